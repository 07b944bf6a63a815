"""Trains the demo's tokenizer and model from the text beside this file.

    python -m gptj_q8.demo.train --output DIR

fills DIR with what `gptj_q8/demo/` ships: `model/`, `report.json` and `loss.png`.
"""

import json
import math
import os
import platform
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GenerationConfig,
    GPTJConfig,
    GPTJForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from gptj_q8.demo import HELD_OUT_BOOKS, books, text

END = "<|endoftext|>"
VOCAB_SIZE = 2048
WINDOW = 512

BATCH_SIZE = 8
LEARNING_RATE = 1.5e-3
WARMUP = 0.05  # as a share of the run
ADAM_BETAS = (0.9, 0.98)
# The text is read some sixteen times. Strong decay and dropout are what keeps a model with five
# parameters a token from learning it by heart.
WEIGHT_DECAY = 0.5
DROPOUT = 0.1
EVALUATE_EVERY = 200
# Held-out evaluations without a new best before the run ends early.
PATIENCE = 8


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-J's own, learned from the training books only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        # All 256 bytes, seen or not, so that any text at all has an encoding.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text("train").splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def new_model() -> GPTJForCausalLM:
    """GPT-J at about a thousandth of its size, freshly initialized."""
    config = GPTJConfig(
        vocab_size=VOCAB_SIZE,
        n_positions=WINDOW,
        n_embd=256,
        n_layer=6,
        n_head=8,
        rotary_dim=16,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        # Dropout on the attention weights would draw more random numbers than all else together.
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return GPTJForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, parts: dict[str, str]) -> torch.Tensor:
    """One row of ids: every book opened by the end-of-text token, and one more at the end."""
    ids = [0]
    for body in parts.values():
        ids += [*tokenizer(body)["input_ids"], 0]
    return torch.tensor(ids)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of `WINDOW` tokens that begin at the given places."""

    def __init__(self, ids: torch.Tensor, starts: torch.Tensor) -> None:
        self.ids = ids
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = int(self.starts[index])
        window = self.ids[start : start + WINDOW]
        return {"input_ids": window, "labels": window}


def training_windows(ids: torch.Tensor, count: int, seed: int) -> Windows:
    """`count` windows: pass after pass over the text, each from a new offset, in a new order."""
    generator = torch.Generator().manual_seed(seed)
    passes: list[torch.Tensor] = []
    while sum(map(len, passes)) < count:
        offset = int(torch.randint(WINDOW, (), generator=generator))
        starts = torch.arange(offset, len(ids) - WINDOW + 1, WINDOW)
        passes.append(starts[torch.randperm(len(starts), generator=generator)])
    return Windows(ids, torch.cat(passes)[:count])


def held_out_windows(ids: torch.Tensor) -> Windows:
    """Windows that overlap by one token, so that each token is predicted once.

    A remainder of less than a batch is left to `held_out_loss`: a compiled model wants one shape.
    """
    starts = torch.arange(0, len(ids) - WINDOW + 1, WINDOW - 1)
    return Windows(ids, starts[: len(starts) // BATCH_SIZE * BATCH_SIZE])


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Nats a token over all of `ids` but the first, in windows that overlap by one token."""
    model.eval()
    total = 0.0
    for start in range(0, len(ids) - 1, WINDOW - 1):
        window = ids[start : start + WINDOW]
        logits = model(input_ids=window[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


class Budget(TrainerCallback):
    """Ends the run, best checkpoint kept, when its minutes are spent or a signal asks for it.

    The learning rate falls with `progress`: the share of the steps or of the minutes, whichever is
    further along. On a machine that keeps up, the clock plays no part and the run repeats exactly;
    on a slower one the rate still comes down to zero in time.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps = steps
        self.seconds = minutes * 60
        self.began = time.monotonic()
        self.ended_by = "steps"
        self.interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: object) -> None:
        self.interrupted = True

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def learning_rate_share(self, step: int) -> float:
        progress = max(step / self.steps, self.elapsed() / self.seconds)
        return max(0.0, min(progress / WARMUP, (1 - progress) / (1 - WARMUP)))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.interrupted or self.elapsed() >= self.seconds:
            self.ended_by = "signal" if self.interrupted else "minutes"
            control.should_evaluate = control.should_save = control.should_training_stop = True


def train(
    model: GPTJForCausalLM, train_ids: torch.Tensor, held_out_ids: torch.Tensor, budget: Budget
) -> tuple[TrainerState, float]:
    """Trains `model` in place, leaves it at its best held-out loss; the CPU seconds spent too."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=ADAM_BETAS, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, budget.learning_rate_share)
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            output_dir=checkpoints,
            max_steps=budget.steps,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=BATCH_SIZE,
            train_sampling_strategy="sequential",  # training_windows has shuffled already
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=True,
            torch_compile=True,
            eval_strategy="steps",
            eval_steps=EVALUATE_EVERY,
            save_strategy="steps",
            save_steps=EVALUATE_EVERY,
            save_only_model=True,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            prediction_loss_only=True,
            logging_steps=50,
            disable_tqdm=True,
            report_to="none",
            seed=torch.initial_seed(),
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=training_windows(
                train_ids, budget.steps * BATCH_SIZE, torch.initial_seed()
            ),
            eval_dataset=held_out_windows(held_out_ids),
            optimizers=(optimizer, scheduler),
            callbacks=[budget, EarlyStoppingCallback(PATIENCE)],
        )
        cpu_began = time.process_time()
        trainer.train()
        return trainer.state, time.process_time() - cpu_began


def save_model(model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in float16 with its tokenizer, ready for use rather than for training."""
    model.half()
    model.config.use_cache = True
    # As in GPT-J-6B's own configuration: who fine-tunes chooses a dropout anew.
    model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def curves(state: TrainerState) -> dict[str, list[tuple[int, float]]]:
    """The (step, loss) pairs of training, averaged over 50 steps, and of the held-out books."""
    return {
        name: [(row["step"], round(row[key], 4)) for row in state.log_history if key in row]
        for name, key in (("train", "loss"), ("held_out", "eval_loss"))
    }


def plot(report: dict[str, Any], file: Path) -> None:
    """Draws the loss curves of a report."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    names = {"train": "training (with dropout)", "held_out": "held out"}
    for (key, name), color in zip(names.items(), ("#8aa4c8", "#c0392b"), strict=True):
        steps, losses = zip(*report["curves"][key], strict=True)
        axes.plot(steps, losses, label=name, color=color, linewidth=2)
    best_step, best = min(report["curves"]["held_out"], key=lambda point: point[1])
    axes.plot([best_step], [best], "o", color="#c0392b")
    axes.annotate(
        f"kept: {best:.3f} at step {best_step}",
        (best_step, best),
        xytext=(-8, 14),
        textcoords="offset points",
        ha="right",
    )
    axes.set(xlabel="step", ylabel="loss (nats a token)", ylim=(best - 0.5, best + 2.5))
    axes.set_title("Demo GPT-J on the Reina-Valera of 1909")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)


def cpu_name() -> str:
    """The processor as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(
    output: Path = typer.Option(..., help="Folder for model/, report.json and loss.png."),
    steps: int = typer.Option(4000, min=1, help="Optimizer steps, 4,096 tokens each."),
    minutes: float = typer.Option(90.0, help="Ends the run early, learning rate fully decayed."),
    seed: int = typer.Option(1909, help="Seeds weights, dropout and the order of the text."),
) -> None:
    """Train the demo's tokenizer and model, and write them with a report of the run."""
    date = datetime.now(UTC).date().isoformat()
    set_seed(seed)
    tokenizer = train_tokenizer()
    train_ids = encode(tokenizer, books("train"))
    held_out_ids = encode(tokenizer, books("held_out"))
    model = new_model()
    parameters = model.num_parameters()
    typer.echo(
        f"{parameters:,} parameters; {len(train_ids):,} tokens to train on, "
        f"{len(held_out_ids):,} held out"
    )

    budget = Budget(steps, minutes)
    state, cpu_seconds = train(model, train_ids, held_out_ids, budget)
    wall_seconds = budget.elapsed()
    save_model(model, tokenizer, output / "model")

    shipped = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    loss = held_out_loss(shipped, held_out_ids)
    characters = len("".join(books("held_out").values()))
    report = {
        "command": f"python -m gptj_q8.demo.train --output DIR --steps {steps} "
        f"--minutes {minutes:g} --seed {seed}",
        "seed": seed,
        "date": date,
        "steps": state.global_step,
        "ended_by": "held-out loss"
        if budget.ended_by == "steps" and state.global_step < steps
        else budget.ended_by,
        "epochs": round(state.global_step * BATCH_SIZE * WINDOW / len(train_ids), 2),
        "minutes": round(wall_seconds / 60, 1),
        "cpu_minutes": round(cpu_seconds / 60, 1),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": parameters,
        "tokens": {"train": len(train_ids), "held_out": len(held_out_ids)},
        "held_out": {
            "books": HELD_OUT_BOOKS,
            "loss": round(loss, 4),
            "perplexity": round(math.exp(loss), 3),
            "bits_per_character": round(
                loss * (len(held_out_ids) - 1) / math.log(2) / characters, 4
            ),
            "how": "The shipped float16 weights, computed in float32. Each held-out book is opened "
            "by <|endoftext|>, one more ends the last; windows of 512 tokens overlap by one, so "
            "that every token but the first is predicted once. Loss is the mean in nats a token, "
            "perplexity its exponential.",
        },
        "curves": curves(state),
    }
    (output / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    plot(report, output / "loss.png")
    typer.echo(f"held-out perplexity {math.exp(loss):.2f} after {state.global_step} steps")


if __name__ == "__main__":
    typer.run(main)
