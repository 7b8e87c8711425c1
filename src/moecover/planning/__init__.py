"""Statistics to the experts that stay."""
