"""A grid of evaluations, and paired tests."""
