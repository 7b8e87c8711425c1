"""What a run of `compare` has ahead: in a line before it starts, and in a dry run what it reads, runs and writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moecover import rehearsal
from moecover.comparison.cell_files import CONFIG, DONE, stored_cell
from moecover.comparison.cells import Cell
from moecover.comparison.costs import check_fits, estimated_seconds
from moecover.comparison.jobs import ModelSetup
from moecover.comparison.models import ComparedModel
from moecover.comparison.preparing import prepare, read_text
from moecover.comparison.reading import Request
from moecover.progress import Progress
from moecover.text import counted, duration_text


def outlook(models: Sequence[ComparedModel], seconds: float | None) -> str:
    """How many cells are done, and how long the others will take."""
    total, pending = sum(len(m.cells) for m in models), sum(len(m.pending) for m in models)
    if not pending:
        return f"all {total} cells are done"
    about = "" if seconds is None else f": about {duration_text(seconds)} on this machine"
    return f"{counted(total, 'cell')}, {total - pending} done, {pending} to go{about}"


def prepare_dry(asked: Request, run: Path, models: Sequence[ComparedModel], progress: Progress) -> None:
    """Prepare the models as far as a dry run needs it: a new run has no cells to recognise, so nothing is hashed."""
    for model in models:
        if (run / CONFIG).is_file():
            prepare(asked, model, run, progress)
        else:
            read_text(asked, model, progress)
    find_pending(run, models)


def find_pending(run: Path, models: Sequence[ComparedModel]) -> list[Cell]:
    """Note which cells are pending, and how long the others took.

    Args:
        run: the run folder.
        models: prepared; cells without a fingerprint are pending.

    Returns:
        Cells that are finished and have to be recomputed, as their inputs have changed.
    """
    changed = []
    for model in models:
        for cell in model.cells:
            found = stored_cell(run, cell)
            done = found is not None and found["status"] == DONE
            if found is not None and done and found["fingerprint"] == model.fingerprints.get(cell.id):
                if (wall_s := found.get("wall_s")) is not None:
                    model.walls.append(wall_s)
                continue
            if done:
                changed.append(cell)
            model.pending.append(cell)
    return changed


def rehearse(
    asked: Request, run: Path, models: Sequence[ComparedModel], setups: Mapping[str, ModelSetup], jobs: int
) -> None:
    """End a dry run with what is ahead.

    Raises:
        InputError: see `check_fits`.
    """
    for model in models:
        check_fits(asked, model, setups[model.name])
        rehearsal.ahead("read", model.name, num_bytes=model.structure.checkpoint.num_bytes)
        for text in model.texts:
            rehearsal.ahead("read", f"{model.name}: text {text.name}", tokens=text.num_tokens)
        for (_, sample), corpora in model.samples.items():
            for corpus in corpora:
                name = f"{model.name}: corpus {corpus.name}, sample {sample}"
                rehearsal.ahead("read", name, tokens=corpus.num_tokens)
        done = len(model.cells) - len(model.pending)
        seconds = estimated_seconds([model], setups, asked.config)
        name = f"{len(model.pending)} cells of {model.name}" + (f", {done} are done" if done else "")
        rehearsal.ahead("run", name, seconds=None if seconds is None else seconds / jobs)
    rehearsal.ahead("write", run)
    rehearsal.stop()
