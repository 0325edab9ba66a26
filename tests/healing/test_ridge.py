"""The closed-form re-fit against a naive loop, the joint solution, and its own guard against overfitting."""

from __future__ import annotations

import pytest
import torch

from reapkit.healing.ridge import ExpertFeatures, descend, refit

TOKENS, HIDDEN, INNER, EXPERTS, TOP_K = 60, 5, 4, 3, 2


def problem(seed: int, noise: float = 0.0):
    """Random features, an error that some correction explains up to noise, and weights."""
    draw = torch.Generator().manual_seed(seed)
    index = torch.stack([torch.randperm(EXPERTS, generator=draw)[:TOP_K] for _ in range(TOKENS)])
    phi = {e: torch.randn(int((index == e).sum()), INNER, generator=draw) for e in range(EXPERTS)}
    rows = {e: (index == e).any(1).nonzero()[:, 0] for e in range(EXPERTS)}
    truth = {e: torch.randn(HIDDEN, INNER, generator=draw) for e in range(EXPERTS)}
    error = noise * torch.randn(TOKENS, HIDDEN, generator=draw)
    for e in range(EXPERTS):
        error.index_add_(0, rows[e], phi[e] @ truth[e].T)
    experts = {e: ExpertFeatures(rows[e], lambda e=e: phi[e]) for e in range(EXPERTS)}
    return experts, error, torch.rand(TOKENS, generator=draw) + 0.1, truth


def naive(experts, error, weight, ridge, sweeps):
    """Each step by least squares on a system to which the ridge is appended as rows."""
    found = {e: torch.zeros(HIDDEN, INNER, dtype=torch.float64) for e in experts}
    for _ in range(sweeps):
        for e, seen in experts.items():
            phi = seen.features().double()
            target = error.double().clone()
            for other, features in experts.items():
                if other != e:
                    for place, row in enumerate(features.rows.tolist()):
                        target[row] -= found[other] @ features.features()[place].double()
            root = weight[seen.rows].double().sqrt()[:, None]
            system = torch.cat([root * phi, ridge**0.5 * torch.eye(INNER, dtype=torch.float64)])
            wanted = torch.cat([root * target[seen.rows], torch.zeros(INNER, HIDDEN, dtype=torch.float64)])
            found[e] = torch.linalg.lstsq(system, wanted).solution.T
    return found


@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_sweeps_against_least_squares(sweeps: int) -> None:
    experts, error, weight, _ = problem(sweeps, noise=0.5)
    found, left = descend(experts, error, weight, 0.7, sweeps)
    expected = naive(experts, error, weight, 0.7, sweeps)
    remaining = error.double().clone()
    for e, seen in experts.items():
        torch.testing.assert_close(found[e].double(), expected[e], rtol=1e-4, atol=1e-5)
        remaining.index_add_(0, seen.rows, -(seen.features().double() @ expected[e].T))
    torch.testing.assert_close(left.double(), remaining, rtol=1e-4, atol=1e-5)


def test_many_sweeps_reach_the_joint_solution() -> None:
    experts, error, weight, _ = problem(3, noise=0.5)
    found, _ = descend(experts, error, weight, 0.5, sweeps=400)
    wide = torch.zeros(TOKENS, EXPERTS * INNER, dtype=torch.float64)
    for e, seen in experts.items():
        wide[seen.rows, e * INNER : (e + 1) * INNER] = seen.features().double()
    gram = wide.T @ (weight.double()[:, None] * wide) + 0.5 * torch.eye(EXPERTS * INNER, dtype=torch.float64)
    joint = torch.linalg.solve(gram, wide.T @ (weight.double()[:, None] * error.double())).T
    for e in experts:
        torch.testing.assert_close(found[e].double(), joint[:, e * INNER : (e + 1) * INNER], rtol=1e-4, atol=1e-5)


def test_what_can_be_explained_is() -> None:
    experts, error, weight, truth = problem(1)
    held_out = torch.arange(TOKENS) % 5 == 4
    found = refit(experts, error, weight, held_out, strengths=(1e-6, 0.1), sweeps=60)
    assert found.strength == 1e-6 and found.held_out < 1e-3 and found.fitted < 1e-3
    for e, correction in found.corrections.items():
        torch.testing.assert_close(correction, truth[e], rtol=0.02, atol=0.02)


def test_held_out_rows_judge_and_are_not_fitted() -> None:
    experts, error, weight, _ = problem(2, noise=0.3)
    held_out = torch.arange(TOKENS) % 4 == 3
    before = refit(experts, error, weight, held_out)
    changed = error.clone()
    changed[held_out] *= 1.5
    after = refit(experts, changed, weight, held_out, strengths=(before.strength,))
    assert all(torch.equal(after.corrections[e], before.corrections[e]) for e in before.corrections)


def test_noise_is_not_learnt() -> None:
    draw = torch.Generator().manual_seed(7)
    _, _, weight, _ = problem(7)
    error = torch.randn(TOKENS, HIDDEN, generator=draw)
    held_out = torch.arange(TOKENS) % 2 == 1
    error[held_out] = -error[~held_out]  # whatever the fit learns is wrong there
    found = refit(
        {0: ExpertFeatures(torch.arange(TOKENS), lambda: torch.ones(TOKENS, INNER))}, error, weight.fill_(1.0), held_out
    )
    assert found.corrections == {} and found.strength is None and (found.fitted, found.held_out) == (1.0, 1.0)


def test_an_expert_without_tokens_keeps_its_weights() -> None:
    experts, error, weight, _ = problem(4, noise=0.1)
    experts[9] = ExpertFeatures(torch.zeros(0, dtype=torch.int64), lambda: torch.zeros(0, INNER))
    found = refit(experts, error, weight, torch.arange(TOKENS) % 5 == 4)
    assert set(found.corrections) == set(range(EXPERTS))
