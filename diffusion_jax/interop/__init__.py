"""Networks and samplers in formats that other programs read."""

MAX_IMAGES = 2**32 - 2  # of one key: fold_in(key, 2**32 - 2) and fold_in(key, 2**32 - 1) are keys of training
