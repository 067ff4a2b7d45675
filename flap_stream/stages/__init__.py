"""One file a stage, each a function from stored values to the next one; `prune` is their order alone.

Imports `restore` and below.
"""
