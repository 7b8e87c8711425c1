"""Makes a sparse Mixture-of-Experts language model smaller by removing whole routed experts.

The data flow is corpus -> profile -> plan -> checkpoint -> evaluation -> report:

    import moecover

    structure = moecover.read_structure("path/to/model")          # configuration and headers only
    corpora = [moecover.load_corpus(name, structure=structure) for name in ("wikitext2", "c4")]
    profile = moecover.profile(structure, corpora)                # one forward pass over each corpus
    plan = moecover.plan(profile, method="tb-coverage", retain=0.5)
    moecover.prune(structure, plan, "path/to/output")             # raw byte ranges, the model is not loaded
    assert moecover.verify("path/to/model", "path/to/output")["equal"]

Names are loaded when they are first used, so that ``import moecover`` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moecover.checkpoints.deepseek.registration import install

__version__ = "0.1.0"

install()

if TYPE_CHECKING:
    from moecover.checkpoints.inspection import inspect
    from moecover.checkpoints.source import open_checkpoint
    from moecover.checkpoints.structure import Structure, read_structure
    from moecover.checkpoints.topology import Topology
    from moecover.corpora.packing import Corpus, load_corpus, load_tokenizer
    from moecover.corpora.sources import CORPORA
    from moecover.errors import InputError, MoecoverError
    from moecover.evaluation.run import perplexity
    from moecover.planning.artifact import LayerPlan, Plan
    from moecover.planning.masking import masked
    from moecover.planning.methods import METHODS
    from moecover.planning.run import plan, plan_budgets
    from moecover.planning.saliency import SALIENCIES
    from moecover.planning.super_experts import super_experts
    from moecover.profiling.artifact import Profile
    from moecover.profiling.run import profile
    from moecover.pruning.writer import prune
    from moecover.registry import load_plugin
    from moecover.reporting.page import report
    from moecover.runtime.loading import load_model
    from moecover.verification.verify import verify

_MODULE_OF = {
    "Corpus": "corpora.packing",
    "CORPORA": "corpora.sources",
    "load_corpus": "corpora.packing",
    "load_tokenizer": "corpora.packing",
    "open_checkpoint": "checkpoints.source",
    "Topology": "checkpoints.topology",
    "Structure": "checkpoints.structure",
    "read_structure": "checkpoints.structure",
    "inspect": "checkpoints.inspection",
    "PROVEN_FAMILIES": "checkpoints.families",
    "Profile": "profiling.artifact",
    "load_model": "runtime.loading",
    "profile": "profiling.run",
    "SALIENCIES": "planning.saliency",
    "METHODS": "planning.methods",
    "Plan": "planning.artifact",
    "plan": "planning.run",
    "plan_budgets": "planning.run",
    "super_experts": "planning.super_experts",
    "load_plugin": "registry",
    "LayerPlan": "planning.artifact",
    "prune": "pruning.writer",
    "masked": "planning.masking",
    "perplexity": "evaluation.run",
    "verify": "verification.verify",
    "report": "reporting.page",
    "MoecoverError": "errors",
    "InputError": "errors",
}

__all__ = [
    "CORPORA",
    "METHODS",
    "PROVEN_FAMILIES",
    "SALIENCIES",
    "Corpus",
    "InputError",
    "LayerPlan",
    "MoecoverError",
    "Plan",
    "Profile",
    "Structure",
    "Topology",
    "inspect",
    "load_corpus",
    "load_model",
    "load_plugin",
    "load_tokenizer",
    "masked",
    "open_checkpoint",
    "perplexity",
    "plan",
    "plan_budgets",
    "profile",
    "prune",
    "read_structure",
    "report",
    "super_experts",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moecover' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moecover.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
