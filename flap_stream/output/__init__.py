"""The pruned checkpoint: a shard plan (a value), its bytes, config.json, pruning.json and the model card.

Imports `engine` and below.
"""
