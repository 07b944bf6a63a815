"""Converts a synthetic sharded GPT-J of full width and generates from the result.

    python -m benchmarks.bench_convert                # 4 of GPT-J-6B's 28 blocks: 2.4 GB in float16
    python -m benchmarks.bench_convert --layers 28    # all of it: 12.1 GB, as much again for a copy
    python -m benchmarks.bench_convert --tiny         # does it run at all?

Prints the sizes, the peak of anonymous memory over its value after imports (while converting from
file to file, while loading and quantizing, while loading what was converted), and the tokens per
second of greedy generation from the 8-bit model and from the original in bfloat16 under plain
Transformers, in turns, each at least three times.
"""

import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.arguments import cpu_parser, set_threads
from benchmarks.machine import new_results
from benchmarks.memory_peak import watch
from benchmarks.model_check import check_products
from benchmarks.report import finish
from benchmarks.results import GIGA, Model
from benchmarks.timing import in_turns

# Weights of the original's width: GPT-J draws its own with a deviation of 0.02.
DEVIATION = 0.02
SHARD_BYTES = 600_000_000
PROMPT_TOKENS = 8


@dataclass
class Conversion:
    """Sizes in bytes. peaks: of anonymous memory over its value after imports."""

    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    seconds: float
    peak: int
    quantizing_load_seconds: float
    quantizing_load_peak: int
    load_seconds: float
    load_peak: int

    @property
    def limit(self) -> int:
        """What DESIGN allows a conversion: the 8-bit size plus 500 MB."""
        return self.bytes_after + 500_000_000


@dataclass
class Generation:
    """Tokens per second of ours and of bfloat16 in each round."""

    tokens: int
    rounds: list[tuple[float, float]]


def write_checkpoint(directory: Path, layers: int, width: int, shard_bytes: int) -> None:
    """Write a GPT-J of random weights in float16, shard by shard."""
    from transformers import GPTJConfig, GPTJForCausalLM

    heads = max(1, width // 256)
    config = GPTJConfig(n_layer=layers, n_embd=width, n_head=heads, dtype="float16")
    config.architectures = ["GPTJForCausalLM"]
    with torch.device("meta"):
        model = GPTJForCausalLM(config)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    size = 0
    for name, parameter in model.named_parameters():
        if shards[-1] and size + 2 * parameter.numel() > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * parameter.numel()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            name: _values(name, model.get_parameter(name).shape, generator) for name in names
        }
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.float16)
    if ".ln_" in name:
        return torch.ones(shape, dtype=torch.float16)
    values = torch.empty(shape, dtype=torch.float16)
    rows = max(1, (1 << 22) // shape[-1])
    for part in values.split(rows):  # in float32, a few MB at a time
        part.copy_(torch.randn(part.shape, generator=generator) * DEVIATION)
    return values


# Each runs in a process of its own, which waits for a line once everything is imported.
_READY = """
import json, sys
from transformers import GPTJForCausalLM
import gptj_q8
from gptj_q8.checkpoint import convert_checkpoint
print("ready", flush=True)
sys.stdin.readline()
"""
_CONVERT = """
report = convert_checkpoint(sys.argv[1], sys.argv[2])
print(json.dumps([report.bytes_before, report.bytes_after, report.bits_per_weight]), flush=True)
"""
_LOAD = """
model = gptj_q8.from_pretrained(sys.argv[1])
print(json.dumps(model.num_parameters()), flush=True)
"""


def convert_and_load(source: Path, target: Path) -> Conversion:
    """Convert `source` to `target`, then load each of them in 8 bits."""
    converted, quantized = watch(_READY + _CONVERT, source, target), watch(_READY + _LOAD, source)
    loaded = watch(_READY + _LOAD, target)
    before, after, bits = converted.answer
    return Conversion(
        before,
        after,
        bits,
        converted.seconds,
        converted.peak - converted.imports,
        quantized.seconds,
        quantized.peak - quantized.imports,
        loaded.seconds,
        loaded.peak - loaded.imports,
    )


def generate(original: Path, converted: Path, tokens: int, rounds: int) -> Generation:
    """Times greedy generation from both models, in turns.

    RuntimeError where a layer in 8 bits computes wrongly: then nothing is timed.
    """
    from transformers import AutoModelForCausalLM

    import gptj_q8

    ours = gptj_q8.from_pretrained(converted, dtype=torch.bfloat16)
    check_products(ours)
    plain = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16)
    calls = {"ours": partial(_write, ours, tokens), "plain": partial(_write, plain, tokens)}
    seconds = in_turns(calls, rounds)
    pairs = zip(seconds["ours"], seconds["plain"], strict=True)
    return Generation(tokens, [(tokens / a, tokens / b) for a, b in pairs])


def _write(model: Any, tokens: int) -> None:
    ids = torch.arange(PROMPT_TOKENS)[None]
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )


def models(conversion: Conversion, generation: Generation | None) -> list[Model]:
    """The figures as results hold them; peaks are of anonymous memory over that after imports."""
    found = [
        Model(
            "convert",
            "file to file",
            {
                "float16_gb": conversion.bytes_before / GIGA,
                "8bit_gb": conversion.bytes_after / GIGA,
                "bits_per_weight": conversion.bits_per_weight,
                "seconds_s": conversion.seconds,
                "peak_gb": conversion.peak / GIGA,
                "limit_gb": conversion.limit / GIGA,
            },
        ),
        Model(
            "convert",
            "loading, quantizing",
            {
                "seconds_s": conversion.quantizing_load_seconds,
                "peak_gb": conversion.quantizing_load_peak / GIGA,
            },
        ),
        Model(
            "convert",
            "loading the 8 bits",
            {"seconds_s": conversion.load_seconds, "peak_gb": conversion.load_peak / GIGA},
        ),
    ]
    if generation is not None:
        found += [
            Model(
                "generate",
                name,
                {
                    "tokens": generation.tokens,
                    "tokens_per_s": statistics.median(speeds),
                    "slowest_tokens_per_s": min(speeds),
                    "fastest_tokens_per_s": max(speeds),
                },
            )
            for name, speeds in zip(
                ("gptj_q8", "bfloat16"), zip(*generation.rounds, strict=True), strict=True
            )
        ]
    return found


def main(argv: list[str]) -> int:
    made = cpu_parser("benchmarks.bench_convert", __doc__)
    made.add_argument("--layers", type=int, default=4, help="blocks of GPT-J; 4 unless given")
    made.add_argument("--tokens", type=int, default=32, help="to generate; 0 for none")
    made.add_argument("--rounds", type=int, default=3, help="of generation, per model")
    made.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one")
    options = made.parse_args(argv)
    set_threads(options)
    results = new_results(torch.device("cpu"), "benchmarks.bench_convert", argv)

    width, shard_bytes = (256, 20_000_000) if options.tiny else (4096, SHARD_BYTES)
    work = Path(tempfile.mkdtemp(prefix="bench_convert.", dir=options.directory))
    generation = None
    try:
        write_checkpoint(work / "float16", options.layers, width, shard_bytes)
        conversion = convert_and_load(work / "float16", work / "8bit")
        if options.tokens:
            generation = generate(work / "float16", work / "8bit", options.tokens, options.rounds)
    finally:
        shutil.rmtree(work)
    results.models += models(conversion, generation)
    return finish(results, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
