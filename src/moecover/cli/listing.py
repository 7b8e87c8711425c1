"""What can be named on the command line: reads the registries, gives rows for `ls` and the docs."""

from __future__ import annotations

from moecover.errors import InputError


def listing(what: str) -> list[dict[str, str]]:
    """Rows ``name``, ``summary``, ``source`` of methods, saliencies, corpora or families.

    Raises:
        InputError: something else.
    """
    if what == "corpora":
        from moecover.corpora.sources import CORPORA, HubCorpus

        return [
            {"name": name, "summary": row.summary, "source": (f"{row.path}, " if isinstance(row, HubCorpus) else "") + row.licence}
            for name, row in CORPORA.items()
        ]  # fmt: skip
    if what == "families":
        from moecover.checkpoints.families import PROVEN_FAMILIES, PROVEN_WITH, UNSUPPORTED

        proven = [{"name": n, "summary": routing, "source": f"proven with transformers {PROVEN_WITH}"} for n, routing in PROVEN_FAMILIES.items()]  # fmt: skip
        return proven + [{"name": n, "summary": reason, "source": "refused"} for n, reason in UNSUPPORTED.items()]
    if what == "methods":
        from moecover.planning.methods import METHODS

        rows = METHODS.rows()
    elif what == "saliencies":
        from moecover.planning.saliency import SALIENCIES

        rows = SALIENCIES.rows()
    else:
        raise InputError(f"nothing is listed under {what!r}. Allowed: methods, saliencies, corpora, families")
    return [{"name": r["name"], "summary": r["summary"], "source": r["paper"]} for r in rows]
