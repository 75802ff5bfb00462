"""The parts of `search`: space, costs of a network, trials, final measurement, report."""
