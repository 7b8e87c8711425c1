"""Proof against the masked original."""
