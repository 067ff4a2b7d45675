"""What compensates for removed units beyond a bias: refits of what remains, layer by layer.

Imports `output` and below.
"""
