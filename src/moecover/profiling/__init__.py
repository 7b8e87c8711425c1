"""One forward pass to additive statistics of every expert."""
