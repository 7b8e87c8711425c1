"""What a repair costs at real size: time and memory of a layer, and of the profiling pass over the same tokens.

    python -m benchmarks.repair_cost SCRATCH [--shape qwen1.5-moe-a2.7b] [--layers 2] [--tokens 32768]
        [--profile-tokens 32768] [--keep 30] [--kind ridge]

Random weights and tokens in the real shape (`benchmarks.full_size`), few layers, in memory. Profile and repair each run
in their own process. Prints for both the seconds of the pass (loading not counted) and the peak resident memory, and
for the repair the seconds of every layer and of its fit, and the bound that `repairing.needed_bytes` gives. All sweeps
run, whether they still reduce the error or not: on random weights convergence tells nothing about a trained model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.full_size import SHAPES, make

PASS = """
import json, sys, time
import numpy as np
import torch
from moecover.repairing import layers as repairing
from moecover.corpora.packing import make_corpus
from moecover.runtime.loading import load_model
from moecover.planning.run import plan
from moecover.planning.artifact import LayerPlan, Plan
from moecover.profiling.run import profile
from moecover.repairing.targets import places
from moecover.checkpoints.structure import read_structure

what, folder, tokens, keep = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
structure, length = read_structure(folder), 2048
rows = np.random.default_rng(0).integers(0, structure.checkpoint.config["vocab_size"], size=(tokens // length, length))
corpora = [make_corpus(n, t, np.ones_like(t, dtype=bool), {}) for n, t in zip("ab", np.array_split(rows, 2))]
model = load_model(structure)
memory = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
loaded, fits, layers, found = memory("VmRSS"), [], [], {}
started = time.perf_counter()
if what == "profile":
    profile(structure, corpora, model=model)
else:
    topology = structure.topology
    kept = sorted(np.random.default_rng(1).permutation(topology.num_experts)[:keep].tolist())
    chosen = Plan(schema=1, keep=keep, layers=[LayerPlan(decoder_layer=d, kept=kept) for d in topology.decoder_layers])
    real = repairing.fit
    def timed(*a, **k):
        before = time.perf_counter()
        try:
            return real(*a, **k)
        finally:
            fits.append(round(time.perf_counter() - before, 1))
    repairing.fit = timed
    last = started
    for one in repairing.repair_layers(model, structure, chosen, corpora, kind=what, tolerance=0.0):
        layers.append(round(time.perf_counter() - last, 1))
        last = time.perf_counter()
    fit = one.fit
    found = {"penalties": fit.penalties, "before": fit.before, "after": fit.after, "kept": len(fit.kept)}
    found["bound"] = repairing.needed_bytes(structure, places(structure, model), keep=keep, tokens=tokens, dtype="auto")
seconds = round(time.perf_counter() - started, 1)
peak = memory("VmHWM")
print(json.dumps({"seconds": seconds, "loaded": loaded, "peak": peak, "fits": fits, "layers": layers, **found}))
"""


def main() -> None:
    """Run both passes and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen1.5-moe-a2.7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument(
        "--profile-tokens", type=int, help="tokens of the profiling pass (default: as many as the repair uses)"
    )
    parser.add_argument("--keep", type=int, default=30)
    parser.add_argument("--kind", choices=("scale", "ridge"), default="ridge")
    args = parser.parse_args()
    folder = make(args.shape, args.scratch / f"{args.shape}-{args.layers}", layers=args.layers)
    seconds = {}
    for what in ("profile", args.kind):
        tokens = args.profile_tokens or args.tokens if what == "profile" else args.tokens
        command = [sys.executable, "-c", PASS, what, str(folder), str(tokens), str(args.keep)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        found = json.loads(done.stdout)
        seconds[what] = found["seconds"]
        print(
            f"{what}, {args.layers} layers, {tokens:,} tokens: {found['seconds']} s, "
            f"peak {found['peak'] / 1e9:.2f} GB of which {found['loaded'] / 1e9:.2f} GB the loaded model",
            flush=True,
        )
        if "bound" in found:
            bound = f"bound {found['bound'] / 1e9:.2f} GB; {found}"
            print(f"  layers {found['layers']} s, of which the fit {found['fits']} s; {bound}")
    print(f"repair / profile: {seconds[args.kind] / seconds['profile']:.1f}")


if __name__ == "__main__":
    main()
