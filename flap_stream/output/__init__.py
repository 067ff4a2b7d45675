"""Writing the pruned checkpoint: the shard plan, its bytes, config.json, pruning.json and the model card.

Imports `model`, `storage` and below; it runs no layer.
"""
