"""Run inside vLLM's own environment: greedy tokens and log-probabilities of prompts, as JSON on stdout.

    python vllm_probe.py MODEL PROMPTS.json OUT.json [--trust-remote-code]

It imports nothing of this project: this is a user's server.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

NEW_TOKENS = 20


def main() -> None:
    from vllm import LLM, SamplingParams

    model, prompts, out, *more = sys.argv[1:]
    server = LLM(
        model=model,
        dtype="float32",
        max_model_len=256,
        enforce_eager=True,
        trust_remote_code="--trust-remote-code" in more,
    )
    asked = [{"prompt_token_ids": ids} for ids in json.loads(Path(prompts).read_text())]
    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=0, ignore_eos=True)
    found = [
        {
            "tokens": list(answer.outputs[0].token_ids),
            "logprobs": [
                step[token].logprob
                for step, token in zip(answer.prompt_logprobs[1:], answer.prompt_token_ids[1:], strict=True)
            ],
        }
        for answer in server.generate(asked, settings)
    ]
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
