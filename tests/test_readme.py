"""The README's Python does what it shows."""

from __future__ import annotations

import re
from pathlib import Path

import hivemind_layout
import pytest
from families import family
from tiny import IDS, relative
from transformers.models.gptj import modeling_gptj

import gptj_q8

README = Path(__file__).parent.parent / "README.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.usefixtures("one_thread")
def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(blocks()[0], names)
    assert names["model"].is_quantized
    assert (tmp_path / "out" / "my-8bit" / "config.json").exists()


@pytest.mark.usefixtures("one_thread")
def test_the_old_checkpoints_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny checkpoint in the place of the one on the Hub."""
    monkeypatch.setattr(modeling_gptj, "GPTJBlock", modeling_gptj.GPTJBlock)  # restores it
    folder = hivemind_layout.write(tmp_path / "old", hivemind_layout.state_dict())
    loaded = []
    for block in blocks():
        if "hivemind/gpt-j-6B-8bit" in block:
            names: dict[str, object] = {}
            exec(block.replace("hivemind/gpt-j-6B-8bit", str(folder)), names)
            loaded.append(names["model"](IDS).logits)
    assert relative(loaded[0], loaded[1]) < 1e-6


@pytest.mark.usefixtures("one_thread")
def test_the_lora_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks() if "add_lora" in block)
    names: dict[str, object] = {}
    exec(block, names)
    assert "442,368 parameters train" in capsys.readouterr().out
    merged = gptj_q8.from_pretrained("out/merged-float")
    # An adapter that has learned nothing yet: the model's own answers, encoded once more at most.
    assert relative(merged(IDS).logits, gptj_q8.from_pretrained(names["path"])(IDS).logits) < 0.02


@pytest.mark.usefixtures("one_thread")
def test_the_other_models_python_runs(tmp_path: Path) -> None:
    """On a tiny GPT-2 in the place of the one on the Hub."""
    family("gpt2").save_pretrained(tmp_path)
    (block,) = (block for block in blocks() if "openai-community/gpt2" in block)
    names: dict[str, object] = {}
    exec(block.replace("openai-community/gpt2", str(tmp_path)), names)
    loss = names["model"](input_ids=IDS, labels=IDS).loss
    loss.backward()
