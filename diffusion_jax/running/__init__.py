"""A run on disk and the machines it runs on."""
