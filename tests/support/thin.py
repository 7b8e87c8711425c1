"""Plans that keep some channels of some experts, and the original with the others zeroed, by other means than ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from moecover.checkpoints.structure import Structure
from moecover.planning.artifact import LayerPlan, Plan


def random_shape(structure: Structure, width: int, *, keep: int | None = None, seed: int = 0) -> Plan:
    """A plan of random experts, half of them by default, as many of every router group, and random channels."""
    assert not isinstance(structure.width, str)
    topology, channels, rng = structure.topology, structure.width.channels, np.random.default_rng(seed)
    keep = topology.num_experts // 2 if keep is None else keep
    groups = np.arange(topology.num_experts).reshape(topology.num_groups, -1)
    layers = []
    for decoder_layer in topology.decoder_layers:
        kept = sorted(int(e) for group in groups for e in rng.choice(group, keep // len(groups), replace=False))
        sets = [sorted(rng.choice(channels, width, replace=False).tolist()) for _ in kept]
        layers.append(LayerPlan(decoder_layer=decoder_layer, kept=kept, channels=sets))
    return Plan(schema=1, keep=keep, width=width, layers=layers)


@contextlib.contextmanager
def channels_zeroed(model: torch.nn.Module, structure: Structure, plan: Plan) -> Iterator[None]:
    """What leaves the gate of every expert is zero in the channels that a plan drops; no weight is touched.

    The library's grouped kernel sorts its pairs by expert: that, and nothing of how weights are stored, is used here.
    """
    assert not isinstance(structure.width, str)
    with contextlib.ExitStack() as undo:
        for name, layer in zip(structure.experts_modules, plan.layers, strict=True):
            experts = model.get_submodule(name)
            stay = torch.zeros(structure.topology.num_experts, structure.width.channels)
            for expert, ids in zip(layer.kept, layer.channels, strict=True):
                stay[expert, ids] = 1
            seen: list[torch.Tensor] = []

            def before(module, args, *, seen=seen):
                seen[:] = [torch.sort(args[1].reshape(-1)).values]

            last = "_apply_gate" if experts.has_gate else "act_fn"  # before the down projection

            own = getattr(experts, last)

            def gated(given, *, own=own, seen=seen, stay=stay):
                return own(given) * stay[seen[0]].to(given.dtype)

            undo.callback(experts.register_forward_pre_hook(before).remove)
            experts.__dict__[last] = gated
            undo.callback(experts.__dict__.pop, last)
        yield
