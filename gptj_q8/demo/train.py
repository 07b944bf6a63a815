"""Trains the demo's tokenizer and model from the text beside this file.

    python -m gptj_q8.demo.train --output DIR

fills DIR with what `gptj_q8/demo/` ships: `model/`, `report.json` and `loss.png`.
"""

import signal
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
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

from gptj_q8.demo import books, text
from gptj_q8.demo.report import (
    curves,
    describe_machine,
    encode_book,
    format_report,
    measure_held_out,
    plot_losses,
)

END = "<|endoftext|>"
VOCAB_SIZE = 2048
WINDOW = 512

BATCH_SIZE = 8
LEARNING_RATE = 2e-3
WARMUP = 0.05  # as a share of the run
ADAM_BETAS = (0.9, 0.98)
# The text is read eight times or more. Strong decay and dropout are what keeps a model with five
# parameters a token from learning it by heart.
WEIGHT_DECAY = 0.3
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


def encode(tokenizer: PreTrainedTokenizerFast, split: Literal["train", "held_out"]) -> torch.Tensor:
    """The books of a split as one row of ids, an end-of-text token before, between and after."""
    rows = [encode_book(tokenizer, body) for body in books(split).values()]
    return torch.cat([rows[0], *(row[1:] for row in rows[1:])])


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

    A remainder of less than a batch is left out: a compiled model wants one shape.
    """
    starts = torch.arange(0, len(ids) - WINDOW + 1, WINDOW - 1)
    return Windows(ids, starts[: len(starts) // BATCH_SIZE * BATCH_SIZE])


class Budget(TrainerCallback):
    """Ends the run, best checkpoint kept, when its minutes are spent or a signal asks for it.

    The learning rate falls with the share spent of the steps or of the minutes, whichever is
    further along. On a machine that keeps up, the clock plays no part and the run repeats exactly;
    on a slower one the rate still comes down to zero in time.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self.steps = steps
        self.seconds = minutes * 60
        self.began = time.monotonic()
        self.interrupted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._interrupt)

    def _interrupt(self, number: int, frame: object) -> None:
        self.interrupted = True

    def seconds_spent(self) -> float:
        """Wall time since the run began."""
        return time.monotonic() - self.began

    def learning_rate_share(self, step: int) -> float:
        """The share of the peak rate: a line up, then a line down."""
        spent = max(step / self.steps, self.seconds_spent() / self.seconds)
        return max(0.0, min(spent / WARMUP, (1 - spent) / (1 - WARMUP)))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.interrupted or self.seconds_spent() >= self.seconds:
            control.should_evaluate = control.should_save = control.should_training_stop = True

    def ended_by(self, steps: int) -> str:
        """Why a run of so many steps ended, in words for the report."""
        if self.interrupted:
            return "signal"
        if steps == self.steps:
            return "steps"
        return "minutes" if self.seconds_spent() >= self.seconds else "held-out loss"


def train(
    model: GPTJForCausalLM,
    train_ids: torch.Tensor,
    held_out_ids: torch.Tensor,
    budget: Budget,
    seed: int,
) -> TrainerState:
    """Trains `model` in place and leaves it at its lowest held-out loss."""
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
            seed=seed,
        )
        trainer = Trainer(
            model,
            arguments,
            train_dataset=training_windows(train_ids, budget.steps * BATCH_SIZE, seed),
            eval_dataset=held_out_windows(held_out_ids),
            optimizers=(optimizer, scheduler),
            callbacks=[budget, EarlyStoppingCallback(PATIENCE)],
        )
        trainer.train()
        return trainer.state


def save_model(model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the model in float16 with its tokenizer, ready for use rather than for training."""
    model.half()
    model.config.use_cache = True
    # As in GPT-J-6B's own configuration: who fine-tunes chooses a dropout anew.
    model.config.resid_pdrop = model.config.embd_pdrop = 0.0
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(
    output: Annotated[Path, typer.Option(help="Folder for model/, report.json and loss.png.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps, 4,096 tokens each.")] = 3200,
    minutes: Annotated[float, typer.Option(min=1, help="End by then, fully decayed.")] = 90,
    seed: Annotated[int, typer.Option(help="Of weights, dropout and text order.")] = 1909,
) -> None:
    """Train the demo's tokenizer and model, and write them with a report of the run."""
    set_seed(seed)
    tokenizer = train_tokenizer()
    train_ids, held_out_ids = encode(tokenizer, "train"), encode(tokenizer, "held_out")
    model = new_model()
    typer.echo(
        f"{model.num_parameters():,} parameters; {len(train_ids):,} tokens to train on, "
        f"{len(held_out_ids):,} held out"
    )

    budget = Budget(steps, minutes)
    state = train(model, train_ids, held_out_ids, budget, seed)
    save_model(model, tokenizer, output / "model")

    held_out = measure_held_out(output / "model")
    report = {
        "command": "python -m gptj_q8.demo.train --output DIR "
        f"--steps {steps} --minutes {minutes:g} --seed {seed}",
        "seed": seed,
        "parameters": model.num_parameters(),
        "tokens": {"train": len(train_ids), "held_out": len(held_out_ids)},
        "steps": state.global_step,
        "epochs": round(state.global_step * BATCH_SIZE * WINDOW / len(train_ids), 2),
        "ended_by": budget.ended_by(state.global_step),
        "minutes": round(budget.seconds_spent() / 60, 1),
        "machine": describe_machine(),
        "held_out": held_out,
        "curves": curves(state),
    }
    (output / "report.json").write_text(format_report(report), encoding="utf-8")
    plot_losses(report, output / "loss.png")
    typer.echo(f"held-out perplexity {held_out['perplexity']}")


if __name__ == "__main__":
    typer.run(main)
