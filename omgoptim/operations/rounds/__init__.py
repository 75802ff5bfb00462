"""Rounds of pruning or factorization, each followed by training; shared by `prune` and `factorize`."""
