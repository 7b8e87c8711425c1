"""Stage 1 as well, corpus: reads a model, gives token ids that it writes itself, as rows of ``input_ids`` in a file.

What a model writes follows what it was trained on, also where named corpora have none of it (Williams et al., "Self-calibration
for Language Model Quantization and Pruning", arXiv 2410.17170). Every document begins with a token drawn evenly from the
vocabulary, so that kinds of text that are rare in the model's own choice come up too, and goes on by sampling from the model's
own distribution, nothing cut off and no temperature. Where one ends the next begins, as in packed training text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from moecover.checkpoints.config_edit import first_number
from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import load_tokenizer
from moecover.errors import InputError
from moecover.files.atomic import PARTIAL, canonical_json, kept_file
from moecover.files.locks import locked
from moecover.runtime.running import Running, running

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

FORMAT = 2  # of a draft


def first_tokens(structure: Structure) -> NDArray[np.int64]:
    """Ids that a document may begin with: of the tokenizer's vocabulary, no special ones; of the model's where it has none."""
    size = int(structure.checkpoint.text_config["vocab_size"])
    tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        return np.arange(size)
    return np.setdiff1d(np.arange(min(size, len(tokenizer))), tokenizer.all_special_ids)


def cache_bytes(structure: Structure, *, tokens: int, itemsize: int) -> int:
    """Memory of the keys and values of so many tokens, as if every layer kept all of them."""
    config = structure.checkpoint.text_config
    if latent := first_number(config, ("kv_lora_rank",)):  # keys and values are made from it
        width = latent + (first_number(config, ("qk_rope_head_dim",)) or 0)
    else:
        queries = first_number(config, ("num_attention_heads",)) or 1
        heads = first_number(config, ("num_key_value_heads",)) or queries
        width = 2 * heads * (first_number(config, ("head_dim",)) or structure.topology.hidden_size // queries)
    return structure.topology.num_layers * width * tokens * itemsize


def ends_of(model: torch.nn.Module) -> list[int]:
    """Ids that end a document; none where the model names none."""
    live: Any = model
    for settings in (live.generation_config, live.config.get_text_config()):
        if (ends := settings.eos_token_id) is not None:
            return list(ends) if isinstance(ends, list) else [ends]
    return []


def generate(
    model: torch.nn.Module, first: NDArray[np.int64], *, sequences: int, length: int, seed: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> NDArray[np.int64]:  # fmt: skip
    """Sequences that a model writes: documents one after the other, sampled from its own distribution.

    The same again for the same model, dtype, device, sizes and seed.

    Args:
        model: from `load_model`.
        first: ids that a document may begin with, each as likely as the other.
        sequences: rows.
        length: tokens of a sequence, the first one counted.
        seed: of the draws.
        advance: told how many tokens more there are.

    Returns:
        int64 ``[sequence, length]``.

    Raises:
        InputError: the model's class cannot generate.
    """
    import torch
    from transformers import GenerationConfig

    live: Any = model
    if not live.can_generate():
        raise InputError(f"{type(model).__name__} cannot generate. Give real text as --corpus NAME=PATH")
    begins = torch.from_numpy(first).to(live.device)
    ends = torch.tensor(ends_of(model), dtype=torch.int64, device=live.device)

    def begin(input_ids: Any, scores: Any) -> Any:
        """A logits processor that begins a document where one has ended."""
        ended = torch.isin(input_ids[:, -1], ends)
        evenly = torch.full_like(scores[0], -torch.inf).index_fill_(0, begins, 0.0)
        return torch.where(ended[:, None], evenly, scores)

    def step(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """A stopping criterion that only counts."""
        advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    theirs = live.generation_config  # may hold a temperature, penalties, an end
    live.generation_config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length - 1, pad_token_id=0)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            ids = begins[torch.randint(len(begins), (sequences,), device=live.device)][:, None]
            advance(sequences)
            made = live.generate(
                ids, attention_mask=torch.ones_like(ids), logits_processor=[begin], stopping_criteria=[step]
            )
    finally:
        live.generation_config = theirs
    found: NDArray[np.int64] = made.cpu().numpy()
    return found


def draft_of(path: Path, inputs: dict[str, Any]) -> Path:
    """Where rows that are done lie until all are: a hidden file beside, named by what they are made from."""
    digest = hashlib.sha256(canonical_json({"format": FORMAT, **inputs}).encode()).hexdigest()
    return path.with_name(f".{path.name}.{digest[:12]}{PARTIAL}")


def _rows_done(file: BinaryIO, length: int, batch_size: int) -> int:
    """How many rows of a draft can stay: whole batches of whole rows. The file is cut behind them."""
    ends = [0]
    for line in file if file.readable() else ():
        try:
            whole = line.endswith(b"\n") and len(json.loads(line)["input_ids"]) == length
        except (ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            break
        ends.append(ends[-1] + len(line))
    done = (len(ends) - 1) // batch_size * batch_size
    file.seek(ends[done])
    file.truncate()
    return done


def write_generated(
    structure: Structure, model: torch.nn.Module | Running, path: Path, *, sequences: int, length: int, seed: int, batch_size: int,
    advance: Callable[[int], None] = lambda tokens: None, say: Callable[[str], None] = lambda line: None,
) -> None:  # fmt: skip
    """A file of sequences that a model writes, one row of ``input_ids`` a line; an interrupted one is gone on with.

    Args:
        structure: the checkpoint.
        model: of it, from `load_model`.
        path: of the file, .jsonl.
        sequences: rows.
        length: tokens a row.
        seed: of the draws.
        batch_size: rows at a time, on which the draws depend.
        advance: told how many tokens more there are.
        say: takes a line on what an interrupted run left.

    Raises:
        InputError: the model's class cannot generate, or another run writes the file.
        MoecoverError: the disk is full or the folder cannot be written.
    """
    first = first_tokens(structure)
    seeds = np.random.default_rng(seed).integers(2**63, size=sequences).tolist()  # a batch has that of its first row
    runs = running(model, structure)
    draft = draft_of(path, {
        "model": structure.model_fingerprint, "sequences": sequences, "length": length, "seed": seed,
        "batch_size": batch_size, "dtype": str(runs.dtype), "device": str(runs.device.type),
    })  # fmt: skip
    with locked(path), kept_file(path, draft) as file:
        for other in path.parent.glob(f".{path.name}.*{PARTIAL}"):
            if other != draft:
                say(f"{other}, made from other inputs, is removed")
                other.unlink()
        if done := _rows_done(file, length, batch_size):
            say(f"resuming: {done} of {sequences} sequences are done")
            advance(done * length)
        try:
            for start in range(done, sequences, batch_size):
                rows = generate(
                    runs.module, first, sequences=min(batch_size, sequences - start), length=length, seed=seeds[start],
                    advance=advance,
                )  # fmt: skip
                file.write(b"".join(json.dumps({"input_ids": row}).encode() + b"\n" for row in rows.tolist()))
                file.flush()
        except BaseException as error:
            error.add_note(f"What was done is kept in {draft} and is used when the same command runs again")
            raise
