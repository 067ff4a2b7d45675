"""The stages, each a function from stored values to the next and named as its verb, and what they share.

`prune.py` is only their order.

Imports `restore` and below.
"""
