"""The model card beside an 8-bit model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from tiny import gptj, load

from gptj_q8 import Q8Config, add_lora, from_pretrained, merge, quantize_
from gptj_q8.checkpoint import card, convert_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def front_matter(text: str) -> dict:
    """What the Hub reads: YAML between two lines of dashes at the very top."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def code_weights(folder: Path) -> int:
    """How many weights a stored model has in 8 bits, counted on what loads."""
    model = from_pretrained(folder)
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("codes"))


def test_convert_writes_what_was_done_and_its_error(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "8bit"
    report = convert_checkpoint(
        source, target, Q8Config(64, "dynamic", modules_to_not_convert=["lm_head"])
    )
    text = (target / "README.md").read_text()
    assert front_matter(text) == {"library_name": "transformers", "tags": ["gptj_q8", "8-bit"]}
    assert "every block of 64 weights" in text
    assert "(codebook `dynamic`). 8.5 bits per weight" in text
    assert f"{code_weights(target):,} weights" in text
    assert "Left in float: `lm_head`." in text
    for layer in report.layers:
        assert f"| {layer.kind} | {layer.weights:,} | {100 * layer.relative_rmse:.3f} % |" in text
    assert str(source.parent) not in text, "a path of this machine"


def test_save_pretrained_writes_one_for_8_bit_models_alone(tmp_path: Path) -> None:
    model = gptj()
    model.save_pretrained(tmp_path / "float")
    assert not (tmp_path / "float" / "README.md").exists()
    quantize_(model, Q8Config(block_size=32))
    model.save_pretrained(tmp_path / "8bit")
    text = (tmp_path / "8bit" / "README.md").read_text()
    assert f"{code_weights(tmp_path / '8bit'):,} weights" in text
    assert "Error of the decoded weights" not in text
    model.dequantize().save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "README.md").exists()


def test_a_persons_card_is_left_alone_and_ours_renewed(float_dir: Path, tmp_path: Path) -> None:
    own = "# Mine\n"
    for block_size in (64, 128):
        load(float_dir, quantization_config=Q8Config(block_size)).save_pretrained(tmp_path)
        assert f"block of {block_size} " in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(own)
    from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == own


def test_an_overwriting_conversion_keeps_a_persons_card(source: Path, tmp_path: Path) -> None:
    for block_size in (64, 128):
        convert_checkpoint(source, tmp_path, Q8Config(block_size), overwrite=True)
        assert f"block of {block_size} " in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    convert_checkpoint(source, tmp_path, Q8Config(256), overwrite=True)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_hub_id_is_named_as_the_base() -> None:
    text = card.text(Q8Config(), "EleutherAI/gpt-j-6b", 6_046_089_216)
    assert front_matter(text)["base_model"] == "EleutherAI/gpt-j-6b"
    assert front_matter(text)["base_model_relation"] == "quantized"
    assert "# EleutherAI/gpt-j-6b in 8 bits" in text
    assert "8.125 bits per weight" in text


def test_what_the_originals_card_says_holds_for_the_copy(source: Path, tmp_path: Path) -> None:
    """Licence, language and task; nothing that speaks of the original alone."""
    original = tmp_path / "original"
    shutil.copytree(source, original)
    original.joinpath("README.md").write_text(
        "---\nlicense: apache-2.0\nlanguage:\n- es\npipeline_tag: text-generation\n"
        "datasets:\n- the_pile\nbase_model: some/other\n---\n# A model\n"
    )
    convert_checkpoint(original, tmp_path / "8bit", Q8Config(64))
    kept = {"license": "apache-2.0", "language": ["es"], "pipeline_tag": "text-generation"}
    ours = {"library_name": "transformers", "tags": ["gptj_q8", "8-bit"]}
    assert front_matter((tmp_path / "8bit" / "README.md").read_text()) == kept | ours
    # From one of ours on, all that it says of its origin.
    card.write(tmp_path, Q8Config(), "EleutherAI/gpt-j-6b", 1, original=original)
    lineage = {"base_model": "EleutherAI/gpt-j-6b", "base_model_relation": "quantized"}
    text = card.text(Q8Config(), tmp_path, 1, original=tmp_path)
    assert front_matter(text) == kept | ours | lineage
    assert "# EleutherAI/gpt-j-6b in 8 bits" in text


def test_a_merged_model_is_no_copy_of_the_one_before(source: Path, tmp_path: Path) -> None:
    add_lora(from_pretrained(source), r=2).save_pretrained(tmp_path / "adapter")
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "# A model in 8 bits" in text
    assert source.name not in text


@pytest.mark.parametrize(
    "broken", ["---\n- a list\n---\n", "---\nlicense: [\n---\n", "no more", ""]
)
def test_a_card_that_cannot_be_read_stops_nothing(broken: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(broken)
    text = card.text(Q8Config(), tmp_path, 1, original=tmp_path)
    assert front_matter(text) == {"library_name": "transformers", "tags": ["gptj_q8", "8-bit"]}


def test_norwegian_is_not_false(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlanguage: no\nlicense: mit\n---\n")
    front = front_matter(card.text(Q8Config(), tmp_path, 1, original=tmp_path))
    assert front["license"] == "mit"
    assert "language" not in front


def test_its_lines_of_python_run_in_its_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert_checkpoint(source, tmp_path / "8bit", Q8Config(64))
    monkeypatch.chdir(tmp_path / "8bit")
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["model"].is_quantized


@pytest.mark.parametrize("base", [None, "", "/some/where/model", Path("/some/where/model")])
def test_anything_else_is_not(base: str | Path | None) -> None:
    text = card.text(Q8Config(), base, 1)
    assert "base_model" not in front_matter(text)
    assert "/some" not in text
