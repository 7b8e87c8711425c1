"""Code that comes with a checkpoint: it runs for a model that is trusted, and for no other.

What runs code does so in one process of its own, for what it registers lasts as long as the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from moecover.checkpoints.remote_code import is_trusted, trust_remote_code
from moecover.checkpoints.structure import read_structure
from moecover.errors import InputError
from moecover.runtime.loading import load_model
from tests.conftest import hand_plan
from tests.support.command_line import run

CONFIGURATION = """
from transformers import MixtralConfig
print("a line on stdout")
open(__MARK__, "a").close()
class OwnConfig(MixtralConfig):
    model_type = "own_moe"
"""
MODELING = """
from transformers import MixtralForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast
open(__MARK__ + "-tokenizer", "a").close()
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
COMMANDS = """
import contextlib, io, json, sys
from moecover.cli.main import main
for line in sys.stdin:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(json.loads(line))
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}


@pytest.fixture
def own(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint of a type and with a tokenizer that only its own code knows; where that runs it leaves a file."""
    source, folder = checkpoints("mixtral"), tmp_path / "own"
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    state = {name: value.clone() for name, value in load_model(read_structure(source)).state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_moe", "architectures": ["OwnForCausalLM"], "auto_map": MAP}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    files = {"configuration_own": CONFIGURATION, "modeling_own": MODELING, "tokenization_own": TOKENIZATION}
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text.replace("__MARK__", repr(str(tmp_path / "ran"))))
    return folder


def test_a_trusted_checkpoint_is_pruned_and_proven(own: Path, checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in own.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (broken / "configuration_own.py").write_text("raise ValueError('no such luck')")
    structure = read_structure(checkpoints("mixtral"))
    hand_plan(structure, [[0, 2, 3]] * len(structure.topology.decoder_layers)).save(tmp_path / "plan.json")
    trusted = "--trust-remote-code"
    commands = [
        ["inspect", own],
        ["inspect", broken, trusted],
        ["prune", own, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", trusted, "-q"],
        ["verify", own, tmp_path / "out", trusted, "--json"],
    ]
    lines = "".join(json.dumps([str(word) for word in command]) + "\n" for command in commands)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "MOECOVER_CACHE": "off"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=lines,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (refused, failed, pruned, proven) = map(json.loads, done.stdout.splitlines())
    assert (refused[0], "unless it is trusted: --trust-remote-code" in refused[2]) == (1, True), refused
    assert (failed[0], "its code raised ValueError: no such luck" in failed[2]) == (2, True), failed
    classes = "configuration_own.OwnConfig, modeling_own.OwnForCausalLM, tokenization_own.OwnTokenizer"
    assert pruned[0] == 0, pruned[2]
    assert f"WARNING: running code that comes with {own}: {classes}\n" in pruned[2]  # in spite of -q
    assert "a line on stdout" not in pruned[1]
    assert f"next: moecover verify {own} {tmp_path / 'out'} --trust-remote-code\n" in pruned[1]
    assert "--trust-remote-code\n" in (tmp_path / "out" / "README.md").read_text()
    assert proven[0] == 0, proven[2]
    assert json.loads(proven[1])["equal"]
    assert (tmp_path / "ran-tokenizer").exists()
    assert (tmp_path / "out" / "modeling_own.py").read_bytes() == (own / "modeling_own.py").read_bytes()


def test_nothing_of_a_folder_runs_without_the_flag(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "inspect", own)
    assert (status, "architecture 'own_moe' is not known" in err) == (1, True)
    assert not (tmp_path / "ran").exists()
    assert not is_trusted(own)


CASES = {
    "no code": ({"auto_map": None}, "auto_map in config.json does not name AutoConfig and one of"),
    "no model": ({"auto_map": {"AutoConfig": "a.B"}}, "auto_map in config.json does not name AutoConfig and one of"),
    "of another repository": (
        {"auto_map": {**MAP, "AutoConfig": "other/repo--configuration_own.OwnConfig"}},
        "no class in a file beside it",
    ),
    "no name": ({"auto_map": {**MAP, "AutoConfig": 5}}, "gives AutoConfig as 5, which is no class"),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_folder_without_usable_code_is_refused(case: str, own: Path, tmp_path: Path) -> None:
    change, said = CASES[case]
    config = json.loads((own / "config.json").read_text()) | change
    (own / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        trust_remote_code(own)
    assert not is_trusted(own)
    assert not (tmp_path / "ran").exists()


def test_the_flag_is_refused_where_it_has_no_use(
    checkpoints: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, "inspect", checkpoints("mixtral"), "--trust-remote-code")
    assert (status, "--trust-remote-code has no use here" in err) == (2, True)
    status, _, err = run(capsys, "inspect", tmp_path / "nowhere" / "at" / "all", "--trust-remote-code")
    assert (status, "--trust-remote-code is for folders and hub models" in err) == (2, True)
