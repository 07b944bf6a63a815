"""GPT-J through scaled_dot_product_attention and a fused GELU, and how they are chosen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DTYPES, relative_error
from peft import LoraConfig, get_peft_model
from tiny import IDS, VOCABULARY, gpt2, gptj, logits
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTJForCausalLM, StaticCache

import gptj_q8
from gptj_q8.models.gptj_attention import SDPA
from gptj_q8.models.gptj_modules import fuse_gelu
from gptj_q8.models.gptj_version import REWRITTEN

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(**changes: object) -> tuple[GPTJForCausalLM, GPTJForCausalLM]:
    """The same model with eager attention and with ours."""
    eager = gptj(initializer_range=0.2, attn_implementation="eager", **changes)
    ours = copy.deepcopy(eager)
    gptj_q8.set_attn_implementation(ours, "sdpa")
    return eager, ours


def attentions(model: nn.Module) -> list[Any]:
    return [module for name, module in model.named_modules() if name.endswith(".attn")]


def attend(model: GPTJForCausalLM, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """What the first block's attention makes of hidden [B, T, K]."""
    where: Any = {"position_ids": torch.arange(hidden.shape[1])[None]}
    if REWRITTEN:
        where = {"position_embeddings": model.transformer.rotary_emb(hidden, **where)}
    output, _ = attentions(model)[0](hidden, attention_mask=mask, **where)
    return output


def causal(length: int, padding: int = 0) -> Tensor:
    """True where a token may look, [1, 1, T, T]; the first `padding` are seen by none."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[:, :padding] = False
    return seen[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@pytest.mark.parametrize("rotary_dim", [4, 16])
@pytest.mark.parametrize("length", [1, 2, 63, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_eagers(dtype: torch.dtype, length: int, rotary_dim: int) -> None:
    """Against the eager attention in float64, output and gradient, rotary in part or all of it."""
    eager, ours = pair(n_embd=64, n_positions=256, rotary_dim=rotary_dim)
    hidden = torch.randn(2, length, 64).to(dtype)
    upstream = torch.randn(2, length, 64).to(dtype)
    mask = causal(length)

    def run(model: GPTJForCausalLM, dtype: torch.dtype, mask: Tensor | None) -> list[Tensor]:
        x = hidden.to(dtype).requires_grad_()
        output = attend(model.to(dtype), x, mask)
        return [output, *torch.autograd.grad(output, x, upstream.to(dtype))]

    theirs = run(eager.to(dtype), dtype, additive(mask, dtype))
    mine = run(ours.to(dtype), dtype, None)
    x = hidden.double().requires_grad_()
    output = exact(attentions(eager)[0], x, dtype, rotary_dim)
    truths = [output, *torch.autograd.grad(output, x, upstream.double())]
    for my, their, truth in zip(mine, theirs, truths, strict=True):
        assert relative_error(my, truth) <= 2 * relative_error(their, truth)


def exact(attention: Any, hidden: Tensor, dtype: torch.dtype, rotary_dim: int) -> Tensor:
    """GPT-J's causal attention of 4 heads in float64, with sines and cosines rounded to dtype.

    Neighbouring elements of a query or key are turned as one complex number (RoFormer, eq. 34).
    """
    angles = torch.arange(hidden.shape[1])[:, None] / 10000 ** (
        torch.arange(0, rotary_dim, 2) / rotary_dim
    )
    turns = torch.complex(*(f(angles).to(dtype).double() for f in (torch.cos, torch.sin)))

    def project(layer: nn.Linear, turned: bool) -> Tensor:
        x = (hidden @ layer.weight.double().T).unflatten(-1, (4, -1)).transpose(1, 2)
        if not turned:
            return x
        pairs = torch.view_as_complex(x[..., :rotary_dim].unflatten(-1, (-1, 2)))
        return torch.cat([torch.view_as_real(pairs * turns).flatten(-2), x[..., rotary_dim:]], -1)

    query, key = project(attention.q_proj, True), project(attention.k_proj, True)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~causal(hidden.shape[1]), -torch.inf).softmax(-1)
    output = (weights @ project(attention.v_proj, False)).transpose(1, 2).flatten(-2)
    return output @ attention.out_proj.weight.double().T


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_finite_and_harm_no_other(dtype: torch.dtype) -> None:
    eager, ours = (model.to(dtype) for model in pair())
    ids = torch.randint(2, VOCABULARY, (2, 20), generator=torch.manual_seed(0))
    seen = torch.ones_like(ids)
    seen[0, :7] = 0
    answers = []
    for model in (eager, ours):
        model.train()
        answer = model(ids, attention_mask=seen, labels=ids.masked_fill(seen == 0, -100))
        answer.loss.backward()
        answers.append(answer.logits[seen == 1])
    torch.testing.assert_close(*answers, rtol=0.02, atol=0.1 if dtype != torch.float32 else 1e-4)
    assert relative_error(answers[1], answers[0].double()) < (
        1e-5 if dtype == torch.float32 else 0.03
    )
    for parameter in ours.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_no_mask_is_made_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a batch without padding nor for one whose attention_mask is all ones."""
    _, ours = pair()
    given = []

    def attends(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        given.append((how["attn_mask"], how["is_causal"]))
        return v

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attends)
    ours.train()
    for mask in (None, torch.ones_like(IDS)):
        ours(IDS, attention_mask=mask, labels=IDS, use_cache=False)
    assert given == [(None, True)] * 4


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padding", [0, 3])
def test_generates_what_eager_does(cache: str, padding: int) -> None:
    eager, ours = pair()
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.manual_seed(1))
    seen = torch.ones_like(ids)
    seen[0, :padding] = 0
    one, two = (
        model.generate(
            ids,
            attention_mask=seen,
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            cache_implementation=cache,
            disable_compile=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for model in (eager, ours)
    )
    assert torch.equal(one.sequences, two.sequences)
    torch.testing.assert_close(torch.stack(one.logits), torch.stack(two.logits), rtol=0, atol=1e-3)


def test_prompt_in_pieces_into_a_static_cache() -> None:
    eager, ours = pair()
    cache = StaticCache(config=ours.config, max_cache_len=32)
    with torch.no_grad():
        whole = eager(IDS).logits
        pieces = [ours(ids, past_key_values=cache).logits for ids in IDS.split([5, 4, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-4)


def test_beam_search() -> None:
    arguments = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    one, two = (model.generate(IDS, **arguments) for model in pair())
    assert torch.equal(one, two)


def test_attention_dropout_drops_in_training_only() -> None:
    _, ours = pair(attn_pdrop=0.5)
    torch.testing.assert_close(logits(ours), logits(ours))
    hidden = torch.randn(1, 6, 48)
    plain = attend(ours, hidden)
    ours.train()
    torch.manual_seed(0)
    mean = torch.stack([attend(ours, hidden) for _ in range(4000)]).mean(0)
    assert not torch.equal(attend(ours, hidden), attend(ours, hidden))
    assert relative_error(mean, plain.double()) < 0.05, "dropped weights are made up for"


def test_a_mask_of_the_users_own_in_float32_for_a_bfloat16_model() -> None:
    eager, ours = (model.bfloat16() for model in pair())
    band = causal(12) & ~torch.ones(12, 12, dtype=torch.bool).tril(-4)
    mask = additive(band, torch.float32)
    with torch.no_grad():
        one, two = (model(IDS, attention_mask=mask).logits for model in (eager, ours))
    assert relative_error(two, one.double()) < 0.02
    assert relative_error(two, logits(eager).double()) > 0.1, "the mask must matter"


def test_compiles_into_one_graph() -> None:
    eager, ours = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (12, 7):
        ids = IDS[:, :length]
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(ids, use_cache=False).logits, eager(ids).logits, rtol=0, atol=1e-4
            )


@pytest.mark.skipif(REWRITTEN, reason="Transformers' own attention warns, and gives none")
def test_attention_weights_are_refused() -> None:
    _, ours = pair()
    with pytest.raises(ValueError, match=r'set_attn_implementation\(model, "eager"\)'):
        ours(IDS, output_attentions=True)


def test_attention_weights_come_from_eager() -> None:
    _, ours = pair()
    gptj_q8.set_attn_implementation(ours, "eager")
    assert ours(IDS, output_attentions=True).attentions[0].shape == (1, 4, 12, 12)


# How it is chosen


def kind(model: nn.Module) -> set[str]:
    """What its attentions are configured as and, where a class tells it, what they are."""
    found = {module.config._attn_implementation for module in attentions(model)}
    if not REWRITTEN:
        classes = {"GPTJAttention": "eager", "SdpaAttention": SDPA}
        assert found == {classes[type(module).__name__] for module in attentions(model)}
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, SDPA),
        ({"attn_implementation": "sdpa"}, SDPA),
        ({"attn_implementation": "eager"}, "eager"),
        ({"output_attentions": True}, "eager"),
    ],
)
def test_our_loader_takes_sdpa_unless_asked(
    float_dir: Path, arguments: dict, expected: str
) -> None:
    if "output_attentions" in arguments:
        arguments = {"config": AutoConfig.from_pretrained(float_dir, **arguments)}
    assert kind(gptj_q8.from_pretrained(float_dir, **arguments)) == {expected}


def test_transformers_own_models_stay_as_they_are(float_dir: Path, tmp_path: Path) -> None:
    """Neither their default nor their refusal changes, and what we save they load."""
    default = "sdpa" if REWRITTEN else "eager"
    model = gptj_q8.from_pretrained(float_dir)
    assert kind(AutoModelForCausalLM.from_pretrained(float_dir)) == {default}
    if not REWRITTEN:
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            AutoModelForCausalLM.from_pretrained(float_dir, attn_implementation="sdpa")
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text().replace("attn_pdrop", "")
    assert kind(AutoModelForCausalLM.from_pretrained(tmp_path)) == {default}
    assert kind(GPTJForCausalLM(model.config)) == {SDPA}, "as its configuration says"


def test_switches_under_peft_and_back() -> None:
    eager, _ = pair()
    before = logits(eager)
    wrapped = get_peft_model(eager, LoraConfig(r=2, target_modules=["q_proj"]))
    gptj_q8.set_attn_implementation(wrapped, "sdpa")
    assert kind(wrapped) == {SDPA}
    torch.testing.assert_close(logits(wrapped), before)
    gptj_q8.set_attn_implementation(wrapped, "eager")
    assert kind(wrapped) == {"eager"}
    assert torch.equal(logits(wrapped), before)


def test_switching_other_models_is_transformers_own() -> None:
    model = gpt2()
    gptj_q8.set_attn_implementation(model, "eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="flex"):
        gptj_q8.set_attn_implementation(gptj(), "flexible")


# The MLP


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_gelu_is_the_same_function_and_keeps_one_tensor(dtype: torch.dtype) -> None:
    mlp = gptj().transformer.h[0].mlp
    theirs = mlp.act
    fuse_gelu(mlp)
    x = torch.linspace(-9, 9, 4001).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    truth = theirs(wide)
    (true_grad,) = torch.autograd.grad(truth.sum(), wide)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = mlp.act(x)
    assert len(kept) == 1
    assert kept[0].data_ptr() == x.data_ptr()
    (grad,) = torch.autograd.grad(y.sum(), x)
    their = theirs(x)
    (their_grad,) = torch.autograd.grad(their.sum(), x)
    assert relative_error(y, truth) <= 2 * relative_error(their, truth)
    assert relative_error(grad, true_grad) <= 2 * relative_error(their_grad, true_grad)


def test_another_activation_stays() -> None:
    model = gptj(activation_function="relu")
    before = model.transformer.h[0].mlp.act
    fuse_gelu(model)
    assert model.transformer.h[0].mlp.act is before
