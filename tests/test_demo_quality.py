"""What 8 bits cost on the model that comes with the package, on text that it has not seen."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import gptj_q8
from gptj_q8 import demo
from gptj_q8.evaluate import Divergence, compare

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = 4096


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo.model_dir(), dtype=torch.float32)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(demo.model_dir())
    ids = tokenizer(demo.text("held_out"), add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids[:TOKENS])


def measure(original: PreTrainedModel, ids: torch.Tensor, **config: object) -> Divergence:
    model = copy.deepcopy(original)
    gptj_q8.quantize_(model, gptj_q8.Q8Config(**config))
    return compare(model, original, ids)


@pytest.fixture(scope="module")
def fitted(original: PreTrainedModel, ids: torch.Tensor) -> Divergence:
    """What `Q8Config()` means."""
    return measure(original, ids)


@pytest.fixture(scope="module")
def seed_format(original: PreTrainedModel, ids: torch.Tensor) -> Divergence:
    """What the `hivemind/gpt-j-6B-8bit` family stores."""
    return measure(original, ids, codebook="dynamic", block_size=4096)


def test_perplexity_is_within_a_thousandth(fitted: Divergence) -> None:
    assert abs(fitted.perplexity_change) < 1e-3
    # Told apart from the noise of a short text: the claim must hold at either end of its error.
    assert abs(fitted.perplexity_change) + 2 * fitted.perplexity_change_standard_error < 1e-3


def test_logits_are_at_least_twice_closer_than_the_seeds(
    fitted: Divergence, seed_format: Divergence
) -> None:
    assert fitted.kl > 0
    assert seed_format.kl >= 2 * fitted.kl


def test_first_choices_agree(fitted: Divergence) -> None:
    assert fitted.top1_agreement > 0.98
