"""Tables of experts by token id (hash routing): found by the model class, read from the files, cut to kept experts.

The routers of some layers learn no choice: they look up the experts of a token by its id, in a table
``[token id, slot]``. config.json has one number of experts for all layers, so such a layer loses experts like any
other, and its table is rewritten for those that stay.
"""

from __future__ import annotations

import functools
import heapq
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moecover.checkpoints.names import layer_number, read_names
from moecover.checkpoints.source import Checkpoint
from moecover.checkpoints.tensor_checks import wrong_shape
from moecover.checkpoints.topology import IdTable
from moecover.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

IDS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}  # dtypes of tables, as numpy calls them
REMEMBERED = 8  # rewritten tables: a masked model asks for the same ones batch after batch


def find_tables(
    checkpoint: Checkpoint, model: torch.nn.Module, axes: Mapping[str, int], modules: Sequence[str], top_k: int
) -> dict[str, IdTable]:
    """The tables of a checkpoint, by the names of the tensors on disk.

    A table is what a router holds of integers with a column for each expert of a token. No shape tells that its values
    are experts: `check_ids` looks at them before they are rewritten.

    Args:
        checkpoint: the files.
        model: the model class, on ``meta``.
        axes: expert axis of every expert-dependent parameter, by name.
        modules: names of the experts modules.
        top_k: experts per token.

    Raises:
        InputError: nothing in the files fills a table, or in another shape or type.
    """
    routers = {key.rpartition(".")[0] for key in axes} - set(modules)
    live = {
        key: tuple(value.shape)
        for key, value in model.state_dict().items()
        if key.rpartition(".")[0] in routers
        and not (value.is_floating_point() or value.is_complex())
        and value.dim() == 2
        and value.shape[1] == top_k
    }
    if not live:
        return {}
    layer_of = {layer_number(module): layer for layer, module in enumerate(modules)}
    found = {
        name: IdTable(layer_of[layer_number(destination.parameter)], destination.parameter)
        for name, destination in read_names(checkpoint, model).destinations.items()
        if destination.parameter in live
    }
    for name, table in found.items():
        entry = checkpoint.tensors[name]
        if entry.shape != live[table.parameter]:
            raise wrong_shape(checkpoint, entry, live[table.parameter])
        if entry.dtype not in IDS:
            raise InputError(
                f"{checkpoint.name}: tensor {name} in {entry.shard} is of {entry.dtype}, a table of experts by token "
                f"id is of {', '.join(IDS)}"
            )
    if missing := sorted(live.keys() - {table.parameter for table in found.values()}):
        shape = list(live[missing[0]])
        raise InputError(f"{checkpoint.name}: nothing in the files fills {missing[0]} of shape {shape}")
    return found


def read_table(checkpoint: Checkpoint, name: str, num_experts: int) -> NDArray[np.integer]:
    """A table in the files, in its own dtype ``[token id, slot]``.

    Args:
        checkpoint: the files.
        name: of the tensor.
        num_experts: experts per layer.

    Raises:
        InputError: it names experts that the layer does not have.
        OSError: the file cannot be read.
    """
    import numpy as np

    entry = checkpoint.tensors[name]
    with (checkpoint.path / entry.shard).open("rb") as file:
        content = os.pread(file.fileno(), entry.num_bytes, entry.start)
    table: NDArray[np.integer] = np.frombuffer(content, IDS[entry.dtype]).reshape(entry.shape)
    check_ids(table, num_experts, f"{checkpoint.name}: tensor {name} in {entry.shard}")
    return table


def check_ids(table: NDArray[np.integer], num_experts: int, where: str) -> None:
    """Refuse a table with values that are no experts of the layer.

    Raises:
        InputError: names the token id and the value.
    """
    import numpy as np

    wrong = np.argwhere((table < 0) | (table >= num_experts))
    if len(wrong):
        token, slot = map(int, wrong[0])
        raise InputError(
            f"{where} sends token id {token} to expert {int(table[token, slot])}. Allowed: 0 to {num_experts - 1}, the "
            "experts of config.json"
        )


def remapped(table: NDArray[np.integer], kept: Sequence[int], num_experts: int) -> NDArray[np.integer]:
    """A table for the kept experts alone, by their new ids.

    Kept experts stay where they are. Every place of a removed one, in the order of token ids and slots, goes to the
    kept expert with the fewest places in the table so far (its own count from the start; ties go to the lower id) among
    those that the token does not have yet, so that tokens spread evenly.

    Args:
        table: experts of every token id, ``[token id, slot]``, all below ``num_experts``.
        kept: ids of the kept experts, ascending, at least as many as slots.
        num_experts: experts of the layer.

    Returns:
        Its dtype and shape are the table's.
    """
    import numpy as np

    whole = np.ascontiguousarray(table, dtype=np.int64)
    new = _remapped(whole.tobytes(), table.shape[1], tuple(kept), num_experts)
    return new.astype(table.dtype)


@functools.lru_cache(maxsize=REMEMBERED)
def _remapped(ids: bytes, slots: int, kept: tuple[int, ...], num_experts: int) -> NDArray[np.int64]:
    """See `remapped`; int64 throughout."""
    import numpy as np

    new_id = np.full(num_experts, -1, dtype=np.int64)
    new_id[list(kept)] = np.arange(len(kept))
    table: NDArray[np.int64] = new_id[np.frombuffer(ids, dtype=np.int64)].reshape(-1, slots)
    counts = np.bincount(table[table >= 0], minlength=len(kept)).tolist()
    least = [(count, expert) for expert, count in enumerate(counts)]
    heapq.heapify(least)
    for token in np.flatnonzero((table < 0).any(axis=1)).tolist():
        row: list[int] = table[token].tolist()
        for slot, expert in enumerate(row):
            if expert < 0:
                row[slot] = _taken(least, row)
        table[token] = row
    return table


def _taken(least: list[tuple[int, int]], others: Sequence[int]) -> int:
    """The expert with the fewest places that is not among others; it has one more from now on."""
    passed = []
    while least[0][1] in others:
        passed.append(heapq.heappop(least))
    count, expert = least[0]
    heapq.heapreplace(least, (count + 1, expert))
    for one in passed:
        heapq.heappush(least, one)
    return expert
