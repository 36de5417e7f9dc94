"""Several processes that answer at one address: the parent's side, a worker's own, what they say to each other."""
