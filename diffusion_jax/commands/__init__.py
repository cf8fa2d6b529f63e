"""The command line: its modes and its flags."""
