"""A run before it starts: memory, FLOPs and time on chips that are not there, and departures from the paper."""
