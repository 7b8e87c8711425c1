"""The shared library of llama.cpp: finds it, checks that its structs are laid out as declared, and loads it."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moecover.errors import InputError, arg, printable
from moecover.llama.layouts import DECLARATIONS, LAYOUTS, OBJECT_BYTES, TENSOR_BYTES, VERSIONS, Layout

PACKAGE = "xllamacpp"  # brings the C API in its extension module
EXTENSIONS = (".so", ".dylib", ".pyd")
REMEDY = "Install `moecover[gguf]`"
ERROR = 4  # of `enum ggml_log_level`
KEPT_LINES = 20
ABORTED = 1  # exit status where llama.cpp ends the process
SHOW_CURSOR = "\n\x1b[?25h"  # which a spinner hides
FUNCTIONS = re.compile(r"^[a-z].*?(\w+)\(", re.MULTILINE)


@dataclass(frozen=True)
class Library:
    """The loaded library.

    Attributes:
        ffi: cffi's view of its types.
        lib: its functions.
        path: the file.
        version: as it says itself.
        errors: its last lines of log with errors.
        callbacks: what it calls, which must outlive it.
    """

    ffi: Any
    lib: Any
    path: Path
    version: str
    errors: deque[str]
    callbacks: tuple[object, ...]

    def reason(self, default: str) -> str:
        """The first error that it logged since `forget`, on one line."""
        return self.errors[0] if self.errors else default

    def forget(self) -> None:
        """Drop the errors that were logged."""
        self.errors.clear()


def find() -> Path | None:
    """The library that the optional dependency brings, without importing it; None where it is not installed."""
    try:
        spec = importlib.util.find_spec(PACKAGE)
    except (ImportError, ValueError):
        return None
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob(f"{PACKAGE}*")):
            if file.suffix in EXTENSIONS:
                return file
    return None


def missing() -> str:
    """Why no model can run here, in a sentence; empty where one can."""
    if importlib.util.find_spec("cffi") is None:
        return f"the package cffi is not installed. {REMEDY}"
    if find() is None:
        return f"llama.cpp is not installed. {REMEDY}, or give {arg('libllama', 'PATH')}"
    return ""


def load(path: str | Path | None = None) -> Library:
    """Load llama.cpp.

    Args:
        path: the shared library (libllama.so of a build or release); None for the optional dependency's.

    Raises:
        InputError: there is none, it cannot be loaded, or it is of a version whose structs are not known.
    """
    if path is None:
        if why := missing():
            raise InputError(f"GGUF files run in llama.cpp, and {why}")
        found = find()
        assert found is not None
    else:
        if importlib.util.find_spec("cffi") is None:
            raise InputError(f"GGUF files run in llama.cpp, and {missing()}")
        found = Path(path)
        if not found.is_file():
            raise InputError(f"{arg('libllama', path)}: no such file. Give the shared library of llama.cpp")
    return _loaded(found.absolute())


@functools.cache  # for the whole process: the library may log until the end
def _loaded(path: Path) -> Library:
    import cffi

    for layout in LAYOUTS:
        ffi: Any = cffi.FFI()
        ffi.cdef(layout.declarations)
        try:
            lib: Any = ffi.dlopen(str(path))
            version = ffi.string(lib.llama_version()).decode(errors="replace")
        except OSError as error:
            raise InputError(f"{path} could not be loaded: {error}. {REMEDY}, or give another file") from error
        except AttributeError as error:
            raise _unknown(path, "not, or of a version before 0.2") from error
        if ".".join(version.split(".")[:2]) not in VERSIONS:
            raise _unknown(path, version)
        if not any(_strange(ffi, lib, layout)):
            return _started(ffi, lib, path, version)
    raise _unknown(path, f"{version} with other parameters than known")


def _unknown(path: Path, version: str) -> InputError:
    known = f"{VERSIONS[0]} to {VERSIONS[-1]}"
    return InputError(f"the library {path} is llama.cpp {version}. Known: {known}, whose structs are checked. {REMEDY}")


def _strange(ffi: Any, lib: Any, layout: Layout) -> Iterator[str]:
    """Fields whose default is not what it should be; functions that are missing."""
    for name in FUNCTIONS.findall(DECLARATIONS):
        if not hasattr(lib, name):
            yield name
    if lib.ggml_tensor_overhead() != TENSOR_BYTES + OBJECT_BYTES or ffi.sizeof("struct ggml_tensor") != TENSOR_BYTES:
        yield "struct ggml_tensor"
    for params, fields in (
        (lib.llama_model_default_params(), layout.model),
        (lib.llama_context_default_params(), layout.context),
    ):
        yield from (name for _, name, default in fields if not _equals(ffi, getattr(params, name), default))


def _equals(ffi: Any, value: Any, default: int | float | None) -> bool:
    return bool(value == ffi.NULL if default is None else value == default)


def _started(ffi: Any, lib: Any, path: Path, version: str) -> Library:
    errors: deque[str] = deque(maxlen=KEPT_LINES)

    @ffi.callback("void(int, const char *, void *)")  # type: ignore[untyped-decorator]
    def log(level: int, text: Any, _: object) -> None:
        if level == ERROR and (line := ffi.string(text).decode(errors="replace").strip()):
            errors.append(line)

    @ffi.callback("void(const char *)")  # type: ignore[untyped-decorator]
    def abort(text: Any) -> None:
        """A failed assertion: llama.cpp ends the process behind this call, with a backtrace if it is not made."""
        line = " ".join(ffi.string(text).decode(errors="replace").split())
        sys.stderr.write(
            f"{SHOW_CURSOR if sys.stderr.isatty() else ''}moecover: llama.cpp {version} gave up: {printable(line)}. "
            "The file may be damaged, or of a kind that this version does not run\n"
        )
        sys.stderr.flush()
        os._exit(ABORTED)

    lib.llama_log_set(log, ffi.NULL)
    lib.ggml_set_abort_callback(abort)
    lib.llama_backend_init()
    if lib.ggml_backend_reg_count() == 0:
        lib.ggml_backend_load_all_from_path(str(path.parent).encode())
    return Library(ffi, lib, path, version, errors, (log, abort))
