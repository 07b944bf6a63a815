"""Fine-tunes: everything from documents to an adapter, in order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from gptj_q8.lora.add import add_lora
from gptj_q8.lora.prepare import prepare_for_finetuning, summary
from gptj_q8.models.gptj_modules import save_memory
from gptj_q8.train import folder
from gptj_q8.train.device import recomputes, rows_at_once
from gptj_q8.train.listener import Listener
from gptj_q8.train.packing import Piece, Rows, encode, keeps_apart
from gptj_q8.train.plot import plot_run
from gptj_q8.train.report import Report
from gptj_q8.train.samples import Sample, beginnings, sample
from gptj_q8.train.settings import Settings
from gptj_q8.train.texts import Document, hold_out
from gptj_q8.train.trainer import Watcher, make_trainer


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
    prompts: what the model continues before and after; none takes beginnings of held-out texts. A
        run that goes on keeps those of its start.
    listener: is told of every step.

    Ctrl-C ends the run after the step in hand, with a checkpoint.

    ValueError for what cannot be learned from (see `encode` and `hold_out`), for a run that cannot
    go on, and for a loss that is NaN; FileExistsError where `output` holds something else;
    OSError for a checkpoint that cannot be written. The last whole checkpoint stays in each case.
    """
    settings = settings or Settings()
    listener = listener or Listener()
    output = Path(output).expanduser()
    folder.check(output, resume, overwrite)
    _check_model(model)

    listener.stage("Encoding")
    set_seed(settings.seed)
    model.eval()
    save_memory(model)
    train_rows, held_out_rows, packed = _rows(model, tokenizer, documents, settings)
    name = name or str(model.name_or_path)
    longest = max(sum(len(piece.ids) for piece in row) for row in train_rows.rows)
    at_once = rows_at_once(longest, settings.batch_size)
    model = add_lora(
        model, settings.rank, settings.alpha, settings.targets, dropout=settings.dropout
    )
    again = recomputes(model, longest, at_once)
    prepare_for_finetuning(model, settings.train_1d, checkpointing=again, verbose=False)
    listener.prepared(summary(model, longest, at_once))

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
    trainer = make_trainer(model, output, settings, train_rows, held_out_rows, at_once, watcher)
    began = time.perf_counter()
    listener.stage("Training")
    with watcher.heeding_signals():
        trainer.go_on(folder.last_checkpoint(output) if resume else None)
        finished = not watcher.interrupted
        measured = max((step for step, _ in trainer.curve("eval_loss")), default=-1)
        if finished and held_out_rows and measured < trainer.state.max_steps:
            trainer.evaluate()
    seconds = time.perf_counter() - began

    samples: list[Sample] = []
    if finished:
        listener.stage("Sampling")
        after = sample(model, tokenizer, list(before), settings.seed)
        samples = [Sample(prompt, text, after[prompt]) for prompt, text in before.items()]
        with folder.put_whole(output) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    losses = trainer.curve("loss")
    held_out = trainer.curve("eval_loss")
    rates = trainer.curve("learning_rate")
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


def _check_model(model: Any) -> None:
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


def _tokens_per_step(rows: Rows, settings: Settings) -> float:
    return rows.targets / len(rows) * min(settings.batch_size, len(rows))


def _plot(title: str, losses: Any, held_out: Any, rates: Any, file: Path) -> bool:
    try:
        plot_run(title, losses, held_out, rates, file)
    except ImportError:
        return False
    return True
