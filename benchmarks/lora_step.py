"""A LoRA step of GPT-J-6B at full size with random weights: its time and peak memory.

    python -m benchmarks.lora_step --device cuda          # in 8 bits, and frozen in bfloat16

Rank 16 on the six matrices of each block, adapters in float32, bfloat16 arithmetic, gradient
checkpointing, AdamW8bit, one sequence of 2048 tokens. Each system in a process of its own. On a GPU
one more step in 8 bits says whether PyTorch can do it within 7.5 GiB of that GPU's memory.
"""

import argparse
import statistics
import sys
from collections.abc import Callable

import torch

from benchmarks.arguments import parser
from benchmarks.finetune_memory import RANK, trainable
from benchmarks.full_size import SYSTEMS, TINY_PROMPT, build, run_each
from benchmarks.memory_peak import peak_memory
from benchmarks.results import GIGA
from benchmarks.timing import HostClock

TOKENS = 2048
STEPS = 3
LIMIT = 7.5 * 2**30  # bytes: what a GPU of 8 GB has to give


def main(argv: list[str]) -> int:
    made = parser("benchmarks.lora_step", __doc__)
    made.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    made.add_argument("--tokens", type=int, default=TOKENS)
    made.add_argument("--rank", type=int, default=RANK)
    return run_each(made, "lora_step", measure, argv)


def measure(system: str, options: argparse.Namespace) -> dict[str, float]:
    """Builds one system and takes steps, here."""
    from gptj_q8.optim import AdamW8bit

    device, tokens = options.device, TINY_PROMPT if options.tiny else options.tokens
    model = trainable(build(system, options.layers, device, tiny=options.tiny)[0], options.rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained, lr=1e-4)
    ids = torch.arange(tokens, device=device)[None] * 7919 % model.config.vocab_size
    losses: list[float] = []

    def step() -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # waits for the device

    with peak_memory(device) as peak:
        clock = HostClock()
        first_s, *seconds = [clock.seconds(step) for _ in range(1 + STEPS)]
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"lora_step: the loss went from {losses[0]} to {losses[-1]}")
    limited = {}
    if device.type == "cuda" and system == "gptj_q8":
        limited = {"fits_7_5_gib": float(fits(LIMIT, step, device))}
    return {
        "layers": options.layers,
        "tokens": tokens,
        "trained": sum(p.numel() for p in trained),
        "first_step_s": first_s,
        "step_s": statistics.median(seconds),
        "tokens_per_s": tokens / statistics.median(seconds),
        f"peak_{'gpu' if device.type == 'cuda' else 'rss_anon'}_gb": peak() / GIGA,
        **limited,
    }


def fits(limit: float, step: Callable[[], object], device: torch.device) -> bool:
    """Whether a step succeeds where PyTorch may take no more than `limit` bytes of a GPU."""
    has = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()  # what earlier steps have freed would count
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / has), device)
    try:
        step()
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
