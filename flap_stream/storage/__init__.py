"""What survives a kill: durable file operations, the journal, and the run directory built on them.

A store is the part of a run directory that holds one kind of result: tokens, statistics, plan, refits, sweeps,
snapshots, loss scores. Knows statistics and plans, not models. Imports `arithmetic` and below.
"""
