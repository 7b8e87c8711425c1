"""The artefact of stage 2: what a profile holds, how profiles add up, and the file, profile.safetensors.

Arrays are numpy arrays, so that planning on a profile needs no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moecover.checkpoints.topology import Topology
from moecover.errors import InputError, arg
from moecover.files.atomic import canonical_json, write_bytes
from moecover.files.tensor_file import read_tensors, tensor_bytes
from moecover.profiling.layer_inputs import FILE as INPUTS
from moecover.profiling.layer_inputs import Inputs, open_inputs
from moecover.profiling.records import ModelRecord, Settings
from moecover.profiling.statistics import MAXIMA, PARTS, STATISTICS, Statistics, added, known
from moecover.profiling.stored import REMAKE, described, named, read_named
from moecover.profiling.wide import CHANNELS, PAIRS, WIDE, joined
from moecover.text import Cell, Shown

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray


SCHEMA = 3
FILE = "profile.safetensors"
MTP = "mtp/"  # in the names of the tensors of multi-token-prediction layers


def _name(profile: Profile) -> str:
    """The model of a profile, in messages."""
    return f"{profile.model['name']} ({profile.model['fingerprint'][:12]})"


@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """Statistics of every routed expert on every corpus.

    With T_e the tokens that the model's router sent to expert e, g_e(x) the routing weight that it used, f_e(x) the
    output of the expert before weighting and p_e(x) the router's probability, each over one corpus:

    ================================ ====================================================== =======
    ``count``                        tokens in T_e                                          int64
    ``num_tokens``                   tokens of the corpus that reached the layer            int64
    ``weight_sum``                   sum of g_e(x)                                          float64
    ``norm_sum``                     sum of ||f_e(x)||_2                                    float64
    ``weighted_norm_sum``            sum of g_e(x) ||f_e(x)||                               float64
    ``weighted_sq_sum``              sum of g_e(x)^2 ||f_e(x)||^2                           float64
    ``renorm_weighted_norm_sum``     sum of g_e(x) / (sum of the token's weights) ||f_e(x)|| float64
    ``norm_sq_sum``                  sum of ||f_e(x)||^2                                    float64
    ``change_norm_sum``              sum of g_e(x) ||f_e(x)|| c(x)                          float64
    ``prob_sum``                     sum of p_e(x) over all tokens                          float64
    ``max_abs``                      largest component of |f_e(x)|                          float64
    ================================ ====================================================== =======

    Where the model scales the input of an expert by the weight instead of its output (llama4), f_e(x) is the output for
    the scaled input, and g_e(x) is 1 in all but ``weight_sum``: g_e(x) f_e(x) is always what the model adds. c(x) is
    how far the routed experts turn a token, see `token_change`.

    Attributes:
        topology: shape of the routed part of the model.
        statistics: ``statistics[corpus][name]``, each of shape ``[layer, expert]``; padding is in none of them.
        corpora: origin and hash of every corpus; several records where profiles were added up.
        model: name, revision and fingerprint of the model.
        settings: how the pass was run, and with which versions.
        parts: ``parts[corpus][name]`` of shape ``[part, layer, expert]``: the running statistics after each eighth of
            the corpus but the last (fewer if it has fewer batches), for `stages`.
        inputs: a sample of the inputs of the experts, where the profile has one.
        channels: ``channels[corpus]``, float64 of shape ``[layer, expert, channel]``: the sum over T_e of
            g_e(x)^2 h_j(x)^2 ||W_down[:, j]||_2^2, with h(x) the input of the expert's down projection W_down. A corpus
            is not in it where an older version made the profile, or the experts are not gated MLPs of one width that
            show their h, see `channels.width_of`.
        pairs: ``pairs[corpus]``, of the experts that tokens are routed to together, see `wide`; a corpus is not in it
            where they were not recorded.
        mtp: the same of the multi-token-prediction layers, as the MoE layers of a model of their own, whose decoder
            indices go on from the last; None where they were not profiled. The k-th does not see the first k tokens of
            a sequence.
    """

    topology: Topology
    statistics: dict[str, Statistics]
    corpora: dict[str, list[dict[str, Any]]]
    model: ModelRecord
    settings: Settings = field(default_factory=Settings)
    parts: dict[str, Statistics] = field(default_factory=dict)
    inputs: Inputs | None = None
    channels: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    pairs: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    mtp: Profile | None = None

    @property
    def wide(self) -> dict[str, dict[str, NDArray[np.float64]]]:
        """The statistics of `WIDE`, by name and corpus."""
        return {CHANNELS: self.channels, PAIRS: self.pairs}

    @property
    def width(self) -> int | None:
        """Number of channels of an expert; None where no corpus has their energy."""
        return next((energy.shape[-1] for energy in self.channels.values()), None)

    def __add__(self, other: Profile) -> Profile:
        """The profile of both token sets: sums add up, the larger maximum is taken, other corpora are kept as they are.

        The statistics of `WIDE` of a corpus, and those of multi-token-prediction layers, are known of the sum where
        both have them.

        Raises:
            InputError: the profiles are of different models, widths or dtypes; of other settings the equal ones stay.
        """
        if not isinstance(other, Profile):
            return NotImplemented
        if self.topology != other.topology or self.model["fingerprint"] != other.model["fingerprint"]:
            raise InputError(f"profiles of different models do not add up: {_name(self)} and {_name(other)}")
        if len({self.width, other.width} - {None}) > 1:
            wide = " and ".join(f"{_name(one)} with {one.width} channels an expert" for one in (self, other))
            raise InputError(f"profiles of different models do not add up: {wide}")
        if len(dtypes := {str(one.settings.get("dtype")) for one in (self, other)}) > 1:
            raise InputError(f"profiles in different dtypes do not add up: {' and '.join(sorted(dtypes))}")
        settings = cast("Settings", {k: v for k, v in self.settings.items() if other.settings.get(k) == v})
        statistics = {**self.statistics, **other.statistics}
        corpora = {**self.corpora, **other.corpora}
        parts, both = {**self.parts, **other.parts}, self.statistics.keys() & other.statistics.keys()
        together = [joined(self.wide[name], other.wide[name], both) for name in WIDE]
        for corpus in both:
            mine, theirs = self.statistics[corpus], other.statistics[corpus]
            statistics[corpus] = added(mine, theirs)
            corpora[corpus] = self.corpora[corpus] + other.corpora[corpus]
            if corpus in self.parts and corpus in other.parts:
                running = [self.parts[corpus], {n: v[None] for n, v in mine.items()}, added(mine, other.parts[corpus])]
                rows = {name: np.concatenate([part[name] for part in running]) for name in STATISTICS}
                step = -(-len(rows["count"]) // (2 * PARTS - 1))
                parts[corpus] = {name: values[step - 1 :: step] for name, values in rows.items()}
        mtp = self.mtp + other.mtp if self.mtp is not None and other.mtp is not None else None
        channels, pairs = together
        return Profile(self.topology, statistics, corpora, self.model, settings, parts, None, channels, pairs, mtp)

    def stages(self) -> list[Profile]:
        """The profiles of growing amounts of text, up to this one, without those of `WIDE`.

        Every corpus contributes the running sums whose share of its tokens is nearest; a single stage where none were
        kept.
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
        """The statistics of all corpora together, each ``[layer, expert]``."""
        stacked = {name: [corpus[name] for corpus in self.statistics.values()] for name in STATISTICS}
        return {n: np.max(values, axis=0) if n in MAXIMA else np.sum(values, axis=0) for n, values in stacked.items()}

    def summary(self) -> str:
        """One line: model, shape and corpora."""
        shape = f"{len(self.topology.decoder_layers)} layers x {self.topology.num_experts} experts"
        corpora = ", ".join(f"{corpus} ({self._num_tokens(corpus):,} tokens)" for corpus in self.statistics)
        return f"{self.model['name']}: {shape}, {corpora}"

    def _num_tokens(self, corpus: str) -> int:
        return int(self.statistics[corpus]["num_tokens"].max(initial=0))

    def rows_shown(self) -> list[dict[str, Cell]]:
        """One row per corpus: its tokens, its samples and the experts that it never selects."""
        return [
            {
                "corpus": corpus,
                "tokens": self._num_tokens(corpus),
                "samples": len(self.corpora.get(corpus, ())),
                "experts never selected": int((statistics["count"] == 0).sum()),
            }
            for corpus, statistics in self.statistics.items()
        ]

    def to_frame(self) -> pandas.DataFrame:
        """All statistics as a pandas data frame, one row per corpus, MoE layer and expert.

        Columns: ``corpus``, ``layer`` (index of the MoE layer), ``decoder_layer``, ``expert``, and the statistics.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        shape = (len(self.topology.decoder_layers), self.topology.num_experts)
        layer, expert = (index.reshape(-1) for index in np.indices(shape))
        where = {"layer": layer, "decoder_layer": np.array(self.topology.decoder_layers)[layer], "expert": expert}
        frames = [
            pandas.DataFrame({"corpus": corpus, **where, **{n: statistics[n].reshape(-1) for n in STATISTICS}})
            for corpus, statistics in self.statistics.items()
        ]
        return pandas.concat(frames, ignore_index=True)

    @property
    def fingerprint(self) -> str:
        """Hash of the model, the corpora in their order, and the statistics, but not of versions and the machine."""
        digest = hashlib.sha256(canonical_json([self.model["fingerprint"], list(self.corpora.items())]).encode())
        for corpus, statistics in self.statistics.items():
            for name in STATISTICS:
                if known(name, statistics):
                    digest.update(f"{corpus}/{name}".encode() + statistics[name].tobytes())
            for name, values in self.wide.items():
                if corpus in values:
                    digest.update(f"{corpus}/{name}".encode() + values[corpus].tobytes())
        if self.mtp is not None:
            digest.update(self.mtp.fingerprint.encode())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write ``profile.safetensors`` into a folder; the file appears only when it is complete.

        Tensors are named as `stored` has it; everything else is in the document of the file, see `tensor_file`.
        """
        about = {
            "schema": SCHEMA,
            "topology": self.topology.to_json(),
            "model": self.model,
            "corpora": self.corpora,
            "settings": self.settings,
        }
        if self.mtp is not None:
            about["mtp"] = list(self.mtp.topology.decoder_layers)
        path = Path(folder) / FILE
        if self.inputs is None or self.inputs.path != path.with_name(INPUTS):
            path.with_name(INPUTS).unlink(missing_ok=True)  # of an earlier profile
        tensors = named(self.statistics, self.parts, self.wide)
        if self.mtp is not None:
            tensors |= named(self.mtp.statistics, self.mtp.parts, self.mtp.wide, MTP)
        write_bytes(path, tensor_bytes(tensors, about))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Profile:
        """Read ``profile.safetensors`` from a folder.

        Args:
            folder: the folder, or the file itself.

        Raises:
            InputError: there is no profile, it has another schema, or its statistics are damaged.
        """
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{folder} holds no {FILE}. Make one with `moecover profile`")
        try:
            about, tensors = read_tensors(path)
            if about.get("schema") != SCHEMA:
                raise ValueError(f"it has schema {about.get('schema')}, this version reads {SCHEMA}")
            topology, names = described(about)
            layers = replace(topology, decoder_layers=tuple(map(int, about["mtp"]))) if about.get("mtp") else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            lacks = "its metadata lacks " if isinstance(error, KeyError) else ""
            raise InputError(f"{path} cannot be used: {lacks}{error}. {REMAKE}") from error
        statistics, parts, wide = read_named(path, tensors, topology, names)
        model, settings = about["model"], about["settings"]
        mtp = None
        if layers is not None:
            own, own_parts, own_wide = read_named(path, tensors, layers, names, MTP)
            of_channels, of_pairs = own_wide[CHANNELS], own_wide[PAIRS]
            mtp = cls(layers, own, about["corpora"], model, settings, own_parts, None, of_channels, of_pairs)
        inputs = open_inputs(path.parent)
        if inputs is not None:
            known = {(c, record.get("sha256")) for c, records in about["corpora"].items() for record in records}
            if inputs.model_fingerprint != about["model"]["fingerprint"] or not set(inputs.hashes.items()) <= known:
                raise InputError(
                    f"{inputs.path} does not belong to {path.name}. Profile again with {arg('keep_inputs')}"
                )
        channels, pairs = wide[CHANNELS], wide[PAIRS]
        return cls(topology, statistics, about["corpora"], model, settings, parts, inputs, channels, pairs, mtp)
