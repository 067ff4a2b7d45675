"""Exports: write a checkpoint in the form that another program reads, GGUF or a stock class of transformers.

Imports `output`, `engine` and below.
"""
