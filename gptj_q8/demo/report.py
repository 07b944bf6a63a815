"""Measures the demo's model on the held-out books and draws its loss curves."""

import json
import math
import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gptj_q8.demo import books
from gptj_q8.doctor.machine import cpu_model

HOW = (
    "The float16 weights as shipped, computed in float32. Each book is opened and closed by "
    "<|endoftext|> and read in windows of 512 tokens that overlap by one, so that every token but "
    "the opening one is predicted once. Loss is the mean in nats a token over all books together, "
    "perplexity its exponential."
)


def encode_book(tokenizer: PreTrainedTokenizerBase, body: str) -> torch.Tensor:
    """One row of ids between two end-of-text tokens."""
    # Quietly, since a book is longer than the model's window: the caller cuts it.
    ids = tokenizer(body, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return torch.tensor([end, *ids, end])


@torch.inference_mode()
def summed_loss(model: torch.nn.Module, ids: torch.Tensor, window: int = 512) -> float:
    """Nats over all of `ids` but the first, in windows that overlap by one token."""
    total = 0.0
    for start in range(0, len(ids) - 1, window - 1):
        part = ids[start : start + window]
        logits = model(input_ids=part[None]).logits[0, :-1]
        total += cross_entropy(logits.float(), part[1:], reduction="sum").item()
    return total


def measure_held_out(folder: Path) -> dict[str, Any]:
    """Loss, perplexity and bits a character of the model in `folder` on the held-out books."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    held_out = books("held_out")
    encoded = {name: encode_book(tokenizer, body) for name, body in held_out.items()}
    nats = {name: summed_loss(model, ids) for name, ids in encoded.items()}
    predicted = {name: len(ids) - 1 for name, ids in encoded.items()}
    loss = sum(nats.values()) / sum(predicted.values())
    characters = sum(map(len, held_out.values()))
    return {
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_character": round(sum(nats.values()) / math.log(2) / characters, 4),
        "perplexity_by_book": {
            name: round(math.exp(nats[name] / predicted[name]), 3) for name in nats
        },
        "how": HOW,
    }


def describe_machine() -> dict[str, Any]:
    """What a reader needs to judge the run's minutes."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def curves(state: transformers.TrainerState) -> dict[str, list[tuple[float, float]]]:
    """The (step, loss) pairs of training, averaged over 50 steps, and of the held-out books."""
    return {
        name: [(row["step"], round(row[key], 4)) for row in state.log_history if key in row]
        for name, key in (("train", "loss"), ("held_out", "eval_loss"))
    }


def format_report(report: dict[str, Any]) -> str:
    """JSON with a line a value, but a line a point for the curves."""
    lines = json.dumps(report, indent=2, ensure_ascii=False)
    return re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", lines) + "\n"


def plot_losses(report: dict[str, Any], file: Path) -> None:
    """Draws the loss curves of a report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    step, best = min(report["curves"]["held_out"], key=lambda point: point[1])
    series = (
        ("train", "training books, with dropout", "#8aa4c8"),
        ("held_out", f"held-out books, {best:.2f} at step {step:,} (shipped)", "#b03a2e"),
    )
    for key, label, color in series:
        points = report["curves"][key]
        axes.plot(*zip(*points, strict=True), label=label, color=color, linewidth=2)
    axes.plot(step, best, "o", color="#b03a2e")
    lowest = min(loss for points in report["curves"].values() for _, loss in points)
    axes.set_ylim(lowest - 0.2, best + 2.2)
    axes.set_xlim(0)
    axes.set_xlabel("optimizer step (4,096 tokens each)")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("The demo's GPT-J on the Reina-Valera of 1909")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)
