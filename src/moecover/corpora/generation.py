"""Text that a model writes itself: reads a model, writes token ids sampled from it as a file of rows of ``input_ids``.

Such text follows what the model was trained on, even where no named corpus does (Williams et al., "Self-calibration for
Language Model Quantization and Pruning", arXiv 2410.17170). Every document begins with a token drawn uniformly from the
vocabulary, so that text that the model itself would rarely begin comes up too; the rest is sampled from the model's own
distribution, without truncation and at temperature 1. Where a document ends the next one begins, as in packed training
text.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from moecover.checkpoints.config_edit import first_number
from moecover.checkpoints.structure import Structure
from moecover.corpora.bos import body_length, prefix_record
from moecover.corpora.tokenizer import load_tokenizer
from moecover.errors import InputError
from moecover.files.atomic import PARTIAL, canonical_json, kept_file
from moecover.files.locks import locked
from moecover.files.reading import parse_json
from moecover.runtime.devices import own_generators
from moecover.runtime.distributed import shared_out
from moecover.runtime.finite import naming, rows_text, watched
from moecover.runtime.running import Running, running
from moecover.runtime.world import World

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

FORMAT = 2  # of a draft


def first_tokens(structure: Structure) -> NDArray[np.int64]:
    """Ids that a document may begin with: the tokenizer's without special ones, the model's if it has none."""
    size = int(structure.checkpoint.text_config["vocab_size"])
    tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        return np.arange(size)
    return np.setdiff1d(np.arange(min(size, len(tokenizer))), tokenizer.all_special_ids)


def cache_bytes(structure: Structure, *, tokens: int, itemsize: int) -> int:
    """Size of the key-value cache in bytes, as if every layer kept all tokens.

    Args:
        structure: the checkpoint.
        tokens: in the cache, of all sequences.
        itemsize: bytes of a number.
    """
    config = structure.checkpoint.text_config
    if latent := first_number(config, ("kv_lora_rank",)):  # keys and values are computed from it
        width = latent + (first_number(config, ("qk_rope_head_dim",)) or 0)
    else:
        queries = first_number(config, ("num_attention_heads",)) or 1
        heads = first_number(config, ("num_key_value_heads",)) or queries
        width = 2 * heads * (first_number(config, ("head_dim",)) or structure.topology.hidden_size // queries)
    return structure.topology.num_layers * width * tokens * itemsize


def ends_of(model: torch.nn.Module) -> list[int]:
    """Ids that end a document, by the model's generation settings or else its configuration."""
    live: Any = model
    for settings in (live.generation_config, live.config.get_text_config()):
        if (ends := settings.eos_token_id) is not None:
            return list(ends) if isinstance(ends, list) else [ends]
    return []


def generate(
    model: torch.nn.Module,
    first: NDArray[np.int64],
    *,
    sequences: int,
    length: int,
    seed: int,
    prefix: tuple[int, ...] = (),
    advance: Callable[[int], None] = lambda tokens: None,
) -> NDArray[np.int64]:
    """Sample sequences from a model: documents one after the other, from its own distribution.

    Reproducible for the same model, dtype, device, sizes and seed.

    Args:
        model: from `load_model`.
        first: ids that a document may begin with, drawn uniformly; int64 ``[id]``.
        sequences: number of sequences, generated as one batch.
        length: tokens per sequence, including the first ones.
        seed: of the sampling.
        prefix: ids that every sequence begins with, before its first document.
        advance: called with the number of tokens added.

    Returns:
        int64 ``[sequence, length]``.

    Raises:
        InputError: the model's class cannot generate.
    """
    import torch

    live: Any = model
    if not live.can_generate():
        raise InputError(f"{type(model).__name__} cannot generate. Give real text as --corpus NAME=PATH")
    begins = torch.from_numpy(first).to(live.device)
    ends = torch.tensor(ends_of(model), dtype=torch.int64, device=live.device)

    def begin(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor that begins a document where one has ended."""
        ended = torch.isin(input_ids[:, -1], ends)
        evenly = torch.full_like(scores[0], -torch.inf).index_fill_(0, begins, 0.0)
        return torch.where(ended[:, None], evenly, scores)

    def step(input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """A stopping criterion that only counts."""
        advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    before = torch.tensor([list(prefix)] * sequences, dtype=torch.int64, device=live.device).reshape(sequences, -1)
    tokens = body_length(length, prefix) - 1
    with _plain_sampling(live, tokens), own_generators():
        torch.manual_seed(seed)
        ids = begins[torch.randint(len(begins), (sequences,), device=live.device)][:, None]
        ids = torch.cat([before, ids], dim=1)
        advance(ids.numel())
        given = {"attention_mask": torch.ones_like(ids), "logits_processor": [begin], "stopping_criteria": [step]}
        made = live.generate(ids, **given) if tokens else ids
    found: NDArray[np.int64] = made.cpu().numpy()
    return found


@contextlib.contextmanager
def _plain_sampling(live: Any, tokens: int) -> Iterator[None]:
    """Sample from the model's own distribution, whatever temperature, penalties or ends its settings name."""
    from transformers import GenerationConfig

    theirs = live.generation_config
    live.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, pad_token_id=0)
    try:
        yield
    finally:
        live.generation_config = theirs


def _inputs(
    structure: Structure, runs: Running, sampling: Mapping[str, int], prefix: tuple[int, ...]
) -> dict[str, str | int | list[int]]:
    """All that the rows of a draft depend on."""
    return {
        "model": structure.model_fingerprint,
        **sampling,
        "dtype": str(runs.dtype),
        "device": str(runs.device.type),
        **prefix_record(prefix),
    }


def draft_of(path: Path, inputs: Mapping[str, str | int | list[int]]) -> Path:
    """The hidden file that holds finished rows until all are done, named by a hash of what they are made from."""
    digest = hashlib.sha256(canonical_json({"format": FORMAT, **inputs}).encode()).hexdigest()
    return path.with_name(f".{path.name}.{digest[:12]}{PARTIAL}")


def _rows_done(file: BinaryIO, length: int, batch_size: int) -> int:
    """Number of rows of a draft that can stay, complete batches of complete rows; the file is truncated after them."""
    ends = [0]
    for line in file if file.readable() else ():
        try:
            whole = line.endswith(b"\n") and len(parse_json(line)["input_ids"]) == length
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            break
        ends.append(ends[-1] + len(line))
    done = (len(ends) - 1) // batch_size * batch_size
    file.seek(ends[done])
    file.truncate()
    return done


def _remove_others(path: Path, draft: Path, say: Callable[[str], None]) -> None:
    """Remove the drafts of a file that were made from other inputs."""
    for other in path.parent.glob(f".{path.name}.*{PARTIAL}"):
        if other != draft:
            say(f"removing {other}, which was made from other inputs")
            other.unlink()


def write_generated(
    structure: Structure,
    model: torch.nn.Module | Running,
    path: Path,
    *,
    sequences: int,
    length: int,
    seed: int,
    batch_size: int,
    prefix: tuple[int, ...] = (),
    advance: Callable[[int], None] = lambda tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write a file of sequences sampled from a model, one row of ``input_ids`` per line; an interrupted run is resumed.

    Args:
        structure: the checkpoint.
        model: the loaded model.
        path: of the file, .jsonl.
        sequences: rows.
        length: tokens per row.
        seed: of the sampling.
        batch_size: rows generated at a time; the result depends on it.
        prefix: ids that every row begins with.
        advance: called with the number of tokens added.
        say: called with a line on the state of an interrupted run.

    Raises:
        InputError: the model's class cannot generate or gives numbers that are not finite, or another run writes the
            file.
        MoecoverError: the disk is full or the folder cannot be written.
    """
    first = first_tokens(structure)
    seeds = np.random.default_rng(seed).integers(2**63, size=sequences).tolist()  # a batch uses its first row's
    runs = running(model, structure)
    here = runs.world
    sampling = {"sequences": sequences, "length": length, "seed": seed, "batch_size": batch_size}
    draft = draft_of(path, _inputs(structure, runs, sampling, prefix))

    def batch(start: int) -> list[list[int]]:
        number = min(batch_size, sequences - start)
        with watched(runs), naming(rows_text("row", start, number)):
            sizes = {"sequences": number, "length": length, "seed": seeds[start]}
            made: list[list[int]] = generate(runs.module, first, **sizes, prefix=prefix, advance=advance).tolist()
        return made

    with _draft_file(path, draft, here, say) as file:
        (done,) = shared_out(here, [file], lambda mine: [_rows_done(f, length, batch_size) for f in mine if f])
        if done:
            say(f"resuming: {done} of {sequences} sequences are done")
            advance(done * length // here.size)
        try:
            for start in range(done, sequences, batch_size * here.size):
                starts = range(start, min(start + batch_size * here.size, sequences), batch_size)
                for rows in shared_out(here, starts, lambda mine: [batch(one) for one in mine]):
                    if file is not None:
                        file.write(b"".join(json.dumps({"input_ids": row}).encode() + b"\n" for row in rows))
                        file.flush()
        except BaseException as error:
            if file is not None:
                error.add_note(f"Progress saved in {draft}; rerun the same command to resume")
            raise


@contextlib.contextmanager
def _draft_file(path: Path, draft: Path, here: World, say: Callable[[str], None]) -> Iterator[BinaryIO | None]:
    """The file that becomes the output when the block ends; only the first of several processes writes one."""
    if here.rank > 0:
        yield None
        return
    with locked(path), kept_file(path, draft) as file:
        _remove_others(path, draft, say)
        yield file
