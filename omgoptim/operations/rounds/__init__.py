"""Rounds of pruning or factorization with training after each: what `prune` and `factorize` share."""
