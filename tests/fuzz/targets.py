"""What is damaged, and which commands read it: a row a kind of file."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.fuzz.damage import HOSTILE, damaged, files, json_text, yaml_text
from tests.fuzz.rule import Command

Commands = Sequence[Command]


@dataclass(frozen=True)
class Target:
    """A file of the base folder, how it is damaged, and the commands that read it.

    Attributes:
        pattern: its path in the base folder, as a pattern.
        damage: from its content to the strategy of what takes its place.
        commands: from a copy of the base folder to the commands; all are run.
    """

    pattern: str
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    commands: Callable[[Path], Commands]

    def file(self, base: Path) -> Path:
        """The file in a base folder."""
        (found,) = base.glob(self.pattern)
        return found


def _inspect(at: Path) -> Command:
    return Command(["inspect", at / "model"])


def _prune(at: Path, *more: object) -> Command:
    return Command(["prune", at / "model", "--plan", at / "plan.json", "-o", at / "out", *more], at / "out")


def _profile(at: Path) -> Command:
    text = ("--sequences", 4, "--length", 16)
    return Command(["profile", at / "model", "--corpus", f"a={at / 'a.jsonl'}", *text, "-o", at / "new"], at / "new")


def _plan(at: Path) -> Command:
    return Command(["plan", at / "profile", "--keep", 4, "-o", at / "new.json"], at / "new.json")


def _list(at: Path) -> Command:
    model = ["--model", at / "model"]
    return Command(["plan", "--from", at / "list.json", *model, "-o", at / "new.json"], at / "new.json")


def _merge(at: Path) -> Command:
    return Command(["merge", at / "profile", at / "other", "-o", at / "sum"], at / "sum")


def _explain(at: Path) -> Command:
    return Command(["explain", at / "plan.json"])


def _verify(at: Path) -> Command:
    return Command(["verify", at / "model", at / "cut"])


def _report(at: Path) -> Command:
    return Command(["report", at / "run", "-o", at / "page.html"], at / "page.html")


def _compare(at: Path) -> Command:
    return Command(["compare", at / "grid.yaml", "-o", at / "grid"])


def _ls(at: Path) -> Command:
    return Command(["ls", "methods", "--plugin", at / "plugin.py"])


def _gguf(at: Path) -> Commands:
    out, plan = at / "out.gguf", at / "gguf-plan.json"
    prune = Command(["prune", at / "m.gguf", "--plan", plan, "-o", out], out)
    return [Command(["inspect", at / "m.gguf"]), prune, Command(["verify", at / "m.gguf", at / "cut.gguf"])]


def json_value(content: bytes) -> st.SearchStrategy[bytes]:
    return files(json.loads(content))


def unsealed_json(content: bytes) -> st.SearchStrategy[bytes]:
    """Changes of a document without its seal, which the program would find first."""
    return files({key: value for key, value in json.loads(content).items() if key != "sha256"})


def shard(content: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with a changed header, or damaged bytes of the header."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]

    def whole(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    texts = json_text(json.loads(header)).map(lambda text: whole(text.encode("utf-8", "surrogatepass")))
    lengths = st.sampled_from([0, 1, 7, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1])
    return st.one_of(
        texts,
        damaged(content[: 8 + length]).map(lambda text: text + data),
        lengths.map(lambda n: struct.pack("<Q", n) + content[8:]),
    )


def gguf_head(content: bytes) -> st.SearchStrategy[bytes]:
    """A GGUF file with damaged bytes of the header, or a number of 8 bytes in it that is wrong."""
    size = 4000  # bytes that hold most of the header of the base folder's file
    numbers = st.sampled_from([0, 1, 2**31, 2**40, 2**63, 2**64 - 1]).map(lambda n: struct.pack("<Q", n))
    lies = st.tuples(st.integers(8, size), numbers).map(lambda lie: content[: lie[0]] + lie[1] + content[lie[0] + 8 :])
    return st.one_of(lies, damaged(content[:size]).map(lambda head: head + content[size:]))


PLUGIN = (
    "import sys; sys.exit(0)",
    "raise SystemExit(3)",
    "print('hello')",
    "x = 1 /",
    "\x00",
    "raise Exception('a\\nb\\x1b[31m' * 1000)",
    "def f(): f()\nf()",
    "from moecover.planning.saliency import SALIENCIES\n@SALIENCIES('s', paper='p')\ndef s(x): return 'text'\n",
    "from moecover.planning.method import METHODS\n@METHODS('m', paper='p')\ndef m(**k): return None\n",
    "from moecover.planning.method import METHODS\n@METHODS('\\x1b[1m\\n', paper='p\\n')\ndef m(): 'x\\x07'\n",
    "from moecover.corpora.sources import CORPORA\nCORPORA.add('pooled', None)\n",
    "from moecover.corpora.sources import CORPORA\nCORPORA.add('a', 5)\n",
    "import nowhere",
    "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
)
CARD = st.builds(
    lambda key, value, end: f"---\n{key}: {value}\n{end}# Card\n".encode("utf-8", "surrogatepass"),
    st.sampled_from(("license", "license_name", "tags", "language", "library_name", "base_model", "x")),
    st.one_of(st.text(max_size=60), st.sampled_from([str(v)[:2000] for v in HOSTILE])),
    st.sampled_from(("---\n", "", "--- \n", "...\n")),
)

TARGETS: dict[str, Target] = {
    "header": Target("model/model-00001-of-*.safetensors", shard, lambda at: [_inspect(at), _prune(at)]),
    "index": Target("model/model.safetensors.index.json", json_value, lambda at: [_inspect(at), _prune(at)]),
    "config": Target("model/config.json", json_value, lambda at: [_inspect(at), _prune(at), _profile(at)]),
    "tokenizer": Target("model/tokenizer.json", json_value, lambda at: [_profile(at)]),
    "tokenizer_config": Target("model/tokenizer_config.json", json_value, lambda at: [_profile(at)]),
    "generation_config": Target("model/generation_config.json", json_value, lambda at: [_prune(at), _profile(at)]),
    "card": Target("model/README.md", lambda _: CARD, lambda at: [_prune(at)]),
    "plan": Target("plan.json", unsealed_json, lambda at: [_explain(at), _prune(at)]),
    "list": Target("list.json", json_value, lambda at: [_list(at)]),
    "profile": Target("profile/profile.safetensors", shard, lambda at: [_plan(at), _merge(at)]),
    "manifest": Target("cut/moecover.json", json_value, lambda at: [_verify(at)]),
    "evaluation": Target(
        "evaluation/evaluation.json", json_value, lambda at: [_prune(at, "--evaluation", at / "evaluation")]
    ),
    "gguf": Target("m.gguf", gguf_head, _gguf),
    "pruned gguf": Target("cut.gguf", gguf_head, lambda at: _gguf(at)[2:]),
    "results": Target("run/results.json", unsealed_json, lambda at: [_report(at)]),
    "usage": Target("run/usage.json", json_value, lambda at: [_report(at)]),
    "jsonl": Target("a.jsonl", damaged, lambda at: [_profile(at)]),
    "grid": Target("grid.yaml", lambda content: yaml_text(content.decode()), lambda at: [_compare(at)]),
    "plugin": Target("plugin.py", lambda _: st.sampled_from(PLUGIN).map(str.encode), lambda at: [_ls(at)]),
}


def tried(target: Target, base: Path, at: Path, content: bytes) -> Commands:
    """The commands of a target on a fresh copy of the base folder with the damaged file in it."""
    shutil.rmtree(at, ignore_errors=True)
    shutil.copytree(base, at)
    target.file(at).write_bytes(content)
    return target.commands(at)
