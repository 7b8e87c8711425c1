"""Where an interrupted pass goes on: a folder with the sums so far and what lies between two decoder layers.

``state.safetensors`` holds the sums of every corpus, what they were made from and how much of it is done; it is replaced
after every batch (in memory) or layer (layer by layer). ``hidden-N.0`` and ``hidden-N.1`` hold what pass N left behind the
last two layers, in turns, so that the older one stays whole while the newer one is made; ``hidden-N.2`` what entered the
first, where memory is short. The folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from moecover.errors import MoecoverError
from moecover.files.atomic import explained
from moecover.files.copying import file_hash

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

FILE = "state.safetensors"


class Sums(Protocol):
    """What a pass adds up for one corpus, as arrays by name."""

    def state(self) -> dict[str, NDArray[Any]]:
        """Everything that was added up."""
        ...

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Go on from what `state` gave."""
        ...


class State:
    """The state of a pass; see the module.

    Args:
        folder: where it lies; made when first needed.
        inputs: what the pass works on, as JSON values, by the name that a message gives it.
        say: takes a line on what is found there.

    Attributes:
        done: batches or layers that are done.
        outputs: of every pass behind the last layer that is done: shape, dtype and form; None where the family hands
            more than hidden states from layer to layer, so that these alone are not enough.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any], *, say: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.done = folder, 0
        self.outputs: list[dict[str, Any]] | None = None
        self._inputs = json.loads(json.dumps(inputs))
        self._sums: dict[str, np.ndarray[Any, Any]] = {}
        found = self._read()
        if found is None:
            return
        if differs := [n for n in {**self._inputs, **found["inputs"]} if self._inputs.get(n) != found["inputs"].get(n)]:
            say(f"starting anew: {folder} was made from other inputs, {differs[0]} differs")
            remove(folder)
            self._sums = {}
            return
        self.done, self.outputs = found["done"], found["outputs"]
        if self.outputs is not None and not all(self._as_noted(call) for call in range(len(self.outputs))):
            self.outputs = None  # the layers are run again up to here, their statistics stand
        say(f"resuming: {self.done} of {found['of']} {found['unit']} are done")

    def _read(self) -> dict[str, Any] | None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / FILE, framework="np") as file:
                found: dict[str, Any] = json.loads(file.metadata()["moecover"])
                self._sums = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            found["inputs"].keys(), found["done"], found["outputs"], found["of"], found["unit"]
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            return None  # nothing there, or nothing that can be used
        return found

    def restore(self, sums: Mapping[str, Sums]) -> None:
        """Have the sums of every corpus go on from here."""
        if self.done:
            for corpus, one in sums.items():
                prefix = f"{corpus}/"
                one.restore({k.removeprefix(prefix): v for k, v in self._sums.items() if k.startswith(prefix)})
            self._sums = {}

    def save(self, done: int, of: int, unit: str, sums: Mapping[str, Sums], *, outputs: Any = None) -> None:
        """Note that so much is done.

        Args:
            done: batches or layers.
            of: how many there are.
            unit: which of the two.
            sums: by corpus.
            outputs: see the class; the files of `put` are hashed.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        from safetensors.numpy import save

        if outputs is not None:
            outputs = [{**row, "hash": file_hash(self._file(call, row["turn"]))} for call, row in enumerate(outputs)]
        about = {"inputs": self._inputs, "done": done, "of": of, "unit": unit, "outputs": outputs}
        tensors = {f"{corpus}/{name}": v for corpus, one in sums.items() for name, v in one.state().items()}
        content = save(tensors, metadata={"moecover": json.dumps(about)})
        with explained(f"writing {self.folder}", left="What was done before is used when the same command runs again"):
            self.folder.mkdir(parents=True, exist_ok=True)
            new = self.folder / f"{FILE}.new"
            new.write_bytes(content)
            new.replace(self.folder / FILE)

    def _file(self, call: int, turn: int) -> Path:
        return self.folder / f"hidden-{call}.{turn}"

    def _as_noted(self, call: int) -> bool:
        assert self.outputs is not None
        row = self.outputs[call]
        try:
            return bool(file_hash(self._file(call, row["turn"])) == row["hash"])
        except OSError:
            return False

    def _mapped(self, call: int, row: dict[str, Any]) -> torch.Tensor:
        """The file of a pass as a tensor."""
        import torch

        dtype, size = getattr(torch, row["dtype"]), int(np.prod(row["shape"]))
        self.folder.mkdir(parents=True, exist_ok=True)
        mapped = torch.from_file(str(self._file(call, row["turn"])), shared=True, size=size, dtype=dtype)
        return mapped.view(row["shape"])

    def put(self, layer: int, call: int, output: Any) -> tuple[dict[str, Any], Any] | None:
        """Write what a decoder layer (or, as layer -1, the embedding) gave for a pass.

        Returns:
            The row for `save`, and the same output in memory of the file's; None where it is more than hidden states.

        Raises:
            MoecoverError: the disk is full or the folder cannot be written.
        """
        import torch

        hidden = output[0] if isinstance(output, tuple) else output
        alone = not isinstance(output, tuple) or all(part is None for part in output[1:])
        if not isinstance(hidden, torch.Tensor) or not alone:
            return None
        form = len(output) if isinstance(output, tuple) else 0
        row = {"shape": list(hidden.shape), "dtype": str(hidden.dtype).removeprefix("torch."), "form": form, "turn": layer % 2 if layer >= 0 else 2}  # fmt: skip
        with explained(f"writing {self.folder}", left="What was done before is used when the same command runs again"):
            mapped = self._mapped(call, row)
            mapped.copy_(hidden)
        return row, _formed(mapped, form)

    def get(self, call: int, device: torch.device) -> Any:
        """What the last layer that is done gave for a pass, from its file, on a device."""
        assert self.outputs is not None
        row = self.outputs[call]
        return _formed(self._mapped(call, row).clone().to(device), row["form"])

    def as_output(self, call: int, hidden: torch.Tensor) -> Any:
        """Hidden states in the form in which this model's decoder layers give them."""
        assert self.outputs is not None
        return _formed(hidden, self.outputs[call]["form"])


def remove(folder: Path) -> None:
    """Remove a state that is not needed any more."""
    shutil.rmtree(folder, ignore_errors=True)


def of_process(folder: Path, rank: int) -> Path:
    """Where one of several processes keeps its own state."""
    return folder.with_name(f"{folder.name}-{rank}")


def remove_all(folder: Path) -> None:
    """Remove a state and those of processes, of an earlier job of another number of them too."""
    for other in folder.parent.iterdir() if folder.parent.is_dir() else ():
        if other == folder or (other.name.startswith(f"{folder.name}-") and other.name[len(folder.name) + 1 :].isdecimal()):  # fmt: skip
            remove(other)


@contextlib.contextmanager
def kept_for_later(folder: Path) -> Iterator[None]:
    """Have an error or an interrupt of the block say that a state stays for the next run."""
    try:
        yield
    except BaseException as error:
        if (folder / FILE).exists():
            left = f"What was done is kept in {folder} and is used when the same command runs again"
            if isinstance(error, MoecoverError):
                raise type(error)(f"{error}. {left}") from error
            error.add_note(left)
        else:
            remove(folder)
        raise


def _formed(hidden: torch.Tensor, form: int) -> Any:
    return (hidden, *[None] * (form - 1)) if form else hidden


def footprint(value: Any) -> Any:
    """What containers hold, to see whether a decoder layer changes what it is handed."""
    if isinstance(value, dict):
        return tuple((key, footprint(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(footprint, value))
    return id(value)
