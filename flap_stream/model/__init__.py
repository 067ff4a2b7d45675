"""What a model is: its files and where they come from, model families as data, and transformers' own layers without
weights.

Imports `modeling`, `storage` and below.
"""
