"""Multi-token prediction from the plan to the proof: what is decided from headers, what the selection keeps, what is
written."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reapkit.checkpoint.architecture import Architecture
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.mtp_support import why_unobserved
from reapkit.core.errors import RecipeError
from reapkit.evaluation.proofs.pruned import prove_pruned
from reapkit.model.loading import load_model
from reapkit.observation.mtp_blocks import MtpBlocks
from reapkit.observation.observation import Observation, Reroute
from reapkit.pipeline.planned import Plan, make_plan
from reapkit.pipeline.run import apply
from reapkit.planning.estimates import estimate
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.recipe.loading import load
from reapkit.selection.decide import select
from reapkit.selection.selection import LayerSelection, Selection
from tests.support import tiny
from tests.support.command import command
from tests.support.observations import observe_routing, random_routing
from tests.support.specs import prune, saliency_spec

RECIPE = """version: 1
name: speculative
model: {{source: model}}
calibration: {{samples: 40, max_length: 48, packing: none, mix: [{{name: ids, source: ids.jsonl, format: tokens}}]}}
prune: {{ratio: 0.5}}
evaluate: {{packs: {{samples: 8, lengths: [48]}}, gates: {{kl_mean: {{max: 9}}}}, generation: null, throughput: null}}
quantize: {{scheme: W4A16, method: rtn, group_size: 16}}
output: {{directory: {root}/run}}
runtime: {{store: {root}/store}}
"""


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a model of a kind with a block, and the recipe beside it."""

    def make(model_type: str = "glm4_moe", **how) -> Path:
        tiny.save_hub_layout(tiny.build(model_type, **how), tmp_path / "model", mtp=1)
        draw = random.Random(0)
        rows = [[draw.randrange(5, 200) for _ in range(draw.randrange(20, 48))] for _ in range(80)]
        lines = [json.dumps({"input_ids": row, "assistant_mask": [i > 9 for i in range(len(row))]}) for row in rows]
        (tmp_path / "ids.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(root=tmp_path))
        return tmp_path / "recipe.yaml"

    return make


# ---------------------------------------------------------------------------------------------- the plan


def planned(path: Path, *overrides: str) -> Plan:
    return make_plan(load(path, overrides))


def test_the_plan_observes_what_transformers_loads(recipe) -> None:
    path = recipe()
    auto, wanted, dropped = (planned(path, f"prune.mtp={wish}") for wish in ("auto", "observe", "drop"))
    assert auto.mtp == wanted.mtp == (3,) and dropped.mtp == ()
    assert auto.stage("observe").key == wanted.stage("observe").key != dropped.stage("observe").key
    assert "mtp" not in dropped.stage("observe").spec, (
        "an observation without blocks is what it was before they could be observed"
    )
    assert any("(layer 3) will be observed and pruned" in note for note in auto.notes)
    assert any("will be dropped (prune.mtp: drop). Engines lose speculative decoding" in note for note in dropped.notes)
    candidate = auto.candidates[0]
    assert auto.kept(candidate) == {1: 8, 2: 8, 3: 8} and dropped.kept(candidate) == {1: 8, 2: 8}
    assert auto.pruned(candidate).experts == dropped.pruned(candidate).experts == {1: 8, 2: 8}
    assert auto.pruned(candidate).nbytes > dropped.pruned(candidate).nbytes
    assert estimate(auto).footprints["resident"].device > estimate(dropped).footprints["resident"].device


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        (
            "qwen3_moe",
            "transformers loads the multi-token-prediction blocks of deepseek_v3 and glm4_moe only, not of qwen3_moe",
        ),
        ("dots1", "not of dots1"),
    ],
)
def test_what_transformers_does_not_load_is_dropped_or_refused(recipe, model_type: str, said: str) -> None:
    path = recipe(model_type)
    auto = planned(path)
    assert auto.mtp == () and "mtp" not in auto.stage("observe").spec
    assert any(said in note and "will be dropped" in note and "speculative decoding" in note for note in auto.notes)
    path.write_text(path.read_text().replace("{ratio: 0.5}", "{ratio: 0.5, mtp: observe}"))
    with pytest.raises(
        RecipeError,
        match=(
            f"recipe.yaml:5:26 prune.mtp: observe, but .*{said}. Choose drop, or auto, which drops blocks that"
            " cannot be"
        ),
    ):
        planned(path)
    done = command("apply", path)
    assert done.code == 2
    assert "recipe.yaml:5:26 prune.mtp: observe, but" in done.stderr and not (path.parent / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_nextn_predict_layers": 2}, "declares 2 multi-token-prediction blocks behind layer 2"),
        ({"num_nextn_predict_layers": 0}, "declares 0 multi-token-prediction blocks"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
    ],
)
def test_blocks_that_do_not_fit_what_the_config_says(recipe, change: dict, said: str) -> None:
    path = recipe()
    config = path.parent / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    checkpoint = Checkpoint.open(path.parent / "model")
    assert said in why_unobserved(checkpoint, checkpoint.layout)


def test_own_modelling_code_loads_no_block(recipe) -> None:
    path = recipe()
    config = path.parent / "model/config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}})
    )
    checkpoint = Checkpoint.open(path.parent / "model")
    assert why_unobserved(checkpoint, checkpoint.layout) is None
    assert "code of its own" in why_unobserved(checkpoint, checkpoint.layout, trust_remote_code=True)


# ---------------------------------------------------------------------------------------------- the decision

DECODER = Architecture("toy_moe", 3, 8, 2)


def with_block(seed: int) -> tuple[Observation, Observation]:
    """An observation of three decoder layers and a block, and the same without it."""
    whole = observe_routing(random_routing(seed, layers=4), layers=(0, 1, 2, 3))

    def first(values: dict, axis: int = 0) -> dict:
        return type(values)((name, value.take(range(3), axis)) for name, value in values.items())

    return whole, dataclasses.replace(
        whole,
        layers=(0, 1, 2),
        statistics=first(whole.statistics),
        maxima=first(whole.maxima),
        coactivation=None if whole.coactivation is None else whole.coactivation[:3],
        snapshots=first(whole.snapshots, 1),
    )


@pytest.mark.parametrize("criterion", ["reap", "eaft-reap", "frequency", "ean", "random"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_a_block_keeps_as_many_as_the_widest_layer_and_changes_no_other(criterion: str, allocation: str) -> None:
    whole, decoder = with_block(4)
    spec = prune(
        ratio=0.5,
        allocation=allocation,
        layout="ragged" if allocation == "global" else "uniform",
        protect={"core_per_layer": 1},
    )
    chosen, alone = (select(one, saliency_spec(criterion), spec, DECODER) for one in (whole, decoder))
    assert list(chosen.layers) == [0, 1, 2, 3]
    assert {layer: chosen.layers[layer].keep for layer in (0, 1, 2)} == {
        layer: alone.layers[layer].keep for layer in (0, 1, 2)
    }
    assert len(chosen.layers[3].keep) == max(len(chosen.layers[layer].keep) for layer in (0, 1, 2))
    block = chosen.layers[3]
    best = sorted(
        set(range(8)) - {e for e, why in block.reasons.items() if why == "core"}, key=lambda e: (-block.saliency[e], e)
    )
    cores = [e for e, why in block.reasons.items() if why == "core"]
    assert set(block.keep) == {*cores, *best[: len(block.keep) - len(cores)]} and len(cores) == 1
    assert "cap" not in block.reasons.values() and "layer minimum" not in block.reasons.values()


def test_reroute_decides_a_block_by_reap() -> None:
    whole, _ = with_block(5)
    draw = np.random.default_rng(0)
    order = np.stack([draw.permutation(8) for _ in range(3)])
    paths = np.concatenate([np.repeat(order[:, None], 4, 1), np.full((1, 4, 8), -1)])
    error = np.concatenate([np.broadcast_to(np.arange(1.0, 9), (3, 4, 8)), np.zeros((1, 4, 8))])
    single = np.concatenate([draw.random((3, 2, 8)), np.zeros((1, 2, 8))])
    measured = dataclasses.replace(whole, reroute=Reroute(np.array([5, 5]), paths, error, single))
    spec = prune(ratio=0.5, protect={"super_experts": False})
    for criterion in ("reroute", "reroute-single"):
        chosen = select(measured, saliency_spec(criterion), spec, DECODER)
        assert chosen.layers[3].keep == select(whole, saliency_spec("reap"), spec, DECODER).layers[3].keep
        assert set(chosen.layers[3].reasons.values()) <= {"saliency", "never routed"}
    reroute = select(measured, saliency_spec("reroute"), spec, DECODER)
    assert all(set(reroute.layers[layer].drop) == set(order[layer, :4].tolist()) for layer in range(3))


def test_super_experts_are_looked_for_in_the_decoder() -> None:
    whole, decoder = with_block(6)
    whole.maxima["activation_max"][3] = 1e9  # would raise the limit above every other expert's
    spec = prune(ratio=0.25)
    chosen, alone = (select(one, saliency_spec(), spec, DECODER) for one in (whole, decoder))
    assert chosen.details["protected"]["super expert"] == alone.details["protected"]["super expert"]


# ---------------------------------------------------------------------------------------------- the run


def test_observed_pruned_proven_and_quantized(recipe, tmp_path: Path) -> None:
    run = apply(load(recipe()))
    pruned = Checkpoint.open(tmp_path / "run/pruned")
    assert (
        pruned.layout.mtp[3].num_experts == pruned.config["n_routed_experts"] == 8
        and pruned.config["num_nextn_predict_layers"] == 1
    )
    selection = Selection.load(tmp_path / "run/selection")
    assert list(selection.layers) == [1, 2, 3] and selection.layers[3].keep != selection.layers[2].keep
    before, after = (tensors(tmp_path / name) for name in ("model", "run/pruned"))
    for new, old in enumerate(selection.layers[3].keep):
        assert torch.equal(
            after[f"model.layers.3.mlp.experts.{new}.up_proj.weight"],
            before[f"model.layers.3.mlp.experts.{old}.up_proj.weight"],
        )
    proofs = json.loads((tmp_path / "run/verify.json").read_text())["proofs"]
    proof = next(
        proof for proof in proofs if proof["name"] == "multi-token prediction" and proof["directory"] == "pruned"
    )
    assert proof["measured"] and all(each["passed"] for each in proofs)
    assert {each["directory"] for each in proofs} == {"pruned", "quantized"}
    assert not any("speculative" in warning for warning in run.warnings)
    base, cut, rounded = run.summary("verify")["rows"]
    assert rounded["bytes"] < cut["bytes"] < base["bytes"] and 0 <= cut["kl_mean"] < rounded["kl_mean"] < 1
    assert pruned.nbytes == run.plan.pruned(run.plan.candidates[0]).nbytes
    quantized = Checkpoint.open(tmp_path / "run/quantized")
    assert quantized.layout.mtp[3].num_experts == 8
    assert quantized.nbytes == run.plan.quantized_nbytes(run.plan.candidates[0])
    assert (
        "| Multi-token prediction | kept, for speculative decoding |" in (tmp_path / "run/pruned/README.md").read_text()
    )
    assert load_model(tmp_path / "run/pruned") is not None and (tmp_path / "run/report.html").is_file()
    commands_read_it(tmp_path)
    assert apply(load(tmp_path / "recipe.yaml")).executed == []
    dropped = apply(
        load(tmp_path / "recipe.yaml", ["prune.mtp=drop", f"output.directory={tmp_path}/other"]), until="prune"
    )
    assert {"observe", "select", "evaluate", "prune"} <= set(dropped.executed) and "calibrate" not in dropped.executed
    without = Checkpoint.open(tmp_path / "other/pruned")
    assert not without.layout.mtp_tensors and without.config["num_nextn_predict_layers"] == 0
    other = Selection.load(tmp_path / "other/selection")
    assert other.keep == {layer: selection.keep[layer] for layer in (1, 2)}, "the decoder is pruned as it was"
    imported_both_ways(tmp_path)


def commands_read_it(root: Path) -> None:
    """Every command that looks at an observation, a selection or a checkpoint copes with the further layer."""
    observation = str(root / "run/observation")
    inspected = command("inspect", observation)
    assert inspected.code == 0 and "multi-token prediction: layer 3, behind the decoder's" in inspected.stdout
    for arguments in (
        ["inspect", root / "run/selection"],
        ["inspect", root / "run/pruned"],
        ["verify", root / "run/pruned"],
        ["report", observation, "-o", root / "page.html"],
        ["export", observation, root / "export"],
        ["compare", observation, observation],
    ):
        assert command(*arguments).code == 0, arguments
    assert "layer_3" in json.loads((root / "export/ranking_by_layer.json").read_text())


def imported_both_ways(root: Path) -> None:
    """An observation made elsewhere decides what can be observed: with the block it stays, without it is dropped or
    refused."""
    held, without = root / "run/observation", root / "other/observation"
    loaded = load(root / "recipe.yaml")
    assert make_plan(loaded, observation=held).mtp == (3,) and make_plan(loaded, observation=without).mtp == ()
    assert any("imported observation does not have" in note for note in make_plan(loaded, observation=without).notes)
    wanted = load(root / "recipe.yaml", ["prune.mtp=observe"])
    with pytest.raises(RecipeError, match=r"does not have the multi-token-prediction layers 3\. Choose drop or auto"):
        make_plan(wanted, observation=without)
    assert make_plan(load(root / "recipe.yaml", ["prune.mtp=drop"]), observation=held).mtp == ()


def test_an_unloadable_block_is_dropped_with_a_warning(recipe, tmp_path: Path) -> None:
    run = apply(load(recipe("qwen3_moe")), until="prune")
    assert any("speculative decoding with them is lost" in warning for warning in run.warnings)
    assert not Checkpoint.open(tmp_path / "run/pruned").layout.mtp_tensors


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


# ---------------------------------------------------------------------------------------------- the proof


def halved(source: Checkpoint, layout: str) -> Selection:
    """Other experts in the blocks than in the decoder, groups kept even; with a ragged layout layer 1 keeps fewer than
    all others."""
    found, quarters = source.layout, [range(first, 16, 4) for first in range(4)]
    most = 2 if layout == "uniform" else 3
    kept = {layer: quarters[: 2 if layer == 1 else most] for layer in found.layers} | dict.fromkeys(
        found.mtp, quarters[4 - most :]
    )
    chosen = {layer: {expert for quarter in taken for expert in quarter} for layer, taken in kept.items()}
    return Selection(
        "x",
        {
            layer: LayerSelection(tuple(sorted(keep)), tuple(sorted(set(range(16)) - keep)), ())
            for layer, keep in chosen.items()
        },
    )


@pytest.mark.parametrize(
    ("model_type", "blocks", "dtype", "layout"),
    [
        ("glm4_moe", 1, torch.float32, "uniform"),
        ("deepseek_v3", 2, torch.bfloat16, "uniform"),
        pytest.param("deepseek_v3", 1, torch.float32, "uniform", marks=pytest.mark.long),
        pytest.param("glm4_moe", 1, torch.float32, "ragged", marks=pytest.mark.long),
    ],
)
def test_pruned_blocks_predict_as_the_masked_original(
    model_type: str, blocks: int, dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    source = Checkpoint.open(tiny.save_hub_layout(tiny.build(model_type, dtype=dtype), tmp_path / "source", mtp=blocks))
    selection = halved(source, layout)
    prune_checkpoint(source, selection, tmp_path / "out", mtp="observe", layout=layout)
    proofs = prove_pruned(source.path, tmp_path / "out", selection)
    assert [proof.name for proof in proofs] == [
        "tensors",
        "config",
        "loads",
        "logits",
        "generates",
        "multi-token prediction",
    ]
    assert all(proof.passed and proof.measured for proof in proofs), proofs
    assert proofs[-1].value < 1e-4
    model = load_model(tmp_path / "out")
    assert [site.num_experts for site in MtpBlocks(model, tuple(range(3, 3 + blocks)), model.device).sites] == [
        len(selection.keep[3])
    ] * blocks
    (weights,) = [
        file
        for file in (tmp_path / "out").glob("*.safetensors")
        if any(".layers.3." in name for name in load_file(file))
    ]
    changed = load_file(weights)
    changed["model.layers.3.mlp.gate.weight"] = changed["model.layers.3.mlp.gate.weight"].flip(0)
    save_file(changed, weights, metadata={"format": "pt"})
    assert {proof.name for proof in prove_pruned(source.path, tmp_path / "out", selection) if not proof.passed} == {
        "tensors",
        "multi-token prediction",
    }
