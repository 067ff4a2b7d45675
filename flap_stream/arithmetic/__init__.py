"""Pure functions on arrays and tensors: moments, scores, allocation, least squares, slicing.

Numbers in, numbers out: no files, no models, no devices. Imports only `config` and `errors`.
"""
