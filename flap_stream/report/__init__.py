"""Figures of a run or of a pruned checkpoint: what is drawn, how, and the page around it."""
