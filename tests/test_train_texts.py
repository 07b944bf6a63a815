"""What a model learns from: documents from files and datasets, rows of tokens from those."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from command_line import save_byte_gptj
from tiny import gpt2, gptj
from torch.nn import functional as F
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedTokenizerBase

from gptj_q8.train.packing import IGNORED, Piece, Rows, collate, encode, keeps_apart
from gptj_q8.train.texts import Document, hold_out, read_documents, read_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Its tokens are bytes."""
    return AutoTokenizer.from_pretrained(save_byte_gptj(tmp_path_factory.mktemp("model"), seed=0))


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


# Reading


def test_a_file_is_one_document_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Ñandú\n", encoding="utf-8-sig")
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress("Ñandú\n".encode()))
    for name in ("a.txt", "a.txt.bz2"):
        (document,) = read_documents(str(tmp_path / name))
        assert (document.text, document.prompt, document.is_file) == ("Ñandú\n", "", True)


def test_records_are_texts_or_prompts_with_completions(tmp_path: Path) -> None:
    odd = "a\u2028b\r\n"  # a line's end to some, but none in JSON
    path = write_lines(tmp_path / "a.jsonl", {"text": odd}, {"prompt": "p", "completion": "c"})
    path.write_text(path.read_text() + "\n\n" + '{"text": "last", "more": 1}', encoding="utf-8")
    texts = [(document.prompt, document.text) for document in read_documents(str(path))]
    assert texts == [("", odd), ("p", "c"), ("", "last")]


def test_a_folder_is_all_its_texts_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "notes.md").write_text("none of it")
    (tmp_path / "a folder.txt").mkdir()
    write_lines(tmp_path / "deep" / "c.jsonl", {"text": "three"})
    assert [d.text for d in read_documents(str(tmp_path))] == ["one", "two", "three"]


def test_datasets_by_name_and_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"text": ["uno", "dos"]})
    never = datasets.Dataset.from_dict({"text": ["never"]})
    asked = []

    def load(name: str, config: str | None) -> Any:
        asked.append((name, config))
        return datasets.DatasetDict(train=rows, test=never)

    monkeypatch.setattr("datasets.load_dataset", load)
    for name in ("owner/name", "name:config"):
        assert [d.text for d in read_documents(name)] == ["uno", "dos"]
    assert asked == [("owner/name", None), ("name", "config")]
    load("x", None).save_to_disk(str(tmp_path / "both"))
    rows.save_to_disk(str(tmp_path / "one"))
    for name in ("both", "one"):
        assert [d.text for d in read_documents(str(tmp_path / name))] == ["uno", "dos"]


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def refuse(*_: object) -> None:
        raise ConnectionError("no route\nmore")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes("crió".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ')
    (tmp_path / "none").mkdir()
    write_lines(tmp_path / "odd.jsonl", {"text": 3, "title": "t"})
    write_lines(tmp_path / "half.jsonl", {"prompt": "p"})
    write_lines(tmp_path / "list.jsonl", ["a"])
    cases = {
        "absent.txt": (FileNotFoundError, r"there is no file or folder .*absent\.txt"),
        "owner/absent": (FileNotFoundError, "owner/absent, and as a dataset .* had: no route$"),
        "empty.txt": (ValueError, r"empty\.txt is empty"),
        "latin.txt": (ValueError, r"latin\.txt is not UTF-8 text \(byte 3\)"),
        "bad.jsonl": (ValueError, r"bad\.jsonl, line 2: no JSON"),
        "none": (ValueError, r"none holds no \.txt and no \.jsonl file"),
        "odd.jsonl": (ValueError, r"line 1: a record needs .* text \(int\), title \(str\)"),
        "half.jsonl": (ValueError, r"line 1: a record needs .* prompt \(str\)"),
        "list.jsonl": (ValueError, r"line 1: a record needs .* it has list"),
    }
    for name, (kind, message) in cases.items():
        source = name if "/" in name else str(tmp_path / name)
        with pytest.raises(kind, match=message):
            read_documents(source)
    only_test = datasets.DatasetDict(test=datasets.Dataset.from_dict({}))
    monkeypatch.setattr("datasets.load_dataset", lambda *_: only_test)
    with pytest.raises(ValueError, match="no split `train`; it has test"):
        read_documents("owner/name")


@pytest.mark.parametrize("module", [bz2, gzip, lzma], ids=lambda module: module.__name__)
def test_a_packed_file_that_is_not_whole_is_named(module: Any, tmp_path: Path) -> None:
    """As after a download that broke off."""
    suffix = {bz2: ".bz2", gzip: ".gz", lzma: ".xz"}[module]
    packed = module.compress(random.Random(0).randbytes(5000))
    changed = bytearray(packed)
    changed[len(packed) // 2 :] = packed[: len(packed) // 2]
    for content in (packed[:-100], packed[:20], bytes(changed), b"plain text"):
        path = tmp_path / f"t.txt{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"t\.txt{suffix}: truncated or damaged"):
            read_text(path)
    with pytest.raises(FileNotFoundError, match=rf"none{suffix}"):
        read_text(tmp_path / f"none{suffix}")


@pytest.mark.parametrize("record", [{"text": "a\ud83d"}, {"prompt": "\udcff", "completion": "c"}])
def test_half_a_character_is_no_text(record: dict[str, str], tmp_path: Path) -> None:
    """JSON can hold what no tokenizer takes: where a text was cut within a character."""
    write_lines(tmp_path / "half.jsonl", {"text": "whole"}, record)
    with pytest.raises(ValueError, match=r"half\.jsonl, line 2: holds half a character"):
        read_documents(str(tmp_path / "half.jsonl"))


# Holding out


def test_the_end_of_a_file_is_held_out_from_a_line_on() -> None:
    text = "".join(f"line {i}\n" for i in range(100))
    (begin,), (end,) = hold_out([Document(text, is_file=True)], 0.1, seed=0)
    assert begin.text + end.text == text
    assert end.text.startswith("line ")
    assert 0.08 < len(end.text) / len(text) < 0.12
    assert (begin.ends, end.ends) == (False, True)


def test_records_are_held_out_by_chance_and_copies_stay_together() -> None:
    documents = [Document(f"t{i % 40}", where=str(i)) for i in range(80)]
    train, held_out = hold_out(documents, 0.25, seed=0)
    assert len(held_out) == 20
    assert not {d.text for d in train} & {d.text for d in held_out}
    assert sorted(d.where for d in [*train, *held_out]) == sorted(d.where for d in documents)
    assert hold_out(documents, 0.25, seed=0) == (train, held_out)
    assert hold_out(documents, 0.25, seed=1) != (train, held_out)
    assert hold_out(documents, 0, seed=0) == (documents, [])


@pytest.mark.parametrize(
    "document", [Document("w\n", where="w.txt", is_file=True), Document("only")]
)
def test_too_little_to_hold_out_is_refused(document: Document) -> None:
    with pytest.raises(ValueError, match="hold out"):
        hold_out([document], 0.1, seed=0)


# Tokens


def learned(row: dict[str, torch.Tensor], i: int = 0) -> list[tuple[int, int]]:
    """The (token seen, token to predict) pairs that a causal model's loss takes."""
    ids, labels = row["input_ids"][i], row["labels"][i]
    return [
        (int(ids[t]), int(labels[t + 1])) for t in range(len(ids) - 1) if labels[t + 1] != IGNORED
    ]


def test_every_token_is_a_target_once(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    for length in (2, 5, 26, 27, 28, 100):
        pieces = encode(tokenizer, [Document(text)], length, 300)
        assert all(2 <= len(piece.ids) <= length for piece in pieces)
        ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        pairs = [pair for piece in pieces for pair in learned(collate([[piece]]))]
        assert pairs == list(pairwise(ids)), length


def test_only_the_completion_is_learned_even_when_packed(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    documents = [Document("bc", "a"), Document("f", "de"), Document("hi", "g")]
    rows = Rows(encode(tokenizer, documents, 16, 300), 16, apart=True)
    (row,) = rows.rows
    batch = collate([row])
    a, b, c, d, e, f, g, h, i = tokenizer("abcdefghi").input_ids
    end = tokenizer.eos_token_id
    assert batch["input_ids"].tolist() == [[a, b, c, end, d, e, f, end, g, h, i, end]]
    pairs = [(a, b), (b, c), (c, end), (e, f), (f, end), (g, h), (h, i), (i, end)]
    assert learned(batch) == pairs
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3] * 3]
    assert rows.targets == len(pairs)


def test_a_text_that_goes_on_has_no_end_token(tokenizer: PreTrainedTokenizerBase) -> None:
    (piece,) = encode(tokenizer, [Document("ab", ends=False)], 16, 300)
    assert piece.ids.tolist() == tokenizer("ab").input_ids


def test_a_tokenizer_that_begins_its_texts_begins_ours(tokenizer: PreTrainedTokenizerBase) -> None:
    class Beginning:
        bos_token_id = 7
        eos_token_id = None

        def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> object:
            found = tokenizer(text)
            found.input_ids[:0] = [7] if add_special_tokens else []
            return found

    (piece,) = encode(Beginning(), [Document("b", "a")], 16, 300)
    assert piece.ids.tolist() == [7, *tokenizer("ab").input_ids]
    assert piece.first_target == 2


def test_a_document_of_no_token_is_left_out() -> None:
    """Some tokenizers drop characters that are none of their script."""
    tokenizer = MagicMock(bos_token_id=None, eos_token_id=None)
    tokenizer.side_effect = lambda text, **_: MagicMock(input_ids=[7, 8] if text == "uno" else [])
    (piece,) = encode(tokenizer, [Document("\u200b"), Document("uno")], 16, 10)
    assert piece.ids.tolist() == [7, 8]


def test_what_cannot_be_learned_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"token \d+ is beyond the model's vocabulary of 60"):
        encode(tokenizer, [Document("zz", where="a")], 16, 60)
    long = Document("c" * 8, "p" * 8, where="a.jsonl, line 3")
    with pytest.raises(ValueError, match=r"line 3: prompt and completion are 17 tokens, .* has 16"):
        encode(tokenizer, [long], 16, 300)
    with pytest.raises(ValueError, match="no document has a second token"):
        encode(tokenizer, [Document("x", ends=False)], 16, 300)


def test_rows_hold_all_pieces_in_few_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(2, 33, (200,), generator=generator).tolist()
    pieces = [Piece(torch.full((size,), i).int(), 1) for i, size in enumerate(sizes)]
    rows = Rows(pieces, 32, apart=True)
    assert all(sum(len(piece.ids) for piece in row) <= 32 for row in rows.rows)
    assert sorted(int(piece.ids[0]) for row in rows.rows for piece in row) == list(range(200))
    assert len(rows) <= sum(sizes) / 32 * 1.05 + 1
    assert len(Rows(pieces, 32, apart=False)) == 200


def test_a_packed_row_has_the_loss_of_its_documents_alone() -> None:
    model = gptj().double()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 9, 3, 14)
    pieces = [
        Piece(torch.randint(130, (size,), generator=generator).int(), first)
        for size, first in zip(sizes, (1, 4, 1, 2), strict=True)
    ]
    batch = collate([pieces[:3], pieces[3:]])
    found = model(**batch, use_cache=False).loss
    total, count = 0.0, 0
    for piece in pieces:
        logits = model(input_ids=piece.ids[None].long()).logits[0]
        wanted = piece.ids[piece.first_target :].long()
        total += float(
            F.cross_entropy(logits[piece.first_target - 1 : -1], wanted, reduction="sum")
        )
        count += len(wanted)
    assert float(found) == pytest.approx(total / count, rel=1e-6)  # it is taken in float32
    seeing = model(**{key: batch[key] for key in ("input_ids", "labels")}, use_cache=False).loss
    assert float(seeing) != pytest.approx(total / count, rel=1e-5)


def test_a_batch_without_neighbours_needs_no_positions() -> None:
    one, other = Piece(torch.arange(5).int(), 1), Piece(torch.arange(3).int(), 1)
    batch = collate([[one], [other]])
    assert "position_ids" not in batch
    assert batch["labels"].tolist() == [[IGNORED, 1, 2, 3, 4], [IGNORED, 1, 2, IGNORED, IGNORED]]


def test_who_keeps_documents_apart_is_tried() -> None:
    assert keeps_apart(gptj())
    assert keeps_apart(gpt2())
    bloom = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2))
    assert not keeps_apart(bloom.eval())  # takes no positions

    class Careless(type(gptj())):
        """Takes positions and sees all tokens before."""

        def forward(self, *, position_ids: torch.Tensor, **inputs: object) -> object:
            return super().forward(**inputs, position_ids=torch.arange(9)[None])

    careless = gptj()
    careless.__class__ = Careless
    assert not keeps_apart(careless)
