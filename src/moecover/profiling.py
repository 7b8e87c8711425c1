"""Stage 2, profile: reads a model and corpora, writes additive statistics of every expert on every corpus.

The forward pass is the library's own. A hook on the experts module sees the selected experts and the routing weights
that the model itself used; a recorder in the slot between the experts' outputs and their weighting sees every output
that the pass computes anyway. So no router is re-derived, only routed (token, expert) pairs are evaluated, and the
logits stay bit-equal to those of the plain pass.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecover.corpus import Corpus
from moecover.errors import InputError, MoecoverError, is_out_of_memory
from moecover.files import canonical_json, write_bytes
from moecover.interrupts import held
from moecover.topology import Structure, Topology

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

SCHEMA = 1
FILE = "profile.safetensors"
COUNTS = ("count", "num_tokens")
SUMS = (
    "weight_sum", "norm_sum", "weighted_norm_sum", "weighted_sq_sum", "renorm_weighted_norm_sum", "prob_sum",
)  # fmt: skip
MAXIMA = ("max_abs",)
DTYPES = ("auto", "bfloat16", "float16", "float32")  # what the grouped kernel runs
STATISTICS = (*COUNTS, *SUMS, *MAXIMA)

Statistics = dict[str, "NDArray[Any]"]


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

    Attributes:
        topology: shape of the routed part of the model.
        statistics: ``statistics[corpus][name]``, each of shape ``[layer, expert]``; padding is in none of them.
        corpora: origin and hash of every corpus, a list of records for a profile that was added up.
        model: name, revision and fingerprint of the model.
        settings: how the pass was run, and the versions that ran it.
    """

    topology: Topology
    statistics: dict[str, Statistics]
    corpora: dict[str, list[dict[str, Any]]]
    model: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

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
        for corpus in self.statistics.keys() & other.statistics.keys():
            mine, theirs = self.statistics[corpus], other.statistics[corpus]
            statistics[corpus] = {
                name: np.maximum(mine[name], theirs[name]) if name in MAXIMA else mine[name] + theirs[name]
                for name in STATISTICS
            }
            corpora[corpus] = self.corpora[corpus] + other.corpora[corpus]
        return Profile(self.topology, statistics, corpora, self.model, self.settings)

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
        path = Path(folder) / FILE
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
        for corpus, values in statistics.items():
            for name in STATISTICS:
                tensor = tensors.get(f"{corpus}/{name}")
                if tensor is None or tensor.shape != shape:
                    got = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                    raise InputError(f"{path}: {corpus}/{name} is {got}, {list(shape)} is needed")
                if not np.isfinite(tensor).all() or (name in COUNTS and (tensor < 0).any()):
                    raise InputError(f"{path}: {corpus}/{name} holds negative or non-finite values. Make it anew with `moecover profile`")  # fmt: skip
                values[name] = tensor
        return cls(topology, statistics, about["corpora"], about["model"], about["settings"])


def check_device(dtype: str, device: str) -> str:
    """The device that is meant, by name.

    Raises:
        InputError: unknown dtype, or a device that this machine does not have.
    """
    with held():
        import torch

    if dtype not in DTYPES:
        raise InputError(f"unknown --dtype {dtype!r}. Allowed: {', '.join(DTYPES)}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {device} is not available: {str(error).splitlines()[0]}") from error
    return device


def load_model(structure: Structure, *, dtype: str = "auto", device: str = "auto") -> torch.nn.Module:
    """The live model of a checkpoint, in evaluation mode, its experts run by the library's grouped kernel.

    Args:
        structure: the checkpoint.
        dtype: a torch dtype by name; ``auto`` takes the checkpoint's.
        device: a torch device by name; ``auto`` takes the first GPU, else the CPU.

    Raises:
        InputError: unknown dtype or device, or tensors missing in the files.
    """
    from transformers import AutoModelForCausalLM

    device = check_device(dtype, device)
    name = structure.checkpoint.name
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            structure.checkpoint.path, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            experts_implementation="grouped_mm", output_loading_info=True, local_files_only=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{name} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{name}: {len(missing)} tensors are missing in the files, the first is {missing[0]}. Fetch it again"
        )
    return model.to(device).eval()  # type: ignore[no-any-return]


def routers(model: torch.nn.Module, structure: Structure) -> tuple[torch.nn.Module, ...]:
    """The router module of every MoE layer: the one of the class that the model itself declares.

    Raises:
        InputError: no module or more than one fits a layer.
    """
    declared = []
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        declared += [getattr(r, "target_class", r) for r in (recorder if isinstance(recorder, list) else [recorder])]
    classes = tuple({c for c in declared if isinstance(c, type)})
    found = []
    for layer, name in enumerate(structure.experts_modules):
        block = model.get_submodule(name.rpartition(".")[0])
        fitting = [m for m in block.modules() if isinstance(m, classes)] if classes else []
        if len(fitting) != 1:
            raise InputError(f"decoder layer {structure.topology.decoder_layers[layer]} of {structure.topology.family} has {len(fitting)} modules that route, one is needed: not supported")  # fmt: skip
        found.append(fitting[0])
    return tuple(found)


class Recorder:
    """Accumulates the statistics of all MoE layers over batches; see `recording`.

    During the pass each layer leaves little behind: one norm, one peak and one weight per (token, slot) pair, and its
    logits. `end_batch` adds them up for all layers at once, expert ids counted on from layer to layer.
    """

    def __init__(self, topology: Topology, device: torch.device) -> None:
        import torch

        self.topology, self.device = topology, device
        slots = len(topology.decoder_layers) * topology.num_experts
        self.sums = torch.zeros(len(SUMS) - 1, slots, dtype=torch.float64, device=device)  # SUMS without prob_sum
        self.prob_sum = torch.zeros(slots, dtype=torch.float64, device=device)
        self.count = torch.zeros(slots, dtype=torch.int64, device=device)
        self.max_abs = torch.zeros(slots, dtype=torch.float32, device=device)
        self.num_tokens = 0
        buffers: dict[int, torch.Tensor] = {}  # by width; shared, so that it stays in the cache
        self.taps = [Tap(layer, buffers) for layer in topology.decoder_layers]
        self.probability: Callable[[torch.Tensor], torch.Tensor] | None = None

    def end_batch(self, token_mask: torch.Tensor | None = None) -> None:
        """Add what the layers left behind; ``token_mask`` is bool ``[token]``, None where every token counts.

        Raises:
            InputError: a router's weights are not finite.
            MoecoverError: a layer was not seen once.
        """
        import torch

        if not all(len(tap.left) == 1 and tap.logits is not None for tap in self.taps):
            raise MoecoverError(
                "the pass did not run every MoE layer once through the kernel that is recorded: please report this"
            )
        experts, order, norms, peaks = (
            torch.stack(part) for part in zip(*(tap.left[0] for tap in self.taps), strict=True)
        )
        weights = torch.stack([tap.weights for tap in self.taps]).double()  # [layer, token, slot]
        logits = torch.stack([tap.logits for tap in self.taps if tap.logits is not None])  # [layer, token, expert]
        total = weights.sum(-1, keepdim=True)
        if not bool(torch.isfinite(total).all()):
            bad = self.taps[int((~torch.isfinite(total)).flatten(1).any(1).nonzero()[0])].decoder_layer
            raise InputError(f"decoder layer {bad}: the router's weights are not finite. Its tensors hold NaN or infinity, or the dtype overflows (try --dtype float32)")  # fmt: skip
        if self.probability is None:
            first = self.taps[0]
            self.probability = scoring_function(logits[0, :64], weights[0, :64], first.index[:64])
        probabilities = self.probability(logits)
        if token_mask is not None:
            probabilities = probabilities[:, token_mask]
        self.prob_sum += probabilities.sum(
            1
        ).flatten()  # float32 within a batch (pairwise), float64 from batch to batch

        offsets = torch.arange(len(self.taps), device=self.device)[:, None] * self.topology.num_experts
        renormalised = (weights / (total + (total == 0))).flatten(1).gather(1, order)
        used, norms = weights.flatten(1).gather(1, order), norms.double()
        columns = (experts + offsets, used, renormalised, norms, peaks)
        if token_mask is None:
            slots, used, renormalised, norms, peaks = (c.flatten() for c in columns)
        else:
            keep = token_mask[order // weights.shape[-1]]
            slots, used, renormalised, norms, peaks = (c[keep] for c in columns)
        weighted = used * norms
        self.sums.index_add_(1, slots, torch.stack([used, norms, weighted, weighted.square(), renormalised * norms]))
        self.count += torch.bincount(slots, minlength=len(self.count))
        self.max_abs.scatter_reduce_(0, slots, peaks, "amax")
        self.num_tokens += weights.shape[1] if token_mask is None else int(token_mask.sum())
        for tap in self.taps:
            tap.clear()

    def statistics(self) -> Statistics:
        """What was added up, each ``[layer, expert]``."""
        shape = (len(self.taps), self.topology.num_experts)
        rows = dict(zip([name for name in SUMS if name != "prob_sum"], self.sums, strict=True))
        tensors = {"count": self.count, **rows, "prob_sum": self.prob_sum, "max_abs": self.max_abs.double()}
        values = {name: tensor.cpu().numpy().reshape(shape) for name, tensor in tensors.items()}
        return {**values, "num_tokens": np.full(shape, self.num_tokens, dtype=np.int64)}


class Tap:
    """What one MoE layer leaves behind in a batch."""

    def __init__(self, decoder_layer: int, buffers: dict[int, torch.Tensor]) -> None:
        self.decoder_layer, self.buffers = decoder_layer, buffers
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self.left: list[tuple[torch.Tensor, ...]] = []  # experts, order, norms, peaks; each [pair], sorted by expert
        self.hidden: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None

    def before_experts(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Hook before the experts: hidden states ``[token, hidden]``, selected experts and weights ``[token, slot]``."""
        self.hidden, self.index, self.weights = args

    def after_router(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Hook after the router: logits ``[token, expert]`` come first in what it returns."""
        self.logits = output[0]

    def __call__(self, outputs: torch.Tensor) -> torch.Tensor:
        """Recorder in the slot after the experts: unweighted outputs ``[pair, hidden]``, pairs sorted by expert."""
        import torch

        experts, order = torch.sort(self.index.reshape(-1))  # the same sort of the same values as the kernel's
        width = outputs.shape[-1]
        if width not in self.buffers:
            rows = 512 if outputs.device.type == "cpu" else 65536
            self.buffers[width] = torch.empty(rows, width, dtype=torch.float32, device=outputs.device)
        norms, peaks = norms_and_peaks(outputs, self.buffers[width])
        if not math.isfinite(norms.sum().item()):
            self._explain_non_finite(experts, order, peaks)
        self.hidden = None
        self.left.append((experts, order, norms, peaks))
        return outputs

    def _explain_non_finite(self, experts: torch.Tensor, order: torch.Tensor, peaks: torch.Tensor) -> None:
        import torch

        assert self.hidden is not None
        where = f"decoder layer {self.decoder_layer}"
        remedy = "hold NaN or infinity, or the dtype overflows (try --dtype float32)"
        bad = ~torch.isfinite(peaks)
        if bool((bad & ~torch.isfinite(self.hidden).all(-1)[order // self.index.shape[-1]]).any()):
            raise InputError(
                f"{where}: the hidden states that enter the experts are not finite. The weights before it {remedy}"
            )
        named = sorted(set(experts[bad].tolist()))
        if named:
            listed = ", ".join(map(str, named[:8]))
            raise InputError(f"{where}, expert {listed}: the output is not finite. Its weights {remedy}")
        raise InputError(f"{where}: the norms of the experts' outputs overflow float32. The weights before it {remedy}")


def norms_and_peaks(outputs: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean norm and largest absolute component of every row, float32 ``[row]``; ``outputs`` is ``[row, hidden]``.

    Row by row through ``buffer`` (float32 ``[chunk, hidden]``), which stays in the cache and is allocated once: on a CPU
    this halves the cost of recording. NaN and infinity show in the peaks.
    """
    import torch

    norms, peaks = torch.empty(2, len(outputs), dtype=torch.float32, device=outputs.device)
    for start in range(0, len(outputs), len(buffer)):
        chunk = outputs[start : start + len(buffer)]
        values = buffer[: len(chunk)].copy_(chunk).abs_()
        torch.linalg.vector_norm(values, dim=-1, out=norms[start : start + len(chunk)])
        torch.amax(values, -1, out=peaks[start : start + len(chunk)])
    return norms, peaks


def scoring_function(
    logits: torch.Tensor, weights: torch.Tensor, index: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from logits to probabilities that a router applies, recognised from one output.

    The weights of a token's slots are proportional to the probabilities of the selected experts, whatever the router
    normalises or scales afterwards. Softmax is taken where nothing fits (a router that multiplies by something else).

    Args:
        logits: ``[token, expert]``.
        weights: ``[token, slot]``.
        index: selected experts ``[token, slot]``.
    """
    import torch

    def softmax(x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1, dtype=torch.float32)

    def sigmoid(x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x.float())

    def shares(values: torch.Tensor) -> torch.Tensor:
        # One slot has no proportions: there the weight itself is compared.
        return values if values.shape[-1] == 1 else values / values.sum(-1, keepdim=True)

    for function in (softmax, sigmoid):
        selected = function(logits).gather(-1, index)
        if torch.allclose(shares(selected), shares(weights.float()), rtol=0.02, atol=1e-3):
            return function
    return softmax


@contextlib.contextmanager
def recording(model: torch.nn.Module, structure: Structure) -> Iterator[Recorder]:
    """Record statistics of every MoE layer while the block runs forward passes; leaves the model as it was.

    Call `Recorder.end_batch` after every pass.

    Raises:
        InputError: the experts of this family cannot be observed.
    """
    handles, changed = [], []
    topology = structure.topology
    recorder = Recorder(topology, next(model.parameters()).device)
    try:
        for name, router, tap in zip(structure.experts_modules, routers(model, structure), recorder.taps, strict=True):
            experts: Any = model.get_submodule(name)
            implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
            if getattr(experts, "has_post_expert_norm", None) is not False or implementation != "grouped_mm":
                raise InputError(f"the experts of {topology.family} (decoder layer {tap.decoder_layer}) do not run through the library's grouped kernel (experts implementation {implementation}): load the model with `load_model`; where that changes nothing, the family is not supported yet")  # fmt: skip
            changed.append(experts)
            experts.has_post_expert_norm = True
            experts.__dict__["post_expert_norm"] = tap
            handles.append(experts.register_forward_pre_hook(tap.before_experts))
            handles.append(router.register_forward_hook(tap.after_router))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
        for experts in changed:
            experts.has_post_expert_norm = False
            experts.__dict__.pop("post_expert_norm", None)


def batches(corpus: Corpus, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Model inputs of a corpus, ``batch_size`` sequences at a time; mask and positions only where there is padding."""
    import torch

    for start in range(0, len(corpus.tokens), batch_size):
        tokens = torch.from_numpy(corpus.tokens[start : start + batch_size])
        mask = torch.from_numpy(corpus.mask[start : start + batch_size])
        used = mask.any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        tokens, mask = tokens[:, first:last], mask[:, first:last]
        if bool(mask.all()):
            yield {"input_ids": tokens}
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
            yield {"input_ids": tokens, "attention_mask": mask.long(), "position_ids": positions}


def profile_corpus(
    model: torch.nn.Module,
    structure: Structure,
    corpus: Corpus,
    *,
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Statistics:
    """Statistics of one corpus, each ``[layer, expert]``, from one forward pass over it.

    Args:
        model: from `load_model`.
        structure: the checkpoint of the model.
        corpus: token ids.
        batch_size: sequences per forward pass.
        advance: called with the tokens of every finished batch.

    Raises:
        InputError: an expert's output is not finite (names layer and expert), or the family cannot be observed.
    """
    import torch

    device = next(model.parameters()).device
    backbone = getattr(model, str(model.base_model_prefix))  # the head is not needed for statistics
    with torch.inference_mode(), recording(model, structure) as recorder:
        for inputs in batches(corpus, batch_size):
            mask = inputs.get("attention_mask")
            backbone(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False)
            recorder.end_batch(None if mask is None else mask.bool().flatten().to(device))
            advance(int(inputs["input_ids"].numel() if mask is None else mask.sum()))
    statistics = {name: recorder.statistics()[name] for name in STATISTICS}
    if (statistics["num_tokens"] != corpus.num_tokens).any():
        raise MoecoverError(f"corpus {corpus.name} has {corpus.num_tokens} tokens, but the layers recorded {statistics['num_tokens'][:, 0].tolist()}: please report this")  # fmt: skip
    if name := next((name for name, values in statistics.items() if not np.isfinite(values).all()), None):
        layer = int(np.argwhere(~np.isfinite(statistics[name]))[0][0])
        raise InputError(f"decoder layer {structure.topology.decoder_layers[layer]}: {name} is not finite on corpus {corpus.name}. The weights hold NaN or infinity, or the dtype overflows (try --dtype float32)")  # fmt: skip
    return statistics


def profile(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    model: torch.nn.Module | None = None,
    batch_size: int = 4,
    dtype: str = "auto",
    device: str = "auto",
    advance: Callable[[int], None] = lambda tokens: None,
) -> Profile:
    """Profile of a model on corpora that are kept apart, from one forward pass over each.

    Args:
        structure: the checkpoint, from `read_structure`.
        corpora: from `load_corpus`; names must differ.
        model: the live model from `load_model` if there is one already; else it is loaded.
        batch_size: sequences per forward pass.
        dtype: of the model to be loaded, see `load_model`.
        device: of the model to be loaded, see `load_model`.
        advance: called with the tokens of every finished batch.

    Raises:
        InputError: names that repeat, or what `load_model` and `profile_corpus` raise.
    """
    import torch
    import transformers

    from moecover import __version__

    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names) or not names:
        raise InputError(f"corpora {', '.join(names) or '(none)'}: at least one is needed, and every name once")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is out of range: 1 or more")
    if model is None:
        model = load_model(structure, dtype=dtype, device=device)
    statistics: Mapping[str, Statistics] = {
        corpus.name: profile_corpus(model, structure, corpus, batch_size=batch_size, advance=advance)
        for corpus in corpora
    }
    parameter = next(model.parameters())
    settings = {
        "batch_size": batch_size,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "experts": "grouped_mm",
        "versions": {
            "moecover": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    about = {
        "name": structure.checkpoint.name,
        "revision": structure.checkpoint.revision,
        "fingerprint": structure.model_fingerprint,
    }
    return Profile(structure.topology, dict(statistics), {c.name: [c.record] for c in corpora}, about, settings)
