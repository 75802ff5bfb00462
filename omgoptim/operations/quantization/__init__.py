"""The parts of `quantize`: candidates, screening, the final race, mixed precision, coverage."""
