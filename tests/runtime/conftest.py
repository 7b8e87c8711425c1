"""A small checkpoint for the tests of this folder."""

from __future__ import annotations

import pytest

from moecover.checkpoints.structure import Structure, read_structure
from tests.support import zoo


@pytest.fixture(scope="package")
def structure(tmp_path_factory: pytest.TempPathFactory) -> Structure:
    folder = tmp_path_factory.mktemp("streamed") / "m"
    zoo.make_model("qwen2_moe").save_pretrained(folder, save_original_format=True)
    return read_structure(folder)
