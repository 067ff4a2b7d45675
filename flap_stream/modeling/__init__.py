"""Modelling code that is copied into every pruned checkpoint."""
