"""Models, inputs and data read in; artifacts written and opened."""
