"""A small GPT-J that speaks the Spanish of the Reina-Valera Bible of 1909, and the text behind it.

The model is the package's own stand-in for GPT-J-6B: the same architecture, small enough to ship,
so that the demo, the tests and the documentation all run on real weights without a download.

`text()` gives the text. These books are held out: no weight, no tokenizer merge and no training
step has seen them, except that the checkpoint kept is the one with the lowest loss on them.

| books | why |
|---|---|
| Jueces and Rut | narrative; neither is retold elsewhere in the Bible, as Reyes is in Crónicas |
| Eclesiastés | wisdom |
| Oseas | prophecy |
| Hebreos | an epistle |
"""

import bz2
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["HELD_OUT_BOOKS", "books", "model_dir", "proverbs", "text"]

HELD_OUT_BOOKS = ("Jueces", "Rut", "Eclesiastés", "Oseas", "Hebreos")

_HERE = Path(__file__).parent
# In text.txt.bz2 a line with this mark and a name opens each book; verses never contain it.
_BOOK_MARK = "# "


def model_dir() -> Path:
    """The folder to hand to `from_pretrained`, of the model as of its tokenizer."""
    return _HERE / "model"


def proverbs() -> str:
    """4,183 Spanish proverbs, one a line, in no order: what the demo fine-tunes the model on.

    Of another time and style than the model's text, of which they are no part.
    """
    return bz2.decompress((_HERE / "proverbs.txt.bz2").read_bytes()).decode("utf-8")


@cache
def _all_books() -> tuple[tuple[str, str], ...]:
    packed = (_HERE / "text.txt.bz2").read_bytes()
    whole = bz2.decompress(packed).decode("utf-8")
    parts = ("\n" + whole).split("\n" + _BOOK_MARK)[1:]
    pairs = (part.split("\n", 1) for part in parts)
    return tuple((name, body.strip("\n") + "\n") for name, body in pairs)


def books(split: Literal["train", "held_out"] = "train") -> dict[str, str]:
    """The books of one split by their Spanish names, in the order of the Bible.

    In each, a verse is a line and an empty line parts two chapters.
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"books: split must be 'train' or 'held_out', got {split!r}")
    held_out = split == "held_out"
    return {name: body for name, body in _all_books() if (name in HELD_OUT_BOOKS) == held_out}


def text(split: Literal["train", "held_out"] = "train") -> str:
    """The text of one split: its books one after the other, an empty line between them."""
    return "\n".join(books(split).values())
