"""Images from a user's files or a public data set, decoded once, in an order that depends on the seed alone."""
