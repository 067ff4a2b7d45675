"""Pure functions on arrays and tensors: moments, scores, allocation, least squares, slicing.

Numbers in, numbers out: no files and no models. Imports only `config` and `errors`.
"""
