"""Figures of plans and comparisons."""
