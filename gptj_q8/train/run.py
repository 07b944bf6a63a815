"""Fine-tunes: everything from documents to an adapter, in order."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments, set_seed

from gptj_q8.lora.add import add_lora
from gptj_q8.lora.prepare import prepare_for_finetuning, summary
from gptj_q8.models.gptj_modules import save_memory
from gptj_q8.optim import AdamW8bit
from gptj_q8.train import folder
from gptj_q8.train.listener import Listener
from gptj_q8.train.packing import Piece, Rows, collate, encode, keeps_apart
from gptj_q8.train.plot import plot_run
from gptj_q8.train.samples import Sample, beginnings, sample
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document, hold_out
from gptj_q8.train.trainer import Q8Trainer, Watcher

# Tokens that go through the model together; a batch of more is done in parts.
TOKENS_AT_ONCE = 2048
# Above this many numbers in a model, only the blocks' inputs are kept and the rest is computed
# again in the backward pass, a third more work; below, all that is kept is small beside a process.
# An estimate: float32 GPT-J blocks of 10^8 numbers in all keep some 1.5 GB for 2048 tokens.
CHECKPOINT_ABOVE = 100_000_000


@dataclass(frozen=True)
class Report:
    """How a run went.

    finished: whether it came to its end rather than being stopped. steps, of_steps: done, and in
    all. checkpoint: the last one's folder, to resume from. adapter: the folder with the result, ""
    where the run was stopped. trained, parameters: how many numbers train, and of how many.
    tokens: learned in each epoch. held_out_tokens: measured. rows: of tokens, in each epoch.
    packed: whether documents share rows. losses, held_out, learning_rates: (step, value), losses
    in nats a token. seconds: of this call's training. plot: the file, "" where none was drawn.
    """

    finished: bool
    steps: int
    of_steps: int
    checkpoint: str
    adapter: str
    trained: int
    parameters: int
    tokens: int
    held_out_tokens: int
    rows: int
    packed: bool
    losses: list[tuple[int, float]]
    held_out: list[tuple[int, float]]
    learning_rates: list[tuple[int, float]]
    seconds: float
    samples: list[Sample]
    plot: str


def finetune(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    output: str | Path,
    settings: Settings | None = None,
    *,
    name: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    prompts: Sequence[str] = (),
    listener: Listener | None = None,
) -> Report:
    """Trains LoRA adapters on documents and writes them to `output`, in PEFT's format.

    model, tokenizer: a causal language model, in 8 bits or not, and its tokenizer. The model is
        changed: it has the trained adapters afterwards.
    documents: as `read_documents` gives them.
    output: the run's folder; `gptj_q8.train.folder` tells what it will hold.
    name: how to call the model in what is written; None takes its `name_or_path`.
    resume: go on from the last checkpoint in `output`, to the same losses as without the stop.
    overwrite: replace another run in `output`.
    prompts: what the model continues before and after; none takes beginnings of held-out texts.
    listener: is told of every step.

    Ctrl-C ends the run after the step in hand, with a checkpoint.

    ValueError for what cannot be learned from (see `encode` and `hold_out`), for a run that cannot
    go on, and for a loss that is NaN; FileExistsError where `output` holds something else;
    OSError for a checkpoint that cannot be written. The last whole checkpoint stays in each case.
    """
    settings = settings or Settings()
    listener = listener or Listener()
    output = Path(output)
    if resume:
        folder.read_record(output)
        if (output / folder.SUMMARY).exists():
            raise ValueError(f"the run in {output} has ended; there is nothing to resume")
    else:
        folder.check_new(output, overwrite)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"{model.name_or_path} has adapters already, which new ones would take the place of; "
            "gptj-q8 convert takes them out of an old checkpoint"
        )
    if model.device.type == "cpu" and model.dtype == torch.float16:
        raise ValueError("float16 trains on a GPU only; load the model in bfloat16 or float32")
    if model.device.index:
        raise ValueError(
            f"training runs on the first GPU, not on {model.device}: hide others with "
            "CUDA_VISIBLE_DEVICES"
        )

    listener.stage("Encoding")
    set_seed(settings.seed)
    model.eval()
    save_memory(model)
    train_rows, held_out_rows, packed = _rows(model, tokenizer, documents, settings)
    name = name or str(model.name_or_path)
    model = _add_adapters(model, settings)
    listener.prepared(summary(model))

    record = folder.Record(
        model=name,
        settings=settings,
        data_digest=_digest([*train_rows.rows, *(held_out_rows.rows if held_out_rows else [])]),
        dtype=str(model.dtype).removeprefix("torch."),
        samples={},
    )
    if resume:
        before = folder.check_same(output, record).samples
    else:
        listener.stage("Sampling")
        before = sample(model, tokenizer, prompts or beginnings(documents, settings), settings.seed)
        folder.begin(output, folder.Record(**{**vars(record), "samples": before}))

    watcher = Watcher(listener, _tokens_per_step(train_rows, settings))
    trainer = _trainer(model, tokenizer, output, settings, train_rows, held_out_rows, watcher)
    last = folder.last_checkpoint(output) if resume else None
    began = time.perf_counter()
    listener.stage("Training")
    with watcher.heeding_signals():
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        finished = not watcher.interrupted
        if (
            finished
            and held_out_rows
            and _last_step(trainer, "eval_loss") < trainer.state.max_steps
        ):
            trainer.evaluate()
    seconds = time.perf_counter() - began

    samples: list[Sample] = []
    if finished:
        listener.stage("Sampling")
        after = sample(model, tokenizer, list(before), settings.seed)
        samples = [Sample(prompt, text, after[prompt]) for prompt, text in before.items()]
        with folder.put_whole(output, "adapter") as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    losses = _curve(trainer, "loss")
    held_out = _curve(trainer, "eval_loss")
    rates = _curve(trainer, "learning_rate")
    plot = output / folder.PLOT
    drawn = bool(losses) and _plot(f"{name}, fine-tuned", losses, held_out, rates, plot)
    trained, parameters = model.get_nb_trainable_parameters()
    checkpoint = folder.last_checkpoint(output)
    report = Report(
        finished=finished,
        steps=trainer.state.global_step,
        of_steps=trainer.state.max_steps,
        checkpoint=str(checkpoint or ""),
        adapter=str(output) if finished else "",
        trained=trained,
        parameters=parameters,
        tokens=train_rows.targets,
        held_out_tokens=held_out_rows.targets if held_out_rows else 0,
        rows=len(train_rows),
        packed=packed,
        losses=losses,
        held_out=held_out,
        learning_rates=rates,
        seconds=seconds,
        samples=samples,
        plot=str(plot) if drawn else "",
    )
    if finished:
        folder.write_json(output / folder.SUMMARY, asdict(report))
    return report


def best_dtype(device: torch.device) -> torch.dtype:
    """What to load a model in that is to be fine-tuned.

    bfloat16 where the processor has instructions for it: half of float32's memory, and quicker
    (the demo's fine-tuning took 26 s instead of 31, to the same held-out loss; two cores of an AMD
    EPYC, Zen 5, 2026-11-24). Else float16 on a GPU, with a loss scaler, and float32 on a CPU.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    has = torch.cpu.get_capabilities()
    with_bfloat16 = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if with_bfloat16 else torch.float32


def _rows(
    model: Any, tokenizer: Any, documents: Sequence[Document], settings: Settings
) -> tuple[Rows, Rows | None, bool]:
    length = settings.length(getattr(model.config, "max_position_embeddings", None))
    train, held_out = hold_out(documents, settings.held_out, settings.seed)
    packed = keeps_apart(model)

    def rows(part: Sequence[Document]) -> Rows:
        return Rows(encode(tokenizer, part, length, model.config.vocab_size), length, packed)

    return rows(train), rows(held_out) if held_out else None, packed


def _digest(rows: Sequence[Sequence[Piece]]) -> str:
    found = hashlib.sha256()
    for row in rows:
        for piece in row:
            found.update(f"{len(piece.ids)} {piece.first_target};".encode())
            found.update(piece.ids.numpy().tobytes())
    return found.hexdigest()


def _add_adapters(model: Any, settings: Settings) -> Any:
    model = add_lora(
        model, settings.rank, settings.alpha, settings.targets, dropout=settings.dropout
    )
    large = model.get_nb_trainable_parameters()[1] > CHECKPOINT_ABOVE
    return prepare_for_finetuning(model, settings.train_1d, checkpointing=large, verbose=False)


def _at_once(length: int, batch_size: int) -> int:
    """Rows that go through the model together: a divisor of the batch."""
    most = max(1, TOKENS_AT_ONCE // length)
    return max(n for n in range(1, batch_size + 1) if batch_size % n == 0 and n <= most)


def _tokens_per_step(rows: Rows, settings: Settings) -> float:
    return rows.targets / len(rows) * min(settings.batch_size, len(rows))


def _trainer(
    model: Any,
    tokenizer: Any,
    output: Path,
    settings: Settings,
    train_rows: Rows,
    held_out_rows: Rows | None,
    watcher: Watcher,
) -> Q8Trainer:
    length = max(sum(len(piece.ids) for piece in row) for row in train_rows.rows)
    at_once = _at_once(length, settings.batch_size)
    steps = settings.steps(len(train_rows))
    every = settings.save_every or math.ceil(steps / 10)
    arguments = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=settings.batch_size // at_once,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        use_cpu=model.device.type == "cpu",
        fp16=model.dtype == torch.float16,
        eval_strategy="steps" if held_out_rows else "no",
        eval_steps=every,
        eval_on_start=bool(held_out_rows) and folder.last_checkpoint(output) is None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=1,
        logging_steps=1,
        # The default hides a NaN behind the losses before it.
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
        seed=settings.seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer spreads over all there are
    trainer = Q8Trainer(
        model,
        arguments,
        data_collator=collate,
        train_dataset=train_rows,
        eval_dataset=held_out_rows,
        callbacks=[watcher],
        optimizer_cls_and_kwargs=(AdamW8bit, {"lr": settings.learning_rate}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _curve(trainer: Q8Trainer, key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in trainer.state.log_history if key in row]


def _last_step(trainer: Q8Trainer, key: str) -> int:
    return max((step for step, _ in _curve(trainer, key)), default=-1)


def _plot(title: str, losses: Any, held_out: Any, rates: Any, file: Path) -> bool:
    try:
        plot_run(title, losses, held_out, rates, file)
    except ImportError:
        return False
    return True
