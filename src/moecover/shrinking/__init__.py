"""One command: from a model to the best checkpoint of a size that this package knows how to make."""
