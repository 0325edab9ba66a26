"""KL divergences of almost equal predictions against float64."""

from __future__ import annotations

import pytest
import torch

from reapkit.evaluation.knockout.divergence import small_divergence


def exact(base: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    log_p, log_q = (each.double().log_softmax(-1) for each in (base, other))
    return torch.where(log_p.exp() > 0, log_p.exp() * (log_p - log_q), 0.0).sum(-1)


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0])
def test_it_is_exact_at_every_size(scale: float) -> None:
    draw = torch.Generator().manual_seed(0)
    base = 4 * torch.randn(50, 2048, generator=draw)
    other = base + scale * torch.randn(3, 50, 2048, generator=draw) + 7
    found, expected = small_divergence(base, other).double(), exact(base, other)
    assert found.shape == (3, 50) and (found >= 0).all()
    rounding = 1e-5 + 1e-6 / scale  # of float32 in a difference of this size
    assert ((found - expected).abs() <= rounding * expected + 1e-10).all()


def test_equal_logits_have_none_and_a_shift_of_all_is_nothing() -> None:
    base = torch.randn(9, 300, generator=torch.Generator().manual_seed(1))
    assert not small_divergence(base, base.clone()).any()
    assert small_divergence(base, base + 0.5).max() < 1e-9


def test_tokens_that_the_model_rules_out_add_nothing() -> None:
    draw = torch.Generator().manual_seed(2)
    base = torch.randn(6, 40, generator=draw)
    other = base + 0.05 * torch.randn(6, 40, generator=draw)
    expected = exact(base[:, :30], other[:, :30])
    base[:, 30:] = other[:, 30:] = -torch.inf
    assert torch.allclose(small_divergence(base, other).double(), expected, rtol=1e-4, atol=3e-7)
