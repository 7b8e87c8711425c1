"""Makes a sparse Mixture-of-Experts language model smaller by removing whole routed experts.

The data flow is corpus -> profile -> plan -> checkpoint -> evaluation:

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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from moecover.checkpoint import prune
    from moecover.corpus import CORPORA, Corpus, load_corpus, load_tokenizer
    from moecover.errors import InputError, MoecoverError
    from moecover.evaluation import masked, perplexity, verify
    from moecover.planning import METHODS, Plan, plan
    from moecover.profiling import Profile, load_model, profile
    from moecover.saliency import SALIENCIES
    from moecover.source import open_checkpoint
    from moecover.topology import PROVEN_FAMILIES, Structure, Topology, inspect, read_structure

_MODULE_OF = {
    "Corpus": "corpus", "CORPORA": "corpus", "load_corpus": "corpus", "load_tokenizer": "corpus",
    "open_checkpoint": "source", "Topology": "topology", "Structure": "topology", "read_structure": "topology",
    "inspect": "topology", "PROVEN_FAMILIES": "topology", "Profile": "profiling", "load_model": "profiling",
    "profile": "profiling", "SALIENCIES": "saliency", "METHODS": "planning", "Plan": "planning", "plan": "planning",
    "prune": "checkpoint", "masked": "evaluation", "perplexity": "evaluation", "verify": "evaluation",
    "MoecoverError": "errors", "InputError": "errors",
}  # fmt: skip

__all__ = [
    "CORPORA",
    "METHODS",
    "PROVEN_FAMILIES",
    "SALIENCIES",
    "Corpus",
    "InputError",
    "MoecoverError",
    "Plan",
    "Profile",
    "Structure",
    "Topology",
    "inspect",
    "load_corpus",
    "load_model",
    "load_tokenizer",
    "masked",
    "open_checkpoint",
    "perplexity",
    "plan",
    "profile",
    "prune",
    "read_structure",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moecover' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moecover.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
