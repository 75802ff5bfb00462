"""Machinery of the derived students: selection, narrowing, replacement, bridging and the search for a size."""
