"""Measure an artifact beside its peers: all engines in one run, on the same inputs, each with its error."""
