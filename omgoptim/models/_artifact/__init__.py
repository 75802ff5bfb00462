"""Parts of an artifact: its recipe, packed weights and removed layers."""
