"""What a number of prompts can show, against a simulation of the experiment."""

from __future__ import annotations

import numpy as np
import pytest

from reapkit.evaluation.metrics.power import detectable_rise, prompts_to_detect


def shown(share: float, other: float, prompts: int) -> float:
    """How often two samples of so many prompts differ by more than 1.96 standard errors."""
    generator = np.random.default_rng(0)
    a = generator.binomial(prompts, share, 20_000) / prompts
    b = generator.binomial(prompts, other, 20_000) / prompts
    error = np.sqrt((a * (1 - a) + b * (1 - b)) / prompts)
    return float(np.mean(np.abs(b - a) > 1.96 * np.maximum(error, 1e-9)))


def test_a_doubling_of_rare_loops_takes_hundreds_of_prompts() -> None:
    assert prompts_to_detect(0.036, 0.036) == 615
    assert shown(0.036, 0.072, 615) == pytest.approx(0.8, abs=0.04)
    assert shown(0.036, 0.072, 64) < 0.25


@pytest.mark.parametrize("share", [0.02, 0.036, 0.1, 0.3])
@pytest.mark.parametrize("prompts", [64, 256, 1024])
def test_the_smallest_rise_and_the_number_of_prompts_are_inverse(share: float, prompts: int) -> None:
    rise = detectable_rise(share, prompts)
    assert prompts_to_detect(share, rise) in (prompts, prompts + 1)
    assert shown(share, share + rise, prompts) == pytest.approx(0.8, abs=0.12)


def test_edges() -> None:
    assert prompts_to_detect(0.1, 0.0) is None and prompts_to_detect(0.1, -0.2) is None
    assert detectable_rise(0.0, 64) == pytest.approx(7.84 / (64 + 7.84))
    assert detectable_rise(1.0, 64) == 0.0
