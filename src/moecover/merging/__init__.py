"""Experts that a plan drops, averaged into the ones that stay."""
