"""The library of llama.cpp: found without an import, and refused where its structs are not those that are declared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from moecover.errors import InputError
from moecover.llama import library
from moecover.llama.layouts import CONTEXT_FIELDS, LAYOUTS, Layout
from tests.support.gguf_models import needs_llama


@needs_llama
def test_the_library_is_found_without_an_import() -> None:
    found = library.find()
    assert found is not None
    assert found.is_file()
    assert library.load().path == found
    assert library.PACKAGE not in sys.modules


@needs_llama
def test_unknown_structs_versions_and_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One field more, an unknown version, another library, no library at all: a line with the remedy each."""
    import _cffi_backend

    remedy = r"Install `moecover\[gguf\]`"
    shifted = [Layout(one.model, (("uint32_t", "n_new", 7), *CONTEXT_FIELDS)) for one in LAYOUTS]
    for name, value, message in (
        ("LAYOUTS", shifted, "with other parameters than known"),
        ("VERSIONS", ("0.1",), r"llama.cpp 0\..*Known: 0.1"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(library, name, value)
            found, link = library.find(), tmp_path / f"lib{name}.so"
            assert found is not None
            link.symlink_to(found)
            with pytest.raises(InputError, match=f"{message}.*{remedy}"):
                library.load(link)
    with pytest.raises(InputError, match=f"not, or of a version before 0.2.*{remedy}"):
        library.load(_cffi_backend.__file__)
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(InputError, match="could not be loaded: .*give another file"):
        library.load(tmp_path / "text.so")


@needs_llama
def test_a_failed_assertion_ends_the_process_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What llama.cpp calls before it aborts; without that it writes a backtrace of a page."""
    found, status = library.load(), list[int]()
    abort = found.callbacks[-1]
    assert found.lib.ggml_set_abort_callback(abort) == abort
    monkeypatch.setattr("os._exit", status.append)
    found.lib.ggml_set_abort_callback(abort)
    abort(found.ffi.new("char[]", b"ggml.c:7: GGML_ASSERT(eps >= 0.0f)\x1b failed\n"))
    assert status == [1]
    assert capsys.readouterr().err == (
        f"moecover: llama.cpp {found.version} gave up: ggml.c:7: GGML_ASSERT(eps >= 0.0f)\\x1b failed. The file may be "
        "damaged, or of a kind that this version does not run\n"
    )


def test_without_the_extra_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"GGUF files run in llama.cpp, and .* Install `moecover\[gguf\]`"):
        library.load()
