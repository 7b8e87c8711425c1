"""What an evaluation says beside its numbers: reads texts, plans and results, says one line each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.evaluation.artifact import FULL, Evaluation
from moecover.evaluation.run import overlaps
from moecover.evaluation.task_scores import cut_text
from moecover.planning.artifact import Plan
from moecover.progress import Progress


def note_overlaps(texts: Sequence[Corpus], plans: Mapping[str, Plan], structure: Structure, progress: Progress) -> None:
    """Say where calibration text is in the text that is measured on."""
    for text in texts:
        note_overlap(f"the text {text.name}", "perplexity", overlaps(text, plans, structure), structure, progress)


def note_overlap(
    what: str, measure: str, by_row: Mapping[str, float], structure: Structure, progress: Progress
) -> None:
    """Say how much of a text or a task is in the calibration text of every row; ``measure`` says what is in doubt."""
    for row, share in by_row.items():
        name = structure.checkpoint.name if row == FULL else row
        progress.say(
            f"note: {share:.0%} of {what} is also in the calibration text of {name}: its {measure} says little about "
            "other text"
        )


def note_cuts(found: Evaluation, progress: Progress) -> None:
    """Say of which tasks items were cut."""
    for name, record in found.tasks.items():
        if cut := record.get("cut"):
            progress.say(f"note: {cut_text(name, cut, record['items'])}")


def note_skips(found: Evaluation, progress: Progress) -> None:
    """Say how many experts a token uses where it skips some."""
    top_k = found.model["top_k"]
    for row in found.rows:
        if row.plan is not None and (skip := row.plan.get("skip")) is not None:
            whole = row.plan.get("top_k", top_k)
            progress.say(
                f"{row.name}: {skip['active']:.2f} of {whole} experts a token on average, "
                f"on {skip['tokens']:,} tokens of {skip['text']}"
            )
