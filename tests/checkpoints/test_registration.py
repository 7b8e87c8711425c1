"""Model type deepseek in transformers' Auto classes: only when it is asked for, and in every order of imports."""

from __future__ import annotations

import subprocess
import sys

from moecover.checkpoints.shipped import shipped_model

IMPORTS = (
    "from transformers import AutoModelForCausalLM",
    "from transformers import AutoModel",
    "from transformers import AutoConfig",
    "from transformers import AutoTokenizer",
    "import transformers",
    "from transformers.models.auto import modeling_auto",
)
# Every order in a child of its own, which has torch but neither transformers nor moecover.
SCRIPT = f"""
import os, sys, traceback
import torch

IMPORTS = {IMPORTS!r}
FOLDER = sys.argv[1]


def check(lines):
    finders = list(sys.meta_path)
    for line in lines:
        exec(line)
    assert sys.meta_path == finders
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    assert "deepseek" not in CONFIG_MAPPING
    assert sys.meta_path == finders

    from moecover.checkpoints.deepseek.registration import register_deepseek
    register_deepseek()
    register_deepseek()
    from transformers import AutoConfig, AutoModelForCausalLM
    assert type(AutoConfig.from_pretrained(FOLDER)).__module__ == "moecover.checkpoints.deepseek.configuration"
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert type(model).__name__ == "DeepseekForCausalLM"
    assert model.config._experts_implementation == "grouped_mm"
    assert not info["missing_keys"] and not info["unexpected_keys"]


for line in IMPORTS:
    for lines in (["import moecover", line], [line, "import moecover"]):
        child = os.fork()
        if child == 0:
            try:
                check(lines)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print("right" if status == 0 else "wrong", *lines, sep="; ", flush=True)
"""


def test_the_type_is_registered_on_request_in_every_order_of_imports() -> None:
    """`import moecover` changes nothing in transformers; `register_deepseek` works whatever was imported before."""
    command = [sys.executable, "-c", SCRIPT, str(shipped_model("deepseek-moe-tiny"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    orders = [order for line in IMPORTS for order in (f"import moecover; {line}", f"{line}; import moecover")]
    assert done.stdout.splitlines() == [f"right; {order}" for order in orders], done.stderr


def test_a_class_of_the_librarys_own_is_left_alone() -> None:
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from moecover.checkpoints.deepseek.registration import register_deepseek

class Own(LlamaConfig):
    model_type = "deepseek"

CONFIG_MAPPING.register("deepseek", Own)
register_deepseek()
assert CONFIG_MAPPING["deepseek"] is Own
assert Own not in MODEL_FOR_CAUSAL_LM_MAPPING
print("left alone")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "left alone\n", done.stderr


def test_the_package_itself_imports_neither_torch_nor_transformers() -> None:
    code = "import moecover, sys; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
