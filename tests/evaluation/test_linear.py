"""Emulated bfloat16 is replaced by float32 products rounded once, and nothing else is."""

import pytest
import torch
from torch.nn.functional import linear

from reapkit.evaluation import linear as module
from reapkit.evaluation.linear import fast_linear, widened_linear
from reapkit.evaluation.outputs import BaseOutputs, Pack, base_hidden, compare, describe_hidden, measure
from reapkit.evaluation.streaming import yardstick_streaming
from reapkit.model.streaming.layers import LayeredModel
from tests.support import tiny
from tests.support.held_out import held_out


@pytest.fixture(params=["AVX2", "AVX512"])
def capability(request, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return request.param


@pytest.fixture
def counted(monkeypatch):
    calls = []
    real = widened_linear
    monkeypatch.setattr(module, "widened_linear", lambda **given: calls.append(given["input"].shape) or real(**given))
    return calls


def drawn(*shape, dtype=torch.bfloat16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("numbers", [1 << 24, 200])
def test_products_are_the_exact_ones_rounded_once(numbers, monkeypatch):
    monkeypatch.setattr(module, "WIDENED_NUMBERS", numbers)
    x, w, b = drawn(3, 20, 48), drawn(33, 48, seed=1), drawn(33, seed=2)
    exact = x.double() @ w.double().T + b.double()
    found = widened_linear(x, w, b)
    assert found.dtype == torch.bfloat16 and found.shape == (3, 20, 33)
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()  # half a unit in the last of 8 bits
    assert torch.equal(widened_linear(x, w), widened_linear(x, w, torch.zeros(33, dtype=torch.bfloat16)))


def test_only_emulated_bfloat16_of_many_rows_is_widened(capability, counted):
    model, w = torch.nn.Linear(8, 8, dtype=torch.bfloat16), drawn(8, 8)
    with fast_linear(model):
        assert torch.equal(linear(drawn(15, 8), w), linear(drawn(15, 8), w))
        assert linear(drawn(16, 8, dtype=torch.float32), w.float()).dtype == torch.float32
        assert counted == []
        found = [linear(drawn(16, 8), w), linear(input=drawn(16, 8), weight=w), model(drawn(16, 8))]
    assert counted == ([(16, 8)] * 3 if capability == "AVX2" else [])
    assert torch.allclose(found[0].float(), linear(drawn(16, 8), w).float(), rtol=2**-7, atol=1e-5) and torch.equal(
        found[0], found[1]
    )
    linear(drawn(16, 8), w)
    assert len(counted) in (0, 3), "outside the block nothing changes"


@torch.no_grad()
def test_a_bfloat16_models_numbers_are_its_own(tmp_path, monkeypatch, counted):
    model = tiny.build("qwen3_moe").to(torch.bfloat16).requires_grad_(False)
    tiny.save_hub_layout(model, tmp_path / "model")
    tokens = held_out(tmp_path / "pack")
    pack, found = Pack.part(tokens, "decide", 24), {}
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        before = len(counted)
        base = BaseOutputs.of(model, pack, base_hidden(model, pack, batch_tokens=64))
        own = describe_hidden(model, pack, base.hidden)
        itself = compare(own, measure(model, pack, base, batch_tokens=64), pack)["all"]
        assert itself["kl_mean"] == {"value": 0.0, "interval": [0.0, 0.0]} and itself["js_distance"]["value"] == 0
        found[capability] = own.nll.mean().item()
        assert (len(counted) > before) == (capability == "AVX2")
    assert found["AVX2"] == pytest.approx(found["AVX512"], rel=1e-3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    before = len(counted)
    streamed = yardstick_streaming(
        lambda: LayeredModel(tmp_path / "model", dtype="bfloat16"), {24: tokens}, batch_tokens=64
    )
    assert streamed.base_metrics["24"]["all"]["nll"]["value"] > 0 and len(counted) - before > 3 * len(
        model.model.layers
    )
