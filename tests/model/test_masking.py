"""A masked model against an independent oracle: the dropped experts' choice scores at minus infinity, weights
untouched."""

from __future__ import annotations

import contextlib

import pytest
import torch

from reapkit.core.errors import UnusableError
from reapkit.model.masking import masked
from reapkit.model.routed_experts import find_experts
from tests.support import tiny

IDS = torch.randint(3, 250, (2, 21), generator=torch.Generator().manual_seed(5))


@contextlib.contextmanager
def oracle(model, keep):
    """Router logits of dropped experts are pushed to minus infinity where they arise, and choice biases with them.

    Every linear map onto the layer's experts inside its block is a router; sigmoid turns minus infinity into a score of
    zero, which a bias could lift again, so biases that are added to scores are lowered too.
    """
    linear = torch.nn.functional.linear
    undo, current = [], []

    def masking_linear(x, weight, bias=None):
        out = linear(x, weight, bias)
        if current and out.shape[-1] == current[-1][0] and weight.shape[0] == current[-1][0]:
            out = out.masked_fill(current[-1][1], -1e30)
        return out

    for site in find_experts(model):
        dropped = torch.ones(site.num_experts, dtype=torch.bool)
        dropped[list(keep[site.layer])] = False
        names = ("e_score_correction_bias", "expert_bias")
        for module in site.block.modules():
            for store in (module._parameters, module._buffers):
                for name in names:
                    if store.get(name) is not None:
                        undo.append((store, name, store[name]))
                        changed = store[name].detach().masked_fill(dropped, -torch.inf)
                        store[name] = torch.nn.Parameter(changed, False) if store is module._parameters else changed

        def before(module, args, kwargs, dropped=dropped, experts=site.num_experts):
            current.append((experts, dropped))

        def after(module, args, output):
            current.pop()

        undo.append(site.block.register_forward_pre_hook(before, with_kwargs=True))
        undo.append(site.block.register_forward_hook(after))
    torch.nn.functional.linear = masking_linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        for entry in undo:
            if isinstance(entry, tuple):
                entry[0][entry[1]] = entry[2]
            else:
                entry.remove()


def drawn_keep(model, seed=0):
    """Half the experts of every layer, equally many of each run of four."""
    draw = torch.Generator().manual_seed(seed)
    return {
        site.layer: sorted(
            int(e) + 4 * group
            for group in range(site.num_experts // 4)
            for e in torch.randperm(4, generator=draw)[: 3 if group == 0 and site.num_experts == 8 else 2]
        )
        for site in find_experts(model)
    }


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("model_type", list(tiny.ARCHITECTURES))
def test_masked_equals_minus_infinity_on_the_choice_score(model_type: str):
    model = tiny.build(model_type)
    whole = logits(model)
    keep = drawn_keep(model)
    with oracle(model, keep):
        expected = logits(model)
    with masked(model, keep):
        got = logits(model)
    assert (got - expected).abs().max() < 1e-5
    assert (got - whole).abs().max() > 1e-3, "the mask must matter for the test to say anything"
    assert torch.equal(logits(model), whole), "everything is restored"


TOP_K_KEY = {"ernie4_5_moe": "moe_k", "hunyuan_v1_moe": "moe_topk", "gemma4_text": "top_k_experts"}


@pytest.mark.parametrize(
    "model_type", [name for name in tiny.ARCHITECTURES if name not in ("llama4_text", "phimoe", "qwen3_vl_moe")]
)
def test_experts_per_token_equals_a_model_configured_so(model_type: str):
    model = tiny.build(model_type)
    configured = tiny.build(model_type, **{TOP_K_KEY.get(model_type, "num_experts_per_tok"): 2})
    configured.load_state_dict(model.state_dict())
    before = logits(model)
    top_k = model.config.get_text_config().to_dict()
    with masked(model, {}, experts_per_token=2):
        got = logits(model)
    same = tiny.ARCHITECTURES[model_type].get("num_experts_per_tok") == 2
    assert torch.equal(got, logits(configured))
    assert same or (got - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)
    assert model.config.get_text_config().to_dict() == top_k


def test_unequal_groups_are_refused():
    model = tiny.build("deepseek_v3")
    with (
        pytest.raises(
            UnusableError, match=(r"layer 1: the router has 4 groups, and the groups keep \[4, 4, 4, 3\] experts")
        ),
        masked(model, {1: range(15)}),
    ):
        pass


def test_a_layer_without_experts_is_refused():
    with (
        pytest.raises(UnusableError, match=r"layers \[0\] have no routed experts to mask; the MoE layers are \[1, 2\]"),
        masked(tiny.build("glm4_moe"), {0: range(8)}),
    ):
        pass


def test_a_bad_keep_set_is_refused_and_nothing_changes():
    model = tiny.build("qwen3_moe")
    before = logits(model)
    with (
        pytest.raises(UnusableError, match=r"layer 1: kept experts .* are not distinct numbers from 0 to 15"),
        masked(model, {0: range(8), 1: [1, 1, 2, 3]}),
    ):
        pass
    assert torch.equal(logits(model), before)


def test_keeping_every_expert_changes_nothing():
    model = tiny.build("gpt_oss")
    before = logits(model)
    with masked(model, {layer: range(16) for layer in range(3)}):
        assert torch.equal(logits(model), before)


@torch.no_grad()
def test_a_layer_that_a_table_routes_stays_whole_while_the_rest_is_masked():
    model = tiny.build("deepseek_v4")
    keep = {0: list(range(16)), 1: list(range(0, 16, 2)), 2: list(range(4, 12))}
    with masked(model, keep):
        got = model(IDS, use_cache=False).logits
    with oracle(model, keep):
        expected = model(IDS, use_cache=False).logits
    assert (got - expected).abs().max() <= 1e-5
    assert not torch.allclose(got, model(IDS, use_cache=False).logits)
    refused = pytest.raises(UnusableError, match="layer 0: the router reads expert numbers from a fixed table")
    with refused, masked(model, {0: list(range(15))}):
        pass
