"""The folder of a run: its record, its checkpoints, and at the end the adapter.

| file | what |
|---|---|
| `run.json` | what was asked for, written at the start |
| `checkpoint-N/` | all that going on from step N takes; only the last is kept |
| `adapter_model.safetensors`, `adapter_config.json` | the result, in PEFT's format |
| `summary.json`, `loss.png` | how it went |
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptj_q8.checkpoint import adapters
from gptj_q8.checkpoint.directory import new_directory
from gptj_q8.train.settings import Settings

RECORD = "run.json"
SUMMARY = "summary.json"
PLOT = "loss.png"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ADAPTER = ".adapter"  # while it moves into place


@dataclass(frozen=True)
class Record:
    """What a run was begun with; it goes on only with the same.

    model: name or folder. data_digest: of the tokens. samples: what the model wrote before it
    learned, by prompt.
    """

    model: str
    settings: Settings
    data_digest: str
    dtype: str
    samples: dict[str, str]


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint furthest on."""
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()
    }
    return found[max(found)] if found else None


def check(folder: Path, resume: bool, overwrite: bool) -> None:
    """FileExistsError unless a new run may begin here: in no folder yet, or in an empty one.

    With `overwrite` a folder that holds a run will do as well. With `resume` it must hold one that
    has not ended: FileNotFoundError, ValueError. ValueError for both at once.
    """
    if resume and overwrite:
        raise ValueError("a run goes on (--resume) or is replaced (--overwrite), not both")
    if resume:
        read_record(folder)
        if (folder / SUMMARY).exists():
            raise ValueError(f"the run in {folder} has ended; there is nothing to resume")
        return
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file")
    if not any(folder.iterdir()):
        return
    if not (folder / RECORD).exists():
        raise FileExistsError(f"{folder} is not empty and holds no run; choose another place")
    if not overwrite:
        last = last_checkpoint(folder)
        reached = f", saved up to {last.name}" if last else ""
        raise FileExistsError(
            f"{folder} holds another run{reached}; go on with it (--resume), replace it "
            "(--overwrite) or choose another place"
        )


def begin(folder: Path, record: Record) -> None:
    """Writes the record of a new run, and removes that of an older one with what it made."""
    if (folder / RECORD).exists():
        for path in folder.iterdir():
            if _CHECKPOINT.fullmatch(path.name):
                shutil.rmtree(path)
        shutil.rmtree(folder / _ADAPTER, ignore_errors=True)
        for name in (RECORD, SUMMARY, PLOT, adapters.WEIGHTS, adapters.CONFIG):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RECORD, asdict(record))


def read_record(folder: Path) -> Record:
    """The record of the run in a folder.

    FileNotFoundError where there is none, ValueError for one that cannot be read.
    """
    path = folder / RECORD
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run to resume: it has no {RECORD}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings = stored.pop("settings")
        if isinstance(settings["targets"], list):
            settings["targets"] = tuple(settings["targets"])
        return Record(settings=Settings(**settings), **stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of a run ({error!r})") from error


def check_same(folder: Path, now: Record) -> Record:
    """The record of the run to go on with; ValueError that says what is not as it was then."""
    before = read_record(folder)
    changed = now.settings.differences(before.settings)
    for name in ("model", "dtype"):
        mine, theirs = getattr(now, name), getattr(before, name)
        if mine != theirs:
            changed.insert(0, f"{name} ({mine}, before {theirs})")
    if not changed and now.data_digest != before.data_digest:
        changed = ["the data, or the tokenizer"]
    if changed:
        raise ValueError(f"the run in {folder} cannot go on: changed are {'; '.join(changed)}")
    return before


@contextmanager
def put_whole(folder: Path) -> Iterator[Path]:
    """Gives a folder to fill with the adapter; its files move to `folder` when the block ends well.

    What a run that was killed meanwhile left behind is written anew.
    """
    whole = folder / _ADAPTER
    shutil.rmtree(whole, ignore_errors=True)
    with new_directory(whole, overwrite=False) as partial:
        yield partial
    for path in sorted(whole.iterdir()):
        os.replace(path, folder / path.name)
    whole.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
