"""The model card of an 8-bit model: README.md beside its weights, as the Hugging Face Hub shows it.

Says what the weights were made of and how, and with what they load. A card that a person wrote is
left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from gptj_q8.checkpoint.report import LayerError
from gptj_q8.config import Q8Config

FILE = "README.md"
# By it a card of ours is known, which a new one may replace.
_MARK = "<!-- Written by gptj_q8. Without this line it will be left alone. -->"


def write(
    directory: Path,
    config: Q8Config,
    base: str | os.PathLike[str] | None,
    weights: int,
    layers: Sequence[LayerError] = (),
) -> None:
    """Writes the card, unless there is one that is not ours.

    base: what was quantized, a Hub id or a folder, of which only the last part is named. weights:
    how many are in 8 bits. layers: the error of each kind, where it was measured.
    """
    if not is_by_a_person(directory):
        (directory / FILE).write_text(text(config, base, weights, layers), encoding="utf-8")


def is_by_a_person(directory: Path) -> bool:
    """Whether there is a card, and it is not ours."""
    path = directory / FILE
    return path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")


def text(
    config: Q8Config,
    base: str | os.PathLike[str] | None,
    weights: int,
    layers: Sequence[LayerError] = (),
) -> str:
    """The card. See `write`."""
    hub_id = _hub_id(base)
    name = hub_id or (Path(base).name if base else "") or "A model"
    of = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else name
    head = ["---", "library_name: transformers"]
    if hub_id:
        head += [f"base_model: {hub_id}", "base_model_relation: quantized"]
    head += ["tags:", "- gptj_q8", "- 8-bit", "---", _MARK]
    body = [
        f"# {name} in 8 bits",
        f"{weights:,} weights of {of} in 8 bits, made by `gptj_q8`: every block of "
        f"{config.block_size} weights has a float32 scale, and each weight is the number of one "
        f"of 256 levels (codebook `{config.codebook}`). {8 + 32 / config.block_size:.4g} bits per "
        "weight.",
        "```python\nimport gptj_q8\n\n"
        'model = gptj_q8.from_pretrained("...")  # this folder, or its id on the Hub\n```',
        "All arithmetic stays in float32, bfloat16 or float16. After `import gptj_q8`, "
        "`AutoModelForCausalLM.from_pretrained` loads it too.",
    ]
    if config.modules_to_not_convert:
        kept = ", ".join(f"`{name}`" for name in config.modules_to_not_convert)
        body.append(f"Left in float: {kept}.")
    if any(layer.relative_rmse for layer in layers):
        body += [
            "## Error of the decoded weights",
            "Root of the mean square, relative to the original's.",
            "\n".join(
                [
                    "| layer | weights | error |",
                    "|---|---|---|",
                    *(
                        f"| {layer.kind} | {layer.weights:,} | {100 * layer.relative_rmse:.3f} % |"
                        for layer in layers
                    ),
                ]
            ),
        ]
    body.append(
        "How much worse it predicts a text than the original is told by"
        " `gptj-q8 evaluate THIS --data TEXT --against ORIGINAL`."
    )
    return "\n".join(head) + "\n\n" + "\n\n".join(body) + "\n"


def _hub_id(base: str | os.PathLike[str] | None) -> str | None:
    """The name if it can be a Hub id and is no folder here."""
    name = str(base or "")
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
