"""Writes the pruned checkpoint."""
