"""Least-squares fits of a changed layer to the original's outputs."""
