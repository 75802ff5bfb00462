"""Safe reading of `.pt2` programs."""
