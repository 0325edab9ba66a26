"""Fractions become integers exactly, and every contradiction is refused with its numbers."""

from __future__ import annotations

import random
from math import floor, lcm

import pytest

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import RecipeError
from reapkit.selection.layer_budget import layer_budgets, layer_range
from tests.support.specs import prune

QWEN = Architecture("qwen3_moe", 48, 128, 8)
DEEPSEEK = Architecture("deepseek_v3", 61, 256, 8, n_group=8, topk_group=4)
ALL = tuple(range(48))
AFTER_DENSE = tuple(range(3, 61))


def kept(architecture: Architecture = QWEN, layers: tuple[int, ...] = ALL, **values) -> dict[int, int]:
    return {layer: budget.kept for layer, budget in layer_budgets(prune(**values), architecture, layers).items()}


def refusal(architecture: Architecture = QWEN, layers: tuple[int, ...] = ALL, **values) -> list[str]:
    with pytest.raises(RecipeError) as error:
        layer_budgets(prune(**values), architecture, layers)
    return [str(problem) for problem in error.value.problems]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"ratio": 0.5}, 64),
        ({"ratio": 0.3}, 90),
        ({"ratio": 0.25}, 96),
        ({"keep_ratio": 0.3}, 39),
        ({"keep_experts": 80}, 80),
        ({"ratio": 0.3, "multiple_of": 8}, 96),
        ({"ratio": 0.5, "multiple_of": 8}, 64),
    ],
)
def test_counts(values: dict, expected: int) -> None:
    assert set(kept(**values).values()) == {expected}


def test_a_decimal_ratio_is_the_number_that_was_written() -> None:
    """0.29 of 100 is 29; as a binary float it is 28.999999999999996."""
    assert kept(Architecture("m", 1, 100, 2), (0,), ratio=0.29) == {0: 71}


def test_groups_lose_the_same_number() -> None:
    assert kept(DEEPSEEK, AFTER_DENSE, ratio=0.4)[3] == 256 - 102 // 8 * 8  # 102 of 256, 12 in each of 8 groups
    assert kept(DEEPSEEK, AFTER_DENSE, ratio=0.4, multiple_of=48)[3] == 192  # next multiple of lcm(8, 48)


def test_against_the_definition() -> None:
    draw = random.Random(0)
    for _ in range(300):
        groups = draw.choice([1, 1, 2, 4])
        architecture = Architecture(
            "m", 4, groups * draw.choice([8, 12, 16]), 2, n_group=groups, topk_group=max(1, groups // 2)
        )
        hundredths, multiple = draw.randrange(1, 70), draw.choice([1, 1, 2, 4])
        removed = architecture.num_experts * hundredths // 100
        unit = lcm(groups, multiple)
        wanted = architecture.num_experts - floor(removed / groups) * groups
        expected = min(architecture.num_experts, -(-wanted // unit) * unit)
        if expected == architecture.num_experts or expected < architecture.least_experts:
            assert refusal(architecture, (0, 1), ratio=hundredths / 100, multiple_of=multiple)
        else:
            assert kept(architecture, (0, 1), ratio=hundredths / 100, multiple_of=multiple) == {
                0: expected,
                1: expected,
            }


def test_caps_bind_after_rounding_and_the_strictest_wins() -> None:
    caps = [
        {"layers": "0-3", "max_ratio": 0.25},
        {"layers": "2-", "min_experts": 70},
        {"layers": [7], "keep_all": True},
    ]
    counts = kept(ratio=0.5, layout="ragged", multiple_of=8, caps=caps)
    assert [counts[layer] for layer in (0, 2, 4, 7, 47)] == [96, 96, 72, 128, 72]


def test_a_cap_on_every_layer_keeps_the_layout_uniform() -> None:
    assert set(kept(ratio=0.5, caps=[{"layers": "0-", "max_ratio": 0.25}]).values()) == {96}


@pytest.mark.parametrize(
    ("spec", "expected", "dense"),
    [
        ("0-4", (3, 4), (0, 1, 2)),
        ("57-", (57, 58, 59, 60), ()),
        ("7", (7,), ()),
        ((9, 4), (4, 9), ()),
        ("0-", AFTER_DENSE, (0, 1, 2)),
    ],
)
def test_layer_ranges_skip_dense_layers_and_say_so(
    spec: str, expected: tuple[int, ...], dense: tuple[int, ...]
) -> None:
    found = layer_range(spec, AFTER_DENSE, 61)
    assert (found.layers, found.dense) == (expected, dense)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("1", "layer 1 is dense and has no experts. MoE layers: 3-60."),
        ("0-2", "names only dense layers (0-2). MoE layers: 3-60."),
        ("60-99", "found '60-99', but the model has layers 0 to 60. Give layers in this range."),
        ("9-4", "found '9-4', but the model has layers 0 to 60. Give layers in this range, the lower one first."),
        ("x", "found 'x', which is not a layer range. Write layers as 7, 0-3, 60- or a list such as [0, 7]."),
        ("-4", "found '-4', which is not a layer range. Write layers as 7, 0-3, 60- or a list such as [0, 7]."),
        ((61,), "found '61', but the model has layers 0 to 60. Give layers in this range."),
    ],
)
def test_layer_ranges_that_make_no_sense(spec: str, says: str) -> None:
    with pytest.raises(ValueError) as error:
        layer_range(spec, AFTER_DENSE, 61)
    assert str(error.value) == says


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"keep_experts": 6},
            (
                "prune.keep_experts: 6, but qwen3_moe routes each token to 8 experts (num_experts_per_tok). Choose "
                "8 to 127."
            ),
        ),
        (
            {"keep_experts": 128},
            (
                "prune.keep_experts: 128, but qwen3_moe has 128 routed experts per layer, so nothing is removed. "
                "Choose 8 to 127."
            ),
        ),
        (
            {"keep_experts": 81, "multiple_of": 8},
            "prune.keep_experts: 81 is not divisible by 8 (n_group 1, multiple_of 8). Choose 80 or 88.",
        ),
        (
            {"ratio": 0.95},
            (
                "prune.ratio: 0.95 leaves 7 of 128 experts, but qwen3_moe routes each token to 8 experts"
                " (num_experts_per_tok), which needs 8. Choose at most 0.9375."
            ),
        ),
        (
            {"keep_ratio": 0.05},
            (
                "prune.keep_ratio: 0.05 leaves 7 of 128 experts, but qwen3_moe routes each token to 8 experts"
                " (num_experts_per_tok), which needs 8. Choose at least 0.0625."
            ),
        ),
        (
            {"ratio": 0.5, "experts_per_token": 80},
            (
                "prune.ratio: 0.5 leaves 64 of 128 experts, but qwen3_moe routes each token to 80 experts"
                " (prune.experts_per_token), which needs 80. Choose at most 0.375."
            ),
        ),
        (
            {"ratio": 0.5, "experts_per_token": 200},
            (
                "prune.experts_per_token: 200, but qwen3_moe routes each token to 200 experts"
                " (prune.experts_per_token), which needs 200 of the 128 experts. Choose 1 to 128."
            ),
        ),
        (
            {"ratio": 0.001},
            "prune.ratio: 0.001, which removes 0 of 128 experts. Choose at least 0.0079, which removes 1 per layer.",
        ),
        (
            {"keep_ratio": 1},
            "prune.keep_ratio: 1, which removes 0 of 128 experts. Choose at most 0.9921, which removes 1 per layer.",
        ),
        (
            {"ratio": 0.02, "multiple_of": 8},
            (
                "prune.ratio: 0.02, which removes 2 of 128 experts and none once the kept count is rounded to a"
                " multiple of 8 (n_group 1, multiple_of 8). Choose at least 0.0625, which removes 8 per layer."
            ),
        ),
        (
            {"ratio": 0.5, "multiple_of": 256},
            (
                "prune.multiple_of: 256, but no count below 128 experts is divisible by 256 (n_group 1, multiple_of"
                " 256). Choose a smaller multiple_of."
            ),
        ),
        (
            {"ratio": 0.5, "caps": [{"layers": "0-3", "max_ratio": 0.25}]},
            (
                "prune.caps[0]: keeps 96 of 128 experts in layers 0-3, but ratio keeps 64 in the others, and layout:"
                " uniform allows one number for all layers. Loosen the cap to 64 experts, set ratio to at most 0.25,"
                " or set prune.layout: ragged."
            ),
        ),
        (
            {"ratio": 0.5, "caps": [{"layers": "7", "keep_all": True}]},
            (
                "prune.caps[0]: keeps 128 of 128 experts in layers 7, but ratio keeps 64 in the others, and layout:"
                " uniform allows one number for all layers. Loosen the cap to 64 experts, or set prune.layout: ragged."
            ),
        ),
        (
            {"keep_experts": 64, "caps": [{"layers": [0, 2, 3], "min_experts": 80}]},
            (
                "prune.caps[0]: keeps 80 of 128 experts in layers 0, 2-3, but keep_experts keeps 64 in the others,"
                " and layout: uniform allows one number for all layers. Loosen the cap to 64 experts, set keep_experts"
                " to 80, or set prune.layout: ragged."
            ),
        ),
        (
            {"ratio": 0.5, "caps": [{"layers": "0-", "keep_all": True}]},
            (
                "prune.ratio: 0.5, but the caps keep every expert of every layer, so nothing is removed. Loosen"
                " prune.caps."
            ),
        ),
        (
            {"ratio": 0.5, "layout": "ragged", "caps": [{"layers": "0", "min_experts": 200}]},
            "prune.caps[0].min_experts: 200, but a layer has 128 experts. Choose 1 to 128, or keep_all: true.",
        ),
        (
            {"ratio": 0.5, "protect": {"experts": {"99": [1]}}},
            "prune.protect.experts.99: layer 99 is not an MoE layer. MoE layers: 0-47.",
        ),
        (
            {"ratio": 0.5, "protect": {"experts": {"4": [128, 3]}}},
            "prune.protect.experts.4: expert 128, but a layer's experts are 0 to 127.",
        ),
        (
            {"ratio": 0.9, "protect": {"experts": {"4": list(range(14))}}},
            "prune.protect.experts.4: protects 14 experts, but the layer keeps 13. Protect fewer, or prune less.",
        ),
        (
            {"ratio": 0.9, "protect": {"core_per_layer": 14}},
            "prune.protect.core_per_layer: 14, but a layer keeps 13 experts. Choose 0 to 13.",
        ),
    ],
)
def test_refusals_say_what_to_do(values: dict, says: str) -> None:
    assert refusal(**values) == [says]


def test_grouped_routers_need_two_experts_in_every_group() -> None:
    assert refusal(DEEPSEEK, AFTER_DENSE, keep_experts=8) == [
        "prune.keep_experts: 8, but deepseek_v3 routes each token to 8 experts (num_experts_per_tok) in 4 of 8 groups,"
        " each scored by its two best. Choose 16 to 248 in steps of 8."
    ]
    assert refusal(DEEPSEEK, AFTER_DENSE, ratio=0.5, protect={"experts": {"3": list(range(17))}}) == [
        "prune.protect.experts.3: protects 17 experts in group 0, but the layer keeps 16 in group 0. Protect fewer, or"
        " prune less."
    ]


def test_a_model_that_routes_to_all_its_experts_cannot_be_pruned_without_a_lower_top_k() -> None:
    dense = Architecture("m", 2, 8, 8)
    assert refusal(dense, (0, 1), ratio=0.5) == [
        "prune.ratio: 0.5, but m routes each token to 8 experts (num_experts_per_tok), which needs all 8, so none can"
        " be removed. Lower prune.experts_per_token."
    ]
    assert kept(dense, (0, 1), ratio=0.5, experts_per_token=4) == {0: 4, 1: 4}


def test_a_suggested_ratio_is_accepted() -> None:
    draw = random.Random(1)
    for _ in range(100):
        experts, multiple = draw.randrange(8, 400), draw.choice([1, 2, 3, 8])
        architecture = Architecture("m", 1, experts, 2)
        [says] = refusal(architecture, (0,), ratio=0.0, multiple_of=multiple) if multiple < experts else [""]
        if "Choose at least" in says:
            ratio = float(says.split("Choose at least ")[1].split(",")[0])
            count = int(says.split("which removes ")[-1].split()[0])
            assert kept(architecture, (0,), ratio=ratio, multiple_of=multiple) == {0: experts - count}


def test_every_problem_is_reported_at_once() -> None:
    found = refusal(keep_experts=128, caps=[{"layers": "50", "keep_all": True}, {"layers": "0", "min_experts": 500}])
    assert [problem.split(":")[0] for problem in found] == [
        "prune.keep_experts",
        "prune.caps[0].layers",
        "prune.caps[1].min_experts",
    ]


HASHED = Architecture("deepseek_v4", 43, 256, 6, tables=(0, 1, 2))


def test_layers_that_a_table_routes_keep_all_by_themselves() -> None:
    found = layer_budgets(prune(ratio=0.5, layout="ragged"), HASHED, tuple(range(43)))
    assert {layer for layer, budget in found.items() if budget.kept == 256 == budget.least} == {0, 1, 2}
    assert {layer for layer, budget in found.items() if budget.table} == {0, 1, 2}
    assert {budget.kept for layer, budget in found.items() if layer > 2} == {128}


def test_what_a_table_does_not_allow_is_refused() -> None:
    layers = tuple(range(43))
    assert refusal(HASHED, layers, ratio=0.5) == [
        "prune.layout: uniform, but a fixed table routes the tokens of layers 0-2, which therefore keep all 256"
        " experts, while the others keep 128. Set prune.layout: ragged."
    ]
    assert refusal(HASHED, layers, ratio=0.5, layout="ragged", experts_per_token=4) == [
        "prune.experts_per_token: 4, but a fixed table routes the tokens of layers 0-2 to 6 experts each, which cannot"
        " be changed. Remove the field."
    ]
    assert refusal(HASHED, (0, 1, 2), ratio=0.5) == [
        "prune.ratio: 0.5, but fixed tables keep every expert of every layer, so nothing is removed. Choose another"
        " model."
    ]
