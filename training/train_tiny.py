"""Train the small Mixture-of-Experts language model that the project ships.

Reads a folder of plain corpora (``--data``: wikitext2/, c4/, gutenberg/, gsm8k/; see ``sources``) and the standard
library of the running interpreter. Writes a checkpoint in the hub's format (tokenizer, config.json, one bf16
safetensors file) and ``training.json`` with the settings, the loss curve and the final figures.

    python training/train_tiny.py --data DIR -o OUT --work WORK [--tokens 20e6]
    python training/hub_layout.py OUT

An interrupted run resumes from ``WORK/state.safetensors`` when it is started again with the same options.
By default, glibc returns memory to the system and faults it in again at every step, which costs a third of the time.
Make it keep the memory:

    MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 python training/...

``--shape qwen2_moe`` is the shape of Qwen1.5-MoE-A2.7B (60 routed experts, top-4, one gated shared expert,
``norm_topk_prob`` false), ``--shape deepseek`` that of DeepSeek-MoE-16B (a dense first layer, 64 routed experts, top-6,
two shared experts), at widths that train on two CPU cores in about an hour. Two optimisers: Muon (momentum
orthogonalised by a Newton-Schulz iteration, batched over the experts) for the matrices, AdamW for embeddings, routers,
norms and biases.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moecover.checkpoints.deepseek.configuration import DeepseekConfig
from moecover.checkpoints.deepseek.modeling import DeepseekForCausalLM
from moecover.corpora.documents import stdlib_documents

END = "<|endoftext|>"
LENGTH = 256
EXPERTS = {"qwen2_moe": (60, 4), "deepseek": (64, 6)}  # routed experts and top-k of a shape, unless given
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
MIXTURE = {"wikitext2": 0.36, "c4": 0.30, "gutenberg": 0.12, "gsm8k": 0.05, "python": 0.17}


# ---------------------------------------------------------------------------------------------------------- documents
def wikitext_articles(path: Path) -> Iterator[str]:
    """Articles of a WikiText file; each starts with a line `` = Title = `` (one equals sign)."""
    article: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        title = line.startswith(" = ") and not line.startswith(" = = ")
        if title and article:
            yield "".join(article)
            article = []
        article.append(line)
    yield "".join(article)


def jsonl_documents(*paths: Path) -> Iterator[str]:
    """The field ``text`` of every row, or ``question`` and ``answer`` on two lines."""
    for path in paths:
        for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines would also cut at U+2028
            if not line:
                continue
            row = json.loads(line)
            yield row["text"] if "text" in row else row["question"] + "\n" + row["answer"]


def sources(data: Path) -> dict[str, list[str]]:
    """Training documents by domain."""
    wiki = data / "wikitext2"
    return {
        "wikitext2": [*wikitext_articles(wiki / "train.txt"), *wikitext_articles(wiki / "train_head.raw.txt")],
        "c4": list(jsonl_documents(*sorted((data / "c4").glob("train_*.jsonl")))),
        "gutenberg": list(jsonl_documents(data / "gutenberg" / "train.jsonl")),
        "gsm8k": list(jsonl_documents(data / "gsm8k" / "train.jsonl")),
        "python": list(stdlib_documents(held_out=False)),
    }


def held_out(data: Path) -> dict[str, str]:
    """Held-out text by domain; the model card gives the figures of the first two."""
    return {
        "wikitext2": (data / "wikitext2" / "test.txt").read_text(encoding="utf-8"),
        "c4": END.join(jsonl_documents(data / "c4" / "validation.jsonl")),
        "python": END.join(stdlib_documents(held_out=True)),
    }


# ---------------------------------------------------------------------------------------------------------- tokenizer
def train_tokenizer(documents: dict[str, list[str]], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned on a fixed number of characters of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    budget = {"wikitext2": 6e6, "c4": 6e6, "gutenberg": 2e6, "gsm8k": 1e6, "python": 3e6}

    def text() -> Iterator[str]:
        for name, docs in documents.items():
            order = np.random.default_rng(0).permutation(len(docs))
            left = budget[name]
            for i in order:
                if left <= 0:
                    break
                left -= len(docs[i])
                yield docs[i]

    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=2 * LENGTH
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> np.ndarray:
    """One stream of uint16 token ids, with an end-of-text token after every document."""
    end = tokenizer.convert_tokens_to_ids(END)
    streams = []
    for start in range(0, len(documents), 64):
        for ids in tokenizer(documents[start : start + 64], verbose=False)["input_ids"]:
            streams.append(np.asarray([*ids, end], dtype=np.uint16))
    return np.concatenate(streams)


def blocks(stream: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Endless shuffled blocks of LENGTH + 1 tokens; every epoch cuts the stream at a new offset."""
    rng = np.random.default_rng(seed)
    while True:
        offset = int(rng.integers(LENGTH))
        starts = np.arange(offset, len(stream) - LENGTH - 1, LENGTH)
        for start in rng.permutation(starts):
            yield stream[start : start + LENGTH + 1].astype(np.int64)


def batches(streams: dict[str, np.ndarray], batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches [batch_size, LENGTH + 1], the domain of every row drawn from MIXTURE."""
    rng = np.random.default_rng(seed)
    rows = {name: blocks(stream, seed + i) for i, (name, stream) in enumerate(streams.items())}
    names, shares = list(MIXTURE), np.array(list(MIXTURE.values()))
    while True:
        drawn = rng.choice(len(names), size=batch_size, p=shares)
        yield torch.from_numpy(np.stack([next(rows[names[i]]) for i in drawn]))


# --------------------------------------------------------------------------------------------------------- optimisers
def orthogonalise(matrix: torch.Tensor, dtype: torch.dtype, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest (semi-)orthogonal matrix, batched over leading axes (Jordan 2024)."""
    x = matrix.to(dtype)
    transposed = x.size(-2) > x.size(-1)
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if transposed else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan 2024) for matrices [..., rows, columns]; the leading axis is experts."""

    def __init__(self, params, lr: float, dtype: torch.dtype, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(buffer, group["momentum"]), self.dtype)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.size(-2) / p.size(-1)) ** 0.5)


def make_optimisers(
    model: torch.nn.Module, matrix_lr: float, other_lr: float, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Muon, computing in a dtype, for the matrices, AdamW for embeddings, routers, norms and biases."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        small = (
            p.dim() < 2 or "embed" in name or "lm_head" in name or name.endswith("mlp.gate.weight") or "_gate." in name
        )
        (others if small else matrices).append(p)
    return [
        Muon(matrices, lr=matrix_lr, dtype=dtype),
        torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


# -------------------------------------------------------------------------------------------------------------- model
def make_model(args: argparse.Namespace, vocabulary: int) -> torch.nn.Module:
    """A randomly initialised model of the requested shape."""
    experts, top_k = EXPERTS[args.shape]
    common = {
        "vocab_size": vocabulary,
        "hidden_size": args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden // 32,
        "num_key_value_heads": args.hidden // 32,
        "num_experts_per_tok": args.top_k or top_k,
        "moe_intermediate_size": args.expert,
        "norm_topk_prob": False,
        "max_position_embeddings": 2 * LENGTH,
        "rope_theta": 10000.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.02,
    }
    if args.shape == "deepseek":
        config = DeepseekConfig(
            **common,
            intermediate_size=args.dense,
            n_routed_experts=args.experts or experts,
            n_shared_experts=2,
            first_k_dense_replace=1,
            tie_word_embeddings=False,
        )
        made = DeepseekForCausalLM
    else:
        config = Qwen2MoeConfig(
            **common,
            intermediate_size=args.shared,
            shared_expert_intermediate_size=args.shared,
            num_experts=args.experts or experts,
            decoder_sparse_step=1,
            tie_word_embeddings=True,
            use_sliding_window=False,
        )
        made = Qwen2MoeForCausalLM
    config._attn_implementation = "sdpa"
    model = made(config)
    model.set_experts_implementation("grouped_mm")
    return model


def watch_routers(model: torch.nn.Module) -> list[torch.Tensor]:
    """A list that every training pass extends by the routers' logits [token, expert]; the caller clears it."""
    seen: list[torch.Tensor] = []

    def note(module: torch.nn.Module, args: tuple, output: tuple) -> None:
        if torch.is_grad_enabled():
            seen.append(output[0])

    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(note)
    return seen


def balance_loss(router_logits: list[torch.Tensor], k: int) -> torch.Tensor:
    """Load-balancing loss as in Switch Transformers, mean over layers; 1 when routing is uniform.

    Number of experts times the sum over experts of (share of slots x mean probability).
    """
    losses = []
    for logits in router_logits:
        probability = logits.float().softmax(-1)
        experts = logits.size(-1)
        share = torch.bincount(probability.topk(k).indices.flatten(), minlength=experts) / (logits.size(0) * k)
        losses.append(experts * (share * probability.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.inference_mode()
def bits_per_byte(model, tokenizer, text: str, dtype: torch.dtype) -> float:
    """-log2 p of the whole text over its number of UTF-8 bytes.

    Disjoint windows of LENGTH tokens; every token but the first is scored.
    """
    ids = torch.from_numpy(encode(tokenizer, text.split(END)).astype(np.int64))[:-1]
    rows = (len(ids) - 1) // LENGTH
    nats, n_bytes = 0.0, len(text.replace(END, "").encode())
    parts = [ids[: rows * LENGTH + 1], ids[rows * LENGTH :]]
    for part, length in zip(parts, (LENGTH, len(parts[1]) - 1), strict=True):
        if length <= 0:
            continue
        inputs, targets = part[:-1].view(-1, length), part[1:].view(-1, length)
        for x, y in zip(inputs.split(32), targets.split(32), strict=True):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                logits = model(x).logits
            nats += F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum").item()
    return nats / math.log(2) / n_bytes


def save_state(path: Path, model, optimisers, step: int, curve: list, spent_s: float) -> None:
    """Write weights, optimiser states, step and curve to one safetensors file that appears only when complete."""
    tensors = {f"model/{name}": p.detach() for name, p in model.named_parameters()}
    for i, optimiser in enumerate(optimisers):
        for j, values in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser{i}/{j}/{key}": value for key, value in values.items()}
    about = json.dumps({"step": step, "curve": curve, "spent_s": spent_s})
    save_file(tensors, path.with_suffix(".partial"), metadata={"state": about})
    os.replace(path.with_suffix(".partial"), path)


def load_state(path: Path, model, optimisers) -> tuple[int, list, float]:
    """Restore what `save_state` wrote; returns step, curve and seconds spent."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["state"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model/{name}"])
    for i, optimiser in enumerate(optimisers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            owner, _, rest = key.partition("/")
            if owner == f"optimiser{i}":
                number, _, name = rest.partition("/")
                state.setdefault(int(number), {})[name] = value
        optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return about["step"], about["curve"], about["spent_s"]


def check_options(args: argparse.Namespace) -> None:
    """Record the options in the work folder, or compare them with those of the run that it belongs to."""
    args.work.mkdir(parents=True, exist_ok=True)
    options = {k: v for k, v in vars(args).items() if k not in ("data", "output", "work", "threads", "save_every")}
    record = args.work / "options.json"
    if record.exists() and json.loads(record.read_text()) != options:
        raise SystemExit(
            f"{args.work} belongs to a run with other options: {record.read_text().strip()}. Give another --work"
        )
    record.write_text(json.dumps(options) + "\n")


def prepare_text(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, dict[str, np.ndarray]]:
    """The tokenizer and the token stream of every domain, from the work folder if they are there."""
    documents = sources(args.data)
    if (args.work / "tokenizer").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    else:
        tokenizer = train_tokenizer(documents, args.vocabulary)
        tokenizer.save_pretrained(args.work / "tokenizer")
    if not (args.work / "streams.npz").exists():
        np.savez(args.work / "streams.npz", **{name: encode(tokenizer, docs) for name, docs in documents.items()})
    streams = dict(np.load(args.work / "streams.npz"))
    print({name: len(s) for name, s in streams.items()}, flush=True)
    return tokenizer, streams


def train_step(
    model: torch.nn.Module,
    optimisers: list[torch.optim.Optimizer],
    router_logits: list[torch.Tensor],
    batch: torch.Tensor,
    balance_weight: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update on a batch [rows, LENGTH + 1]; returns the language-model loss and the balancing loss."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        router_logits.clear()
        output = model(batch[:, :-1])
    loss = F.cross_entropy(output.logits.flatten(0, 1).float(), batch[:, 1:].flatten())
    balance = balance_loss(router_logits, model.config.num_experts_per_tok)
    (loss + balance_weight * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return loss, balance


def train(args: argparse.Namespace) -> None:
    """Train or resume, then evaluate and write the checkpoint."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    check_options(args)
    tokenizer, streams = prepare_text(args)
    model = make_model(args, len(tokenizer))
    router_logits = watch_routers(model)
    dtype = DTYPES[args.precision]
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{n_parameters:,} parameters, {2 * n_parameters / 1e6:.1f} MB in bf16", flush=True)

    optimisers = make_optimisers(model, args.matrix_lr, args.other_lr, dtype)
    steps = int(args.tokens) // (args.batch_size * LENGTH)
    data = batches(streams, args.batch_size, args.seed)
    first, curve, spent_s = 0, [], 0.0
    state_file = args.work / "state.safetensors"
    if state_file.exists():
        first, curve, spent_s = load_state(state_file, model, optimisers)
        for _ in range(first):
            next(data)
    base = [args.matrix_lr, args.other_lr]
    texts = held_out(args.data)
    started = time.monotonic()
    for step in range(first, steps):
        decay = min(1.0, (step + 1) / 50) * min(1.0, (steps - step) / (args.decay * steps))
        for optimiser, rate in zip(optimisers, base, strict=True):
            optimiser.param_groups[0]["lr"] = rate * decay
        loss, balance = train_step(model, optimisers, router_logits, next(data), args.balance, dtype)
        if step % 20 == 0:
            elapsed = time.monotonic() - started
            speed = (step - first + 1) * args.batch_size * LENGTH / elapsed
            figures = f"loss {loss.item():.3f} balance {balance.item():.2f}"
            print(f"step {step}/{steps} {figures} {speed:.0f} tokens/s {spent_s + elapsed:.0f} s", flush=True)
            curve.append({"step": step, "loss": round(loss.item(), 4), "balance": round(balance.item(), 3)})
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            save_state(state_file, model, optimisers, step + 1, curve, spent_s + time.monotonic() - started)
            sample = {
                name: round(bits_per_byte(model, tokenizer, text[:100_000], dtype), 4) for name, text in texts.items()
            }
            print(f"step {step + 1}: bits per byte on 100 kB of each held-out text {sample}", flush=True)
    finish(args, model, tokenizer, texts, curve, steps, spent_s + time.monotonic() - started)


def finish(args, model, tokenizer, texts, curve, steps, spent_s) -> None:
    """Evaluate the model, rounded to bf16, on the held-out texts; write the checkpoint and ``training.json``."""
    model = model.to(torch.bfloat16)
    args.output.mkdir(parents=True, exist_ok=True)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.output, save_original_format=True)
    tokenizer.save_pretrained(args.output)
    model = model.to(DTYPES[args.precision])  # the rounded weights, in the precision of training
    figures = {
        name: round(bits_per_byte(model, tokenizer, text, DTYPES[args.precision]), 4) for name, text in texts.items()
    }
    record = {
        "bits_per_byte": figures,
        "tokens": steps * args.batch_size * LENGTH,
        "wall_s": round(spent_s),
        "threads": args.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mixture": MIXTURE,
        "options": {k: v for k, v in vars(args).items() if k not in ("data", "output", "work")},
        "curve": curve[::5],
    }
    (args.output / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["bits_per_byte"]), flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/, c4/, gutenberg/ and gsm8k/")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the finished checkpoint")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder: tokenizer, token streams, state")
    parser.add_argument("--shape", choices=("qwen2_moe", "deepseek"), default="qwen2_moe")
    parser.add_argument("--tokens", type=float, default=20e6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=160)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, help="routed experts (default: those of the shape)")
    parser.add_argument("--top-k", type=int, help="routed experts per token (default: that of the shape)")
    parser.add_argument("--expert", type=int, default=64, help="intermediate width of a routed expert")
    parser.add_argument("--shared", type=int, default=256, help="intermediate width of the shared expert (qwen2_moe)")
    parser.add_argument("--dense", type=int, default=640, help="intermediate width of the dense first layer (deepseek)")
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=3e-3)
    parser.add_argument("--balance", type=float, default=0.003, help="coefficient of the balancing loss")
    parser.add_argument(
        "--decay",
        type=float,
        default=0.6,
        help="share of the run, at its end, over which the learning rates fall to zero",
    )
    parser.add_argument(
        "--precision", choices=DTYPES, default="bf16", help="of matrix products; f32 where the processor has no bf16"
    )
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
