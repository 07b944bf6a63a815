"""Perplexity and divergence, against numbers worked out another way."""

import math

import accelerate
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPTJConfig, GPTJForCausalLM

from gptj_q8.evaluate import compare, perplexity
from gptj_q8.sliding_window import windows

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 61
POSITIONS = 32


def tiny_gptj(seed: int) -> GPTJForCausalLM:
    torch.manual_seed(seed)
    config = GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=32,
        n_layer=2,
        n_head=2,
        rotary_dim=8,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,  # large enough that predictions differ from one another
    )
    return GPTJForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> GPTJForCausalLM:
    return tiny_gptj(0)


@pytest.fixture(scope="module")
def other() -> GPTJForCausalLM:
    return tiny_gptj(1)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (71,), generator=torch.Generator().manual_seed(2))


class Table(nn.Module):
    """A model that predicts the next token from the last alone: logits[t] = table[ids[t]]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def brute_force(model: nn.Module, ids: Tensor, window: int, stride: int) -> Tensor:
    """Log probabilities [T - 1, V], each from a pass of its own over that token's context."""
    rows = []
    for t in range(1, len(ids)):
        # The first window that holds token t.
        begin = max(0, math.ceil((t + 1 - window) / stride)) * stride
        with torch.no_grad():
            logits = model(ids[None, begin:t]).logits
        rows.append(F.log_softmax(logits[0, -1].double(), dim=-1))
    return torch.stack(rows)


@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 31, 32, 33, 100])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 1), (8, 3), (8, 7), (32, 16)])
def test_windows_score_each_token_once_with_context(length: int, window: int, stride: int) -> None:
    plan = windows(length, window, stride)
    scored = [t for w in plan for t in range(w.first, w.end)]
    assert scored == list(range(1, length))
    assert all(w.end - w.begin <= window for w in plan)
    assert all(w.first - w.begin >= window - stride for w in plan[1:])


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (0, 0), (8, 0), (8, -1), (8, 8), (8, 9)])
def test_windows_refuse_impossible_sizes(window: int, stride: int) -> None:
    with pytest.raises(ValueError, match="window"):
        windows(100, window, stride)


@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 1), (32, 31), (7, 3), (2, 1)])
def test_perplexity_equals_one_pass_per_token(
    model: GPTJForCausalLM, ids: Tensor, window: int, stride: int
) -> None:
    truth = -brute_force(model, ids, window, stride).gather(-1, ids[1:, None]).mean()
    result = perplexity(model, ids, window=window, stride=stride)
    assert result.tokens == len(ids) - 1
    assert result.nll == pytest.approx(float(truth), rel=1e-6)
    assert result.value == pytest.approx(math.exp(float(truth)), rel=1e-5)


def test_compare_equals_one_pass_per_token(
    model: GPTJForCausalLM, other: GPTJForCausalLM, ids: Tensor
) -> None:
    log_q, log_p = (brute_force(m, ids, 32, 16) for m in (model, other))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    result = compare(model, other, ids, window=32, stride=16)
    assert result.tokens == len(ids) - 1
    assert result.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_max == pytest.approx(float(kl.max()), rel=1e-5)
    agreement = (log_q.argmax(-1) == log_p.argmax(-1)).double().mean()
    assert result.top1_agreement == pytest.approx(float(agreement))
    assert result.perplexity == perplexity(model, ids, window=32, stride=16)
    assert result.original_perplexity == perplexity(other, ids, window=32, stride=16)
    change = result.perplexity.value / result.original_perplexity.value - 1
    assert result.perplexity_change == pytest.approx(change)


def test_defaults_are_the_models_context_and_half_of_it(
    model: GPTJForCausalLM, ids: Tensor
) -> None:
    assert perplexity(model, ids) == perplexity(model, ids, window=POSITIONS, stride=16)
    assert perplexity(model, ids[:20]) == perplexity(model, ids[:20], window=20, stride=10)


def test_a_model_is_not_far_from_itself(model: GPTJForCausalLM, ids: Tensor) -> None:
    result = compare(model, model, ids)
    assert (result.kl, result.kl_max, result.top1_agreement) == (0.0, 0.0, 1.0)
    assert (result.perplexity_change, result.perplexity_change_standard_error) == (0.0, 0.0)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(ids: Tensor) -> None:
    result = perplexity(Table(torch.zeros(VOCABULARY, VOCABULARY)), ids)
    assert result.value == pytest.approx(VOCABULARY, rel=1e-12)
    assert result.standard_error == pytest.approx(0.0, abs=1e-9)


def test_kl_of_a_shifted_coin() -> None:
    p, q = 0.75, 0.5
    original = Table(torch.tensor([p, 1 - p]).log().expand(2, 2))
    model = Table(torch.tensor([q, 1 - q]).log().expand(2, 2))
    result = compare(model, original, torch.tensor([0, 1, 1, 0, 1]))
    truth = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert result.kl == pytest.approx(truth, rel=1e-6)
    assert result.kl_max == pytest.approx(truth, rel=1e-6)


def test_kl_resolves_differences_below_float32s_normalization_error(ids: Tensor) -> None:
    # KL of logits z and z + e is to second order the variance of e under softmax(z), over 2.
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    e = 1e-4 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    p = z.double().softmax(-1)
    moved = (z + e).double() - z.double()
    variance = (p * moved**2).sum(-1) - (p * moved).sum(-1) ** 2
    result = compare(Table(z + e), Table(z), ids)
    assert result.kl == pytest.approx(float(variance[ids[:-1]].mean()) / 2, rel=1e-3)


def test_tokens_that_the_original_excludes_count_nothing() -> None:
    original = Table(torch.tensor([0.0, 0.0, -math.inf]).expand(3, 3))
    model = Table(torch.tensor([0.0, 0.0, 0.0]).expand(3, 3))
    result = compare(model, original, torch.tensor([0, 1, 0, 1]))
    assert result.kl == pytest.approx(math.log(3 / 2), rel=1e-6)


def test_standard_error_covers_the_truth_for_correlated_losses() -> None:
    """Losses come in runs of 10 equal values; ignoring that makes the error 3 times too small."""
    generator = torch.Generator().manual_seed(4)
    # Token 0 costs 1 nat, token 1 costs 3, whatever stands before.
    log_probs = torch.tensor([-1.0, -3.0])
    rest = (1 - log_probs.exp().sum()).log()[None]
    table = Table(torch.cat([log_probs, rest]).expand(3, 3))
    errors, claims = [], []
    for _ in range(40):
        runs = torch.randint(2, (500,), generator=generator).repeat_interleave(10)
        result = perplexity(table, runs)
        errors.append(result.nll - 2.0)
        claims.append(result.standard_error / result.value)
    actual = torch.tensor(errors).square().mean().sqrt()
    claimed = torch.tensor(claims).mean()
    assert 0.7 < claimed / actual < 1.4


def test_paired_error_is_smaller_than_the_perplexitys_own(
    model: GPTJForCausalLM, ids: Tensor
) -> None:
    near = tiny_gptj(0)
    with torch.no_grad():
        near.lm_head.weight.add_(1e-3 * torch.randn_like(near.lm_head.weight))
    result = compare(near, model, ids)
    own = result.perplexity.standard_error / result.perplexity.value
    assert 0 < result.perplexity_change_standard_error < own / 10


def test_too_few_tokens_for_an_error_say_so(model: GPTJForCausalLM) -> None:
    result = perplexity(model, [1, 2])
    assert result.tokens == 1
    assert math.isnan(result.standard_error)


def test_dropout_is_off_and_training_flags_are_kept(ids: Tensor) -> None:
    model = tiny_gptj(0)
    reference = perplexity(model, ids)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.train()
    model.transformer.h[1].eval()
    before = [m.training for m in model.modules()]
    assert perplexity(model, ids) == reference
    assert [m.training for m in model.modules()] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float(ids: Tensor, dtype: torch.dtype) -> None:
    model = tiny_gptj(0)
    truth = perplexity(model, ids).nll
    assert perplexity(model.to(dtype), ids).nll == pytest.approx(truth, rel=0.02)


def test_progress_ends_at_the_last_token(model: GPTJForCausalLM, ids: Tensor) -> None:
    seen: list[tuple[int, int]] = []
    perplexity(model, ids, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (70, 70)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_chunks_do_not_change_the_result(
    model: GPTJForCausalLM, other: GPTJForCausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(model, other, ids)
    monkeypatch.setattr("gptj_q8.evaluate.LOGITS_PER_CHUNK", VOCABULARY * 5)
    monkeypatch.setattr("gptj_q8.sliding_window.TOKENS_PER_PASS", 1)
    parts = compare(model, other, ids)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-5)
    assert parts.perplexity.nll == pytest.approx(whole.perplexity.nll, rel=1e-6)


def test_bad_texts_are_refused(model: GPTJForCausalLM) -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        perplexity(model, [1])
    with pytest.raises(ValueError, match=r"\[T\] or \[1, T\]"):
        perplexity(model, torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(TypeError, match="integers"):
        perplexity(model, torch.zeros(5))
    with pytest.raises(ValueError, match="exceeds the model's 32 positions"):
        perplexity(model, torch.zeros(50, dtype=torch.long), window=33)
    with pytest.raises(ValueError, match="token 61 is beyond the model's vocabulary of 61"):
        perplexity(model, [60, 61])


def test_nan_is_named_not_averaged(ids: Tensor) -> None:
    model = tiny_gptj(0)
    with torch.no_grad():
        model.lm_head.weight[5, 3] = math.nan
    with pytest.raises(ValueError, match="the model predicts NaN at 70 of 70 tokens"):
        perplexity(model, ids)
    with pytest.raises(ValueError, match="the original predicts NaN"):
        compare(tiny_gptj(0), model, ids)


def test_vocabularies_must_match(ids: Tensor) -> None:
    wide = Table(torch.zeros(VOCABULARY + 3, VOCABULARY + 3))
    with pytest.raises(ValueError, match="vocabularies differ: 61 and 64"):
        compare(Table(torch.zeros(VOCABULARY, VOCABULARY)), wide, ids)


def test_an_offloaded_model_is_scored_too(model: GPTJForCausalLM, ids: Tensor) -> None:
    offloaded = accelerate.cpu_offload(tiny_gptj(0), execution_device=torch.device("cpu"))
    assert perplexity(offloaded, ids) == perplexity(model, ids)
