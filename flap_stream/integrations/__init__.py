"""Entry points for other programs: lm-evaluation-harness and vLLM.

Imports `stages` and below.
"""
