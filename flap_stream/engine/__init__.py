"""The stream of decoder layers: one pass over all of them, with weights, hidden states, snapshots, placement and ranks.

Imports `model`, `storage` and below; knows nothing of what a stage does with a layer.
"""
