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

from moecover.registration import install

__version__ = "0.1.0"

install()

if TYPE_CHECKING:
    from moecover.checkpoint import prune
    from moecover.corpora import CORPORA
    from moecover.corpus import Corpus, load_corpus, load_tokenizer
    from moecover.errors import InputError, MoecoverError
    from moecover.evaluation import perplexity
    from moecover.inspection import inspect
    from moecover.masking import masked
    from moecover.model import load_model
    from moecover.planning import METHODS, plan, plan_budgets, super_experts
    from moecover.plans import LayerPlan, Plan
    from moecover.profiles import Profile
    from moecover.profiling import profile
    from moecover.registry import load_plugin
    from moecover.reporting import report
    from moecover.saliency import SALIENCIES
    from moecover.source import open_checkpoint
    from moecover.topology import Structure, Topology, read_structure
    from moecover.verification import verify

_MODULE_OF = {
    "Corpus": "corpus", "CORPORA": "corpora", "load_corpus": "corpus", "load_tokenizer": "corpus",
    "open_checkpoint": "source", "Topology": "topology", "Structure": "topology", "read_structure": "topology",
    "inspect": "inspection", "PROVEN_FAMILIES": "families", "Profile": "profiles", "load_model": "model",
    "profile": "profiling", "SALIENCIES": "saliency", "METHODS": "planning", "Plan": "plans", "plan": "planning", "plan_budgets": "planning", "super_experts": "planning", "load_plugin": "registry", "LayerPlan": "plans",
    "prune": "checkpoint", "masked": "masking", "perplexity": "evaluation", "verify": "verification",
    "report": "reporting",
    "MoecoverError": "errors", "InputError": "errors",
}  # fmt: skip

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
