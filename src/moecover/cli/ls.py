"""The verb `ls`: what can be named on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from moecover.cli.options import add_plugin, load_plugins
from moecover.cli.verb import Outcome

HELP = "list methods, saliencies, merges, corpora or families"
Rows = list[dict[str, str]]


def methods() -> Rows:
    """Selection methods."""
    from moecover.planning.methods import METHODS

    return [{"name": m.name, "summary": m.summary, "source": m.paper} for m in METHODS.values()]


def saliencies() -> Rows:
    """Saliencies."""
    from moecover.planning.saliency import SALIENCIES

    return [{"name": row["name"], "summary": row["summary"], "source": row["paper"]} for row in SALIENCIES.rows()]


def merges() -> Rows:
    """Merges of the experts that are dropped."""
    from moecover.merging.methods import MERGES

    return [{"name": m.name, "summary": m.summary, "source": m.paper} for m in MERGES.values()]


def corpora() -> Rows:
    """Named corpora."""
    from moecover.corpora.sources import CORPORA

    return [
        {
            "name": name,
            "summary": row.summary,
            "source": ", ".join(filter(None, (row.address, row.licence))),
        }
        for name, row in CORPORA.items()
    ]


def families() -> Rows:
    """Model types, the proven ones first, then those that are refused."""
    from moecover.checkpoints.deepseek.registration import ALIASES
    from moecover.checkpoints.families import PROVEN_FAMILIES, PROVEN_WITH, UNSUPPORTED, WHOLE_EXPERTS_ONLY

    source = {name: f"another name of {known}, " for name, known in ALIASES.items()}
    by = f"proven with transformers {PROVEN_WITH}"
    whole = {name: f"; whole experts only: {reason}" for name, reason in WHOLE_EXPERTS_ONLY.items()}
    proven = [
        {"name": name, "summary": routing + whole.get(name, ""), "source": source.get(name, "") + by}
        for name, routing in PROVEN_FAMILIES.items()
    ]
    return proven + [{"name": name, "summary": reason, "source": "refused"} for name, reason in UNSUPPORTED.items()]


LISTS: dict[str, Callable[[], Rows]] = {
    "methods": methods,
    "saliencies": saliencies,
    "merges": merges,
    "corpora": corpora,
    "families": families,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("what", choices=tuple(LISTS))
    add_plugin(parser)


def run(args: argparse.Namespace) -> Outcome:
    """Print a line for each."""
    load_plugins(args)
    rows = LISTS[args.what]()
    width = max(len(row["name"]) for row in rows) + 2
    lines = [
        f"{row['name']:{width}}{row['summary']}" + (f"  [{row['source']}]" if row["source"] else "") for row in rows
    ]
    return Outcome(rows, "\n".join(lines))
