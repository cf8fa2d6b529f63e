"""A run before it starts: its memory, FLOPs and time, also on absent chips, and its departures from the paper."""
