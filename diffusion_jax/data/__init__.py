"""Images from wherever a user keeps them, decoded once, in an order that is a function of the seed."""
