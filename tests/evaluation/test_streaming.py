"""Streaming evaluation has the resident one's numbers, whatever the architecture, and reads every layer once."""

import random
from dataclasses import replace

import pytest
import torch

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.artifact_store import Store
from reapkit.core.progress import SILENT
from reapkit.evaluation import streaming
from reapkit.evaluation.bench import MaskedCandidate
from reapkit.evaluation.candidates import evaluate
from reapkit.evaluation.directory import Yardstick
from reapkit.evaluation.gates import Gate
from reapkit.evaluation.measures import Measures
from reapkit.evaluation.streaming import evaluate_streaming, measure_streaming, yardstick_streaming
from reapkit.model.loading import load_model
from reapkit.model.routed_experts import find_experts
from reapkit.model.streaming.layers import LayeredModel
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.measurements import KeptMeasurements
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection
from tests.support import tiny
from tests.support.held_out import held_out

pytestmark = pytest.mark.usefixtures("layer_blocks")

GATES = (Gate("kl_mean", max=1e3),)


def candidate(model, name, kept, seed=0, experts_per_token=None):
    draw, layers = random.Random(seed), {}
    for site in find_experts(model):
        keep = tuple(sorted(draw.sample(range(site.num_experts), kept)))
        drop = tuple(e for e in range(site.num_experts) if e not in keep)
        layers[site.layer] = LayerSelection(keep, drop, (0.0,) * site.num_experts)
    return MaskedCandidate(name, Selection("random", layers, experts_per_token))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "glm4_moe", "gpt_oss", "qwen3_next", "gemma4_text"])
def test_the_numbers_are_the_resident_ones(model_type, tmp_path, monkeypatch):
    tiny.save_hub_layout(tiny.build(model_type), tmp_path / "model")
    packs = {24: held_out(tmp_path / "pack")}
    model = load_model(tmp_path / "model", dtype="float32")
    given = [
        candidate(model, "half", 8),
        candidate(model, "most", 12, experts_per_token=2 if model_type == "qwen3_moe" else None),
    ]
    control = [candidate(model, "control", 8, seed=1)]
    resident = evaluate(lambda: model, packs, given, GATES, controls=control, batch_tokens=64)
    layered, read = LayeredModel(tmp_path / "model", dtype="float32"), []
    load = layered.load_ahead
    monkeypatch.setattr(layered, "load_ahead", lambda layer: read.append(layer) or load(layer))
    streamed = evaluate_streaming(
        lambda: layered,
        packs,
        given,
        GATES,
        controls=control,
        batch_tokens=64,
        hidden_bytes=100_000,
        offload_directory=tmp_path / "offload",
    )
    assert read == list(range(len(layered.layers)))
    assert (tmp_path / "offload").is_dir() and not list((tmp_path / "offload").iterdir())  # used, and left empty
    assert all(parameter.device.type == "meta" for parameter in layered.layers.parameters())
    assert [entry["verdict"] for entry in streamed["candidates"]] == ["pass", "pass"]  # measured anyway, so judged too
    assert streamed["winner"] == resident["winner"] == "half" and streamed["base_generation"] is None
    for part in ("base", "controls", "confirm"):
        assert_close(streamed[part], resident[part])
    assert_close(streamed["candidates"][0], resident["candidates"][0])


def assert_close(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)


@torch.no_grad()
def test_an_unmasked_candidate_is_exactly_the_base(tmp_path):
    model = tiny.build("qwen3_moe")
    tiny.save_hub_layout(model, tmp_path / "model")
    found = evaluate_streaming(
        lambda: LayeredModel(tmp_path / "model", dtype="float32"),
        {24: held_out(tmp_path / "pack")},
        [candidate(model, "whole", 16)],
        GATES,
        batch_tokens=64,
    )
    assert found["candidates"][0]["metrics"]["24"]["all"]["kl_mean"] == {"value": 0.0, "interval": [0.0, 0.0]}


def test_a_directory_measured_in_streaming_has_its_resident_numbers(tmp_path):
    model = tiny.build("qwen3_moe")
    tiny.save_hub_layout(model, tmp_path / "base")
    chosen = candidate(model, "half", 8).selection
    prune_checkpoint(Checkpoint.open(tmp_path / "base"), chosen, tmp_path / "pruned", max_shard_bytes=10**9)
    packs = {24: held_out(tmp_path / "pack")}
    resident = Yardstick.of(lambda: load_model(tmp_path / "base", dtype="float32"), packs, batch_tokens=64)
    streamed = yardstick_streaming(lambda: LayeredModel(tmp_path / "base", dtype="float32"), packs, batch_tokens=64)
    assert_close(streamed.base_metrics, resident.base_metrics)
    assert_close(
        streamed.metrics(measure_streaming(streamed, LayeredModel(tmp_path / "pruned", dtype="float32"))),
        resident.metrics(resident.measure_directory(tmp_path / "pruned")),
    )


def test_a_further_candidate_goes_through_the_layers_alone(tmp_path, monkeypatch):
    tiny.save_hub_layout(tiny.build("qwen3_moe"), tmp_path / "model")
    packs = {24: held_out(tmp_path / "pack")}
    model = load_model(tmp_path / "model", dtype="float32")
    half, most = (replace(candidate(model, name, kept), of=name) for name, kept in (("half", 8), ("most", 12)))

    def streamed(load, given, measures=None, **how):
        return evaluate_streaming(load, packs, given, GATES, batch_tokens=64, measures=measures, **how)

    def kept():
        return Measures(kept=KeptMeasurements(Store(tmp_path / "store"), tmp_path / "run", SoundPlans(), SILENT))

    def layered():
        return LayeredModel(tmp_path / "model", dtype="float32")

    passed = []
    collect = streaming._PackPass._collect

    def noted(self, name, *arguments):
        passed.append(name)
        return collect(self, name, *arguments)

    monkeypatch.setattr(streaming._PackPass, "_collect", noted)
    first = streamed(layered, [half], kept())
    assert passed == [None, "half"] and first == streamed(layered, [half])
    passed.clear()
    assert streamed(lambda: 1 / 0, [half], kept()) == first, "what is there is judged without the model"
    both = streamed(layered, [half, most], kept(), offload_directory=tmp_path / "offload")
    assert passed == ["most"] and both == streamed(layered, [half, most])
    yardstick = yardstick_streaming(layered, packs, batch_tokens=64, measures=kept())
    assert yardstick.base_metrics == first["confirm"]["base"]
    assert passed == ["most", None, "half", "most"], "no pass for what the evaluation measured"
