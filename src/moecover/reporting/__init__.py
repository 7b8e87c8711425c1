"""The page of a comparison, and figures."""
