"""Every stage from Python, on a model of your own: `python examples/pipeline.py MODEL OUT`.

MODEL is a local folder or a hub id. Each function shows its progress; pass ``progress=False`` for silence.
"""

from __future__ import annotations

import sys
from pathlib import Path

import moecover


def main(model: str, out: Path) -> None:
    """Profile, plan, explain, repair, prune, verify, evaluate."""
    facts = moecover.inspect(model)
    print(facts)  # noqa: T201

    texts = ["encyclopedia", "web"]
    profile = moecover.profile(model, texts, output=out / "profile", sequences=16)
    plan = moecover.plan(profile, retain=0.5, saliency="reap", protect=0.5)
    plan.save(out / "plan.json")
    print(moecover.explain(plan, profile=profile).text())  # noqa: T201

    repaired = moecover.repair(model, plan, texts, kind="ridge", tokens=4096, sequences=16)
    pruned = moecover.prune(model, plan, out / "half", repaired=repaired)
    proof = moecover.verify(model, pruned.output)
    if not proof.equal:
        raise SystemExit(f"first difference at {proof.first_difference}")

    found = moecover.evaluate(model, {"half": plan}, texts=["encyclopedia-heldout"], windows=16)
    for row in found.rows:
        print(row.name, row.keep, {name: text.perplexity for name, text in row.perplexity.items()})  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
