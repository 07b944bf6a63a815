"""The model card of an 8-bit model: README.md beside its weights, as the Hugging Face Hub shows it.

Says what the weights were made of and how, and with what they load. A card that a person wrote is
left alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from gptj_q8.checkpoint.report import LayerError
from gptj_q8.config import Q8Config

FILE = "README.md"
# By it a card of ours is known, which a new one may replace.
_MARK = "<!-- Written by gptj_q8. Without this line it will be left alone. -->"
# What the Hub shows of the original and holds for its copy too.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LINEAGE = ("base_model", "base_model_relation")


def write(
    directory: Path,
    config: Q8Config,
    base: str | os.PathLike[str] | None,
    weights: int,
    layers: Sequence[LayerError] = (),
    original: Path | None = None,
) -> None:
    """Writes the card, unless there is one that is not ours.

    base: what was quantized, a Hub id or a folder, of which only the last part is named. weights:
    how many are in 8 bits. layers: the error of each kind, where it was measured. original: the
    folder of `base`, whose card tells licence, language and task.
    """
    if not is_by_a_person(directory):
        card = text(config, base, weights, layers, original)
        (directory / FILE).write_text(card, encoding="utf-8")


def is_by_a_person(directory: Path) -> bool:
    """Whether there is a card, and it is not ours."""
    return (directory / FILE).exists() and not _is_ours(directory)


def _is_ours(directory: Path) -> bool:
    path = directory / FILE
    return path.is_file() and _MARK in path.read_text(encoding="utf-8", errors="replace")


def text(
    config: Q8Config,
    base: str | os.PathLike[str] | None,
    weights: int,
    layers: Sequence[LayerError] = (),
    original: Path | None = None,
) -> str:
    """The card. See `write`."""
    metadata = _inherited(original)
    if hub_id := _hub_id(base):
        metadata |= {"base_model": hub_id, "base_model_relation": "quantized"}
    origin = metadata.get("base_model")
    if origin:
        title, made_from = origin, f", made from [{origin}](https://huggingface.co/{origin})"
    elif base and Path(base).name and not (original and _is_ours(original)):
        title, made_from = Path(base).name, f", made from `{Path(base).name}`"
    else:
        title, made_from = "A model", ""
    head = ModelCardData(
        library_name="transformers", tags=["gptj_q8", "8-bit"], **metadata
    ).to_yaml()
    body = [
        f"# {title} in 8 bits",
        f"{weights:,} weights in 8 bits{made_from} by `gptj_q8`: every block of "
        f"{config.block_size} weights has a float32 scale, and each weight is the number of one "
        f"of 256 levels (codebook `{config.codebook}`). {8 + 32 / config.block_size:.4g} bits per "
        "weight.",
        "```python\nimport gptj_q8\n\n"
        'model = gptj_q8.from_pretrained(".")  # or this folder\'s path, or its id on the Hub\n```',
        "That is for models that write text. After `import gptj_q8`, `from_pretrained` of "
        "Transformers' classes loads this and any other kind. All arithmetic stays in float32, "
        "bfloat16 or float16.",
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
    return f"---\n{head}\n---\n{_MARK}\n\n" + "\n\n".join(body) + "\n"


def _inherited(original: Path | None) -> dict[str, Any]:
    """What the original's card says of its copies too; of ours the base model as well."""
    if original is None or not (original / FILE).is_file():
        return {}
    try:
        found = metadata_load(original / FILE) or {}
    except Exception:  # it is a person's, and may be anything; no reason to lose the model
        return {}
    keys = (*_INHERITED, *_LINEAGE) if _is_ours(original) else _INHERITED
    # YAML takes an unquoted `no`, Norwegian, for false.
    return {key: found[key] for key in keys if isinstance(found.get(key), str | list)}


def _hub_id(base: str | os.PathLike[str] | None) -> str | None:
    """The name if it can be a Hub id and is no folder here."""
    name = str(base or "")
    return name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None
