"""The tokenizer of a GGUF file: token ids of texts and chats as the checkpoint's own tokenizer makes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moecover.checkpoints.structure import read_structure
from moecover.corpora.bos import prefix_of
from moecover.corpora.packing import load_corpus
from moecover.corpora.windows import load_windows, tokenizer_record
from moecover.llama.opening import opened_gguf
from moecover.progress import SILENT
from tests.support.gguf_models import convert, needs_llama
from tests.support.tiny import TEXT, make_tokenizer

pytestmark = needs_llama
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}<end>\n{% endfor %}"


def test_texts_and_chats_become_the_checkpoints_own_tokens(checkpoints: Callable[..., Path], tmp_path: Path) -> None:
    """With a BOS token that is added, what spells one in a text, a chat template, and bytes of other alphabets."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("qwen3_moe", mlp_only_layers=[]), folder)
    own = make_tokenizer(begins=True)
    own.chat_template = TEMPLATE
    own.save_pretrained(folder)
    structure, original = read_structure(convert(folder, tmp_path / "m.gguf")), read_structure(folder)
    texts, chats = tmp_path / "texts.txt", tmp_path / "chats.jsonl"
    texts.write_text((TEXT + "größe <s> 専門家 <end>, 🚀?\n") * 40)
    turns = ({"role": "assistant", "content": TEXT},)
    rows = [{"messages": [{"role": "user", "content": f"{i}?"}, *turns]} for i in range(40)]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with opened_gguf(structure, libllama=None, device="cpu", progress=SILENT) as (_, tokenizer):
        assert tokenizer is not None
        assert (prefix_of(tokenizer), prefix_of(tokenizer, "never")) == (prefix_of(own), ())
        assert len(prefix_of(own)) == 1
        for path, options in ((texts, ""), (texts, "?parse_special=yes"), (chats, "")):
            source = f"{path}{options}"
            found = load_corpus("a", source, structure=structure, tokenizer=tokenizer, length=32)
            expected = load_corpus("a", source, structure=original, length=32)
            assert np.array_equal(found.tokens, expected.tokens), source
            assert found.record == expected.record
        window = load_windows("a", texts, structure=structure, tokenizer=tokenizer, length=32)
        assert np.array_equal(window.tokens, load_windows("a", texts, structure=original, length=32).tokens)
        assert tokenizer_record(tokenizer)["entries"] == 300
