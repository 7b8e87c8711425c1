"""What servers make of pruned checkpoints; each server in a virtual environment of its own."""
