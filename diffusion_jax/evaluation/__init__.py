"""Likelihood bound, sample quality, and the report of a run."""
