"""The version of the package, and of the libraries that compute with it."""

from __future__ import annotations

import platform

VERSION = "0.1.0"


def library_versions() -> dict[str, str]:
    """Versions of the packages on which the last digits of every number depend."""
    import torch
    import transformers

    return {
        "moecover": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
