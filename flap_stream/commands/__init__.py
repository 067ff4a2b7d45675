"""The command line: each verb in its own file, which only declares options and prints results.

Imports every other room, the heavy ones only when a verb runs.
"""
