"""Loads and converts a synthetic checkpoint in the layout and size of hivemind/gpt-j-6B-8bit.

    python -m benchmarks.bench_old_checkpoint               # all 28 blocks: 6.2 GB, and a copy
    python -m benchmarks.bench_old_checkpoint --layers 2    # does it run at all?

Writes a pytorch_model.bin of random codes, loads it through `gptj_q8.from_pretrained` and through
`gptj_q8.hivemind`, rewrites it, and loads that; each in a process of its own, which then computes
the logits of four tokens. Prints seconds and the peak of anonymous memory (RssAnon), imports and
logits included. Pages of the mapped file are no anonymous memory.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.arguments import bare_parser
from benchmarks.machine import new_results
from benchmarks.memory_peak import Watched, watch
from benchmarks.report import finish
from benchmarks.results import GIGA, Model
from gptj_q8.codebooks import dynamic

BLOCK = 4096
# Decoded, random codes have a deviation of about 0.3 scales; GPT-J's weights have one of 0.02.
SCALE = 0.06

_READY = """
import json, sys
import torch, transformers, peft
import gptj_q8
from gptj_q8.checkpoint import convert_checkpoint
from gptj_q8.hivemind import GPTJForCausalLM
print("ready", flush=True)
sys.stdin.readline()
"""
_COMPUTE = """
with torch.no_grad():
    logits = model(torch.arange(4)[None]).logits
assert logits.isfinite().all()
print(json.dumps(model.num_parameters()), flush=True)
"""
_STEPS = {
    "gptj_q8.from_pretrained(OLD)": "model = gptj_q8.from_pretrained(sys.argv[1])" + _COMPUTE,
    "hivemind.GPTJForCausalLM.from_pretrained(OLD)": (
        "model = GPTJForCausalLM.from_pretrained(sys.argv[1], low_cpu_mem_usage=True)" + _COMPUTE
    ),
    "convert_checkpoint(OLD, NEW)": (
        "print(json.dumps(convert_checkpoint(sys.argv[1], sys.argv[2]).bytes_after), flush=True)"
    ),
    "gptj_q8.from_pretrained(NEW)": "model = gptj_q8.from_pretrained(sys.argv[2])" + _COMPUTE,
}
# Run apart, for it holds the whole checkpoint in memory.
_WRITE = """
import sys
from pathlib import Path
from benchmarks.bench_old_checkpoint import write
write(Path(sys.argv[1]), int(sys.argv[2]))
"""


def write(directory: Path, layers: int) -> None:
    """Write config.json and a pytorch_model.bin as the old code's state_dict() was."""
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(n_layer=layers)
    config.architectures = ["GPTJForCausalLM"]
    config.dtype = "float32"
    with torch.device("meta"):
        model = GPTJForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            value = 1.0 if name.endswith("weight") else 0.0  # norms and biases
            state[name] = torch.full(parameter.shape, value)
            continue
        base = name.removesuffix(".weight")
        codes = torch.empty(parameter.shape, dtype=torch.uint8)
        state[name] = codes.random_(0, 256, generator=generator)
        state[f"{base}.absmax"] = torch.full((-(-codes.numel() // BLOCK),), SCALE)
        state[f"{base}.code"] = dynamic()
    positions = config.n_positions
    for i in range(layers):
        mask = torch.ones(positions, positions, dtype=torch.uint8).tril()
        state[f"transformer.h.{i}.attn.bias"] = mask.view(1, 1, positions, positions)
        state[f"transformer.h.{i}.attn.masked_bias"] = torch.tensor(-1e9)
    directory.mkdir(parents=True)
    config.save_pretrained(directory)
    torch.save(state, directory / "pytorch_model.bin")


def measure(old: Path, new: Path) -> dict[str, Watched]:
    """Take each step; the last one reads what the one before it wrote."""
    return {name: watch(_READY + code, old, new) for name, code in _STEPS.items()}


def write_apart(directory: Path, layers: int) -> int:
    """Write the checkpoint in another process; return the size of its weights in bytes."""
    subprocess.run([sys.executable, "-c", _WRITE, directory, str(layers)], check=True)
    return (directory / "pytorch_model.bin").stat().st_size


def main(argv: list[str]) -> int:
    made = bare_parser("benchmarks.bench_old_checkpoint", __doc__)
    made.add_argument("--layers", type=int, default=28, help="blocks of GPT-J; 28 unless given")
    made.add_argument("--directory", type=Path, help="for the checkpoints; a temporary one")
    options = made.parse_args(argv)
    layers = 1 if options.tiny else options.layers
    results = new_results(torch.device("cpu"), "benchmarks.bench_old_checkpoint", argv)

    work = Path(tempfile.mkdtemp(prefix="bench_old_checkpoint.", dir=options.directory))
    try:
        size = write_apart(work / "old", layers)
        steps = measure(work / "old", work / "new")
    finally:
        shutil.rmtree(work)
    for name, watched in steps.items():
        figures = {"seconds_s": watched.seconds, "peak_gb": watched.peak / GIGA}
        results.models.append(Model("old checkpoint", name, {"file_gb": size / GIGA, **figures}))
    return finish(results, options.json)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
