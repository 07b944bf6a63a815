"""gptj-q8 demo: the lesson, and that it replaces no other model."""

import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import read_json, run
from tiny import contents

from gptj_q8.cli.demo import _activation
from gptj_q8.train.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


def test_demo_shows_the_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_q8.cli.demo.TOKENS", 1024)
    monkeypatch.setattr("gptj_q8.cli.demo.TIMED_TOKENS", 4)
    lesson = Settings(learning_rate=4e-3, sequence_length=128, max_steps=2, save_every=2)
    monkeypatch.setattr("gptj_q8.cli.demo.LESSON", lesson)
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # must not be taken for the model or the text
    output = tmp_path / "copy"
    shown = run("demo", "--output", output)
    assert shown.exit_code == 0, shown.output
    for part in (
        "bits/weight",
        "perplexity",
        "KL (nats)",
        "tokens/s",
        "\nEn el principio",
        "After:\nQuien mucho",
    ):
        assert part in shown.stdout
    # The lines it prints do what it says.
    python = shown.stdout.partition("In Python:")[2]
    lines = [line.strip() for line in python.splitlines() if line.startswith("    ")]
    names: dict[str, Any] = {}
    exec("\n".join(lines[:2]), names)
    assert names["model"].get_memory_footprint() < 7e6

    measured = read_json(run("demo", "--output", output, "--overwrite", "--json"))
    assert measured["python"] == lines[:2]
    ours, old = measured["copies"]
    assert old["divergence"]["kl"] > 2 * ours["divergence"]["kl"]
    assert measured["generation"] in shown.stdout
    assert measured["finetuning"]["samples"][0]["after"].strip() in shown.stdout


def test_demo_tells_how_its_commands_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `make demo` they are in .venv alone."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", "")
    assert _activation() == "source .venv/bin/activate"
    command = tmp_path / "gptj-q8"
    command.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _activation() is None


@pytest.mark.slow
def test_demo_learns_proverbs(tmp_path: Path) -> None:
    """A minute: the lesson as `make demo` gives it."""
    lesson = read_json(run("demo", "--output", tmp_path / "copy", "--json"))["finetuning"]
    assert lesson["held_out_tokens"] > 3000
    assert lesson["held_out"][-1][1] <= 0.8 * lesson["held_out"][0][1]


def test_demo_replaces_no_other_model(byte_dir: Path) -> None:
    before = contents(byte_dir)
    result = run("demo", "--output", byte_dir)
    assert result.exit_code == 1
    assert (
        "is not empty; choose another place, or overwrite it: overwrite=True, on the command line "
        "--overwrite" in result.stderr
    )
    assert contents(byte_dir) == before
