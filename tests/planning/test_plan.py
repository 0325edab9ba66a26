"""The plan: integers and keys. Each field of the recipe reruns exactly its descendants, and nothing else does."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from reapkit.core.errors import RecipeError
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.stages.every_stage import STAGE_NAMES
from reapkit.recipe.loading import load
from tests.support.paths import ROOT

ALL = set(STAGE_NAMES) - {"repair", "knockout"}  # only where the recipe asks for it
FROM_OBSERVE = ALL - {"calibrate", "packs"}
FROM_SELECT = FROM_OBSERVE - {"observe"}
FROM_PRUNE = {"prune", "quantize", "verify", "report"}


def keys(*overrides: str) -> dict[str, str]:
    return {stage.name: stage.key for stage in make_plan(load(ROOT / "recipes/demo.yaml", overrides)).stages}


@pytest.fixture(scope="module")
def base() -> dict[str, str]:
    return keys()


def test_the_demos_data_is_that_of_earlier_stores(base: dict[str, str]) -> None:
    """A new field, or another way to read data, leaves the keys alone of recipes that do not use it."""
    assert (base["calibrate"][:12], base["packs"][:12]) == ("76203ce8d857", "424ebe2b93f6")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("calibration.samples=100", ALL),
        ("calibration.seed=7", ALL),
        ("calibration.mix.code.weight=0.9", ALL),
        ("calibration.mix.prose.name=english", ALL),
        ("observe.eaft=false", FROM_OBSERVE),
        ("observe.entropy_top_k=10", FROM_OBSERVE),
        ("observe.knockout_tokens=4096", set()),
        ("saliency.criterion=knockout", {"knockout", *FROM_SELECT}),
        ("evaluate.controls=[knockout]", {"knockout", *FROM_SELECT}),
        ("saliency.criterion=frequency", FROM_SELECT),
        ("saliency.prior_count=3", FROM_SELECT),
        ("prune.ratio=0.25", FROM_SELECT),
        ("prune.multiple_of=4", FROM_SELECT),
        ("evaluate.controls=[random]", FROM_SELECT),
        ("prune.repair=ridge", {"repair", "evaluate", *FROM_PRUNE}),
        ("prune.mtp=drop", FROM_PRUNE),
        ("output.max_shard_bytes=2000000", FROM_PRUNE),
        ("evaluate.packs.samples=64", {"packs", "evaluate", "verify", "report"}),
        ("evaluate.gates=strict", {"evaluate", "report"}),
        ("quantize.scheme=W4A16", {"quantize", "verify", "report"}),
        ("quantize.method=rtn", {"quantize", "verify", "report"}),
        ("evaluate.gates_quantized=strict", {"verify", "report"}),
        ("description=another", {"report"}),
        ("output.card=false", {"report"}),
        ("evaluate.on_reject=warn", set()),
        ("runtime.batch_tokens=512", set()),
        ("runtime.device=cpu", set()),
        ("runtime.checkpoint_minutes=1", set()),
        ("output.directory=elsewhere", set()),
    ],
)
def test_a_changed_field_reruns_exactly_its_descendants(
    override: str, expected: set[str], base: dict[str, str]
) -> None:
    changed = {name for name, key in keys(override).items() if key != base.get(name)}
    assert changed == expected


def test_knock_outs_are_measured_anew_for_another_sample_and_not_for_another_ratio() -> None:
    first = keys("saliency.criterion=knockout")
    for override, expected in (
        ("observe.knockout_tokens=4096", {"knockout", *FROM_SELECT}),
        ("observe.eaft=false", FROM_OBSERVE),
        ("prune.ratio=0.25", FROM_SELECT),
        ("calibration.seed=7", {"knockout", *ALL}),
    ):
        changed = keys("saliency.criterion=knockout", override)
        assert {name for name, key in changed.items() if key != first[name]} == expected, override
    assert "knockout" not in keys("saliency.criterion=reap-relative")


def test_the_plan_says_what_knock_outs_take_and_refuses_them_where_layers_stream(tmp_path: Path) -> None:
    store = f"runtime.store={tmp_path}"
    plan = make_plan(load(ROOT / "recipes/demo.yaml", ["saliency.criterion=knockout", store]))
    cost = plan.estimates.knockout
    assert cost is not None and cost.tokens == 8192 and cost.hours is None
    assert cost.forwards == 32 * (1 + 3 / 4 + 2 / 4 + 1 / 4)
    assert cost.flops == 2 * plan.base.active_parameters * cost.token_forwards
    assert make_plan(load(ROOT / "recipes/demo.yaml", [store])).estimates.knockout is None
    for given, message in (
        (
            "runtime.placement=streaming",
            r"measured on a model that is in memory as a whole, but the layers of this one",
        ),
        ("observe.knockout_tokens=0", r"knockout is measured by the stage knockout, but observe.knockout_tokens is 0"),
    ):
        with pytest.raises(RecipeError, match=message):
            make_plan(load(ROOT / "recipes/demo.yaml", ["saliency.criterion=knockout", store, given]))


def test_the_key_follows_content_not_place(tmp_path: Path, base: dict[str, str]) -> None:
    copied = tmp_path / "other-name.yaml"
    copied.write_text((ROOT / "recipes/demo.yaml").read_text())
    assert {stage.name: stage.key for stage in make_plan(load(copied)).stages} == base


def test_a_local_source_enters_the_key_by_its_bytes(tmp_path: Path) -> None:
    recipe, data = tmp_path / "r.yaml", tmp_path / "data.jsonl"
    recipe.write_text(
        "version: 1\nname: t\nmodel: {source: 'builtin:demo'}\ncalibration: {samples: 4, mix: [{name: d, source:"
        " data.jsonl}]}\nprune: {ratio: 0.5}\nquantize: {group_size: 64}\n"
    )
    data.write_text(json.dumps({"text": "one"}) + "\n")
    first = make_plan(load(recipe)).stage("calibrate").key
    data.write_text(json.dumps({"text": "two"}) + "\n")
    assert make_plan(load(recipe)).stage("calibrate").key != first


def test_integers_and_bytes_of_the_demo() -> None:
    plan = make_plan(load(ROOT / "recipes/demo.yaml"))
    pruned = plan.pruned(plan.candidates[0])
    assert plan.base.experts == dict.fromkeys(range(4), 32) and pruned.experts == dict.fromkeys(range(4), 16)
    removed = 4 * 16 * (3 * 64 * 128 + 128)  # three matrices and a router row for each of 16 experts in 4 layers
    assert plan.base.parameters - pruned.parameters == removed
    assert plan.base.nbytes - pruned.nbytes == 2 * removed


def test_without_a_scheme_nothing_is_quantized() -> None:
    assert "quantize" not in {
        stage.name for stage in make_plan(load(ROOT / "recipes/demo.yaml", ["quantize.scheme=null"])).stages
    }


def test_a_grid_waits_for_its_verdict() -> None:
    plan = make_plan(load(ROOT / "recipes/demo.yaml", ["prune={candidates: {ratio: [0.5, 0.25]}}"]))
    assert [candidate.ratio for candidate in plan.candidates] == sorted(
        (c.ratio for c in plan.candidates), reverse=True
    )
    assert plan.stage("prune").key is None and plan.stage("evaluate").known_key == plan.stage("evaluate").key
    with pytest.raises(ValueError, match=r"^prune has no key before the verdict that it waits for$"):
        _ = plan.stage("prune").known_key


@pytest.mark.parametrize(
    ("mix", "has_path"),
    [
        ("null", True),
        ("{math: 2}", True),
        ("{code: 3, tools: 3, prose: 3, math: 3}", True),
        ("{code: 1, tools: 1}", False),
        ("{code: 2, tools: 1, prose: 1, math: 1}", False),
    ],
)
def test_reroute_takes_the_weights_that_paths_are_measured_for(mix: str, has_path: bool) -> None:
    overrides = ("observe.reroute_tokens=512", f"saliency.mix={mix}")
    make_plan(load(ROOT / "recipes/demo.yaml", (*overrides, "saliency.criterion=reroute-single")))
    with (
        nullcontext()
        if has_path
        else pytest.raises(
            RecipeError,
            match=(
                r"saliency\.mix=.*: reroute needs removal paths, and these were"
                r" measured only for"
            ),
        )
    ):
        make_plan(load(ROOT / "recipes/demo.yaml", (*overrides, "saliency.criterion=reroute")))
