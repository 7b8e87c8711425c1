"""How often the drafts of a pruned multi-token-prediction layer are accepted, by which ids it keeps.

Neither shipped model has such a layer. This trains one beside the frozen qwen2-moe-tiny, in the form of DeepSeek-V3's
and from random weights (from those of the last layer its experts would be the last layer's), to give the model's own
distribution of the token after next. Then it prunes the model with the layer. A draft is accepted where its best token
is the pruned model's own best token at that place, on held-out text, without sampling.

    python -m benchmarks.mtp_drafts FOLDER --text FILE ... [--minutes 16]

The layer is trained on the files, 1,100 blocks of 256 tokens of each; FOLDER keeps the trained model, which a second
run takes as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.shipped import shipped_model
from moecover.checkpoints.structure import Structure, read_structure
from moecover.corpora.packing import Corpus, load_corpus
from moecover.planning.run import plan
from moecover.profiling.run import profile
from moecover.pruning.writer import prune
from moecover.runtime.drafting import Drafts, load_drafts
from moecover.runtime.loading import backbone_of, load_model

LENGTH, BATCH, BLOCKS, BALANCE = 256, 4, 1100, 0.01


def configured(folder: Path) -> Path:
    """A copy of the shipped model whose configuration has one multi-token-prediction layer."""
    shutil.copytree(shipped_model("qwen2-moe-tiny"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_mtp_layers": 1, "mtp_layer_types": ["full_attention"]}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def blocks(files: list[Path], folder: Path) -> Iterator[torch.Tensor]:
    """Batches of token ids ``[BATCH, LENGTH]`` of all files, in an order of their own in every round."""
    structure = read_structure(folder)
    corpora = [load_corpus("text", f, structure=structure, sequences=BLOCKS, length=LENGTH) for f in files]
    rows = torch.cat([torch.from_numpy(corpus.tokens[corpus.mask.all(1)]) for corpus in corpora])
    print(f"{len(rows) * LENGTH:,} tokens to train on", flush=True)
    draw = torch.Generator().manual_seed(0)
    while True:
        yield from rows[torch.randperm(len(rows), generator=draw)].split(BATCH)


def uneven(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """How unevenly tokens go to experts, 1 where all get as many; ``logits`` is ``[token, expert]``."""
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(top_k).indices, 1 / top_k)
    return logits.shape[1] * (chosen.mean(0) * logits.softmax(-1).mean(0)).sum()


def trained(folder: Path, files: list[Path], minutes: float) -> None:
    """Train the layer for some minutes, and write it into the checkpoint's folder beside the other tensors."""
    from transformers.modeling_layers import MtpModel

    torch.manual_seed(0)
    structure = read_structure(folder)
    model = load_model(structure, dtype="float32")
    mtp = MtpModel(model, 1).float()
    layer, logits = mtp.layers[0], list[torch.Tensor]()
    layer.mtp_block.mlp.gate.register_forward_hook(lambda module, args, output: logits.append(output[0]))
    for parameter in mtp.parameters():
        parameter.requires_grad_(False)
    for parameter in layer.parameters():
        if parameter.dim() > 1:  # the library leaves stacked experts without values
            torch.nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3, weight_decay=0.01)
    started, step = time.monotonic(), 0
    for tokens in blocks(files, folder):
        share = (time.monotonic() - started) / (60 * minutes)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50) * (1 - share)
        with torch.no_grad():
            states = backbone_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = model.lm_head(states[:, 1:]).log_softmax(-1)
        positions = torch.arange(1, tokens.shape[1])[None]
        drafts = model.lm_head(mtp.forward_layer(0, states[:, :-1], positions, None, input_ids=tokens[:, 1:]))
        loss = torch.nn.functional.kl_div(drafts.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1)
        optimizer.zero_grad()
        (loss.mean() + BALANCE * uneven(logits.pop(), mtp.config.num_experts_per_tok)).backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            same = (drafts.argmax(-1) == wanted.argmax(-1)).float().mean()
            print(f"step {step}: {loss.mean().item():.3f} nats, {same:.1%} accepted", flush=True)
        step += 1
    print(f"trained {step} steps of {BATCH * LENGTH} tokens in {time.monotonic() - started:.0f} s", flush=True)
    save_file(stored(layer, folder), folder / "model.safetensors", metadata={"format": "pt"})


def stored(layer: Any, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint with those of the layer, under the names and in the layout of the hub."""
    from training.hub_layout import separate

    number = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    own = {
        f"model.layers.{number}.{name.removeprefix('mtp_block.').replace('post_norm.', 'shared_head.norm.')}": tensor
        for name, tensor in layer.state_dict().items()
        if "rotary" not in name
    }
    kind = torch.bfloat16
    return load_file(folder / "model.safetensors") | {k: v.to(kind).contiguous() for k, v in separate(own).items()}


def accepted(model: Any, drafts: Drafts, texts: list[Corpus]) -> torch.Tensor:
    """The share of accepted drafts of every block of all texts, ``[block]``."""
    found = []
    with torch.inference_mode():
        for tokens in (torch.from_numpy(row)[None] for corpus in texts for row in corpus.tokens[corpus.mask.all(1)]):
            states = backbone_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
            wanted = model.lm_head(states).argmax(-1)[:, 1:]
            (drafted,) = drafts.run(states, tokens)
            found.append((model.lm_head(drafted).argmax(-1) == wanted).double().mean())
    return torch.stack(found)


def opened(folder: Path) -> tuple[Any, Drafts]:
    """A model and its multi-token-prediction layer."""
    structure = read_structure(folder)
    model = load_model(structure, dtype="float32")
    return model, load_drafts(model, structure)


def line(name: str, found: torch.Tensor, against: torch.Tensor | None = None) -> None:
    """Print a share; against another one the difference, with the standard error over blocks."""
    text = f"{name}: {found.mean():.1%}"
    if against is not None:
        apart = found - against
        text += f" ({apart.mean():+.2%}, standard error {apart.std() / len(apart) ** 0.5:.2%})"
    print(text, flush=True)


def cost(structure: Structure, corpora: list[Corpus], model: Any) -> None:
    """Print what recording the layer adds to the processor time of a profile, of three rounds the median."""
    shares = []
    for _ in range(3):
        seconds = []
        for mtp in (False, True):
            started = time.process_time()
            profile(structure, corpora, model=model, mtp=mtp)
            seconds.append(time.process_time() - started)
        shares.append(seconds[1] / seconds[0])
    print(f"profile --mtp takes {statistics.median(shares):.2f} of profile's processor time ({len(shares)} rounds)")


def measured(folder: Path, scratch: Path) -> None:
    """Print acceptance of the whole model, and of pruned ones by the ids that the layer keeps."""
    structure = read_structure(folder)
    calibration, texts = (
        [load_corpus(f"{name}{end}", structure=structure, length=LENGTH) for name in ("encyclopedia", "web")]
        for end in ("", "-heldout")
    )
    model, whole = opened(folder)
    cost(structure, calibration, model)
    profiled = profile(structure, calibration, model=model, mtp=True)
    line("whole model", accepted(model, whole, texts))
    for retain in (0.5, 0.25):
        rated = plan(profiled, retain=retain)
        last = set(rated.layers[-1].kept)
        shared = len(last & set(rated.mtp[0].kept))
        print(
            f"retain {retain}: {rated.keep} experts, {shared} of the layer's own ids are the last layer's", flush=True
        )
        by_chance = [plan(profiled, method="random", retain=retain, seed=seed).mtp for seed in range(3)]
        choices = {"own rating": rated.mtp, "ids of the last layer": []}
        choices |= {f"random ids {seed}": ids for seed, ids in enumerate(by_chance)}
        base = None
        for name, ids in choices.items():
            out = prune(structure, rated.model_copy(update={"mtp": ids}), scratch / f"{retain} {name}", mtp="prune")
            cut, drafts = opened(out)
            if base is None:
                base = accepted(cut, whole, texts)
                line("  layer kept whole", base)
            line(f"  {name}", accepted(cut, drafts, texts), base)


def main() -> None:
    """Train where there is nothing yet, then measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="files to train on")
    parser.add_argument("--minutes", type=float, default=16)
    args = parser.parse_args()
    model = args.folder / "model"
    if not model.exists():
        if not args.text:
            parser.error(f"{model} does not exist: give --text FILE ... to train it")
        shutil.rmtree(args.folder / "new", ignore_errors=True)  # of a run that was interrupted
        new = configured(args.folder / "new")
        trained(new, args.text, args.minutes)
        new.rename(model)
    with tempfile.TemporaryDirectory() as scratch:
        measured(model, Path(scratch))


if __name__ == "__main__":
    main()
