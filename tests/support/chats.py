"""A tokenizer whose tokens can be read, with a chat template: words are tokens, so are the marks of the template."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [
    *"abc{}<>s",
    "hi",
    "there",
    "what",
    "is",
    "two",
    "four",
    "weather",
    "sunny",
    "call",
    "def",
    "be",
    "kind",
    "end",
]
WORDS += ["end", "tools", "user"]
MARKS = ["<unk>", "<s>", "<end>", "<system>", "<user>", "<assistant>", "<tool>", "<tools>"]
# Begins with BOS, refuses a chat that an assistant begins, ends the assistant's turns.
TEMPLATE = """{{- bos_token }}
{%- if tools %}<tools>{% for tool in tools %} {{ tool.name }}{% endfor %}{% endif %}
{%- for message in messages %}
{%- if loop.first and message.role == 'assistant' %}{{ raise_exception('the user must begin') }}{% endif %}
{{- '<' + message.role + '>' }} {{ message.content or '' }}
{%- if message.tool_calls %} call {{ message.tool_calls[0].function.name }}{% endif %}
{%- if message.role == 'assistant' %}<end>{% endif %}
{%- endfor %}"""
# The same of messages of parts.
OF_PARTS = """{{- bos_token }}
{%- for message in messages %}{{ '<' + message.role + '>' }}
{%- if message.content is string %} {{ message.content }}{% else %}
{%- for part in message.content %} {{ part.text }}{% endfor %}{% endif %}
{%- endfor %}"""


def word_tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Words of `WORDS` and marks of `MARKS`; ``<s>`` begins what it tokenizes."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*MARKS, *WORDS]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    own = {"bos_token": "<s>", "eos_token": "<end>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)
    made.add_special_tokens({"additional_special_tokens": MARKS[3:]})
    made.chat_template = template
    return made


def words(tokenizer: PreTrainedTokenizerFast, ids: object) -> str:
    """Tokens as they are written in the tests."""
    return " ".join(tokenizer.convert_ids_to_tokens([int(i) for i in ids]))  # type: ignore[attr-defined]
