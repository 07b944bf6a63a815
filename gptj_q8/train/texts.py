"""Reads what a model is to learn from: files, folders, datasets."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
_RECORDS = ".jsonl"
_TEXT = ".txt"
# JSON may hold half of a UTF-16 pair, where a text was cut; tokenizers refuse it.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """A text of its own: a file, or a record of JSONL or of a dataset.

    text: what the model learns to write. prompt: what it reads before that and does not learn.
    where: the file, with the line of a record.
    is_file: whether it is a plain file, long perhaps, of which a part can be held out.
    ends: whether the text ends here, and not only this part of it.
    """

    text: str
    prompt: str = ""
    where: str = ""
    is_file: bool = False
    ends: bool = True


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, plain or packed (.gz, .bz2, .xz).

    OSError where it cannot be read, ValueError where it is damaged or not UTF-8.
    """
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            content = file.read()
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ValueError(f"{path}: truncated or damaged: {error}") from error
    return decode(content, str(path))


def decode(content: bytes, where: str) -> str:
    """Text of UTF-8 bytes; ValueError that names `where` for others."""
    try:
        return content.decode("utf-8-sig")  # with the mark that some programs begin with, or not
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from error


def read_documents(source: str) -> list[Document]:
    """The documents in a file, in a folder, or in a dataset of the Hugging Face hub.

    source: a `.jsonl` file (a record a line, with `text`, or with `prompt` and `completion`), any
        other file (plain text), a folder (its `.txt` and `.jsonl` files, those in folders within
        it too, or a dataset saved with `save_to_disk`), or a dataset's name, `NAME` or
        `NAME:CONFIG`, of which the split `train` is taken. Files may be packed: .gz, .bz2, .xz.

    FileNotFoundError where there is nothing of that name, ValueError for what cannot be read as
    text or records, and where all that is found is empty.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        documents = _read_folder(path)
    elif path.exists():
        documents = _read_file(path)
    elif _means_a_path(source):
        raise FileNotFoundError(f"there is no file or folder {source}")
    else:
        documents = list(_records(_download(source), source, "row"))
    filled = [document for document in documents if document.text.strip()]
    if not filled:
        raise ValueError(f"{source} is empty: there is nothing to learn in it")
    return filled


def _means_a_path(source: str) -> bool:
    # A dataset is `owner/name` or `name`, without the ending of a file.
    kinds = (_TEXT, _RECORDS, *_OPENERS)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or source.endswith(kinds)


def _read_folder(folder: Path) -> list[Document]:
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        dataset = _datasets().load_from_disk(str(folder))
        return list(_records(_train_split(dataset, str(folder)), str(folder), "row"))
    found = (path for path in folder.rglob("*") if _kind(path) in (_TEXT, _RECORDS))
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no .txt and no .jsonl file")
    return [document for path in files for document in _read_file(path)]


def _kind(path: Path) -> str:
    """The ending of a file's name, that of its packing left out."""
    return Path(path.stem).suffix if path.suffix in _OPENERS else path.suffix


def _read_file(path: Path) -> list[Document]:
    content = read_text(path)
    if _kind(path) != _RECORDS:
        return [Document(content, where=str(path), is_file=True)]
    return list(_records(_parse(content, path), str(path), "line"))


def _parse(content: str, path: Path) -> Iterator[Any]:
    # Not splitlines: JSON strings may hold U+2028 as it is.
    for number, line in enumerate(content.split("\n"), 1):
        try:
            yield json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error.msg})") from error


def _records(rows: Iterable[Any], source: str, unit: str) -> Iterator[Document]:
    for number, row in enumerate(rows, 1):
        if row is not None:
            yield _document(row, f"{source}, {unit} {number}")


def _document(row: Any, where: str) -> Document:
    if isinstance(row, Mapping):
        prompt, completion, text = (row.get(key) for key in ("prompt", "completion", "text"))
        for value in (prompt, completion, text):
            if isinstance(value, str) and _SURROGATE.search(value):
                raise ValueError(f"{where}: holds half a character (a lone surrogate), so no text")
        if isinstance(prompt, str) and isinstance(completion, str):
            return Document(completion, prompt, where)
        if isinstance(text, str):
            return Document(text, where=where)
        held = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
    else:
        held = type(row).__name__
    raise ValueError(
        f"{where}: a record needs `text`, or `prompt` and `completion`, as strings; it has "
        f"{held or 'nothing'}"
    )


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "reading a dataset needs the package datasets: pip install gptj_q8[train]"
        ) from error
    return datasets


def _download(source: str) -> Any:
    name, _, config = source.partition(":")
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, config or None)
    # The hub's refusals are of many classes.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"there is no file or folder {source}, and as a dataset it cannot be had: {reason}"
        ) from error
    return _train_split(found, source)


def _train_split(found: Any, source: str) -> Any:
    if not isinstance(found, Mapping):
        return found
    if "train" not in found:
        raise ValueError(f"{source} has no split `train`; it has {', '.join(found)}")
    return found["train"]


def hold_out(
    documents: Sequence[Document], share: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Parts documents into those to learn from and those that only measure.

    Of a file the end is held out, from the beginning of a line on. Of records a random selection
    is, copies of one another on the same side.

    share: of each kind, 0 for none. seed: of the selection.

    ValueError where there are too few to part.
    """
    if share == 0:
        return list(documents), []
    train, held_out = [], []
    texts: dict[tuple[str, str], list[Document]] = {}
    for document in documents:
        if document.is_file:
            begin, end = _cut(document, share)
            train.append(begin)
            held_out.append(end)
        else:
            texts.setdefault((document.prompt, document.text), []).append(document)
    if texts:
        if len(texts) < 2:
            raise ValueError(
                "there is one record only and none to hold out: set held_out to 0 (--held-out 0)"
            )
        groups = list(texts.values())
        random.Random(seed).shuffle(groups)
        count = max(1, round(share * len(groups)))
        held_out += [document for group in groups[:count] for document in group]
        train += [document for group in groups[count:] for document in group]
    return train, held_out


def _cut(document: Document, share: float) -> tuple[Document, Document]:
    text = document.text
    target = int(len(text) * (1 - share))
    # At a line's beginning where one is near, else between words.
    for mark in ("\n", " "):
        place = text.rfind(mark, 0, target) + 1
        if place > target / 2:
            break
    else:
        place = target
    begin, end = text[:place], text[place:]
    if not begin.strip() or not end.strip():
        raise ValueError(
            f"{document.where}: too short to hold out {share:.0%} of it; "
            "set held_out to 0 (--held-out 0)"
        )
    where = document.where
    return Document(begin, "", where, True, ends=False), Document(end, "", where, True)
