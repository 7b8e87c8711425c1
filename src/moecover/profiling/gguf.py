"""The profile of a GGUF model: runs corpora through llama.cpp, gives the same statistics as a pass of transformers.

Sequence after sequence runs in chunks of `CHUNK` tokens, without the language-model head; the sums are added up and
saved as in `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from moecover.checkpoints.stamps import stamps
from moecover.checkpoints.structure import Structure
from moecover.corpora.packing import Corpus
from moecover.llama.model import Model, Session
from moecover.profiling.artifact import Profile
from moecover.profiling.collecting import collected
from moecover.profiling.gguf_taps import GgufTaps, width_in
from moecover.profiling.records import Settings, model_record
from moecover.profiling.run import check_names
from moecover.profiling.statistics import STATISTICS
from moecover.profiling.sums import Sums
from moecover.profiling.wide import WIDE
from moecover.runtime.finite import naming
from moecover.runtime.pass_state import State
from moecover.version import VERSION, library_versions


def profile_gguf(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    model: Model,
    batch_size: int = 4,
    state: Path | None = None,
    advance: Callable[[int], None] = lambda tokens: None,
    say: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Profile a GGUF model on several corpora, each of which keeps its own statistics.

    Args:
        structure: the file.
        corpora: in the model's tokens, with distinct names.
        model: opened in llama.cpp.
        batch_size: sequences between two saves of the state.
        state: folder for the state from which an interrupted pass resumes; to be removed when the profile is saved.
        advance: called with the number of tokens that have been processed.
        say: receives lines of log.

    Raises:
        InputError: names that repeat, an architecture whose experts llama.cpp does not show, or numbers that are not
            finite.
        MoecoverError: llama.cpp gives up, or the disk is full.
    """
    import torch

    check_names(corpora)
    width, threads = width_in(structure), torch.get_num_threads()
    cpu = torch.device("cpu")
    sums = {c.name: Sums(structure.topology, cpu, -(-len(c.tokens) // batch_size), width) for c in corpora}
    resumed = None
    if state is not None:
        resumed = State(state, _depends_on(structure, corpora, model, batch_size, threads), say=say)
        resumed.restore(sums)
    taps = GgufTaps(model.library, structure)
    longest = max(int(corpus.mask.sum(1).max()) for corpus in corpora)
    with model.session(longest, threads=threads, watch=taps.recorder) as session:
        _run(session, taps, corpora, sums, batch_size, resumed, advance)
    for one in sums.values():
        one.finish()
    settings = _settings(structure, model, batch_size, threads)
    return collected(structure.topology, corpora, sums, model_record(structure), settings)


def _depends_on(
    structure: Structure, corpora: Sequence[Corpus], model: Model, batch_size: int, threads: int
) -> dict[str, object]:
    """What the statistics depend on, by the name that messages use."""
    return {
        "model": structure.model_fingerprint,
        "weights": stamps(structure),
        "corpora": [(c.name, [c.record]) for c in corpora],
        "batch size": batch_size,
        "threads": threads,
        "llama.cpp": model.library.version,
        "statistics": [*STATISTICS, *WIDE],
        "version": VERSION,
    }


def _run(
    session: Session,
    taps: GgufTaps,
    corpora: Sequence[Corpus],
    sums: Mapping[str, Sums],
    batch_size: int,
    state: State | None,
    advance: Callable[[int], None],
) -> None:
    """Run all batches that the state does not have."""
    jobs = [(corpus, start) for corpus in corpora for start in range(0, len(corpus.tokens), batch_size)]
    for done, (corpus, start) in enumerate(jobs):
        for row in range(start, min(start + batch_size, len(corpus.tokens))):
            tokens = corpus.tokens[row][corpus.mask[row]]
            if state is not None and done < state.done:
                advance(len(tokens))
                continue
            with naming(f"corpus {corpus.name}, block {row}"):
                for _, logits in session.run(tokens):
                    taps.recorder.check()
                    sums[corpus.name].add(taps.taps, 0, start // batch_size)
                    advance(len(logits))
        if state is not None and done >= state.done and (state.due() or done + 1 == len(jobs)):
            state.save(done + 1, len(jobs), "batches", sums)


def _settings(structure: Structure, model: Model, batch_size: int, threads: int) -> Settings:
    return {
        "batch_size": batch_size,
        "dtype": str(structure.quantised),
        "device": "llama.cpp",
        "experts": "mul_mat_id",
        "threads": threads,
        "versions": {**library_versions(), "llama.cpp": model.library.version},
    }
