"""The experts in quantisation settings get their new ids: reads names and patterns in JSON, gives the edited JSON.

One grammar serves the settings of all quantisers (lists of modules to leave out or to convert, overrides by module,
targets of groups), wherever a name stands, as a value or as a key:

- A name with its layer gets the expert's new id, or goes with it.
- A name without a layer (of a block, as in GPTQ's ``modules_in_block_to_quantize``) stands for all layers. The ids that
  are listed alike become the ids that those experts have in the output, where that is the same in every layer: if all
  experts are listed, the ids below the number of kept experts stay.
- A pattern (`patterns`) is judged by the names in the checkpoint that it matches: it stays where it matches the same
  modules in the output, becomes one for the new ids, or is replaced by what names exactly those modules.

What cannot be rewritten exactly is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import regex

from moecover.checkpoints.names import EXPERT, expert_number, layer_number
from moecover.checkpoints.patterns import Pattern, any_of, pattern_of, split_prefix, substituted
from moecover.errors import InputError

# A name of a module or tensor of one expert: layer number and expert number; dots may be escaped.
EXPERT_NAME = re.compile(r"(\d+)(\\?\.(?:[^.\\]+\\?\.)*?experts\\?\.)(\d+)(?!\d)")
BLOCK_NAME = re.compile(r"(?<!\w)(experts\\?\.)(\d+)(?!\d)")
ROOTS = (("model.", ""), ("", "model."), ("", "language_model."), ("model.language_model.", "language_model.model."))
BLOCK_KEYS = ("modules_in_block_to_quantize", "inside_layer_modules", "layer_modules")
LEAVES = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")  # where the files have no such names

# A name, the layer number and the expert id in it -> the new id; None if that expert is removed.
NewId = Callable[[str, int, int], int | None]


@dataclass(frozen=True)
class Renumbering:
    """What becomes of the experts' names.

    Attributes:
        new_id: the new id of an expert.
        layers: decoder index of every MoE layer.
        experts: experts per layer before.
        tensors: names of the checkpoint's tensors.
    """

    new_id: NewId
    layers: tuple[int, ...]
    experts: int
    tensors: tuple[str, ...]

    @functools.cached_property
    def modules(self) -> dict[str, str | None]:
        """Names of all tensors and modules before -> after, None for those of removed experts."""
        names = dict[str, None]()
        for tensor in [*self.tensors, *self._not_in_files()]:
            parts = tensor.split(".")
            names.update(dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1)))
        return {name: self._after(name) for name in names}

    def styles(self) -> Iterator[dict[str, str | None]]:
        """The modules by their names in the files, and as other programs name them: with other roots."""
        yield self.modules
        for old, new in ROOTS:
            changed = {name.removeprefix(old): after for name, after in self.modules.items() if name.startswith(old)}
            yield {new + name: after and new + after.removeprefix(old) for name, after in changed.items()}

    def _not_in_files(self) -> Iterator[str]:
        """Names of single experts' modules where the files stack the experts of a layer."""
        if any(expert_number(name) is not None for name in self.tensors):
            return
        stacks = dict.fromkeys(name.partition(".experts.")[0] for name in self.tensors if ".experts." in name)
        for stack in stacks:
            yield from (f"{stack}.experts.{e}.{leaf}" for e in range(self.experts) for leaf in LEAVES)

    def _after(self, name: str) -> str | None:
        one = expert_number(f"{name}.")
        if one is None:
            return name
        new = self.new_id(name, layer_number(name), one)
        return None if new is None else EXPERT.sub(f".experts.{new}.", f"{name}.", count=1)[:-1]

    def new_ids(self, ids: Iterable[int]) -> list[set[int]]:
        """The new ids that experts have, layer by layer; removed ones have none."""
        old = list(ids)
        found = ({self.new_id("", layer, e) for e in old} for layer in self.layers)
        return [{i for i in of_layer if i is not None} for of_layer in found]


def renumbered(value: Any, how: Renumbering) -> Any:
    """A JSON value in which strings and keys that name experts name them by their new ids.

    Args:
        value: quantisation settings.
        how: what becomes of the experts.

    Raises:
        InputError: a name or pattern cannot be rewritten so that it means the same modules.
    """
    return _Settings(how).of(value, "")


@dataclass
class _Settings:
    """One pass over settings."""

    how: Renumbering

    def of(self, value: Any, key: str) -> Any:
        """The edited value under a key."""
        if isinstance(value, str):
            found = self.names(value, key, {})
            if len(found) > 1:
                raise _refused(value, "a list of names would have to take its place")
            return found[0] if found else None
        if isinstance(value, list):
            return self.listed(value, key, _block_ids(value))
        if isinstance(value, dict):
            alike = _block_ids(list(value.items()))
            edited: dict[str, Any] = {}
            for name, old in value.items():
                new = self.of(old, name)
                if new is not None or old is None:
                    for again in self.names(name, key, alike, said=old):
                        edited.setdefault(again, new)
            return edited
        return value

    def listed(self, values: list[Any], key: str, alike: dict[str, set[int]]) -> list[Any]:
        """The edited list; ``alike`` holds the ids that are listed for every name of a block."""
        edited, seen = list[Any](), set[str]()
        for item in values:
            if isinstance(item, str):
                new_names = [name for name in self.names(item, key, alike) if name not in seen]
                seen.update(new_names)
                edited += new_names
            elif isinstance(item, list):
                inner = self.listed(item, key, alike)
                edited += [inner] if inner or not item else []
            elif (new := self.of(item, key)) is not None or item is None:
                edited.append(new)
        return edited

    def names(self, text: str, key: str, alike: dict[str, set[int]], *, said: object = None) -> list[str]:
        """What takes the place of one text; nothing if it names removed experts only."""
        if (pattern := pattern_of(text)) is not None:
            return self.patterns(pattern)
        if (match := EXPERT_NAME.search(text)) is not None:
            new = self.how.new_id(_bare(text), int(match[1]), int(match[3]))
            return [] if new is None else [f"{text[: match.start(3)]}{new}{text[match.end(3) :]}"]
        if (match := BLOCK_NAME.search(text)) is not None:
            return self.of_block(text, match, key, alike.get(_block_key(text, match, said), {int(match[2])}))
        return [text]

    def of_block(self, text: str, match: re.Match[str], key: str, ids: set[int]) -> list[str]:
        """The names for one name without a layer, of those that name ``ids`` alike."""
        after = self.how.new_ids(ids)
        if all(new == after[0] for new in after):
            place = sorted(ids).index(int(match[2]))
            new = sorted(after[0])[place : place + 1]
            return [f"{text[: match.start(2)]}{i}{text[match.end(2) :]}" for i in new]
        name = _bare(text)
        modules = {old: new for old, new in self.how.modules.items() if old == name or old.endswith(f".{name}")}
        if key in BLOCK_KEYS or not modules or split_prefix(text)[0]:
            raise _refused(text, "it names experts without their layer, and other ones stay in every layer")
        return [new for new in modules.values() if new is not None]

    def patterns(self, pattern: Pattern) -> list[str]:
        """What takes the place of a pattern."""
        try:
            modules, matches = self.matched(pattern)
        except (regex.error, OverflowError) as error:
            if "experts" not in pattern.body:
                return [pattern.text]
            raise _refused(pattern.text, f"it is no regular expression ({error})") from error
        old = [name for name in modules if matches(name)]
        named = [name for name in old if expert_number(f"{name}.") is not None]
        new = [name for name in modules.values() if name is not None]
        wanted = {after for name in old if (after := modules[name]) is not None}
        if {name for name in new if matches(name)} == wanted and (wanted or not named):
            return [pattern.text]
        if not wanted:
            return []
        for way in self.ways(pattern, modules, named):
            if set(filter(any_of(way), new)) == wanted:
                return [one.text for one in way]
        if pattern.regex:
            return [pattern.with_body(_any_of(wanted)).text]
        return _one_by_one(wanted, new)

    def matched(self, pattern: Pattern) -> tuple[dict[str, str | None], Callable[[str], object]]:
        """The modules, named as a pattern names them, and the function that says which match.

        Raises:
            regex.error: it is no valid regular expression.
        """
        matches = pattern.matcher()
        for modules in self.how.styles():
            if any(matches(name) for name in modules):
                return modules, matches
        return self.how.modules, matches

    def ways(self, pattern: Pattern, modules: dict[str, str | None], named: list[str]) -> Iterator[list[Pattern]]:
        """Patterns for the new ids, which may match what the pattern did."""
        by_layer: dict[int, set[int]] = {}
        for name in named:
            by_layer.setdefault(layer_number(name), set())
            if (after := modules[name]) is not None:
                by_layer[layer_number(name)].add(int(str(expert_number(f"{after}."))))
        sets = list(by_layer.values())
        if sets and all(ids == sets[0] for ids in sets):
            yield from substituted(pattern, sets[0])


def _bare(text: str) -> str:
    """The name in a text, without escapes, anchors and the mark of a regular expression."""
    return split_prefix(text)[1].removeprefix("^").removesuffix("$").replace("\\.", ".")


def _any_of(names: Iterable[str]) -> str:
    """A regular expression for exactly these names, those of the experts of a layer together."""
    ids: dict[tuple[str, str], list[str]] = {}
    for name in names:
        stem, experts, rest = name.partition(".experts.")
        number, dot, leaf = rest.partition(".")
        place = (stem + experts, dot + leaf) if experts and number.isdigit() else (name, "")
        ids.setdefault(place, []).append(number if place[0] != name else "")
    leaves: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (stem, leaf), numbers in ids.items():
        leaves.setdefault((stem, tuple(sorted(numbers, key=lambda n: (len(n), n)))), []).append(leaf)
    found = [re.escape(stem) + _one_of(numbers) + _one_of(sorted(of)) for (stem, numbers), of in leaves.items()]
    return f"(?:{'|'.join(sorted(found))})$"


def _one_by_one(wanted: set[str], names: Iterable[str]) -> list[str]:
    """Shell patterns for exactly the wanted ones of some names: an expert and all in it, or the names themselves."""
    found = list[str]()
    experts: dict[str, list[str]] = {}
    for name in names:
        stem, _, rest = name.partition(".experts.")
        number = rest.partition(".")[0]
        if number.isdigit():
            experts.setdefault(f"{stem}.experts.{number}", []).append(name)
        elif name in wanted:
            found.append(name)
    for expert, members in experts.items():
        inside = [name for name in members if name in wanted]
        found += [expert, f"{expert}.*"] if len(inside) == len(members) else inside
    return found


def _one_of(texts: Iterable[str]) -> str:
    escaped = [re.escape(text) for text in texts]
    return escaped[0] if len(escaped) == 1 else f"(?:{'|'.join(escaped)})"


def _block_ids(values: list[Any]) -> dict[str, set[int]]:
    """The ids that names without a layer have in a list, or in the items of an object, for every such name."""
    alike: dict[str, set[int]] = {}
    for value in values:
        if isinstance(value, list):
            for name, ids in _block_ids(value).items():
                alike.setdefault(name, set()).update(ids)
            continue
        text, said = value if isinstance(value, tuple) else (value, None)
        if isinstance(text, str) and EXPERT_NAME.search(text) is None and (match := BLOCK_NAME.search(text)):
            alike.setdefault(_block_key(text, match, said), set()).add(int(match[2]))
    return alike


def _block_key(text: str, match: re.Match[str], said: object) -> str:
    """The same text for all experts, and for all that is said of them."""
    return f"{text[: match.start(2)]}#{text[match.end(2) :]} {json.dumps(said, sort_keys=True)}"


def _refused(text: str, why: str) -> InputError:
    return InputError(
        f"the quantisation settings name experts by {text!r}, which cannot be renumbered: {why}. "
        "Write out the names with their layers"
    )
