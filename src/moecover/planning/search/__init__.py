"""Search for the subset of experts with the smallest reconstruction loss."""
