"""Networks and samplers in formats that other programs read."""
