"""The likelihood bound, the quality of samples, and the report of a run."""
