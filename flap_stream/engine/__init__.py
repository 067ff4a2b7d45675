"""Streaming decoder layers: one pass over all of them, with weights, hidden states, snapshots, placement and ranks.

Imports `model`, `storage` and below; it does not know what a stage does with a layer.
"""
