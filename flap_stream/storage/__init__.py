"""What survives a kill: durable file operations, the journal, and the run directory built on them.

Knows statistics and plans, not models. Imports `arithmetic` and below.
"""
