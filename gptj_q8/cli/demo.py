"""`gptj-q8 demo`: convert, measure, generate, fine-tune, on the small model that comes along."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from gptj_q8.cli import load, options
from gptj_q8.cli.convert import say_report
from gptj_q8.cli.finetune import ScreenListener, say_losses, say_samples
from gptj_q8.cli.screen import Screen, bytes_text, open_screen, with_error
from gptj_q8.demo import model_dir, text
from gptj_q8.train.settings import Settings

if TYPE_CHECKING:
    import torch

    from gptj_q8.checkpoint import ConversionReport
    from gptj_q8.config import Q8Config
    from gptj_q8.evaluate import Divergence
    from gptj_q8.train.report import Report

OUTPUT = Path("out/demo-8bit")
PROMPT = "En el principio"
SEED = 1
# Enough text to know the change of perplexity to a few hundredths of a percent, in seconds.
TOKENS = 8192
TIMED_TOKENS = 32  # a round
# A model this small wants a higher learning rate than the default, and proverbs are short.
LESSON = Settings(learning_rate=4e-3, sequence_length=128)
PROVERB = "Quien mucho"


@dataclass(frozen=True)
class Copy:
    """An 8-bit copy of the model, and what was measured of it."""

    name: str
    report: ConversionReport
    divergence: Divergence
    tokens_per_second: float


def demo_command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="The folder for the 8-bit copy.")
    ] = OUTPUT,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", metavar="", help="Replace DIR if it is there, as the default."),
    ] = False,
    device: options.Device = "auto",
    json: options.AsJson = False,
) -> None:
    """Convert the small Spanish GPT-J, measure what that costs, let it speak, teach it proverbs.

    Takes two minutes on two processor cores and needs no network.
    """
    with open_screen(json) as screen, TemporaryDirectory() as scratch:
        with screen.working("Starting ..."):
            load.quieten()
            import torch

            from gptj_q8.config import Q8Config
            from gptj_q8.evaluate import compare
            from gptj_q8.generate import decode_speeds, encode, generate
            from gptj_q8.train import folder

            # Matrices this small gain less than half from a second thread, and on a busy machine
            # they lose a hundredfold to threads that wait for each other.
            torch.set_num_threads(1)
            on = load.device(device)
            # Not by the name `demo`, which a folder here may bear too.
            source = str(model_dir())
            tokens = load.tokenizer(None, source)

        screen.heading("1. Convert the small Spanish GPT-J to 8 bits")
        formats = {
            "8-bit": (str(output), Q8Config()),
            "8-bit, old format": (
                str(Path(scratch) / "old"),
                Q8Config(block_size=4096, codebook="dynamic"),
            ),
        }
        # The folder of the default is the demo's own. What lies elsewhere may be another model.
        overwrite = overwrite or output == OUTPUT
        tuned = output.with_name(f"{output.name}-tuned")
        folder.check(tuned, resume=False, overwrite=overwrite)
        reports = [
            _convert(screen, folder, config, overwrite) for folder, config in formats.values()
        ]
        say_report(screen, reports[0])

        screen.heading("2. Compare with the original, on text that the model has not seen")
        original = load.model(source, "float32", on)
        models = [load.model(folder, "float32", on) for folder, _ in formats.values()]
        ids = load.token_ids(tokens, text("held_out"), TOKENS)
        divergences = []
        for name, model in zip(formats, models, strict=True):
            with screen.progress(f"Comparing {name}") as on_progress:
                divergences.append(compare(model, original, ids, on_progress=on_progress))
        with screen.progress("Timing") as on_progress:
            speeds = decode_speeds(
                [original, *models],
                encode(tokens, PROMPT),
                new_tokens=TIMED_TOKENS,
                on_progress=on_progress,
            )
        copies = [
            Copy(*measured)
            for measured in zip(formats, reports, divergences, speeds[1:], strict=True)
        ]
        bits = torch.finfo(_stored_dtype()).bits
        _say_comparison(screen, copies, bits, speeds[0])

        screen.heading("3. Generate with the 8-bit copy")
        torch.manual_seed(SEED)
        screen.stream(PROMPT)
        made = generate(models[0], tokens, PROMPT, max_new_tokens=80, on_text=screen.stream)
        screen.say()

        screen.heading("4. Fine-tune it on Spanish proverbs, which it has not seen either")
        lesson = _finetune(screen, str(output), tuned, on, overwrite)
        say_losses(screen, lesson)
        say_samples(screen, lesson)

        screen.heading("5. Go on from here")
        lines = ["import gptj_q8", f'model = gptj_q8.from_pretrained("{output.as_posix()}")']
        screen.say(f"The 8-bit copy is in {output}, the adapter in {tuned}.")
        if activate := _activation():
            screen.say("First, for Python and the commands to be found in this terminal:")
            screen.say()
            screen.say(f"    {activate}")
            screen.say()
        screen.say("In Python:")
        screen.say()
        for line in lines:
            screen.say(f"    {line}")
        screen.say()
        screen.say("On the command line:")
        screen.say()
        screen.say(f'    gptj-q8 generate {output} "{PROMPT}"')
        screen.say(f'    gptj-q8 generate {output} "{PROVERB}" --adapter {tuned}')
        if lesson.plot:
            screen.say()
            screen.say(f"{lesson.plot} shows how it learned.")
        screen.result(
            {
                "output": str(output),
                "original": {
                    "bytes": reports[0].bytes_before,
                    "bits_per_weight": bits,
                    "perplexity": asdict(divergences[0].original_perplexity),
                    "tokens_per_second": speeds[0],
                },
                "copies": [asdict(copy) for copy in copies],
                "generation": PROMPT + made.text,
                "finetuning": asdict(lesson),
                "python": lines,
            }
        )


def _activation() -> str | None:
    """What makes `gptj-q8` a command here, as after `make demo`; None where it is one already."""
    script = Path(sys.prefix, "bin", "activate")
    if shutil.which("gptj-q8") or not script.exists():
        return None
    return f"source {os.path.relpath(script)}"


def _convert(screen: Screen, folder: str, config: Q8Config, overwrite: bool) -> ConversionReport:
    from gptj_q8.checkpoint import convert_checkpoint

    with screen.progress("Converting") as on_progress:
        return convert_checkpoint(
            model_dir(),
            folder,
            config,
            overwrite=overwrite,
            on_progress=on_progress,
        )


def _finetune(
    screen: Screen, source: str, target: Path, on: torch.device, overwrite: bool
) -> Report:
    from gptj_q8.train.device import best_dtype
    from gptj_q8.train.run import finetune

    dtype = str(best_dtype(on)).removeprefix("torch.")
    with screen.progress("Loading") as update:
        report = finetune(
            load.trainable_model(source, dtype, on),
            load.tokenizer(None, source),
            load.demo_documents(),
            target,
            LESSON,
            overwrite=overwrite,
            prompts=[PROVERB],
            listener=ScreenListener(screen, update),
        )
    if not report.finished:
        raise KeyboardInterrupt
    return report


def _stored_dtype() -> torch.dtype:
    from transformers import AutoConfig

    dtype: torch.dtype = AutoConfig.from_pretrained(model_dir()).dtype
    return dtype


def _say_comparison(
    screen: Screen, copies: list[Copy], original_bits: int, original_speed: float
) -> None:
    ours, old = copies
    truth = ours.divergence.original_perplexity
    rows = [
        (
            f"original, float{original_bits}",
            bytes_text(ours.report.bytes_before),
            f"{original_bits:.2f}",
            with_error(truth.value, truth.standard_error),
            "0",
            f"{original_speed:.0f}",
        )
    ]
    for copy in copies:
        found = copy.divergence.perplexity
        rows.append(
            (
                copy.name,
                bytes_text(copy.report.bytes_after),
                f"{copy.report.bits_per_weight:.2f}",
                with_error(found.value, found.standard_error),
                f"{copy.divergence.kl:.1e}",
                f"{copy.tokens_per_second:.0f}",
            )
        )
    screen.table(("", "size", "bits/weight", "perplexity", "KL (nats)", "tokens/s"), rows)
    screen.say()
    best = ours.divergence
    closer = old.divergence.kl / best.kl
    screen.prose(
        f"8 bits change the perplexity by {100 * best.perplexity_change:+.3f} % "
        f"(± {100 * best.perplexity_change_standard_error:.3f} %), and the likeliest next token "
        f"at {100 * (1 - best.top1_agreement):.1f} % of {best.tokens:,} tokens. By KL "
        f"divergence their predictions are {closer:.1f} times closer to the original's than those "
        "of the old format, that of hivemind/gpt-j-6B-8bit (dynamic codebook, blocks of 4096)."
    )
    screen.say()
    screen.prose(
        "All compute in float32 on one thread. A model this small says little about speed: "
        "the time goes into Python."
    )
