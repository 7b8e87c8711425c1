"""Checkpoints in another program's format, told by their settings and headers, and refused by what they are."""

from __future__ import annotations

from moecover.checkpoints.config_edit import quantisation
from moecover.checkpoints.header import TensorEntry
from moecover.checkpoints.source import Checkpoint
from moecover.errors import InputError

MLX_STACK = ".switch_mlp."  # where MLX stacks the experts of a layer


def is_mlx(checkpoint: Checkpoint) -> bool:
    """Whether the weights are laid out for Apple's MLX."""
    metadata = [found for found in checkpoint.shard_metadata.values() if found]
    settings = checkpoint.config.get("quantization")
    by_settings = isinstance(settings, dict) and {"group_size", "bits"} <= settings.keys()
    stacked = any(MLX_STACK in name for name in checkpoint.tensors)
    return stacked or by_settings or any(found.get("format") == "mlx" for found in metadata)


def check_format(checkpoint: Checkpoint) -> None:
    """Refuse a folder whose weights are laid out for another program.

    Raises:
        InputError: it is one of MLX.
    """
    if is_mlx(checkpoint):
        raise InputError(
            f"{checkpoint.name} is an MLX folder: its weights are laid out for Apple's MLX. Prune the original that it "
            "was made from, then convert the result"
        )


def packed_router(checkpoint: Checkpoint, entry: TensorEntry) -> InputError:
    """The error for a router whose weights are stored in a packed type."""
    method = quantisation(checkpoint.config)
    how = f" ({method})" if method else ""
    return InputError(
        f"{checkpoint.name}: the router is quantised{how}: {entry.name} is stored as {list(entry.shape)} of "
        f"{entry.dtype}, so its experts cannot be separated. Prune the original that it was made from, then quantise"
    )
