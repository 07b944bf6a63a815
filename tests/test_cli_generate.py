"""gptj-q8 generate: its text, its JSON, its seeds and limits."""

from pathlib import Path

import pytest
import torch
from command_line import POSITIONS, byte_ids, float32, read_json, run
from transformers import GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.usefixtures("one_thread")


def test_generate_prints_prompt_and_text_and_then_its_speed(byte_dir: Path) -> None:
    result = run("generate", byte_dir, "En el", "--max-new-tokens", 12, "--seed", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("En el")
    assert "12 tokens at" in result.stderr
    assert "seed 1" in result.stderr


def test_generate_json_is_the_same_text_with_its_timing(byte_dir: Path) -> None:
    arguments = ("generate", byte_dir, "En el", "-n", 12, "--seed", 1)
    printed = run(*arguments).stdout
    made = read_json(run(*arguments, "--json"))
    assert printed == f"En el{made['text']}\n"
    assert (made["prompt_tokens"], made["new_tokens"], made["seed"]) == (5, 12, 1)
    assert made["tokens_per_second"] == pytest.approx(11 / made["decode_seconds"])
    assert made["dtype"] == "float16"


def test_generate_greedily_follows_the_largest_logit(byte_dir: Path) -> None:
    made = read_json(
        run("generate", byte_dir, "En", "-n", 5, "--greedy", "--dtype", "float32", "--json")
    )
    network = float32(byte_dir)
    ids = byte_ids("En", byte_dir)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(byte_dir)
    assert made["text"] == tokenizer.decode(ids[2:])
    assert made["seed"] is None


def test_generate_without_a_seed_says_which_it_took(byte_dir: Path) -> None:
    arguments = ("generate", byte_dir, "En", "-n", 20, "--json")
    first, second = read_json(run(*arguments)), read_json(run(*arguments))
    assert first["text"] != second["text"]
    again = read_json(run(*arguments, "--seed", first["seed"]))
    assert again["text"] == first["text"]


def test_generate_stops_at_the_end_of_the_context(byte_dir: Path) -> None:
    made = read_json(run("generate", byte_dir, "x" * 60, "-n", 100, "--seed", 1, "--json"))
    assert made["prompt_tokens"] + made["new_tokens"] == POSITIONS


def test_generate_from_nothing_and_with_too_much(byte_dir: Path) -> None:
    assert read_json(run("generate", byte_dir, "", "-n", 2, "--json"))["prompt_tokens"] == 1
    result = run("generate", byte_dir, "x" * POSITIONS)
    assert result.exit_code == 1
    assert "the prompt has 64 tokens; of the model's 64 it may take 63" in result.stderr
    assert not result.stdout, "refused before it is shown"


def test_generate_refuses_another_models_tokenizer(byte_dir: Path, tmp_path: Path) -> None:
    config = GPTJConfig(vocab_size=20, n_positions=64, n_embd=64, n_layer=1, n_head=2, rotary_dim=8)
    GPTJForCausalLM(config).save_pretrained(tmp_path / "small")
    result = run("generate", tmp_path / "small", "En", "--tokenizer", byte_dir)
    assert result.exit_code == 1
    assert "beyond the model's vocabulary of 20" in result.stderr
