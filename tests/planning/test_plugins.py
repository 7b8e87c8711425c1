"""A user's own saliencies and methods, by the shipped example and by files that go wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from moecover.errors import InputError
from moecover.planning.methods import METHODS
from moecover.planning.saliency import SALIENCIES
from moecover.planning.selection import ranked
from moecover.planning.super_experts import super_experts
from moecover.profiling.artifact import Profile
from moecover.registry import load_plugin
from tests.support.command_line import run

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugin.py"


@pytest.fixture
def family() -> str:
    return "qwen2_moe"


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a plugin enters is gone after the test."""
    with METHODS.restored(), SALIENCIES.restored():
        yield


@pytest.fixture
def folder(small_profile: Profile, tmp_path: Path) -> Path:
    small_profile.save(tmp_path / "profile")
    return tmp_path / "profile"


def test_the_example_works(small_profile: Profile, folder: Path, tmp_path: Path, capsys) -> None:
    keep = small_profile.topology.num_experts - 1
    out = tmp_path / "plan.json"
    status, _, err = run(capsys, "plan", folder, "--plugin", EXAMPLE, "--saliency", "energy", "--keep", keep, "-o", out)
    assert status == 0, err
    s = small_profile.statistics["a"]
    row = json.loads(out.read_text())["layers"][0]
    assert row["saliency"]["a"] == (s["weighted_sq_sum"] / s["num_tokens"])[0].tolist()


def loudest(folder: Path, profile: Profile, out: Path) -> tuple[object, ...]:
    """The command that plans with the example's method."""
    use = ("--plugin", EXAMPLE, "--method", "loudest")
    return ("plan", folder, *use, "--keep", profile.topology.top_k, "-o", out)


def test_the_examples_method_takes_its_options(small_profile: Profile, folder: Path, tmp_path: Path, capsys) -> None:
    keep, command = small_profile.topology.top_k, loudest(folder, small_profile, out := tmp_path / "plan.json")
    assert run(capsys, *command)[0] == 0
    raw = json.loads(out.read_text())
    assert raw["options"] == {"saliency": "contribution", "floor": 0.0}
    shares = [np.array(raw["layers"][0]["saliency"][c]) for c in ("a", "b")]
    assert raw["layers"][0]["kept"] == sorted(ranked(np.maximum(*shares))[:keep].tolist())


def test_options_by_name(folder: Path, small_profile: Profile, tmp_path: Path, capsys) -> None:
    command = loudest(folder, small_profile, out := tmp_path / "plan.json")
    assert run(capsys, *command, "--option", "floor=9")[0] == 0
    assert json.loads(out.read_text())["options"]["floor"] == 9


def test_a_bad_option_is_named(folder: Path, small_profile: Profile, tmp_path: Path, capsys) -> None:
    command = loudest(folder, small_profile, out := tmp_path / "plan.json")
    for given, message in (
        ("roof=1", "--roof is no option of method loudest. It has: --saliency, --floor"),
        ("roof", "--option roof: give NAME=VALUE"),
    ):
        status, _, err = run(capsys, *command, "--option", given)
        assert (status, message in err, out.exists()) == (2, True, False), err


def test_listing_and_explain_know_plugins(folder: Path, small_profile: Profile, tmp_path: Path) -> None:
    """Each command in a process of its own, as a user runs them."""
    out = tmp_path / "plan.json"
    commands = [
        ["ls", "methods", "--plugin", EXAMPLE],
        [
            "plan",
            folder,
            "--plugin",
            EXAMPLE,
            "--saliency",
            "energy",
            "--keep",
            small_profile.topology.top_k,
            "-o",
            out,
        ],
        ["explain", out, "--profile", folder, "--plugin", EXAMPLE],
    ]
    texts = []
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "moecover", *map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert "loudest" in texts[0]
    assert "Utility is energy" in texts[2]


@pytest.mark.parametrize("kind, name", [("METHODS", "random"), ("SALIENCIES", "reap")])
def test_what_is_built_in_cannot_be_replaced_by_the_first_import(kind: str, name: str, tmp_path: Path) -> None:
    """In a process of its own, where the plugin is the first to import it."""
    path = tmp_path / "mine.py"
    path.write_text(f"from moecover import {kind}\n@{kind}({name!r}, paper='x')\ndef f(*args):\n    'Mine.'\n")
    command = [sys.executable, "-m", "moecover", "ls", kind.lower(), "--plugin", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{name} exists already. Choose another name" in done.stderr


HEAD = "from moecover import METHODS, SALIENCIES\nfrom moecover.planning.artifact import LayerPlan\n"


def method_that_keeps(ids: str) -> str:
    """A plugin's method that keeps the same experts in every layer."""
    layers = f"[LayerPlan(decoder_layer=d, kept={ids}) for d in profile.topology.decoder_layers]"
    return f"@METHODS('mine', paper='x')\ndef f(profile, budget):\n    return {layers}\n"


BROKEN = {
    "raises on import": ("x = 1 / 0\n", "line 3: the file raised ZeroDivisionError: division by zero"),
    "syntax": ("def (:\n", "the file raised SyntaxError"),
    "taken name": (
        "@SALIENCIES('reap', paper='x')\ndef f(s):\n    return s['count']\n",
        "saliency reap exists already",
    ),
    "saliency raises": (
        "@SALIENCIES('mine', paper='x')\ndef f(s):\n    return s['cuont']\n",
        "line 5: saliency mine raised KeyError: 'cuont'",
    ),
    "saliency of another shape": (
        "@SALIENCIES('mine', paper='x')\ndef f(s):\n    return s['count'][0]\n",
        "saliency mine gives shape",
    ),
    "saliency not finite": (
        "@SALIENCIES('mine', paper='x')\ndef f(s):\n    return s['count'] / 0 * 0.0\n",
        "finite numbers are needed",
    ),
    "saliency of text": (
        "@SALIENCIES('mine', paper='x')\ndef f(s):\n    return s['count'].astype(str)\n",
        "numbers of shape",
    ),
    "negative saliency": (
        "@SALIENCIES('mine', paper='x')\ndef f(s):\n    return s['count'] - 1000.0\n",
        "gives negative values",
    ),
    "method raises": (
        "@METHODS('mine', paper='x')\ndef f(profile, budget):\n    raise ValueError('no idea')\n",
        "line 5: method mine raised ValueError: no idea",
    ),
    "method gives nothing": (
        "@METHODS('mine', paper='x')\ndef f(profile, budget):\n    pass\n",
        "method mine gives no list of",
    ),
    "method keeps too few": (
        method_that_keeps("[0]"),
        "method mine keeps experts [0] of decoder layer",
    ),
    "method keeps what is not there": (
        method_that_keeps("[*range(budget.keep - 1), 999]"),
        "999] of decoder layer",
    ),
    "method twice the same": (
        method_that_keeps("[0] * budget.keep"),
        "line 5: method mine raised ValidationError",
    ),
}


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("what", list(BROKEN))
def test_a_plugin_that_goes_wrong_is_one_line_and_nothing_is_written(
    what: str, folder: Path, small_profile: Profile, tmp_path: Path, capsys
) -> None:
    body, message = BROKEN[what]
    plugin, out = tmp_path / "mine.py", tmp_path / "plan.json"
    plugin.write_text(HEAD + body)
    use = ["--method", "mine"] if "method" in what else ["--saliency", "mine"]
    keep = small_profile.topology.num_experts - 1
    status, stdout, err = run(capsys, "plan", folder, "--plugin", plugin, *use, "--keep", keep, "-o", out)
    assert (status, stdout) == (2, ""), err
    assert message in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_a_method_that_drops_super_experts_is_refused(
    folder: Path, small_profile: Profile, tmp_path: Path, capsys
) -> None:
    plugin, keep = tmp_path / "mine.py", small_profile.topology.top_k
    extreme = super_experts(small_profile)
    layer = next(i for i, experts in enumerate(extreme) if experts)
    others = sorted(set(range(small_profile.topology.num_experts)) - extreme[layer])[:keep]
    plugin.write_text(HEAD + method_that_keeps(str(others)))
    command = ("plan", folder, "--plugin", plugin, "--method", "mine", "--keep", keep, "-o", tmp_path / "x.json")
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command, "--protect-super-experts")
    assert (status, "method mine drops super experts of decoder layer" in err) == (2, True)


@pytest.mark.parametrize("name", ["missing.py", "text.txt"])
def test_no_such_plugin(name: str, folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.txt").write_text("")
    status, _, err = run(capsys, "plan", folder, "--plugin", tmp_path / name, "--keep", 8, "-o", tmp_path / "x.json")
    assert (status, "no such Python file" in err) == (2, True)


def test_a_failed_import_does_not_leave_the_registry_guarded(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(InputError):
        load_plugin(tmp_path / "bad.py")
    SALIENCIES("reap", paper="not from a plugin: may replace what is built in")(lambda s: s["count"])
    assert SALIENCIES.papers["reap"].startswith("not from a plugin")


def test_plugins_get_no_shell_of_their_own(monkeypatch, tmp_path: Path, folder: Path, capsys) -> None:
    """Only a file that was named is run: nothing in the working folder is picked up by itself."""
    (tmp_path / "plugin.py").write_text("raise SystemExit('ran')\n")
    (tmp_path / "moecover_plugin.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "ls", "methods")[0] == 0
