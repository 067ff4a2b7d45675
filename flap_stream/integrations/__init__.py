"""Entry points for other programs, lm-evaluation-harness and vLLM, and out to trackers of experiments.

Imports `stages` and below.
"""
