"""Store a trained model as the hub's models of its kind are stored; the same logits to the last bit.

Reads a checkpoint of one file and rewrites it in place: every expert's matrices are tensors of their own, the head is a
tensor of its own beside the embedding, and a model of type ``deepseek`` comes with the class of its configuration, for
programs that know the model but not the configuration.

    python training/hub_layout.py MODEL
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from moecover.checkpoints.deepseek import configuration

FUSED = ".mlp.experts."
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
CONFIGURATION = "configuration_deepseek.py"


def separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with stacked experts taken apart.

    Args:
        tensors: by name; ``experts.gate_up_proj`` ``[expert, 2 width, hidden]`` and ``experts.down_proj``
            ``[expert, hidden, width]`` become a tensor for each expert, all others stay.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem, fused, kind = name.partition(FUSED)
        if not fused or kind not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            for part, values in (parts if kind == "gate_up_proj" else {kind: matrix}).items():
                found[f"{stem}{FUSED}{expert}.{part}.weight"] = values.clone()
    return found


def main() -> None:
    """Rewrite the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    folder: Path = parser.parse_args().model
    config = json.loads((folder / "config.json").read_text())
    tensors = separate(load_file(folder / "model.safetensors"))
    tensors.setdefault(HEAD, tensors[EMBEDDING].clone())
    config["tie_word_embeddings"] = False
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where programs look that are older than the other
    if config["model_type"] == "deepseek":
        config["auto_map"] = {"AutoConfig": f"{Path(CONFIGURATION).stem}.DeepseekConfig"}
        shutil.copyfile(configuration.__file__, folder / CONFIGURATION)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    main()
