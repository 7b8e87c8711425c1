"""Where the numbers come from: the records of models, corpora, texts and tasks as lists of terms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import JsonValue

from moecover.profiling.artifact import Profile
from moecover.reporting.blocks import Record
from moecover.reporting.data import Run
from moecover.reporting.findings import ModelFindings
from moecover.reporting.numbers import plain, size

UNREAD = ("sketch",)  # of a text, what finds overlaps with others
RawRecord = Mapping[str, JsonValue]


def provenance_of(
    run: Run, models: Sequence[ModelFindings], corpora: Mapping[str, RawRecord]
) -> dict[str, list[Record]]:
    """The records by heading: models, calibration corpora, texts and tasks; headings without records are left out."""
    groups = {
        "Models": records_of({m.name: m.about for m in models}, left_out=("num_bytes_by_keep",)),
        "Calibration corpora": records_of(corpora),
        "Perplexity texts": records_of(run.texts),
        "Tasks": records_of(run.tasks),
    }
    return {heading: records for heading, records in groups.items() if records}


def records_of(records: Mapping[str, RawRecord], *, left_out: Sequence[str] = ()) -> list[Record]:
    """Records by name as lists of terms, without the entries ``left_out`` and those that no person reads."""
    skipped = ("name", *UNREAD, *left_out)
    return [
        Record(name, tuple((key.replace("_", " "), _entry(key, v)) for key, v in record.items() if key not in skipped))
        for name, record in records.items()
    ]


def _entry(key: str, value: JsonValue) -> str:
    return size(value) if key.endswith("_bytes") and isinstance(value, int) else plain(value)


def calibration_corpora(profiles: Iterable[Profile]) -> dict[str, RawRecord]:
    """The records of the calibration corpora by name; further samples of a corpus are numbered."""
    records: dict[str, RawRecord] = {}
    for profile in profiles:
        for corpus, samples in profile.corpora.items():
            for record in samples:
                if record not in records.values():
                    earlier = sum(name == corpus or name.startswith(f"{corpus}, sample ") for name in records)
                    records[f"{corpus}, sample {earlier + 1}" if earlier else corpus] = record
    return records
