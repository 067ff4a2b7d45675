"""Restoration: refits what is left of each layer on the inputs that the pruned layers before it produce.

`refit_layers.py` is the loop over layers, `sublayer.py` runs and refits attention and MLP one after the other,
`output_projection.py` fits o_proj and down_proj by least squares, `experts.py` those of a mixture's experts.
`reconstruction.py` fits a whole layer by gradients, with the tensors that `cut_layer.py` keeps of it. `requirements.py`
says which models can be refitted and what that takes. The arithmetic is in `arithmetic/`.

Imports `engine` and the rooms below it.
"""
