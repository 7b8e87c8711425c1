"""The verb `env`: what a report of a fault needs to say about this machine."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys

from moecover.cli.verb import Outcome
from moecover.errors import InputError

HELP = "print versions, devices and settings, for reports of faults"
SETTINGS = ("HF_", "TRANSFORMERS_", "MOECOVER_", "OMP_", "MKL_", "CUDA_VISIBLE", "TORCH")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def add_options(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def _without_login(value: str) -> str:
    """A setting without all that comes before the last @ of an address: a password may have @ and / in it."""
    return re.sub("//.*@", "//", value, flags=re.DOTALL)


def run(args: argparse.Namespace) -> Outcome:
    """Collect and print."""
    import torch

    from moecover.llama.library import find, load
    from moecover.runtime.devices import available_memory, kinds_here, name_of
    from moecover.text import size_text
    from moecover.version import library_versions

    library = "none"
    if find() is not None:
        try:
            library = load().version
        except InputError as error:
            library = str(error)
    devices = {kind: name_of(torch.device(kind)) for kind in kinds_here()}
    settings = {
        name: "(set)" if any(word in name for word in SECRET) else _without_login(value)
        for name, value in sorted(os.environ.items())
        if name.startswith(SETTINGS)
    }
    found: dict[str, str] = {
        **{name: str(version) for name, version in library_versions().items()},
        "system": platform.platform(),
        "processors": str(os.cpu_count()),
        "threads of torch": str(torch.get_num_threads()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory free": size_text(available_memory("cpu")),
        **{f"device {kind}": f"{name}, {size_text(available_memory(kind))} free" for kind, name in devices.items()},
        "llama.cpp": library,
        "interpreter": sys.executable,
        **settings,
    }
    width = max(map(len, found))
    return Outcome(found, "\n".join(f"{name:<{width}}  {value}" for name, value in found.items()))
