"""The state of an interrupted pass: a folder with the sums so far and the hidden states between two decoder layers.

``state.safetensors`` holds the sums of every corpus, the inputs of the pass and its progress; it is replaced after each
batch (in memory; a large one less often, see `State.due`) or layer (layer by layer). ``hidden-N.0`` and ``hidden-N.1``
hold the outputs of the last two layers for pass N, alternately, so that the older one stays intact while the newer one
is written; ``hidden-N.2`` holds the input of the first layer, where memory is short. The folder may be deleted at any
time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, cast

import numpy as np

from moecover.errors import MoecoverError
from moecover.files.atomic import explained
from moecover.files.hashing import file_hash
from moecover.files.tensor_file import read_tensors, tensor_bytes

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    LayerOutput = torch.Tensor | tuple[torch.Tensor | None, ...]  # hidden states, or a tuple that begins with them

FILE = "state.safetensors"
SMALL = 10_000_000  # bytes that can be written after every batch
SHARE = 50  # a larger state takes at most one part in so many of the time
REST_IS_SAFE = "Progress up to here is used when the same command runs again"


class Sums(Protocol):
    """What a pass adds up for one corpus, as arrays by name."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that has been added up."""
        ...

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Continue from the result of `state`."""
        ...


class Output(TypedDict):
    """What the state records of a layer's output for one pass.

    ``form`` is the length of the tuple that the layer returned, 0 for a bare tensor; ``turn`` selects the file.
    """

    shape: list[int]
    dtype: str
    form: int
    turn: int
    hash: NotRequired[str]


class _Saved(TypedDict):
    """The metadata of the state's file."""

    inputs: dict[str, object]
    done: int
    of: int
    unit: str
    outputs: list[Output] | None


class State:
    """The state of a pass; see the module.

    Args:
        folder: where it is kept; created when first needed.
        inputs: what the pass depends on, JSON values by name; messages use the names.
        say: receives lines of log.

    Attributes:
        done: number of finished batches or layers.
        outputs: what the last finished layer returned for every pass; None where the family passes more than hidden
            states from layer to layer, so that these are not sufficient.
    """

    def __init__(
        self, folder: Path, inputs: Mapping[str, object], *, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self.folder, self.done = folder, 0
        self._last = 0, 0.0, 0.0  # bytes and seconds of the last save, and when it ended
        self.outputs: Sequence[Output] | None = None
        self._inputs: dict[str, object] = json.loads(json.dumps(inputs))
        self._sums: dict[str, NDArray[Any]] = {}
        found = self._read()
        if found is None:
            return
        if differs := [n for n in {**self._inputs, **found["inputs"]} if self._inputs.get(n) != found["inputs"].get(n)]:
            say(f"starting over: {folder} was made from other inputs, {differs[0]} differs")
            remove(folder)
            self._sums = {}
            return
        self.done, self.outputs = found["done"], found["outputs"]
        if self.outputs is not None and not all(self._is_intact(call) for call in range(len(self.outputs))):
            self.outputs = None  # the layers run again up to here; their statistics are complete
        say(f"resuming: {self.done} of {found['of']} {found['unit']} are done")

    def _read(self) -> _Saved | None:
        try:
            document, self._sums = read_tensors(self.folder / FILE)
            found = cast("_Saved", document)
            found["inputs"].keys(), found["done"], found["outputs"], found["of"], found["unit"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None  # there is no state, or it is damaged
        return found

    def restore(self, sums: Mapping[str, Sums]) -> None:
        """Continue the sums of every corpus from the state."""
        if self.done:
            for corpus, one in sums.items():
                prefix = f"{corpus}/"
                one.restore({k.removeprefix(prefix): v for k, v in self._sums.items() if k.startswith(prefix)})
            self._sums = {}

    def due(self) -> bool:
        """Whether it is time to save again; if the job does not, a little more of it is lost with an interruption."""
        num_bytes, seconds, ended = self._last
        return num_bytes <= SMALL or time.monotonic() - ended >= SHARE * seconds

    def save(
        self, done: int, of: int, unit: str, sums: Mapping[str, Sums], *, outputs: Sequence[Output] | None = None
    ) -> None:
        """Save the progress of the pass.

        Args:
            done: number of finished batches or layers.
            of: their total.
            unit: ``batches`` or ``layers``.
            sums: by corpus.
            outputs: see the class; the files written by `put` are hashed.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        started = time.monotonic()
        if outputs is not None:
            outputs = [{**row, "hash": file_hash(self._file(call, row["turn"]))} for call, row in enumerate(outputs)]
        about = {"inputs": self._inputs, "done": done, "of": of, "unit": unit, "outputs": outputs}
        tensors = {f"{corpus}/{name}": v for corpus, one in sums.items() for name, v in one.state().items()}
        content = tensor_bytes(tensors, about)
        with explained(f"writing {self.folder}", left=REST_IS_SAFE):
            self.folder.mkdir(parents=True, exist_ok=True)
            new = self.folder / f"{FILE}.new"
            new.write_bytes(content)
            new.replace(self.folder / FILE)
        ended = time.monotonic()
        self._last = len(content), ended - started, ended

    def _file(self, call: int, turn: int) -> Path:
        return self.folder / f"hidden-{call}.{turn}"

    def _is_intact(self, call: int) -> bool:
        """Whether the hidden states of a pass are those that were saved."""
        assert self.outputs is not None
        row = self.outputs[call]
        try:
            return bool(file_hash(self._file(call, row["turn"])) == row["hash"])
        except OSError:
            return False

    def _mapped(self, call: int, row: Output) -> torch.Tensor:
        """The hidden states of a pass as a memory-mapped tensor."""
        import torch

        dtype, size = getattr(torch, row["dtype"]), int(np.prod(row["shape"]))
        self.folder.mkdir(parents=True, exist_ok=True)
        mapped = torch.from_file(str(self._file(call, row["turn"])), shared=True, size=size, dtype=dtype)
        return mapped.view(row["shape"])

    def put(self, layer: int, call: int, output: object) -> tuple[Output, LayerOutput] | None:
        """Write what a decoder layer (or, as layer -1, the embedding) returned for a pass.

        Returns:
            The row for `save`, and the same output: in the file's memory for a model on the CPU, else on its device,
            since the model goes on with it; None where it is more than hidden states.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        import torch

        hidden = output[0] if isinstance(output, tuple) else output
        alone = not isinstance(output, tuple) or all(part is None for part in output[1:])
        if not isinstance(hidden, torch.Tensor) or not alone:
            return None
        row: Output = {
            "shape": list(hidden.shape),
            "dtype": str(hidden.dtype).removeprefix("torch."),
            "form": len(output) if isinstance(output, tuple) else 0,
            "turn": layer % 2 if layer >= 0 else 2,
        }
        with explained(f"writing {self.folder}", left=REST_IS_SAFE):
            mapped = self._mapped(call, row)
            mapped.copy_(hidden)
        return row, _formed(mapped if hidden.device.type == "cpu" else hidden, row["form"])

    def get(self, call: int, device: torch.device) -> LayerOutput:
        """What the last finished layer returned for a pass, read from its file, on a device."""
        assert self.outputs is not None
        row = self.outputs[call]
        return _formed(self._mapped(call, row).clone().to(device), row["form"])

    def as_output(self, call: int, hidden: torch.Tensor) -> LayerOutput:
        """Hidden states in the form in which the decoder layers of this model return them."""
        assert self.outputs is not None
        return _formed(hidden, self.outputs[call]["form"])


def remove(folder: Path) -> None:
    """Remove a state that is no longer needed."""
    shutil.rmtree(folder, ignore_errors=True)


def of_process(folder: Path, rank: int) -> Path:
    """The folder for the state of one of several processes."""
    return folder.with_name(f"{folder.name}-{rank}")


def remove_all(folder: Path) -> None:
    """Remove a state and those of all processes, including those of an earlier job with more processes."""
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        rank = other.name.removeprefix(f"{folder.name}-")
        if other == folder or (rank != other.name and rank.isdecimal()):
            remove(other)


@contextlib.contextmanager
def kept_for_later(folder: Path) -> Iterator[None]:
    """Make an error or interrupt in the block say that the progress was saved; without a state, remove the folder."""
    try:
        yield
    except BaseException as error:
        if (folder / FILE).exists():
            left = f"Progress saved in {folder}; rerun the same command to resume"
            if isinstance(error, MoecoverError):
                raise error.extended(left) from error
            error.add_note(left)
        else:
            remove(folder)
        raise


def _formed(hidden: torch.Tensor, form: int) -> LayerOutput:
    return (hidden, *[None] * (form - 1)) if form else hidden


def footprint(value: object) -> object:
    """The identities of everything in nested containers: tells whether a decoder layer changes its arguments."""
    if isinstance(value, dict):
        return tuple((key, footprint(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(footprint, value))
    return id(value)
