"""Every shipped recipe validates, and plans for real against the public facts of its model; what others published comes
out."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from math import prod
from pathlib import Path

import pytest

from reapkit.pipeline.planned import Plan, make_plan
from reapkit.recipe.loading import load
from reapkit.recipe.schema import Recipe
from tests.support import published_models
from tests.support.paths import ROOT

RECIPES = ROOT / "recipes"
NAMES = tuple(sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml")))


@dataclass(frozen=True)
class Expected:
    """Per candidate, the smallest model first: experts kept and parameters in billions; the facts they come from."""

    facts: str
    kept: tuple[int, ...]
    billions: tuple[float, ...]


EXPECTED = {
    "glm-code-agentic": Expected("glm-4.7", (80, 96, 120), (184.8, 218, 268)),  # published at 40 % and 25 %
    "glm-code-agentic-w4a16": Expected("glm-4.7", (80, 96, 120), (184.8, 218, 268)),
    "deepseek-v3.2-w3a16": Expected("deepseek-v3.2", (128,), (345,)),  # published
    "gpt-oss-20b-eaft": Expected("gpt-oss-20b", (26, 29, 31), (17.3, 19.1, 20.3)),
    "qwen3.5-397b-a17b": Expected("qwen3.5-397b-a17b", (338,), (265.4,)),
    "qwen3-30b-a3b": Expected("qwen3-30b-a3b", (64, 96), (16.0, 23.3)),
    "qwen3-30b-a3b-fp8": Expected("qwen3-30b-a3b", (64, 96), (16.0, 23.3)),
    "cerebras-agentic": Expected("qwen3-30b-a3b", (96,), (23.3,)),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory):
    """The plan of a shipped recipe against its model's facts; models and plans are made once."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def model(name: str) -> Path:
        return published_models.write(name, root / name)

    @cache
    def plan(recipe: str) -> Plan:
        return make_plan(load(RECIPES / f"{recipe}.yaml", [f"model.source={model(EXPECTED[recipe].facts)}"]))

    return plan


def recipe_of(name: str) -> Recipe:
    return load(RECIPES / f"{name}.yaml")


# ---------------------------------------------------------------------------------------------- the facts


@pytest.mark.parametrize("name", published_models.NAMES)
def test_the_facts_add_up_to_what_the_hub_counts(name: str) -> None:
    assert published_models.stored_numbers(name) == published_models.facts(name)["published"]["stored"]


@pytest.mark.parametrize(
    "recipe", ["glm-code-agentic", "deepseek-v3.2-w3a16", "gpt-oss-20b-eaft", "qwen3.5-397b-a17b", "qwen3-30b-a3b"]
)
def test_the_plan_counts_the_parameters_that_model_cards_state(recipe: str, planned) -> None:
    plan = planned(recipe)
    published = published_models.facts(EXPECTED[recipe].facts)["published"]
    assert plan.base.parameters == pytest.approx(published["parameters"], rel=0.01)
    embedding = next(t.numel for t in plan.checkpoint.tensors.values() if t.name.endswith("embed_tokens.weight"))
    active = (
        plan.base.active_parameters
    )  # cards differ in whether they count the embedding, of which a token reads one row
    assert 0.97 * (active - embedding) <= published["active"] <= 1.03 * active


# ---------------------------------------------------------------------------------------------- the recipes


def test_every_recipe_is_planned_here() -> None:
    assert set(NAMES) == {*EXPECTED, "demo", "base/code-agentic-mix"}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_named_and_explained(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    up = "../" * (name.count("/") + 1)
    assert text.startswith(f"# yaml-language-server: $schema={up}recipe.schema.json\n# ")
    assert max(map(len, text.splitlines())) <= 140
    if name != "demo":
        assert "\n# Reproduces: " in text
    if "base/" not in name:
        assert recipe_of(name).name == name and recipe_of(name).description


@pytest.mark.parametrize("recipe", EXPECTED)
def test_experts_and_parameters_after_pruning(recipe: str, planned) -> None:
    plan, expected = planned(recipe), EXPECTED[recipe]
    pruned = [plan.pruned(candidate) for candidate in plan.candidates]
    assert [set(sizes.experts.values()) for sizes in pruned] == [{kept} for kept in expected.kept]
    assert [sizes.parameters / 1e9 for sizes in pruned] == pytest.approx(list(expected.billions), rel=0.005)


@pytest.mark.parametrize("recipe", ["deepseek-v3.2-w3a16", "gpt-oss-20b-eaft", "qwen3.5-397b-a17b"])
def test_kinds_hold_every_tensor_once(recipe: str, planned) -> None:
    checkpoint, kinds = planned(recipe).checkpoint, planned(recipe).layout.kinds
    assert sorted(name for kind in kinds for name in kind.names) == sorted(checkpoint.tensors)
    assert all(
        (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape) == (kind.tensor.dtype, kind.tensor.shape)
        for kind in kinds
        for name in kind.names
    )
    assert len(kinds) < 5_000


@pytest.mark.parametrize(
    ("recipe", "bytes_per_weight", "bytes_per_row"),
    [
        ("glm-code-agentic", 3.125 / 8, 0),
        ("glm-code-agentic-w4a16", 4.125 / 8, 0),
        ("deepseek-v3.2-w3a16", 3.125 / 8, 0),
        ("qwen3-30b-a3b", 3.125 / 8, 0),
        ("qwen3-30b-a3b-fp8", 1, 2),
    ],
)
def test_quantized_bytes(recipe: str, bytes_per_weight: float, bytes_per_row: int, planned) -> None:
    plan, expected = planned(recipe), EXPECTED[recipe]
    for candidate, kept in zip(plan.candidates, expected.kept, strict=True):
        assert plan.quantized_nbytes(candidate) == pytest.approx(
            naive_quantized_bytes(expected.facts, kept, bytes_per_weight, bytes_per_row), rel=1e-4
        )


QUANTIZED = re.compile(r"layers\.\d+\.(self_attn\.\w+_proj\w*|mlp\.(\w+\.)*(gate|up|down)_proj)\.weight$")


def naive_quantized_bytes(facts: str, kept: int, bytes_per_weight: float, bytes_per_row: int) -> float:
    """Tensor by tensor, for models whose experts lie one by one: the first `kept` stay, with as many router rows."""
    depth, total = published_models.facts(facts)["config"]["num_hidden_layers"], 0.0
    for name, dtype, shape in published_models.expand(published_models.facts(facts)["tensors"]):
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if f"layers.{depth}." in name or name.endswith("_scale_inv") or (expert and int(expert[1]) >= kept):
            continue
        if ".mlp.gate." in name:
            shape = (kept, *shape[1:])
        if QUANTIZED.search(name):
            total += prod(shape) * bytes_per_weight + shape[0] * bytes_per_row + (16 if bytes_per_weight != 1 else 0)
        else:
            total += prod(shape) * (4 if dtype == "F32" else 2)
    return total


def test_four_bit_glm_has_the_published_sizes(planned) -> None:
    plan = planned("glm-code-agentic-w4a16")
    half, two_fifths, _ = (plan.quantized_nbytes(candidate) / 2**30 for candidate in plan.candidates)
    assert half == pytest.approx(92, rel=0.03) and two_fifths == pytest.approx(108, rel=0.03)


# ---------------------------------------------------------------------------------------------- what they reproduce


@pytest.mark.parametrize("name", ["glm-code-agentic", "deepseek-v3.2-w3a16", "qwen3.5-397b-a17b", "qwen3-30b-a3b"])
def test_the_mix_of_700_330_330(name: str) -> None:
    calibration = recipe_of(name).calibration
    total = sum(entry.weight for entry in calibration.mix)
    assert [calibration.samples * entry.weight / total for entry in calibration.mix] == [700, 330, 330]


def test_the_mix_of_24576() -> None:
    calibration = recipe_of("cerebras-agentic").calibration
    assert [calibration.samples * entry.weight / 6 for entry in calibration.mix] == [4096] * 6
    assert (calibration.max_length, calibration.packing, calibration.score) == (16384, "none", "all")


def test_the_eaft_policy() -> None:
    recipe = recipe_of("gpt-oss-20b-eaft")
    assert [1 - ratio for ratio in recipe.prune.candidates.ratio] == [Decimal("0.8"), Decimal("0.9"), Decimal("0.95")]
    assert recipe.saliency.eaft.weights.model_dump() == {"good": 1.0, "uncertain": 0.25, "conflict": -2.0}
    assert recipe.evaluate.packs.lengths == (1024, 2048) and recipe.evaluate.gates == "near-lossless"


def test_the_deepseek_template_marks_what_the_assistant_wrote() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    call = {"function": {"name": "forecast", "arguments": {"city": "Rome", "days": 3}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "[0, 1]"},
        {"role": "tool", "content": "[2]"},
        {"role": "assistant", "content": "Yes."},
    ]
    recipe = recipe_of("deepseek-v3.2-w3a16")
    template = (RECIPES / recipe.calibration.chat_template).read_text()
    (text,), (spans,) = render_jinja_template(
        conversations=[messages],
        tools=[{"function": {"name": "forecast"}}],
        chat_template=template,
        return_assistant_tokens_mask=True,
    )
    called = (
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="forecast">\n<｜DSML｜parameter name="city"'
        ' string="true">Rome'
        '</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls><｜end▁of▁sentence｜>"
    )
    assert [text[begin:end] for begin, end in spans] == [called, "Yes.<｜end▁of▁sentence｜>"]
    assert (
        text.startswith("<｜begin▁of▁sentence｜>Be brief.\n\n## Tools\n")
        and '{"name": "forecast"}\n</functions>' in text
    )
    assert text.endswith(
        f"<｜User｜>Rain?<｜Assistant｜></think>{called}\n\n<function_results>\n<result>[0, 1]</result>\n"
        "<result>[2]</result>\n</function_results>\n\n</think>Yes.<｜end▁of▁sentence｜>"
    )


def test_the_harmony_markers_span_every_way_a_message_can_end() -> None:
    from reapkit.calibration.spans import marked_spans

    text = (
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>analysis<|message|>add<|end|><|start|>assistant"
        " to=functions.python<|channel|>commentary<|message|>2+2<|call|><|start|>functions.python"
        " to=assistant<|message|>4<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    spans = [text[begin:end] for begin, end in marked_spans(text, recipe_of("gpt-oss-20b-eaft").calibration.spans)]
    assert [span.removesuffix("<|start|>") for span in spans] == [
        "<|channel|>analysis<|message|>add<|end|>",
        " to=functions.python<|channel|>commentary<|message|>2+2<|call|>",
        "<|channel|>final<|message|>4<|return|>",
    ]
