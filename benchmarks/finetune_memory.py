"""One fine-tuning step of GPT-J-6B at full size, random weights: its peak memory and its time.

    python -m benchmarks.finetune_memory --json benchmarks/results/finetune-memory.json

LoRA of rank 16 on the six matrices of each block, in float32; bfloat16 arithmetic, checkpointing,
AdamW8bit, one sequence; each length in a process of its own. Memory is anonymous memory (RssAnon,
polled), imports and building included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.arguments import cpu_parser, set_threads
from benchmarks.full_size import LAYERS, TINY_LAYERS, TINY_PROMPT, build
from benchmarks.machine import new_results
from benchmarks.memory_peak import peak_anonymous_memory
from benchmarks.report import finish
from benchmarks.results import GIGA, Model, Note

TOKENS = (2048, 512)
RANK = 16


def main(argv: list[str]) -> int:
    made = cpu_parser("benchmarks.finetune_memory", __doc__)
    made.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    made.add_argument("--layers", type=int, default=LAYERS, help="fewer for a dry run")
    made.add_argument("--rank", type=int, default=RANK)
    made.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.here:
        set_threads(options)
        print(json.dumps(measure(options.layers, options.tokens[0], options.rank, options.tiny)))
        return 0
    results = new_results(torch.device("cpu"), "benchmarks.finetune_memory", argv)
    for tokens in (TINY_PROMPT,) if options.tiny else options.tokens:
        layers = TINY_LAYERS if options.tiny else options.layers
        command = [sys.executable, "-m", "benchmarks.finetune_memory", "--here"]
        command += ["--layers", str(layers), "--rank", str(options.rank), "--tokens", str(tokens)]
        command += ["--tiny"] if options.tiny else []
        command += ["--threads", str(options.threads)] if options.threads else []
        done = subprocess.run(command, stdout=subprocess.PIPE)
        if done.returncode:
            results.failed.append(Note(f"{tokens} tokens", f"exit status {done.returncode}"))
        else:
            figures = json.loads(done.stdout.splitlines()[-1])
            results.models.append(Model("finetune_memory", f"{tokens} tokens", figures))
        if options.json:
            results.write(options.json)
    return finish(results, options.json)


def measure(layers: int, tokens: int, rank: int, tiny: bool = False) -> dict[str, float]:
    """Builds the model and takes one step, here. RuntimeError where the loss is not finite."""
    from gptj_q8.memory import Setting, estimate
    from gptj_q8.optim import AdamW8bit

    peaks: dict[str, float] = {}
    seconds: dict[str, float] = {}

    @contextmanager
    def part(name: str) -> Iterator[None]:
        begun = time.perf_counter()
        with peak_anonymous_memory(0.005) as peak:
            yield
        peaks[name], seconds[name] = peak() / GIGA, time.perf_counter() - begun

    torch.manual_seed(0)
    with part("build"):
        model = trainable(build("gptj_q8", layers, tiny=tiny)[0], rank)
        optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = example(tokens, model.config.vocab_size)
    with part("forward"):
        loss = model(ids, labels=ids).loss
    with part("backward"):
        loss.backward()
    with part("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    if not loss.isfinite():
        raise RuntimeError(f"finetune_memory: the loss is {loss.item()}")
    guess = estimate(model.config, Setting(tokens=tokens, rank=rank))
    return {
        "tokens": tokens,
        "layers": layers,
        "rank": rank,
        "loss": loss.item(),
        "threads": torch.get_num_threads(),
        "peak_rss_anon_gb": max(peaks.values()),
        "estimate_gb": guess.total / GIGA,
        **{f"peak_{name}_gb": value for name, value in peaks.items()},
        **{f"{name}_s": value for name, value in seconds.items()},
        "step_s": sum(s for name, s in seconds.items() if name != "build"),
    }


def trainable(model: Any, rank: int) -> Any:
    """The model with an adapter, ready to train."""
    from gptj_q8.lora import add_lora, prepare_for_finetuning

    return prepare_for_finetuning(add_lora(model, r=rank), verbose=False)


def example(tokens: int, words: int = 50257) -> Tensor:
    """Token ids [1, tokens]."""
    return torch.randint(words, (1, tokens), generator=torch.Generator().manual_seed(1))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
