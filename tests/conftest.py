"""Fixtures and builders that many tests share: tiny checkpoints, structures, profiles, pruned checkpoints, corpora.

Nothing reaches the hub: ``HF_HUB_OFFLINE`` is set before the first import.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("COLUMNS", None)  # what is printed does not depend on the terminal that the tests were started from
os.unsetenv("COLUMNS")  # readline, which pytest imports, sets it for processes that are started, not in `os.environ`
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as many processes as cores: more threads would wait for each other
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # as the command does: equal bits wherever a matrix lies in memory
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import copy
import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import moecover.checkpoints.structure
from moecover import progress
from moecover.checkpoints.derivation import derive
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import ExpertLayout
from moecover.corpora.packing import Corpus, make_corpus
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.run import plan
from moecover.profiling.artifact import Profile
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from tests.support.tiny import FAMILIES, make_checkpoint

# In the background a test run inherits an ignored SIGINT, and so would the processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the development corpora (../shared/data) are not on this machine"
)


def quick_dtype() -> str:
    """The dtype in which the shipped models run quickly here: some processors lack instructions for their bfloat16."""
    return "auto" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"


@pytest.fixture(scope="session", autouse=True)
def remembered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A structure cache of this test run, also for the processes that it starts: never the user's own."""
    folder = tmp_path_factory.mktemp("remembered")
    os.environ["MOECOVER_CACHE"] = str(folder)
    return folder


_LAYOUTS: dict[str, ExpertLayout] = {}


@pytest.fixture(autouse=True)
def layouts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of a checkpoint is derived once in a test run, but where its derivation is tested.

    Two model classes are built for it, which takes longer than most tests. What it depends on is what the structure
    cache goes by, which is off in a process that has loaded transformers.
    """
    if "checkpoints" in request.path.parts[-2:]:
        return

    def derived(checkpoint: Checkpoint) -> ExpertLayout:
        tensors = sorted((e.name, e.dtype, e.shape) for e in checkpoint.tensors.values())
        key = json.dumps([checkpoint.config, checkpoint.declared_quantisation, tensors])
        if key not in _LAYOUTS:
            _LAYOUTS[key] = derive(checkpoint)
        return _LAYOUTS[key]

    monkeypatch.setattr(moecover.checkpoints.structure, "derive", derived)


@pytest.fixture(autouse=True)
def not_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run says does not depend on the ``--quiet`` of a command that ran before it in this process."""
    monkeypatch.setattr(progress, "quiet", False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in processes that have one: on some processors float32 products depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a tiny checkpoint by family and options, made once per session; tests must not write into it."""
    made: dict[str, Path] = {}

    def get(family: str, **options: object) -> Path:
        key = family + "".join(f"-{k}{v}" for k, v in sorted(options.items())).replace(" ", "").replace("/", "")
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp("tiny") / key, family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def converted(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """GGUF file of a tiny checkpoint by family, and its checkpoint's folder beside it as ``checkpoint``."""
    from tests.support.gguf_models import OPTIONS, convert

    made: dict[str, Path] = {}

    def get(family: str, experts: str = "F32") -> Path:
        if (key := f"{family}-{experts}") not in made:
            folder = tmp_path_factory.mktemp("converted")
            (folder / "checkpoint").symlink_to(checkpoints(family, **OPTIONS[family]))
            made[key] = convert(folder / "checkpoint", folder / f"{family}.gguf", experts=experts)
        return made[key]

    return get


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """The name of every family of `tests.support.tiny.FAMILIES` in turn."""
    return str(request.param)


@pytest.fixture
def structure(checkpoints: Callable[..., Path], family: str) -> Structure:
    """The structure of every family's tiny checkpoint in turn."""
    return read_structure(checkpoints(family))


def random_corpus(
    name: str = "random", *, sequences: int = 6, length: int = 24, seed: int = 0, vocab: int = 300
) -> Corpus:
    """A corpus of random token ids [sequences, length], all of them valid.

    A seed draws from 40 ids of its own only, so that two seeds use different experts.
    """
    rng = np.random.default_rng(seed)
    favourites = rng.choice(vocab, size=40, replace=False)
    tokens = rng.choice(favourites, size=(sequences, length)).astype(np.int64)
    return make_corpus(name, tokens, np.ones_like(tokens, dtype=bool), {"source": "random"})


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as a JSONL file, and return its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


_PROFILES: dict[str, Profile] = {}


@pytest.fixture
def small_profile(structure: Structure) -> Profile:
    """A profile of every family's tiny checkpoint on the random corpora ``a`` and ``b``, a copy for every test."""
    model = structure.model_fingerprint
    if model not in _PROFILES:
        corpora = [random_corpus("a", seed=1), random_corpus("b", seed=2)]
        _PROFILES[model] = profile(structure, corpora, dtype="float32")
    return copy.deepcopy(_PROFILES[model])


@pytest.fixture(scope="session")
def pruned(checkpoints: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A checkpoint pruned to half of its experts by the default plan, by family and options, made once per session."""
    made: dict[str, Path] = {}

    def get(family: str, **options: object) -> Path:
        key = family + "".join(f"-{k}{v}" for k, v in sorted(options.items()))
        if key not in made:
            structure = read_structure(checkpoints(family, **options))
            profiled = profile(structure, [random_corpus("a", seed=1), random_corpus("b", seed=2)])
            chosen = plan(profiled, keep=max(structure.topology.top_k, structure.topology.num_experts // 2))
            made[key] = prune(structure, chosen, tmp_path_factory.mktemp("pruned") / key)
        return made[key]

    return get


def hand_plan(structure: Structure, kept: list[list[int]]) -> Plan:
    """A plan that keeps these experts, one list per MoE layer."""
    layers = [
        LayerPlan(decoder_layer=d, kept=list(k)) for d, k in zip(structure.topology.decoder_layers, kept, strict=True)
    ]
    return Plan(schema=1, keep=len(kept[0]), layers=layers)
