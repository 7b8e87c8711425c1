"""What users give an evaluation: held-out texts and plans, by name or as objects; reads the files that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from moecover import rehearsal
from moecover.checkpoints.structure import Structure
from moecover.corpora.arguments import source_of
from moecover.corpora.loading import load_corpora, parsed
from moecover.corpora.options import TextOptions
from moecover.corpora.packing import Corpus
from moecover.corpora.windows import WINDOWS, check_text, load_windows
from moecover.errors import InputError, arg
from moecover.evaluation.artifact import FULL
from moecover.planning.artifact import Plan, keep_all, with_top_k
from moecover.planning.fitting import check_top_k
from moecover.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SKIP_BLOCKS = 32  # of calibration text, for the thresholds of a skipping rule
Texts = Mapping[str, str | PathLike[str] | None] | Sequence[str | Corpus]
Plans = Mapping[str, Plan | str | PathLike[str]] | Sequence[str | PathLike[str]]


def parsed_texts(texts: Texts) -> dict[str, str | Corpus | None]:
    """Held-out texts by name: the file of each, None for the held-out part of a named corpus, or the text itself.

    Args:
        texts: names (``"wikitext2"``), ``"NAME=PATH"``, texts from `load_windows`, or a mapping from names to files.

    Raises:
        InputError: an unknown name, a file that does not exist or cannot be read, or a name twice.
    """
    if isinstance(texts, Mapping):
        texts = [name if path is None else f"{name}={fspath(path)}" for name, path in texts.items()]
    found: dict[str, str | Corpus | None] = {}
    for text in texts:
        name, equals, path = (text.name, "", "") if isinstance(text, Corpus) else text.partition("=")
        if name in found:
            raise InputError(f"{arg('texts', name)} is given twice")
        if isinstance(text, Corpus):
            found[name] = text
            continue
        if not equals:
            check_text(name)
        else:
            try:
                source_of(name, path)
            except InputError as error:
                raise InputError(f"{arg('texts', text)}: {error.message}") from error
        found[name] = path if equals else None
    return found


def load_texts(
    texts: Mapping[str, str | Corpus | None],
    structure: Structure,
    *,
    length: int | None = None,
    windows: int | None = None,
    bos: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress,
) -> list[Corpus]:
    """Held-out texts in windows of the model's token ids, see `load_windows`."""
    loaded = []
    for name, source in texts.items():
        if isinstance(source, Corpus):
            loaded.append(source)
            continue
        with progress.spinner(f"reading {name}"):
            text = load_windows(
                name,
                source,
                structure=structure,
                tokenizer=tokenizer,
                length=length,
                windows=windows or WINDOWS,
                bos=bos or "auto",
            )
            loaded.append(text)
        rehearsal.ahead("read", f"text {name}", tokens=text.num_tokens)
    return loaded


def with_fewer(plans: Mapping[str, Plan], top_ks: Sequence[int], structure: Structure) -> dict[str, Plan]:
    """Plans, and behind them the model itself and each plan with every number of experts per token.

    Args:
        plans: by the name of their row.
        top_ks: experts per token, at most the model's own number.
        structure: the model.

    Raises:
        InputError: a number that the model cannot have, or one twice, or two rows of one name.
    """
    found = dict(plans)
    for number in top_ks:
        check_top_k(structure, number)
        for name, plan in {FULL: keep_all(structure.topology), **plans}.items():
            if (row := f"{name} top-{number}") in found:
                raise InputError(f"{arg('top_ks', number)}: two rows are called {row!r}. Give every number once")
            found[row] = with_top_k(plan, number)
    return found


def skipping_rows(plans: Mapping[str, Plan], skip: str | Corpus, structure: Structure) -> dict[str, Plan]:
    """The rows in which tokens skip experts: of the model itself and of each plan, by name.

    Args:
        plans: by the name of their row.
        skip: calibration text of the rule.
        structure: the model.

    Raises:
        InputError: an unknown text, a token that goes to one expert only, or a plan with the name of such a row.
    """
    parsed([skip])
    if 1 in {structure.topology.top_k, *(plan.top_k for plan in plans.values())}:
        name = skip.name if isinstance(skip, Corpus) else skip
        raise InputError(f"{arg('skip', name)}: a token goes to one expert only, and none of that can be skipped")
    found = {f"{name} skip": plan for name, plan in {FULL: keep_all(structure.topology), **plans}.items()}
    if repeated := [row for row in found if row in plans]:
        raise InputError(f"two rows are called {repeated[0]!r}: rename the plan")
    return found


def skip_text(skip: str | Corpus, structure: Structure, *, bos: str | None, progress: Progress) -> Corpus:
    """The calibration text of a skipping rule.

    Args:
        skip: name, ``NAME=PATH``, or text that is loaded.
        structure: the model.
        bos: what blocks begin with.
        progress: shows the reading.
    """
    options: TextOptions = {} if isinstance(skip, Corpus) else {"sequences": SKIP_BLOCKS, "bos": bos}
    (found,) = load_corpora([skip], structure, options, progress=progress)
    return found


def named_plans(plans: Plans) -> dict[str, Plan]:
    """Plans by the name of their row: that of the file, with its folder's where two are alike.

    Raises:
        InputError: a file that is no plan, or two plans of one name.
    """
    if isinstance(plans, Mapping):
        return {name: plan if isinstance(plan, Plan) else Plan.load(Path(plan)) for name, plan in plans.items()}
    paths = [Path(path) for path in plans]
    short = [path.stem for path in paths]
    names = [path.stem if short.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}" for path in paths]
    if len(set(names)) < len(names):
        raise InputError(f"two {arg('plan')} files have the same name: give every plan once")
    return {name: Plan.load(path) for name, path in zip(names, paths, strict=True)}
