"""The result of a proof, as an object, as a dictionary and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moecover.cli.main import main
from moecover.verification.verify import verify


def test_a_verification_is_an_object_and_a_dictionary(
    checkpoints: Callable[..., Path], pruned: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = verify(checkpoints("mixtral"), pruned("mixtral"))
    assert result.equal
    assert result["equal"] is result.equal
    assert dict(result) == result.to_dict()
    with pytest.raises(KeyError):
        result["summary"]
    assert repr(result) == (
        f"<Verification equal on {result.tokens} tokens of {', '.join(result.corpora)}, largest difference 0>"
    )
    assert [row["output"] for row in result.rows_shown()] == ["decoder layer 0", "decoder layer 1", "logits"]
    assert main(["verify", str(checkpoints("mixtral")), str(pruned("mixtral")), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result.to_dict()
