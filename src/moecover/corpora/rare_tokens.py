"""A corpus of tokens that the calibration text hardly holds: reads loaded corpora and the vocabulary, makes blocks.

Experts that serve what no calibration text holds, such as a script in another alphabet, are seen by no corpus: every
rule by how often an expert is used removes them first. The tokens that the text holds least of, in random order, are
routed to them, and coverage then gives this corpus its turns like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from moecover.corpora.packing import Corpus, make_corpus
from moecover.corpora.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from moecover.checkpoints.structure import Structure

NAME = "rare-tokens"
SHARE = 0.1  # of the vocabulary, and all others that the text holds no more often


def vocabulary(structure: Structure, tokenizer: PreTrainedTokenizerBase | None = None) -> NDArray[np.int64]:
    """Ids that stand for text: without special and added tokens, and without ids that the tokenizer does not know."""
    config = structure.checkpoint.text_config
    if tokenizer is None and structure.checkpoint.gguf is None:
        tokenizer = load_tokenizer(structure.checkpoint.path)
    if tokenizer is None:
        others = [config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")]
        special = {one for other in others for one in (other if isinstance(other, list) else [other])}
        known = int(config["vocab_size"])
    else:
        known = min(len(tokenizer), int(config["vocab_size"]))
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return np.array([i for i in range(known) if i not in special], dtype=np.int64)


def rare_tokens(
    structure: Structure,
    corpora: Sequence[Corpus],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    blocks: int,
    length: int,
    seed: int = 0,
) -> Corpus:
    """Blocks of the tokens that some corpora hold least of, each as likely as the others, in random order.

    Blocks begin as those of the first corpus do (BOS).

    Args:
        structure: of the model whose tokens they have.
        corpora: whose tokens are counted.
        tokenizer: instead of the one in the model's folder.
        blocks: number of blocks.
        length: tokens of a block.
        seed: of the order.
    """
    ids = vocabulary(structure, tokenizer)
    counts = sum(np.bincount(c.tokens[c.mask], minlength=int(ids.max()) + 1)[: int(ids.max()) + 1] for c in corpora)
    ours = np.asarray(counts)[ids]
    most = np.sort(ours)[max(0, int(SHARE * len(ids)) - 1)]
    chosen = ids[ours <= most]
    tokens = np.random.default_rng(seed).choice(chosen, size=(blocks, length))
    begin = corpora[0].record.get("bos", [])
    tokens[:, : len(begin)] = begin
    record = {
        "source": f"{len(chosen)} tokens that the other corpora hold at most {int(most)} times, in random order",
        "sequences": blocks,
        "length": length,
        "seed": seed,
    }
    return make_corpus(NAME, tokens, np.ones_like(tokens, dtype=bool), record)
