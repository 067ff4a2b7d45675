"""One file per stage, each a function from stored values to the next; `prune.py` is only their order.

Imports `restore` and below.
"""
