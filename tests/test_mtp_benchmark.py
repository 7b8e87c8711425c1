"""The benchmark of multi-token-prediction layers: what it does before it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import mtp_drafts


def test_text_is_asked_for_and_a_half_made_model_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an interrupted run."""
    monkeypatch.setattr("sys.argv", ["mtp_drafts", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        mtp_drafts.main()
    assert "does not exist: give --text FILE ..." in capsys.readouterr().err
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "half").touch()
    measured: list[Path] = []
    monkeypatch.setattr("sys.argv", ["mtp_drafts", str(tmp_path), "--text", "a.txt"])
    monkeypatch.setattr(mtp_drafts, "trained", lambda folder, files, minutes: None)
    monkeypatch.setattr(mtp_drafts, "measured", lambda folder, scratch: measured.append(folder))
    mtp_drafts.main()
    assert measured == [tmp_path / "model"]
    assert (tmp_path / "model" / "config.json").is_file()
    assert not (tmp_path / "model" / "half").exists()
