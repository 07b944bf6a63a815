"""GPT-J-6B at full size with random weights, built layer by layer: speed and memory.

    python -m benchmarks.full_size                        # 8 bits, and bfloat16 if it fits
    python -m benchmarks.full_size --systems gptj_q8 --layers 2
    python -m benchmarks.full_size --device cuda --systems compiled

Each system in a process of its own: decode speed through `generate`, a prompt of 512 tokens, and
the peak of memory while they run: anonymous memory (RssAnon) on a CPU, what PyTorch allocated on a
GPU. Decoding is also given as a share of what reading the codes and scales once for each token
would allow, at the speed of a read loop (on a GPU: of a copy, bytes read plus bytes written).
`compiled` is gptj_q8 with a static cache, which Transformers compiles on a GPU with
mode="reduce-overhead".
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.arguments import parser, set_threads
from benchmarks.ceilings import stream_gb_per_s
from benchmarks.cold import free_memory
from benchmarks.machine import new_results
from benchmarks.memory_peak import peak_memory
from benchmarks.model_check import check_products
from benchmarks.report import finish
from benchmarks.results import GIGA, Model, Note

SYSTEMS = ("gptj_q8", "bfloat16")
COMPILED = "compiled"
LAYERS = 28
PROMPT, NEW_TOKENS = 512, 32
SHORT_PROMPT = 8
TINY = {"n_embd": 64, "n_head": 4, "rotary_dim": 8, "vocab_size": 160, "n_positions": 64}
TINY_LAYERS, TINY_PROMPT, TINY_TOKENS = 2, 16, 4
# What a model needs beside its weights, for activations and the cache.
ROOM = 1.5 * GIGA
STREAM_BYTES = 2**30


def main(argv: list[str]) -> int:
    made = parser("benchmarks.full_size", __doc__)
    made.add_argument("--systems", nargs="+", choices=(*SYSTEMS, COMPILED), default=SYSTEMS)
    made.add_argument("--prompt", type=int, default=PROMPT)
    made.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    return run_each(made, "decode", measure, argv)


def run_each(
    made: argparse.ArgumentParser,
    task: str,
    measure: Callable[[str, argparse.Namespace], dict[str, float]],
    argv: list[str],
) -> int:
    """Measures each system of `--systems` in a process of its own, prints and stores the figures.

    A system that fails or does not fit in memory costs the others nothing. Returns 1 if one failed.
    """
    made.add_argument("--layers", type=int, default=LAYERS, help="fewer for a dry run")
    made.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = made.parse_args(argv)
    if options.tiny:
        options.layers = TINY_LAYERS
    if options.here:
        set_threads(options)
        torch.manual_seed(0)
        print(json.dumps(measure(options.systems[0], options)))
        return 0
    module = f"benchmarks.{Path(sys.modules[measure.__module__].__file__ or '').stem}"
    results = new_results(options.device, module, argv)
    begun = time.monotonic()
    for system in options.systems:
        left = options.seconds - (time.monotonic() - begun)
        if why := _why_not(system, options, left):
            results.skipped.append(Note(f"{task} {system}", why))
            continue
        rest = [a for a in argv if a not in ("--systems", *SYSTEMS, COMPILED)]
        command = [sys.executable, "-m", module, *rest, "--systems", system, "--here"]
        try:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, timeout=min(left, 1e6)
            )
        except subprocess.TimeoutExpired:
            results.skipped.append(Note(f"{task} {system}", f"{options.seconds:.0f} s were over"))
            continue
        if done.returncode:
            results.failed.append(Note(f"{task} {system}", f"exit status {done.returncode}"))
        else:
            results.models.append(Model(task, system, json.loads(done.stdout.splitlines()[-1])))
        if options.json:
            results.write(options.json)
    return finish(results, options.json)


def _why_not(system: str, options: argparse.Namespace, left_s: float) -> str | None:
    needed = _weights(options.layers) * (2 if system == "bfloat16" else 1) + ROOM
    if not options.tiny and needed > free_memory(options.device):
        return f"it needs {needed / GIGA:.1f} GB of free memory"
    return f"{options.seconds:.0f} s were over" if left_s <= 0 else None


def measure(system: str, options: argparse.Namespace) -> dict[str, float]:
    """Builds one system and measures it, here."""
    device, compiled = options.device, system == COMPILED
    prompt, count = options.prompt, options.new_tokens
    if options.tiny:
        prompt, count = TINY_PROMPT, TINY_TOKENS
    begun = time.perf_counter()
    model, quantize_s = build(
        "gptj_q8" if compiled else system, options.layers, device, tiny=options.tiny
    )
    build_s = time.perf_counter() - begun
    # Every matrix but the embedding's is read once for each token.
    streamed = sum(
        each.nbytes
        for name, each in [*model.named_parameters(), *model.named_buffers()]
        if "wte" not in name and each.dim() > 0
    )
    how = static_cache(device) if compiled else {}
    with peak_memory(device) as peak, torch.inference_mode():
        # Wakes threads, fills caches; compiles, which a static cache of another length does anew.
        _tokens(model, SHORT_PROMPT, count if compiled else 2, how)
        decode = _tokens(model, SHORT_PROMPT, count, how)
        prefill = [_tokens(model, prompt, 1, how)[0] for _ in range(2)]
    read = stream_gb_per_s(device, 2**16 if options.tiny else STREAM_BYTES)
    # A GPU may hand over several tokens at once.
    token_s = (statistics.mean if device.type == "cuda" else statistics.median)(decode[1:])
    return {
        "layers": options.layers,
        "threads": torch.get_num_threads(),
        "weights": sum(m.numel() for n, m in model.named_parameters() if m.dim() == 2),
        "build_s": build_s,
        "quantize_s": quantize_s,
        "decode_tokens_per_s": 1 / token_s,
        f"prefill_{prompt}_s": min(prefill),
        f"peak_{'gpu' if device.type == 'cuda' else 'rss_anon'}_gb": peak() / GIGA,
        "streamed_gb_per_token": streamed / GIGA,
        "stream_gb_per_s": read,
        "share_of_stream_speed": streamed / GIGA / token_s / read,
    }


def static_cache(device: torch.device) -> dict[str, Any]:
    """Arguments of `generate`: a static cache, and a decode step compiled into one graph.

    On a CPU it is traced only, which Transformers does there when asked by a private switch.
    """
    from transformers import CompileConfig

    config = CompileConfig(fullgraph=True)  # its mode is reduce-overhead
    if device.type == "cpu":
        config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


def build(
    system: str, layers: int, device: torch.device | str = "cpu", tiny: bool = False
) -> tuple[nn.Module, float]:
    """GPT-J of random bfloat16 weights, one block in floats at a time; seconds spent quantizing.

    RuntimeError where a quantized layer computes wrongly: then nothing is timed.
    """
    from transformers import GPTJConfig, GPTJForCausalLM
    from transformers.models.gptj.modeling_gptj import GPTJBlock

    from gptj_q8 import Q8Config, quantize_

    tokens = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    config = GPTJConfig(n_layer=0, **tokens, **(TINY if tiny else {}))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    seconds = 0.0
    try:
        with torch.device(device):
            model = GPTJForCausalLM(config).eval()
            blocks = model.transformer.h
            for layer in range(layers + 1):
                if system == "gptj_q8":
                    begun = time.perf_counter()
                    quantize_(model, Q8Config())  # what is quantized already stays
                    _wait(device)
                    seconds += time.perf_counter() - begun
                if layer < layers:
                    blocks.append(GPTJBlock(config, layer_idx=layer).eval())
    finally:
        torch.set_default_dtype(before)
    model.config.n_layer = layers
    check_products(model)
    return model, seconds


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def _tokens(model: Any, prompt: int, count: int, how: dict[str, Any]) -> list[float]:
    """Seconds from one new token to the next, the first from the start. how: for `generate`."""
    arrivals = [time.perf_counter()]

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            arrivals.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.arange(prompt, device=model.device)[None] % min(1000, model.config.vocab_size)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        streamer=Clock(),
        **how,
    )
    # The streamer is given the prompt before it is computed.
    times = [arrivals[0], *arrivals[2:]]
    return [b - a for a, b in pairwise(times)]


def _weights(layers: int) -> int:
    return 2 * 50400 * 4096 + layers * (4 * 4096**2 + 2 * 4096 * 16384)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
