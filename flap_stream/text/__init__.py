"""Text to token windows: reading files, tokenising in bounded memory, drawing calibration and evaluation windows.

Imports `model` and below.
"""
