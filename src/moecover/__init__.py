"""Makes a sparse Mixture-of-Experts language model smaller: fewer routed experts, thinner ones, refitted.

The data flow is corpus -> profile -> plan -> checkpoint -> evaluation -> report:

    import moecover

    model = "path/to/model"                                           # or a hub id, or a Structure
    profile = moecover.profile(model, ["wikitext2", "c4"])            # one forward pass over each corpus
    plan = moecover.plan(profile, retain=0.5)
    moecover.prune(model, plan, "path/to/output")                     # copies byte ranges, the model is not loaded
    assert moecover.verify(model, "path/to/output").equal             # same outputs as the masked original

Names are loaded when they are first used, so that ``import moecover`` is quick; it changes nothing in other libraries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from moecover.version import VERSION

if TYPE_CHECKING:
    from moecover.checkpoints.deepseek.registration import register_deepseek
    from moecover.checkpoints.families import PROVEN_FAMILIES
    from moecover.checkpoints.inspection import Inspection, inspect
    from moecover.checkpoints.remote_code import trust_remote_code
    from moecover.checkpoints.source import open_checkpoint
    from moecover.checkpoints.structure import Structure, read_structure
    from moecover.checkpoints.topology import Topology
    from moecover.comparison.results import Comparison
    from moecover.comparison.run import compare
    from moecover.corpora.own_text import generate
    from moecover.corpora.packing import Corpus, load_corpus
    from moecover.corpora.sources import CORPORA
    from moecover.corpora.splitting import Kinds, split
    from moecover.corpora.tokenizer import load_tokenizer
    from moecover.corpora.windows import load_windows
    from moecover.errors import InputError, MoecoverError
    from moecover.evaluation.artifact import Evaluation
    from moecover.evaluation.bounds import keep_within_size, plan_within
    from moecover.evaluation.budgets import plan_for_budget
    from moecover.evaluation.job import evaluate
    from moecover.evaluation.perplexity import perplexity
    from moecover.merging.methods import MERGES
    from moecover.planning.artifact import LayerPlan, Plan
    from moecover.planning.exchange import export_plan, import_plan
    from moecover.planning.explaining.facts import Explanation, explain
    from moecover.planning.job import plan
    from moecover.planning.masking import masked
    from moecover.planning.methods import METHODS
    from moecover.planning.options import Option
    from moecover.planning.run import plan_budgets
    from moecover.planning.saliency import SALIENCIES
    from moecover.planning.super_experts import super_experts
    from moecover.profiling.artifact import Profile
    from moecover.profiling.imatrix import imatrix_profile
    from moecover.profiling.job import merge, profile
    from moecover.progress import Progress
    from moecover.pruning.job import prune
    from moecover.pruning.request import Pruned
    from moecover.publishing.upload import Uploaded, upload
    from moecover.registry import load_plugin
    from moecover.repairing.artifact import Repaired
    from moecover.repairing.job import repair
    from moecover.reporting.page import Report, report
    from moecover.reporting.sections import SECTIONS
    from moecover.runtime.loading import load_model
    from moecover.shrinking.job import shrink
    from moecover.shrinking.request import Shrunk
    from moecover.verification.job import verify
    from moecover.verification.verify import Verification

# Every public name and its module, in the order of the data flow; a test holds the imports above against it.
PUBLIC = {
    "checkpoints.source": ("open_checkpoint",),
    "checkpoints.topology": ("Topology",),
    "checkpoints.structure": ("Structure", "read_structure"),
    "checkpoints.families": ("PROVEN_FAMILIES",),
    "checkpoints.inspection": ("Inspection", "inspect"),
    "checkpoints.deepseek.registration": ("register_deepseek",),
    "checkpoints.remote_code": ("trust_remote_code",),
    "runtime.loading": ("load_model",),
    "corpora.sources": ("CORPORA",),
    "corpora.packing": ("Corpus", "load_corpus"),
    "corpora.tokenizer": ("load_tokenizer",),
    "corpora.windows": ("load_windows",),
    "corpora.own_text": ("generate",),
    "corpora.splitting": ("Kinds", "split"),
    "profiling.artifact": ("Profile",),
    "profiling.imatrix": ("imatrix_profile",),
    "profiling.job": ("merge", "profile"),
    "planning.saliency": ("SALIENCIES",),
    "planning.options": ("Option",),
    "planning.methods": ("METHODS",),
    "planning.artifact": ("LayerPlan", "Plan"),
    "planning.super_experts": ("super_experts",),
    "planning.run": ("plan_budgets",),
    "planning.job": ("plan",),
    "planning.exchange": ("export_plan", "import_plan"),
    "planning.masking": ("masked",),
    "planning.explaining.facts": ("Explanation", "explain"),
    "merging.methods": ("MERGES",),
    "repairing.artifact": ("Repaired",),
    "repairing.job": ("repair",),
    "pruning.request": ("Pruned",),
    "pruning.job": ("prune",),
    "verification.verify": ("Verification",),
    "verification.job": ("verify",),
    "evaluation.artifact": ("Evaluation",),
    "evaluation.perplexity": ("perplexity",),
    "evaluation.job": ("evaluate",),
    "evaluation.bounds": ("keep_within_size", "plan_within"),
    "evaluation.budgets": ("plan_for_budget",),
    "shrinking.request": ("Shrunk",),
    "shrinking.job": ("shrink",),
    "publishing.upload": ("Uploaded", "upload"),
    "comparison.results": ("Comparison",),
    "comparison.run": ("compare",),
    "reporting.sections": ("SECTIONS",),
    "reporting.page": ("Report", "report"),
    "registry": ("load_plugin",),
    "progress": ("Progress",),
    "errors": ("InputError", "MoecoverError"),
}
__version__ = VERSION
_MODULE_OF = {name: module for module, names in PUBLIC.items() for name in names}

__all__ = [
    "CORPORA",
    "MERGES",
    "METHODS",
    "PROVEN_FAMILIES",
    "SALIENCIES",
    "SECTIONS",
    "Comparison",
    "Corpus",
    "Evaluation",
    "Explanation",
    "InputError",
    "Inspection",
    "Kinds",
    "LayerPlan",
    "MoecoverError",
    "Option",
    "Plan",
    "Profile",
    "Progress",
    "Pruned",
    "Repaired",
    "Report",
    "Shrunk",
    "Structure",
    "Topology",
    "Uploaded",
    "Verification",
    "compare",
    "evaluate",
    "explain",
    "export_plan",
    "generate",
    "imatrix_profile",
    "import_plan",
    "inspect",
    "keep_within_size",
    "load_corpus",
    "load_model",
    "load_plugin",
    "load_tokenizer",
    "load_windows",
    "masked",
    "merge",
    "open_checkpoint",
    "perplexity",
    "plan",
    "plan_budgets",
    "plan_for_budget",
    "plan_within",
    "profile",
    "prune",
    "read_structure",
    "register_deepseek",
    "repair",
    "report",
    "shrink",
    "split",
    "super_experts",
    "trust_remote_code",
    "upload",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'moecover' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moecover.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
