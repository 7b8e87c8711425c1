"""Malformed inputs: what the command does with files that are damaged, hostile or merely odd."""
