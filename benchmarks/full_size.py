"""GPT-J-6B at full size with random weights, built layer by layer: speed and memory.

    python -m benchmarks.full_size                        # 8 bits, and bfloat16 if it fits
    python -m benchmarks.full_size --systems gptj_q8 --layers 2

Each system in a process of its own: decode speed through `generate`, a prompt of 512 tokens, and
the peak of anonymous memory (RssAnon) while they run. Decoding is also given as a share of what
reading the codes and scales once for each token would allow, at the speed of a read loop.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.ceilings import read_all
from benchmarks.cold import free_memory

SYSTEMS = ("gptj_q8", "bfloat16")
LAYERS = 28
PROMPT, NEW_TOKENS = 512, 32
SHORT_PROMPT = 8
GIGA = 1e9
# What a model needs beside its weights, for activations and the cache.
ROOM = 1.5 * GIGA
READ_BYTES = 2**30


def main(argv: list[str]) -> int:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.full_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    made.add_argument("--layers", type=int, default=LAYERS, help="fewer for a dry run")
    made.add_argument("--prompt", type=int, default=PROMPT)
    made.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    made.add_argument("--threads", type=int, help="CPU threads; PyTorch's choice unless given")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    made.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.here:
        print(json.dumps(measure(options)))
        return 0
    results, failed = [], False
    for system in options.systems:
        needed = _weights(options.layers) * (1 if system == "gptj_q8" else 2) + ROOM
        if needed > free_memory(torch.device("cpu")):
            print(f"{system}: skipped, it needs {needed / GIGA:.1f} GB of free memory")
            continue
        rest = [a for a in argv if a not in ("--systems", *SYSTEMS)]
        command = [sys.executable, "-m", "benchmarks.full_size", *rest]
        done = subprocess.run(
            [*command, "--systems", system, "--here"], stdout=subprocess.PIPE, text=True
        )
        if done.returncode:
            print(f"{system}: FAILED, exit status {done.returncode}")
            failed = True
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print("\n".join(f"{name:28} {_word(value)}" for name, value in results[-1].items()) + "\n")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Builds one system and measures it, here."""
    if options.threads:
        torch.set_num_threads(options.threads)
    (system,) = options.systems
    torch.manual_seed(0)
    begun = time.perf_counter()
    model, quantize_s = build(system, options.layers)
    build_s = time.perf_counter() - begun
    # Every matrix but the embedding's is read once for each token.
    streamed = sum(
        each.nbytes
        for name, each in [*model.named_parameters(), *model.named_buffers()]
        if "wte" not in name and each.dim() > 0
    )
    with peak_anonymous_memory() as peak, torch.inference_mode():
        _tokens(model, SHORT_PROMPT, 2)  # wakes threads, fills caches
        decode = _tokens(model, SHORT_PROMPT, options.new_tokens)
        prefill = [_tokens(model, options.prompt, 1)[0] for _ in range(2)]
    read = _read_speed()
    token_s = statistics.median(decode[1:])
    return {
        "system": system,
        "layers": options.layers,
        "threads": torch.get_num_threads(),
        "weights": _weights(options.layers),
        "build_s": build_s,
        "quantize_s": quantize_s,
        "decode_tokens_per_s": 1 / token_s,
        f"prefill_{options.prompt}_s": min(prefill),
        "peak_rss_anon_gb": peak() / GIGA,
        "streamed_gb_per_token": streamed / GIGA,
        "read_gb_per_s": read / GIGA,
        "share_of_read_speed": streamed / token_s / read,
    }


def build(system: str, layers: int) -> tuple[nn.Module, float]:
    """GPT-J of random bfloat16 weights, one block in floats at a time; seconds spent quantizing."""
    from transformers import GPTJConfig, GPTJForCausalLM
    from transformers.models.gptj.modeling_gptj import GPTJBlock

    from gptj_q8 import Q8Config, quantize_

    config = GPTJConfig(n_layer=0, bos_token_id=0, eos_token_id=None, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    seconds = 0.0
    try:
        model = GPTJForCausalLM(config).eval()
        blocks = model.transformer.h
        for layer in range(layers + 1):
            if system == "gptj_q8":
                begun = time.perf_counter()
                quantize_(model, Q8Config())  # what is quantized already stays
                seconds += time.perf_counter() - begun
            if layer < layers:
                blocks.append(GPTJBlock(config, layer_idx=layer).eval())
    finally:
        torch.set_default_dtype(before)
    model.config.n_layer = layers
    return model, seconds


def _tokens(model: Any, prompt: int, count: int) -> list[float]:
    """Seconds from one new token to the next, the first from the start."""
    arrivals = [time.perf_counter()]

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.arange(prompt)[None] % 1000
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=Clock(),
    )
    # The streamer is given the prompt before it is computed.
    times = [arrivals[0], *arrivals[2:]]
    return [b - a for a, b in pairwise(times)]


@contextmanager
def peak_anonymous_memory(every_s: float = 0.02) -> Iterator[Callable[[], int]]:
    """The most bytes of anonymous memory that the process held inside; file pages do not count."""
    peak, stop = [_anonymous_memory()], threading.Event()

    def poll() -> None:
        while not stop.wait(every_s):
            peak[0] = max(peak[0], _anonymous_memory())

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        stop.set()
        thread.join()


def _anonymous_memory() -> int:
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _read_speed() -> float:
    """Bytes per second of a read loop over cold memory."""
    buffer = torch.ones(READ_BYTES, dtype=torch.uint8)
    samples = []
    for _ in range(9):
        begun = time.perf_counter()
        read_all(buffer)
        samples.append(time.perf_counter() - begun)
    return READ_BYTES / statistics.median(samples)


def _weights(layers: int) -> int:
    return 2 * 50400 * 4096 + layers * (4 * 4096**2 + 2 * 4096 * 16384)


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
