"""Candidates of a quantize run: built, screened, repaired by mixed precision, measured and chosen."""
