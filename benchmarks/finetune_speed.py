"""A fine-tuning step in 8 bits beside the same model frozen in bfloat16, the same LoRA on both.

    python -m benchmarks.finetune_speed --json benchmarks/results/finetune-speed.json

Four full-width blocks of GPT-J with random weights, embedding and head; adapters of rank 16 in
bfloat16 on the six matrices of each block, checkpointing, AdamW8bit, and all that
`gptj_q8.save_memory` does, for both. Step by step in turns; the ratio is the median of those within
each round, so that what slows a whole round cancels.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.arguments import cpu_parser, set_threads
from benchmarks.finetune_memory import RANK, example, trainable
from benchmarks.full_size import SYSTEMS, TINY_LAYERS, TINY_PROMPT, build
from benchmarks.machine import new_results
from benchmarks.report import finish
from benchmarks.results import Model
from benchmarks.timing import in_turns

LAYERS, TOKENS, ROUNDS = 4, (512, 1024, 2048), 5


def main(argv: list[str]) -> int:
    made = cpu_parser("benchmarks.finetune_speed", __doc__)
    made.add_argument("--layers", type=int, default=LAYERS)
    made.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    made.add_argument("--rounds", type=int, default=ROUNDS)
    made.add_argument("--profile", action="store_true", help="tell where the time of a step goes")
    options = made.parse_args(argv)
    set_threads(options)
    results = new_results(torch.device("cpu"), "benchmarks.finetune_speed", argv)
    layers = TINY_LAYERS if options.tiny else options.layers
    steps = {system: make_step(system, layers, options.tiny) for system in SYSTEMS}
    for tokens in (TINY_PROMPT,) if options.tiny else options.tokens:
        if options.profile:
            for system, step in steps.items():
                print(system, tokens, profile(step, tokens), sep="\n")
            continue
        results.models += compare(steps, tokens, options.rounds)
        if options.json:
            results.write(options.json)
    return finish(results, None if options.profile else options.json)


def make_step(system: str, layers: int, tiny: bool = False) -> Callable[[int], None]:
    """A function that takes one training step on so many tokens."""
    from gptj_q8.optim import AdamW8bit

    torch.manual_seed(0)
    model: Any = trainable(build(system, layers, tiny=tiny)[0], RANK)
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in adapters:  # in float32 PEFT would cast x and the output in the other's favour
        parameter.data = parameter.data.bfloat16()
    optimizer = AdamW8bit(adapters, lr=1e-5)

    def step(tokens: int) -> None:
        ids = example(tokens, model.config.vocab_size)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(steps: dict[str, Callable[[int], None]], tokens: int, rounds: int) -> list[Model]:
    """Seconds of each system's steps; share_of_bfloat16_time: median of the rounds."""
    samples = in_turns({name: partial(step, tokens) for name, step in steps.items()}, rounds)
    return [
        Model(
            f"finetune_speed, {tokens} tokens",
            system,
            {
                "step_s": statistics.median(seconds),
                "fastest_s": min(seconds),
                "slowest_s": max(seconds),
                "share_of_bfloat16_time": statistics.median(
                    a / b for a, b in zip(seconds, samples["bfloat16"], strict=True)
                ),
            },
        )
        for system, seconds in samples.items()
    ]


def profile(step: Callable[[int], None], tokens: int) -> str:
    """A table of the ops that take the most time."""
    step(tokens)
    with torch.profiler.profile() as found:
        step(tokens)
    return str(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
