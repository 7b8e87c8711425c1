"""Model type deepseek in transformers' Auto classes: only when it is asked for, and in every order of imports."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moecover.checkpoints.shipped import shipped_model

IMPORTS = (
    "from transformers import AutoModelForCausalLM",
    "from transformers import AutoModel",
    "from transformers import AutoConfig",
    "from transformers import AutoTokenizer",
    "import transformers",
    "from transformers.models.auto import modeling_auto",
)
# Each order runs in a child process of its own, which has loaded torch but neither transformers nor moecover.
SCRIPT = """
import json, os, sys, traceback
import torch

FOLDER, ORDERS = sys.argv[1], json.loads(sys.argv[2])
PARTS = ("transformers", "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto")


def check(lines):
    for line in lines:
        before = list(sys.meta_path), {name: id(module) for name, module in sys.modules.items() if name in PARTS}
        exec(line)
        after = list(sys.meta_path), {name: id(module) for name, module in sys.modules.items() if name in PARTS}
        assert before == after or line != "import moecover"
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    assert "deepseek" not in CONFIG_MAPPING

    from moecover.checkpoints.deepseek.registration import register_deepseek
    register_deepseek()
    register_deepseek()
    from transformers import AutoConfig, AutoModelForCausalLM
    assert type(AutoConfig.from_pretrained(FOLDER)).__module__ == "moecover.checkpoints.deepseek.configuration"
    model, info = AutoModelForCausalLM.from_pretrained(FOLDER, output_loading_info=True)
    assert type(model).__name__ == "DeepseekForCausalLM"
    assert model.config._experts_implementation == "grouped_mm"
    assert not info["missing_keys"] and not info["unexpected_keys"]


for lines in ORDERS:
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


# What registration has to find out: nothing of transformers is there, only the lazy module is, all of it is.
ORDERS = [["import moecover", IMPORTS[0]], ["import transformers", "import moecover"], [IMPORTS[-1], "import moecover"]]
EVERY_ORDER = [order for line in IMPORTS for order in (["import moecover", line], [line, "import moecover"])]
OTHER_ORDERS = [order for order in EVERY_ORDER if order not in ORDERS]


@pytest.mark.parametrize(
    "orders", [ORDERS, pytest.param(OTHER_ORDERS, marks=pytest.mark.slow)], ids=["telling", "others"]
)
def test_the_type_is_registered_on_request_in_every_order_of_imports(orders: list[list[str]]) -> None:
    """`import moecover` changes nothing in transformers; `register_deepseek` works whatever was imported before."""
    command = [sys.executable, "-c", SCRIPT, str(shipped_model("deepseek-moe-tiny")), json.dumps(orders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["right; " + "; ".join(lines) for lines in orders], done.stderr


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
