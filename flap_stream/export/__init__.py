"""Pruned checkpoints in the forms that other programs read."""
