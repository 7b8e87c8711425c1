"""Text to blocks of token ids."""
