"""Perplexity, closeness to the full model, tasks, and budgets found by them."""
