"""Tools of a llama.cpp checkout that no package brings, for slow tests: its converter and its programs.

``LLAMA_CPP=DIR`` in the environment names the checkout (a source distribution of llama-cpp-python holds one as
``vendor/llama.cpp``). Programs are looked for where its own instructions build them: ``cmake -B build && cmake --build
build --target llama-imatrix``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("LLAMA_CPP", ""))
CONVERTER = ROOT / "convert_hf_to_gguf.py"
# The converter knows tokenizers by what they make of one text, and those of tiny checkpoints it does not know.
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
del sys.argv[:1]
sys.argv[0] += "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
HOW = "set LLAMA_CPP to a checkout of llama.cpp"
needs_converter = pytest.mark.skipif(
    not os.environ.get("LLAMA_CPP") or not CONVERTER.is_file() or importlib.util.find_spec("sentencepiece") is None,
    reason=f"no {CONVERTER.name}, or not the package sentencepiece that it imports: {HOW}",
)


def program(name: str) -> Path:
    """Where a program of the checkout is built."""
    return ROOT / "build" / "bin" / name


def needs_program(name: str) -> pytest.MarkDecorator:
    """Skips where a program is not built."""
    return pytest.mark.skipif(
        not os.environ.get("LLAMA_CPP") or not program(name).is_file(), reason=f"no {name}: {HOW} with build/bin/{name}"
    )


def ran(command: Sequence[object]) -> None:
    """Run a tool, which must end well."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def convert_by_llama_cpp(folder: Path, output: Path, kind: str = "f32") -> Path:
    """A checkpoint as a GGUF file, by llama.cpp's own converter; returns the file."""
    ran([sys.executable, "-c", CONVERT, ROOT, folder, "--outtype", kind, "--outfile", output])
    return output
