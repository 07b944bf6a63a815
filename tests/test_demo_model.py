"""The small model that the package ships is whole, loads as any other, and is as good as told."""

import json
import math
import unicodedata

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTJForCausalLM,
    PreTrainedTokenizerBase,
)

from gptj_q8.demo import HELD_OUT_BOOKS, books, model_dir, text
from gptj_q8.demo.report import encode_book, summed_loss

REPORT = json.loads((model_dir().parent / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir())


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return AutoModelForCausalLM.from_pretrained(model_dir(), dtype=torch.float32)


def test_weights_are_small_and_in_float16() -> None:
    assert (model_dir() / "model.safetensors").stat().st_size < 12_000_000
    assert AutoModelForCausalLM.from_pretrained(model_dir()).dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loads_and_runs_in_half_precision(dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir(), dtype=dtype)
    logits = model(torch.arange(32)[None]).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()


def test_is_a_gptj_of_the_size_reported(model: GPTJForCausalLM) -> None:
    assert isinstance(model, GPTJForCausalLM)
    assert model.num_parameters() == REPORT["parameters"]
    assert model.lm_head.weight is not model.transformer.wte.weight


@pytest.mark.parametrize(
    "sample",
    [
        "EN el principio crió Dios los cielos y la tierra.\nY la tierra estaba desordenada",
        " ¿Á dónde iré?  ¡Ay!\n\n\tñandú, pingüino ",
        "日本語, עברית, emoji 👩‍👩‍👧 and \x00 control \r\n",
        unicodedata.normalize("NFD", "corazón"),
        "",
    ],
)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, sample: str) -> None:
    ids = tokenizer(sample)["input_ids"]
    assert tokenizer.decode(ids) == sample
    assert all(0 <= i < 2048 for i in ids)


def test_tokenizer_knows_spanish(tokenizer: PreTrainedTokenizerBase) -> None:
    rut = books("held_out")["Rut"]
    assert len(rut) / len(tokenizer(rut, verbose=False)["input_ids"]) > 3
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == 0


def test_held_out_books_share_no_verse_with_training() -> None:
    train, held_out = text("train").splitlines(), text("held_out").splitlines()
    assert set(books("held_out")) == set(HELD_OUT_BOOKS)
    assert len(books("train")) + len(books("held_out")) == 66
    assert not (set(train) & set(held_out)) - {""}
    share = len(text("held_out")) / (len(text("held_out")) + len(text("train")))
    assert 0.04 < share < 0.06


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'held_out', got 'test'"):
        text("test")


def test_perplexity_is_as_reported(
    model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = encode_book(tokenizer, books("held_out")["Rut"])
    perplexity = math.exp(summed_loss(model, ids) / (len(ids) - 1))
    assert perplexity == pytest.approx(REPORT["held_out"]["perplexity_by_book"]["Rut"], rel=1e-3)


def test_continues_in_known_words(
    model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer("En el principio", return_tensors="pt")
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    # The last word may be cut short.
    words = tokenizer.decode(ids, skip_special_tokens=True).split()[3:-1]
    known = set(text("train").split())
    assert len(words) >= 10
    assert sum(word in known for word in words) >= 0.9 * len(words)
