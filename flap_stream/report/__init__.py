"""Reports: read a run directory or a pruned checkpoint, draw its figures, and lay them out on one HTML page.

Imports `stages` and below.
"""
