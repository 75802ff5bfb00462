"""Matching of checkpoints with state dicts."""
