"""Closed-form refit of the experts that stay."""
