"""Entry points that other programs find: lm-evaluation-harness and vLLM.

Imports `stages` and below.
"""
