"""What GPT-J-6B takes of memory, part by part, running and training: counted, not measured.

    python -m benchmarks.bench_memory --json out/memory.json

Four ways: float32 and float16 (or bfloat16) under plain Transformers and PEFT; the model that this
one follows, hivemind/gpt-j-6B-8bit, which decodes a whole matrix before each product; and
gptj_q8. Running: one sequence of 2048 tokens with its cache. Training: LoRA of rank 16 on it with
checkpointing, at its fullest: the loss or the last block's backward, when the adapters have next to
no gradients yet. The libraries' share, 0.5 GB, is an estimate for a GPU. benchmarks.full_size and
benchmarks.lora_step measure peaks.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.arguments import bare_parser
from benchmarks.machine import new_results
from benchmarks.report import finish
from benchmarks.results import GIGA, Model

TOKENS, RANK = 2048, 16
SEED_BLOCK = 4096
# Of attention's scores, in float32: before softmax, after it, and the gradient.
SCORES = 3
SYSTEMS = ("float32", "float16", "hivemind 8-bit", "gptj_q8")


def count(config: Any, system: str, training: bool) -> dict[str, float]:
    """Bytes of each part, in GB."""
    from gptj_q8.memory import Setting, estimate

    tokens = min(TOKENS, config.n_positions)
    ours = estimate(config, Setting(tokens=tokens, rank=RANK, device="cuda"))
    codes, adapters = ours.standing["codes"], ours.standing["adapters"] // 4
    word = 4 if system == "float32" else 2
    is_8bit = system in ("hivemind 8-bit", "gptj_q8")
    wide, largest = config.n_embd, config.vocab_size * config.n_embd
    scales = {"hivemind 8-bit": 4 * codes // SEED_BLOCK, "gptj_q8": ours.standing["scales"]}
    parts = {
        "weights": codes if is_8bit else word * codes,
        "scales, biases, norms": scales.get(system, 0)
        + ours.standing["biases, norms, positions"] * word // 2,
        "libraries": ours.standing["libraries"],
        "decoded matrix": largest * word if system == "hivemind 8-bit" else 0,
    }
    if not training:
        parts["keys and values"] = 2 * config.n_layer * tokens * wide * word
        return _giga(parts)
    plain = system != "gptj_q8"
    scores = SCORES * config.n_head * tokens**2 * 4 if plain else 0
    logits = tokens * config.vocab_size * (word + 4 + word)
    block = ours.passing["backward of a block"] * word // 2 + scores
    loss = logits if plain else ours.passing["loss"]
    parts |= {
        "adapters": 4 * adapters,
        "optimizer": ours.standing["optimizer state"] if is_8bit else 8 * adapters,
        "activations kept": ours.passing["activations kept"] * word // 2,
        "working memory": max(block, loss),
    }
    return _giga(parts)


def _giga(parts: dict[str, int]) -> dict[str, float]:
    return {f"{name}_gb": size / GIGA for name, size in parts.items()}


def models(config: Any) -> Iterator[Model]:
    for task in ("running", "training"):
        for system in SYSTEMS:
            yield Model(f"memory {task}", system, count(config, system, task == "training"))


def main(argv: list[str]) -> int:
    from transformers import GPTJConfig

    options = bare_parser("benchmarks.bench_memory", __doc__).parse_args(argv)
    results = new_results(torch.device("cpu"), "benchmarks.bench_memory", argv)
    results.models += models(GPTJConfig())  # whose defaults are those of GPT-J-6B
    return finish(results, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
