"""The artefact of stage 2: what a profile holds, how it adds up, and its file, profile.safetensors.

Arrays are numpy's, so that planning on a profile needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError
from moecover.files.atomic import canonical_json, write_bytes
from moecover.profiling.layer_inputs import FILE as INPUTS
from moecover.profiling.layer_inputs import Inputs, open_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCHEMA = 2
PARTS = 8  # of a corpus, whose running sums are kept
FILE = "profile.safetensors"
COUNTS = ("count", "num_tokens")
SUMS = (
    "weight_sum", "norm_sum", "weighted_norm_sum", "weighted_sq_sum", "renorm_weighted_norm_sum", "prob_sum",
)  # fmt: skip
MAXIMA = ("max_abs",)
STATISTICS = (*COUNTS, *SUMS, *MAXIMA)

Statistics = dict[str, "NDArray[Any]"]


def added(one: Statistics, two: Statistics) -> Statistics:
    """The statistics of both token sets; shapes broadcast."""
    return {n: np.maximum(one[n], two[n]) if n in MAXIMA else one[n] + two[n] for n in STATISTICS}


@dataclass(frozen=True)
class Profile:
    """Statistics of every routed expert on every corpus.

    With T_e the tokens that the model's router sent to expert e, g_e(x) the routing weight that it used, f_e(x) the
    expert's output before weighting and p_e(x) the router's probability, each over one corpus:

    ================================ ====================================================== =======
    ``count``                        tokens in T_e                                          int64
    ``num_tokens``                   tokens of the corpus that reached the layer            int64
    ``weight_sum``                   sum of g_e(x)                                          float64
    ``norm_sum``                     sum of ||f_e(x)||_2                                    float64
    ``weighted_norm_sum``            sum of g_e(x) ||f_e(x)||                               float64
    ``weighted_sq_sum``              sum of g_e(x)^2 ||f_e(x)||^2                           float64
    ``renorm_weighted_norm_sum``     sum of g_e(x) / (sum of the token's weights) ||f_e(x)|| float64
    ``prob_sum``                     sum of p_e(x) over all tokens                          float64
    ``max_abs``                      largest component of |f_e(x)|                          float64
    ================================ ====================================================== =======

    Where the model scales an expert's input by the weight instead of its output (llama4), f_e(x) is what the expert gives
    for the scaled input, and 1 stands for g_e(x) in all but ``weight_sum``: g_e(x) f_e(x) is always what is added.

    Attributes:
        topology: shape of the routed part of the model.
        statistics: ``statistics[corpus][name]``, each of shape ``[layer, expert]``; padding is in none of them.
        corpora: origin and hash of every corpus, a list of records for a profile that was added up.
        model: name, revision and fingerprint of the model.
        settings: how the pass was run, and the versions that ran it.
        parts: ``parts[corpus][name]`` of shape ``[part, layer, expert]``: the statistics as they stood after each
            eighth of the corpus but the last (fewer when it has fewer batches), for `stages`.
        inputs: a sample of what enters the experts, where the profile keeps one.
    """

    topology: Topology
    statistics: dict[str, Statistics]
    corpora: dict[str, list[dict[str, Any]]]
    model: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, Statistics] = field(default_factory=dict)
    inputs: Inputs | None = None

    def __add__(self, other: Profile) -> Profile:
        """The profile of both token sets: sums add, maxima take the larger, a corpus of one side stays as it is.

        Raises:
            InputError: the profiles are of different models.
        """
        if not isinstance(other, Profile):
            return NotImplemented
        if self.topology != other.topology or self.model["fingerprint"] != other.model["fingerprint"]:
            raise InputError(f"profiles of different models do not add up: {self.model['name']} ({self.model['fingerprint'][:12]}) and {other.model['name']} ({other.model['fingerprint'][:12]})")  # fmt: skip
        statistics = {**self.statistics, **other.statistics}
        corpora = {**self.corpora, **other.corpora}
        parts = {**self.parts, **other.parts}
        for corpus in self.statistics.keys() & other.statistics.keys():
            mine, theirs = self.statistics[corpus], other.statistics[corpus]
            statistics[corpus] = added(mine, theirs)
            corpora[corpus] = self.corpora[corpus] + other.corpora[corpus]
            if corpus in self.parts and corpus in other.parts:
                running = [self.parts[corpus], {n: v[None] for n, v in mine.items()}, added(mine, other.parts[corpus])]
                joined = {name: np.concatenate([part[name] for part in running]) for name in STATISTICS}
                step = -(-len(joined["count"]) // (2 * PARTS - 1))
                parts[corpus] = {name: values[step - 1 :: step] for name, values in joined.items()}
        return Profile(self.topology, statistics, corpora, self.model, self.settings, parts)

    def stages(self) -> list[Profile]:
        """The profile as it would have been after less text, from the shortest to the whole.

        Every corpus contributes the part whose share of its tokens is nearest; one stage alone where no parts were kept.
        """
        whole = {c: {n: v[None] for n, v in s.items()} for c, s in self.statistics.items()}
        running = {
            c: {n: np.concatenate([self.parts[c][n], v]) for n, v in s.items()} if c in self.parts else s
            for c, s in whole.items()
        }
        shares = {c: s["num_tokens"][:, 0, 0] / s["num_tokens"][-1, 0, 0] for c, s in running.items()}
        stages = min(len(s) for s in shares.values())
        found = []
        for stage in range(1, stages + 1):
            at = {c: int(np.abs(share - stage / stages).argmin()) for c, share in shares.items()}
            statistics = {c: {n: v[at[c]] for n, v in s.items()} for c, s in running.items()}
            found.append(Profile(self.topology, statistics, self.corpora, self.model, self.settings))
        return found

    def pooled(self) -> Statistics:
        """The statistics of all corpora taken as one, each ``[layer, expert]``."""
        corpora = list(self.statistics.values())
        return {
            name: np.max([c[name] for c in corpora], axis=0) if name in MAXIMA else np.sum([c[name] for c in corpora], axis=0)
            for name in STATISTICS
        }  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Hash of model, corpora in their order, and statistics; versions and the machine do not enter."""
        digest = hashlib.sha256(canonical_json([self.model["fingerprint"], list(self.corpora.items())]).encode())
        for corpus, statistics in self.statistics.items():
            for name in STATISTICS:
                digest.update(f"{corpus}/{name}".encode() + statistics[name].tobytes())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write ``profile.safetensors`` into a folder; the file appears only when complete.

        Tensors are named ``{corpus}/{statistic}``; the metadata entry ``moecover`` holds everything else as JSON.
        """
        from safetensors.numpy import save

        about = {
            "schema": SCHEMA,
            "topology": self.topology.to_json(),
            "model": self.model,
            "corpora": self.corpora,
            "settings": self.settings,
        }
        tensors = {f"{corpus}/{name}": values for corpus, s in self.statistics.items() for name, values in s.items()}
        tensors |= {f"{corpus}/{name}/parts": v for corpus, s in self.parts.items() for name, v in s.items()}
        path = Path(folder) / FILE
        if self.inputs is None or self.inputs.path != path.with_name(INPUTS):
            path.with_name(INPUTS).unlink(missing_ok=True)  # of an earlier profile
        write_bytes(path, save(tensors, metadata={"moecover": json.dumps(about)}))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Profile:
        """Read ``profile.safetensors`` from a folder.

        Raises:
            InputError: no profile there, another schema, or statistics that no pass can give.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{folder} holds no {FILE}. Make one with `moecover profile`")
        try:
            with safe_open(path, framework="np") as file:
                about = json.loads((file.metadata() or {}).get("moecover", "null"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, ValueError) as error:
            raise InputError(f"{path} is damaged: {error}. Make it anew with `moecover profile`") from error
        if not isinstance(about, dict) or about.get("schema") != SCHEMA:
            found = about.get("schema") if isinstance(about, dict) else None
            raise InputError(f"{path} has schema {found}, this version reads {SCHEMA}. Make it anew with `moecover profile`")  # fmt: skip
        try:
            topology = Topology.from_json(about["topology"])
            statistics: dict[str, Statistics] = {corpus: {} for corpus in about["corpora"]}
            about["model"]["fingerprint"], about["model"]["name"], about["settings"]
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{path} is damaged: its metadata lacks {error}. Make it anew with `moecover profile`"
            ) from error
        shape = (len(topology.decoder_layers), topology.num_experts)

        def checked(key: str, name: str) -> NDArray[Any]:
            tensor: NDArray[Any] | None = tensors.get(key)
            if tensor is None or tensor.shape[-2:] != shape or tensor.ndim != (3 if key.endswith("/parts") else 2):
                got = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise InputError(f"{path}: {key} is {got}, {list(shape)} is needed")
            if not np.isfinite(tensor).all() or (name in COUNTS and (tensor < 0).any()):
                raise InputError(
                    f"{path}: {key} holds negative or non-finite values. Make it anew with `moecover profile`"
                )
            return tensor

        parts: dict[str, Statistics] = {}
        for corpus, values in statistics.items():
            for name in STATISTICS:
                values[name] = checked(f"{corpus}/{name}", name)
            if f"{corpus}/count/parts" in tensors:
                parts[corpus] = {name: checked(f"{corpus}/{name}/parts", name) for name in STATISTICS}
        inputs = open_inputs(path.parent)
        if inputs is not None:
            known = {(c, record.get("sha256")) for c, records in about["corpora"].items() for record in records}
            if inputs.model_fingerprint != about["model"]["fingerprint"] or not set(inputs.hashes.items()) <= known:
                raise InputError(
                    f"{inputs.path} does not belong to {path.name}. Make the profile anew with --keep-inputs"
                )
        return cls(topology, statistics, about["corpora"], about["model"], about["settings"], parts, inputs)


def merged(profiles: Sequence[Profile], names: Sequence[str]) -> Profile:
    """The profile of all token sets together.

    Args:
        profiles: of one model.
        names: what the user calls them.

    Raises:
        InputError: different models, or the same sample of a corpus in two of them.
    """
    seen: dict[tuple[str, str], str] = {}
    for profile, name in zip(profiles, names, strict=True):
        for corpus, records in profile.corpora.items():
            for record in records:
                if (other := seen.get((corpus, record["sha256"]))) is not None:
                    raise InputError(f"{name} and {other} hold the same sample of corpus {corpus}: it would count twice. Use other blocks (--seed, --sequences) or leave one out")  # fmt: skip
                seen[corpus, record["sha256"]] = name
    total = profiles[0]
    for profile in profiles[1:]:
        total = total + profile
    return total
