"""Finding experts, intercepting their calls, and the two ways of running them one by one."""

from __future__ import annotations

import pytest
import torch

from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import _grouped, _loop_over_experts, observed_forward
from reapkit.model.routed_experts import find_experts
from tests.support import tiny

IDS = torch.randint(3, 250, (2, 19), generator=torch.Generator().manual_seed(3))


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("model_type", "overrides", "layers"),
    [
        ("qwen3_moe", {}, (0, 1, 2)),
        ("glm4_moe", {}, (1, 2)),
        ("nemotron_h", {}, (1,)),
        ("qwen3_moe", {"decoder_sparse_step": 2, "num_hidden_layers": 4}, (1, 3)),
        ("llama4_text", {"interleave_moe_layer_step": 2, "num_hidden_layers": 4, "moe_layers": None}, (1, 3)),
        ("qwen3_vl_moe", {}, (0, 1, 2)),
    ],
)
def test_layers_are_decoder_indices(model_type: str, overrides: dict, layers: tuple[int, ...]):
    assert tuple(site.layer for site in find_experts(tiny.build(model_type, **overrides))) == layers


@pytest.mark.parametrize("model_type", list(tiny.ARCHITECTURES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_watching_does_not_change_the_model(model_type: str, dtype: torch.dtype):
    model = tiny.build(model_type, dtype=dtype)
    if model_type != "llama4_text":
        model.set_experts_implementation("eager")
    before = logits(model)
    with intercepted(
        find_experts(model), lambda site, hidden, index, gates, inner: observed_forward(site, hidden, index, gates)[0]
    ):
        watched = logits(model)
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    assert (watched - before).abs().max() <= rounding
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_interceptions_nest_and_end_with_what_the_model_would_run(implementation: str):
    model = tiny.build("qwen3_moe")
    model.set_experts_implementation(implementation)
    before, calls = logits(model), []

    def noting(name):
        def handler(site, hidden, index, gates, inner):
            calls.append((name, site.layer))
            return inner(hidden, index, gates)

        return handler

    with intercepted(find_experts(model), noting("outer")):
        with intercepted(find_experts(model), noting("inner")):
            assert torch.equal(logits(model), before)
        assert calls == [(name, layer) for layer in range(3) for name in ("inner", "outer")]
        calls.clear()
        logits(model)
        assert calls == [("outer", layer) for layer in range(3)]
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h", "llama4_text", "deepseek_v3"])
def test_the_grouped_call_agrees_with_the_loop(model_type: str):
    """What runs on a GPU, here on the CPU."""
    site = find_experts(tiny.build(model_type))[0]
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 64, generator=draw)
    index = torch.rand(13, 16, generator=draw).argsort(dim=1)[:, :3]
    gates = torch.rand(13, 3, generator=draw) + 0.1
    expert, order = torch.sort(index.reshape(-1), stable=True)
    arguments = (site, hidden, expert, order // 3, order, gates.reshape(-1)[order])
    with torch.no_grad():
        for loop, grouped in zip(_loop_over_experts(*arguments), _grouped(*arguments), strict=True):
            assert torch.allclose(loop, grouped, rtol=1e-4, atol=1e-6)
