"""The proof of a pruned GGUF model: compares its files with the original's byte by byte, and runs both in llama.cpp.

Every tensor must be what the kept experts' bytes make it, every other one the original's, and in the header nothing
may differ but the number of experts and the ``moecover.*`` keys. Where llama.cpp is there and loads the original, the
pruned model must give the probabilities of the masked original too, see `gguf_numeric`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moecover import rehearsal
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus
from moecover.errors import InputError
from moecover.gguf.header import Header
from moecover.llama.library import Library, load, missing
from moecover.planning.fitting import check_plan
from moecover.pruning.gguf_writer import new_numbers, plan_in
from moecover.text import Cell
from moecover.verification.gguf_numeric import Numeric, compare
from moecover.verification.repaired import changed_tensors
from moecover.verification.verify import Verification

OWN = "moecover."  # what keys of ours begin with
PROBABILITIES = "log-probabilities"


@dataclass(frozen=True, repr=False)
class GgufVerification(Verification):
    """The outcome for GGUF files; ``layers`` holds the log-probabilities alone, in nats, or nothing where none ran.

    Attributes:
        tensors: number of tensors that were compared.
        header: what differs in the headers, and whether it may: a line for each key.
        wrong_keys: of these, the keys that may not differ.
        not_run: why no model was run; empty where both were.
    """

    tensors: int = 0
    header: tuple[str, ...] = ()
    wrong_keys: tuple[str, ...] = ()
    not_run: str = ""

    def summary(self) -> str:
        if self.equal:
            return (
                f"equal: the bytes of {self.tensors} tensors are those of the original's kept experts and of all "
                f"else; in the header differ {'; '.join(self.header)}; {self._run_text()}"
            )
        reasons = [] if self.first_difference != PROBABILITIES else [self._run_text()]
        if self.changed_tensors:
            reasons.append(
                f"{len(self.changed_tensors)} of {self.tensors} tensors, the first {self.changed_tensors[0]}"
            )
        if self.wrong_keys:
            reasons.append(f"in the header {', '.join(self.wrong_keys[:5])}")
        return f"NOT equal: {'; '.join(reasons)}"

    def _run_text(self) -> str:
        """What running both gave, or why they did not run."""
        if self.not_run:
            return f"no model was run: {self.not_run}"
        on = f"{self.tokens:,} tokens of {', '.join(self.corpora)}"
        return f"log-probabilities within {self.max_abs_difference:.2g} of the masked original's on {on}"

    def rows_shown(self) -> list[dict[str, Cell]]:
        wrong = set(self.wrong_keys)
        return [{"header": line, "may differ": line.split(" ", 1)[0] not in wrong} for line in self.header]


def verify_gguf(
    model: str | Path | Structure,
    pruned: str | Path,
    *,
    corpora: Sequence[Corpus | tuple[str, str]] = (),
    libllama: str | Path | None = None,
    on_cpu: bool = False,
) -> GgufVerification:
    """Compare a pruned GGUF model with the original, in bytes and, where llama.cpp is there, in what it computes.

    Args:
        model: the original, a GGUF file or its structure.
        pruned: its first file, which `prune` wrote.
        corpora: text to run, see `verification_text`.
        libllama: the library; None for the optional dependency's, if it is installed.
        on_cpu: leave a GPU alone.

    Raises:
        InputError: a file cannot be read, they do not belong together, or text or a library was given and cannot be
            used.
    """
    original = model if isinstance(model, Structure) else read_structure(model)
    cut = read_structure(pruned)
    if original.checkpoint.gguf is None or cut.checkpoint.gguf is None:
        raise InputError(f"{original.checkpoint.name} and {pruned}: both must be GGUF files, or both folders")
    plan = plan_in(cut.checkpoint.gguf)
    try:
        check_plan(plan, original)
    except InputError as error:
        raise InputError(f"{pruned} was not pruned from {original.checkpoint.name}: {error}") from error
    parts, others = original.checkpoint.gguf.parts, cut.checkpoint.gguf.parts
    if len(parts) != len(others):
        raise InputError(f"{pruned} has {len(others)} parts, {original.checkpoint.name} has {len(parts)}")
    required = bool(corpora) or libllama is not None
    library = load(libllama) if required or not missing() else None
    _rehearse(original, cut, library)
    changed = changed_tensors(original, plan, cut.checkpoint, {}, mtp="prune")
    lines, wrong = list[str](), list[str]()
    counts = new_numbers(original, plan)
    for before, after in zip(parts, others, strict=True):
        for key, line, may in _differences(before, after, counts):
            lines.append(line)
            wrong += [] if may else [key]
        if list(before.tensors) != list(after.tensors):
            changed.append(f"(the order in {after.path.name})")
    numeric: Numeric | str = str(InputError(missing()))
    if library is not None:
        numeric = compare(original, cut, plan, library, corpora=corpora, on_cpu=on_cpu, required=required)
    run = numeric if isinstance(numeric, Numeric) else Numeric(0.0, 0, [], False)
    return GgufVerification(
        equal=not changed and not wrong and not run.fails,
        first_difference=next(iter([*changed, *wrong, *([PROBABILITIES] if run.fails else [])]), None),
        max_abs_difference=run.largest,
        changed_files=[],
        tokens=run.tokens,
        corpora=run.corpora,
        layers={PROBABILITIES: run.largest} if run.tokens else {},
        repaired=0,
        changed_tensors=changed,
        tensors=len(original.checkpoint.tensors),
        header=tuple(lines),
        wrong_keys=tuple(wrong),
        not_run=numeric if isinstance(numeric, str) else "",
    )


def _rehearse(original: Structure, cut: Structure, library: Library | None) -> None:
    """End a dry run: from here on every byte is read, then both models run where there is a library."""
    for one in (original.checkpoint, cut.checkpoint):
        rehearsal.ahead("read", one.name, num_bytes=one.num_bytes)
    rehearsal.ahead("run", "every byte" if library is None else "every byte; both models in llama.cpp")
    rehearsal.stop()


def _differences(before: Header, after: Header, numbers: dict[str, int]) -> Iterator[tuple[str, str, bool]]:
    """Keys that differ, each with a line that begins with it and whether it may."""
    if before.version != after.version or before.alignment != after.alignment:
        yield "version", f"version {before.version} -> {after.version}, alignment {after.alignment}", False
    for key in {**before.fields, **after.fields}:
        if key not in after.fields:
            yield key, f"{key} is missing", False
        elif key not in before.fields:
            yield key, f"{key} is new", key.startswith(OWN)
        elif before.raw(key) != after.raw(key):
            old, new = before.values.get(key), after.values.get(key)
            same_kind = before.fields[key].kind == after.fields[key].kind
            may = key.startswith(OWN) or (key in numbers and numbers[key] == new and same_kind)
            yield key, f"{key} {_short(old)} -> {_short(new)}", may


def _short(value: object) -> str:
    text = "(an array)" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
