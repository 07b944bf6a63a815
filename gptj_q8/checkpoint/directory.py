"""Makes a model directory whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

# Files that only together make a tokenizer.
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
SETTINGS = "generation_config.json"
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


@contextmanager
def new_directory(target: Path, overwrite: bool, replaced: Sequence[str] = ()) -> Iterator[Path]:
    """Gives a directory to fill that becomes `target` if and only if the block ends well.

    Until then it stands beside `target`, which must not be a link, under another name. With
    `overwrite`, an old model directory gives way in one rename. What it holds and the new one
    lacks moves there, but for weights, generation settings, those named in `replaced`, and its
    tokenizer if the new one has any.
    FileExistsError when `target` holds something else, or anything without `overwrite`. OSError
    that says where the rest of the old directory is, if it cannot be moved.
    """
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        # Again: someone else may have filled it meanwhile.
        _check_target(target, overwrite)
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        _put(partial, target, replaced)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _put(partial: Path, target: Path, replaced: Sequence[str]) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    _keep_others(old, target, replaced)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file")
    if os.path.ismount(target):  # Path.is_mount does not know Windows before Python 3.12
        raise FileExistsError(f"{target} is a mount point, which cannot be renamed; name a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} is not empty; choose another place, or overwrite it: overwrite=True, on the "
            "command line --overwrite"
        )
    if not _holds_model(target):
        raise FileExistsError(f"{target} is not empty and holds no model to overwrite")


def _holds_model(folder: Path) -> bool:
    # Other programs have a config.json too.
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):
        return False


def _keep_others(old: Path, new: Path, replaced: Sequence[str]) -> None:
    """Moves what the new directory lacks from the old one, except what is replaced; drops that."""
    gone = [SETTINGS, *replaced]
    if holds_tokenizer(new):
        gone += TOKENIZER
    try:
        for path in old.iterdir():
            is_replaced = _WEIGHT_FILE.fullmatch(path.name) or _matches(path.name, gone)
            if not is_replaced and not (new / path.name).exists():
                path.rename(new / path.name)
    except OSError as error:
        raise OSError(
            f"{new} is written, but what else it held could not be moved there and is in {old}: "
            f"{error}"
        ) from error
    shutil.rmtree(old, ignore_errors=True)  # a process may still read the old weights


def holds_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer in a folder."""
    return any(_matches(path.name, TOKENIZER) for path in folder.iterdir())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _sync(path: Path) -> None:
    """Waits until the disk has the file, or the folder's names where the system opens folders."""
    is_folder = path.is_dir()
    try:
        # Windows flushes what is open for writing only, and opens no folders.
        handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
