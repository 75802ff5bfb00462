"""What `search` works with: the space, the cost of a network, the trials, the final measurement and the report."""
