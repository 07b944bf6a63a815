"""The files of a checkpoint, and whether they belong together."""

import json
from collections.abc import Mapping
from pathlib import Path

from gptj_q8.checkpoint.shards import INDEX, WEIGHTS, Entry

_BIN_WEIGHTS = "pytorch_model.bin"
_BIN_INDEX = f"{_BIN_WEIGHTS}.index.json"


def find(directory: Path) -> list[Path]:
    """Returns the weight files of a checkpoint, in order.

    FileNotFoundError names what is missing: every file, or one that the index lists. ValueError for
    a damaged index.
    """
    for name in (WEIGHTS, INDEX, _BIN_WEIGHTS, _BIN_INDEX):
        path = directory / name
        if not path.exists():
            continue
        if not name.endswith(".index.json"):
            return [path]
        shards = sorted(set(_read_index(path).values()))
        missing = [shard for shard in shards if not (directory / shard).exists()]
        if missing:
            raise FileNotFoundError(
                f"{directory}: {name} lists {len(shards)} shards, missing: {', '.join(missing)}"
            )
        return [directory / shard for shard in shards]
    raise FileNotFoundError(f"{directory}: holds neither {WEIGHTS} nor {_BIN_WEIGHTS} nor an index")


def _read_index(path: Path) -> dict[str, str]:
    """Returns the name of the shard that each tensor is in."""
    try:
        shards = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"].items())
        if not all(isinstance(shard, str) for shard in shards.values()):
            raise TypeError("names of shards must be text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: truncated or damaged: {error!r}") from error
    return shards


def check_index(entries: Mapping[str, Entry]) -> None:
    """ValueError unless every tensor is in the shard that the index beside it names.

    Of shards that were mixed up, Transformers would load what there is and draw the rest at random.
    """
    first = Path(next(iter(entries.values())).file) if entries else Path()
    index = first.parent / (INDEX if first.suffix == ".safetensors" else _BIN_INDEX)
    if not index.exists():
        return
    shards = _read_index(index)
    if first.name not in shards.values():  # it is another checkpoint's that lies here too
        return
    for name, shard in shards.items():
        if name not in entries or Path(entries[name].file).name != shard:
            raise ValueError(f"{index.parent / shard}: lacks {name}, which {index.name} has there")
