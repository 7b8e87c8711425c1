"""How a pruned model is run, for its card: a snippet each for transformers, vLLM and llama.cpp, where they can run it.

The snippets name the repository, or a placeholder for it; a test runs that for transformers.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from moecover.checkpoints.remote_code import is_trusted
from moecover.checkpoints.server_needs import lacking
from moecover.checkpoints.servers import LLAMA_CPP, unmet
from moecover.files.reading import read_json
from moecover.text import markdown_block, markdown_text

if TYPE_CHECKING:
    from moecover.checkpoints.structure import Structure
    from moecover.planning.artifact import Plan

VLLM = "vllm"
PROMPT, QUESTION = "The lighthouse stood on", "What is a mixture of experts?"
TEXT_INPUTS = f'inputs = tokenizer("{PROMPT}", return_tensors="pt").to(model.device)'
CHAT_INPUTS = f"""\
messages = [{{"role": "user", "content": "{QUESTION}"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
inputs = inputs.to(model.device)"""


def usage(structure: Structure, plan: Plan, *, repository: str, output: str) -> list[str]:
    """The section in lines.

    Args:
        structure: the source.
        plan: which experts stay.
        repository: the hub id of the pruned model.
        output: name of a GGUF file; empty for a folder.
    """
    if structure.checkpoint.gguf is not None:
        return ["## Use", "", *_gguf(repository, output)]
    return [
        *("## Use", "", "With transformers:", "", markdown_block(_transformers(structure, repository), "python"), ""),
        *_vllm(structure, plan, repository),
        *_llama_cpp(structure, plan, repository),
    ]


def _transformers(structure: Structure, repository: str) -> str:
    """A program that loads the model and lets it write; of a type that plain transformers lacks, with its class."""
    auto, inputs = _auto_class(structure), CHAT_INPUTS if _has_chat_template(structure) else TEXT_INPUTS
    trusted = ", trust_remote_code=True" if _is_trusted(structure) else ""
    own = ""
    if structure.topology.family == "deepseek" and not trusted:
        own = "import moecover\n\nmoecover.register_deepseek()  # transformers has no class of this type\n"
    return f"""\
from transformers import {auto}, AutoTokenizer
{own}
name = "{repository}"
tokenizer = AutoTokenizer.from_pretrained(name{trusted})
model = {auto}.from_pretrained(name, dtype="auto", device_map="auto"{trusted})
{inputs}
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""


def _vllm(structure: Structure, plan: Plan, repository: str) -> list[str]:
    if missing := lacking(structure, VLLM):
        return [f"Not with vLLM as it is: {markdown_text('; '.join(missing))}.", ""]
    trusted = " --trust-remote-code" if _is_trusted(structure) else ""
    command = f"vllm serve {repository}{trusted}"
    return ["With vLLM:", "", markdown_block(command, "sh"), "", *_asked(structure, plan, VLLM)]


def _llama_cpp(structure: Structure, plan: Plan, repository: str) -> list[str]:
    """Conversion and server; left out for types that only a model's own code knows, which the converter lacks."""
    if _is_trusted(structure):
        return []
    if missing := lacking(structure, LLAMA_CPP):
        return [f"Not with llama.cpp as it is: {markdown_text('; '.join(missing))}.", ""]
    folder = repository.rpartition("/")[2]
    command = (
        f"hf download {repository} --local-dir {folder}\n"
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {folder}.gguf\n"
        f"llama-server -m {folder}.gguf"
    )
    return [
        *("With llama.cpp, where its converter knows the model type:", "", markdown_block(command, "sh"), ""),
        *_asked(structure, plan, LLAMA_CPP),
    ]


def _gguf(repository: str, output: str) -> list[str]:
    file = shlex.quote(output)
    return [
        *("With llama.cpp, from the hub or from the file:", ""),
        markdown_block(f"llama-server --hf-repo {repository} --hf-file {file}\nllama-server -m {file}", "sh"),
        "",
    ]


def _asked(structure: Structure, plan: Plan, server: str) -> list[str]:
    """What a server asks of this shape that is not met."""
    lines = unmet(structure.topology, plan.keep, server, width=plan.width)
    return [*(f"- {markdown_text(line)}." for line in lines), *([""] if lines else [])]


def _auto_class(structure: Structure) -> str:
    """The Auto class that loads the model; transformers is only asked where there may be two."""
    config = structure.checkpoint.config
    if "text_config" not in config:
        return "AutoModelForCausalLM"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from moecover.checkpoints.model_class import auto_class

    family = str(config.get("model_type"))
    found = auto_class(CONFIG_MAPPING[family]) if family in CONFIG_MAPPING else None
    return found.__name__ if found is not None else "AutoModelForCausalLM"


def _is_trusted(structure: Structure) -> bool:
    folder = structure.checkpoint.folder
    return folder is not None and is_trusted(folder)


def _has_chat_template(structure: Structure) -> bool:
    """Whether the tokenizer turns messages into text."""
    folder = structure.checkpoint.folder
    if folder is None:
        return False
    if (folder / "chat_template.jinja").is_file():
        return True
    try:
        settings = read_json(folder / "tokenizer_config.json")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
