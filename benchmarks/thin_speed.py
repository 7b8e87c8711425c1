"""Tokens a second of the full model, of fewer whole experts and of thinner ones of equal bytes, in alternation.

    python -m benchmarks.thin_speed [MODEL] [--shapes 30 40x48 60x32] [--prompt 512] [--new 64] [--batch 1] [--rounds 5]
                                    [--dtype float32] [--device auto] [--threads N] [--folder .]

MODEL is a folder, a hub id, or by default the shipped qwen2-moe-tiny. A shape is experts (30), or experts x channels of
each (40x48); without ``--shapes``, half of the routed bytes as whole experts, as three quarters of the experts, and as
all of them. Experts and channels are random: speed does not depend on which ones stay. The checkpoints are written and
loaded as any other; every round runs all of them, in another order each time. Prints for prefill (one forward pass over
the prompt) and for generation (greedy, after the prompt, its own prefill included) the median tokens a second, and the
median over rounds of the ratio to the full model of the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.checkpoints.topology import Width
from moecover.planning.artifact import LayerPlan, Plan
from moecover.planning.curve import parse_shape
from moecover.planning.keep import resolve_keep, resolve_width
from moecover.planning.shapes import Shape, shape_name
from moecover.pruning.writer import prune
from moecover.runtime.loading import load_model
from moecover.text import size_text

SHARE = 0.5  # of the routed bytes, where no shapes are given
FULL = "full model"


def shapes_of(structure: Structure, asked: list[str] | None) -> list[Shape]:
    """The shapes that are asked for, or three that take half of the routed bytes."""
    topology, width = structure.topology, structure.width
    assert isinstance(width, Width), width
    if asked:
        found = [parse_shape(text, topology, width.channels) if "x" in text else Shape(int(text)) for text in asked]
        return [shape for shape in found if isinstance(shape, Shape)]
    shapes = [Shape(resolve_keep(topology, keep=None, retain=SHARE))]
    for share in (0.75, 1.0):
        keep = resolve_keep(topology, keep=None, retain=share)
        part = SHARE * topology.num_experts / keep
        shapes.append(Shape(keep, resolve_width(width.channels, width=None, retain=part)))
    return shapes


def random_plan(structure: Structure, shape: Shape) -> Plan:
    """Random experts, as many of every group of the router, and random channels of each."""
    assert isinstance(structure.width, Width)
    topology, chance = structure.topology, np.random.default_rng(0)
    groups = np.arange(topology.num_experts).reshape(topology.num_groups, -1)
    layers = []
    for number in topology.decoder_layers:
        chosen = [chance.choice(group, shape.keep // len(groups), replace=False) for group in groups]
        kept = sorted(map(int, np.concatenate(chosen)))
        width, channels = shape.width, structure.width.channels
        sets = [] if width is None else [sorted(map(int, chance.choice(channels, width, replace=False))) for _ in kept]
        layers.append(LayerPlan(decoder_layer=number, kept=kept, channels=sets))
    return Plan(schema=1, keep=shape.keep, width=shape.width, layers=layers)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, the device's work included."""
    started = time.perf_counter()
    with torch.inference_mode():
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(models: dict[str, torch.nn.Module], prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """Tokens a second of every model, round by round: by ``prefill`` and ``generation``."""
    speeds: dict[str, dict[str, list[float]]] = {what: {n: [] for n in models} for what in ("prefill", "generation")}
    names, again = list(models), {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False}
    for turn in range(-1, args.rounds):  # the first warms up
        for name in [names[(turn + i) % len(names)] for i in range(len(names))]:
            model = models[name]
            device, ids = prompt.device, torch.ones_like(prompt)
            prefill = seconds(lambda model=model: model(input_ids=prompt, use_cache=False), device)
            generation = seconds(
                lambda model=model, ids=ids: model.generate(prompt, attention_mask=ids, **again), device
            )
            if turn >= 0:
                speeds["prefill"][name].append(prompt.numel() / prefill)
                speeds["generation"][name].append(args.batch * args.new / generation)
    return speeds


def main() -> None:
    """Write, load, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="folder or hub id (default: the shipped qwen2-moe-tiny)")
    parser.add_argument("--shapes", nargs="+", help="such as 30 40x48 60x32")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated after it")
    parser.add_argument("--batch", type=int, default=1, help="prompts at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--folder", type=Path, default=Path(), help="scratch folder for the checkpoints")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    structure = read_structure(args.model or shipped_model("qwen2-moe-tiny"))
    models, sizes = {FULL: load_model(structure, dtype=args.dtype, device=args.device)}, {}
    sizes[FULL] = structure.checkpoint.num_bytes
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        for shape in shapes_of(structure, args.shapes):
            name = shape_name(shape.keep, shape.width)
            cut = read_structure(prune(structure, random_plan(structure, shape), Path(scratch) / name))
            models[name] = load_model(cut, dtype=args.dtype, device=args.device)
            sizes[name] = cut.checkpoint.num_bytes
        device, vocabulary = next(models[FULL].parameters()).device, structure.checkpoint.text_config["vocab_size"]
        prompt = torch.randint(0, vocabulary, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
        speeds = measure(models, prompt.to(device), args)
    print(f"{args.batch} x {args.prompt} tokens, {args.new} new, {args.dtype} on {device}, {args.rounds} rounds")
    print(f"{'':16}{'size':>10}" + "".join(f"{what + ', tokens/s':>24}{'over full':>12}" for what in speeds))
    for name, size in sizes.items():
        cells = ""
        for of_model in speeds.values():
            ratios = [one / full for one, full in zip(of_model[name], of_model[FULL], strict=True)]
            cells += f"{statistics.median(of_model[name]):24.1f}{statistics.median(ratios):12.2f}"
        print(f"{name:16}{size_text(size):>10}{cells}")


if __name__ == "__main__":
    main()
