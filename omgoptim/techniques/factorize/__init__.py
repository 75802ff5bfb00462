"""Low-rank factorizations of weights."""
