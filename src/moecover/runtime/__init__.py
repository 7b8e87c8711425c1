"""A model that runs: in memory, layer by layer, in several processes."""
