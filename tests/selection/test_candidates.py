"""The grid becomes concrete candidates, smallest model first, each checked against the model."""

from __future__ import annotations

from decimal import Decimal

import pytest

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import RecipeError
from reapkit.selection.candidates import budget_notes, candidates, kept_experts
from tests.support.specs import prune, saliency_spec

QWEN = Architecture("qwen3_moe", 48, 128, 8)
LAYERS = tuple(range(48))


def refusal(spec, criterion: str = "reap") -> list[str]:
    with pytest.raises(RecipeError) as error:
        candidates(spec, saliency_spec(criterion), QWEN, LAYERS)
    return [str(problem) for problem in error.value.problems]


def test_the_scalars_are_one_candidate() -> None:
    [one] = candidates(prune(keep_ratio=0.7, experts_per_token=4), saliency_spec("ean"), QWEN, LAYERS)
    assert (one.name, one.ratio, one.criterion, one.allocation, one.experts_per_token) == (
        "ean-r0.3-top4",
        Decimal("0.3"),
        "ean",
        "uniform",
        4,
    )
    [kept] = candidates(prune(keep_experts=80), saliency_spec(), QWEN, LAYERS)
    assert (kept.name, kept.ratio) == ("reap-keep80", None)
    assert kept_experts(kept.prune(prune(keep_experts=80)), kept.ratio, QWEN, (3,)) == {3: 80}


def test_a_grid_is_a_product_smallest_first() -> None:
    spec = prune(
        layout="ragged",
        candidates={"ratio": [0.25, 0.5], "criterion": ["reap", "my_module:mine"], "allocation": ["uniform", "global"]},
    )
    names = [candidate.name for candidate in candidates(spec, saliency_spec(), QWEN, LAYERS)]
    assert names == [
        "reap-r0.5",
        "reap-r0.5-global",
        "my_module.mine-r0.5",
        "my_module.mine-r0.5-global",
        "reap-r0.25",
        "reap-r0.25-global",
        "my_module.mine-r0.25",
        "my_module.mine-r0.25-global",
    ]
    assert len(set(names)) == len(names)


def test_the_grid_replaces_the_scalars() -> None:
    spec = prune(keep_experts=80, experts_per_token=2, candidates={"ratio": [0.5], "experts_per_token": [6, 4]})
    small, large = candidates(spec, saliency_spec(), QWEN, LAYERS)
    assert (small.experts_per_token, large.experts_per_token) == (4, 6)
    applied = small.prune(spec)
    assert (applied.ratio, applied.keep_experts, applied.candidates, applied.experts_per_token) == (
        Decimal("0.5"),
        None,
        None,
        4,
    )
    assert kept_experts(spec, small.ratio, QWEN, (0,)) == {0: 64}


def test_problems_stand_where_the_value_was_written() -> None:
    assert refusal(prune(candidates={"ratio": [0.5, 0.99], "experts_per_token": [500]}))[-1].startswith(
        "prune.candidates.experts_per_token[0]: 500, but qwen3_moe routes each token to 500 experts"
    )
    assert refusal(prune(candidates={"ratio": [0.5, 0.99]})) == [
        "prune.candidates.ratio[1]: 0.99 leaves 2 of 128 experts, but qwen3_moe routes each token to 8 experts"
        " (num_experts_per_tok), which needs 8. Choose at most 0.9375."
    ]
    assert refusal(prune(keep_ratio=0.01))[0].startswith("prune.keep_ratio: 0.01 leaves 2 of 128 experts")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            {"ratio": 0.5, "candidates": {"allocation": ["global"]}},
            (
                "prune.candidates.allocation: global gives layers different numbers of experts, which needs"
                " prune.layout: ragged. Set prune.layout: ragged, or remove global."
            ),
        ),
        ({"candidates": {"ratio": []}}, "prune.candidates.ratio: is an empty list. Give values, or remove the field."),
        (
            {"candidates": {"ratio": [0.5, 1.5]}},
            "prune.candidates.ratio[1]: found 1.5, must be at least 0 and below 1.",
        ),
        (
            {"ratio": 0.5, "candidates": {"experts_per_token": [0]}},
            "prune.candidates.experts_per_token[0]: found 0, must be at least 1.",
        ),
        (
            {"ratio": 0.5, "candidates": {"criterion": ["reap", "raep"]}},
            (
                "prune.candidates.criterion[1]: found 'raep'. Known: reap, reap-relative, eaft-reap, frequency,"
                " weighted-frequency, ean, ean-mean, reroute, reroute-single, knockout, random, or your own as"
                " module:function. Did you mean 'reap'?"
            ),
        ),
    ],
)
def test_grids_that_cannot_be(spec: dict, says: str) -> None:
    assert refusal(prune(**spec)) == [says]


def test_an_unknown_criterion_is_found_without_a_model() -> None:
    with pytest.raises(RecipeError, match=r"saliency\.criterion: found 'frequencies'.*Did you mean 'frequency'"):
        candidates(prune(ratio=0.5), saliency_spec("frequencies"))


def test_notes_say_what_was_rounded_and_skipped() -> None:
    deepseek = Architecture("deepseek_v3", 61, 256, 8, n_group=8, topk_group=4)
    notes = budget_notes(
        prune(ratio=0.4, layout="ragged", caps=[{"layers": "0-9", "max_ratio": 0.2}]), deepseek, tuple(range(3, 61))
    )
    assert notes == [
        "prune.caps[0].layers skips the dense layers 0-2.",
        "prune.ratio: 0.4 asks for 154 kept experts, rounded up to 160 to a multiple of 8 (n_group 8, multiple_of 1).",
    ]
