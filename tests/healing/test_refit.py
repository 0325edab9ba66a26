"""Streamed repair against whole-model forwards, layer by layer, whatever the layout; and what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from reapkit.core.errors import UnusableError
from reapkit.healing.refit import repair
from reapkit.healing.ridge import STRENGTHS, ExpertFeatures, descend
from reapkit.model.expert_calls import intercepted
from reapkit.model.loading import final_hidden, load_model
from reapkit.model.masking import masked
from reapkit.model.routed_experts import find_experts
from reapkit.model.streaming.layers import LayeredModel
from reapkit.pruning.refitted_weights import RepairedWeights, repaired
from reapkit.selection.selection import LayerSelection, Selection
from tests.support import tiny
from tests.support.tiny_tokens import tiny_tokens

pytestmark = pytest.mark.usefixtures("layer_blocks")

LENGTHS = (24, 17, 9, 20, 9, 24, 13, 22, 24, 24, 21, 24, 24, 18, 24, 24, 23, 24)


def half(model, seed: int = 0) -> Selection:
    draw, layers = random.Random(seed), {}
    for site in find_experts(model):
        groups = 4 if site.num_experts == 16 else 1
        size = site.num_experts // groups
        keep = tuple(sorted(e for g in range(groups) for e in draw.sample(range(g * size, (g + 1) * size), size // 2)))
        layers[site.layer] = LayerSelection(
            keep, tuple(e for e in range(site.num_experts) if e not in keep), (0.0,) * site.num_experts
        )
    return Selection("random", layers)


def layer_outputs(model, row) -> dict[int, torch.Tensor]:
    """Each decoder layer's output for one row, [tokens, hidden]."""
    prefix = find_experts(model)[0].name.split(f".{find_experts(model)[0].layer}.")[0]
    found, handles = {}, []
    for number, layer in enumerate(model.get_submodule(prefix)):
        handles.append(
            layer.register_forward_hook(
                lambda module, args, output, number=number: found.__setitem__(
                    number, (output[0] if isinstance(output, tuple) else output)[0].clone()
                )
            )
        )
    final_hidden(model, row.input_ids[None])
    for handle in handles:
        handle.remove()
    return found


def naive(path: Path, selection: Selection, tokens, scale: float) -> dict[int, dict[int, torch.Tensor]]:
    """Layer after layer: whole forwards of the original and of the pruned model as re-fitted so far, one row at a
    time."""
    original, pruned = load_model(path, dtype="float32"), load_model(path, dtype="float32")
    rows = [tokens.row(number) for number in range(tokens.num_rows)]
    targets = [layer_outputs(original, row) for row in rows]
    seen_of = {}
    for number, source in enumerate(tokens.row_source):
        seen_of.setdefault(int(source), []).append(number)
    judging = {number for numbers in seen_of.values() for number in numbers[7::8]}
    found = {}
    for site in find_experts(pruned):
        calls, outputs = [], []

        def watch(here, hidden, index, gates, inner, site=site, calls=calls):
            if here.layer == site.layer:
                calls.append((hidden.clone(), index.clone(), gates.clone()))
            return inner(hidden, index, gates)

        with intercepted(find_experts(pruned), watch), masked(pruned, selection.keep):
            outputs += [layer_outputs(pruned, row)[site.layer] for row in rows]
        target = torch.cat([each[site.layer] for each in targets])
        error, weight = (target - torch.cat(outputs)) / scale, 1 / target.square().sum(1)
        held_out = torch.cat([torch.full((len(row.input_ids),), number in judging) for number, row in enumerate(rows)])
        hidden, index, gates = (torch.cat(parts) for parts in zip(*calls, strict=True))
        experts, diagonal = {}, []
        for expert in selection.keep[site.layer]:
            pairs = [(t, k) for t in range(len(index)) for k in range(index.shape[1]) if index[t, k] == expert]
            phi = (
                torch.stack(
                    [
                        site.activation(hidden[t : t + 1] * gates[t, k], expert)[0]
                        if site.gate_on_input
                        else gates[t, k] * site.activation(hidden[t : t + 1], expert)[0]
                        for t, k in pairs
                    ]
                )
                if pairs
                else torch.zeros(0, 1)
            )
            experts[expert] = ExpertFeatures(
                torch.tensor([t for t, _ in pairs], dtype=torch.int64), lambda phi=phi: phi
            )
            diagonal.append(
                (phi.square() * (weight * ~held_out)[[t for t, _ in pairs]][:, None]).sum()
                / site.module.down_proj.shape[1 if site.down_proj_is_transposed else 2]
            )
        tried = []
        for strength in STRENGTHS:
            corrections, left = descend(
                experts, error, weight * ~held_out, strength * float(sum(diagonal)) / len(experts)
            )
            tried.append((float((left.square().sum(1) * weight)[held_out].sum()), corrections))
        best, corrections = min(tried, key=lambda each: each[0])
        if best >= float((error.square().sum(1) * weight)[held_out].sum()):
            continue
        found[site.layer] = {}
        for expert, correction in corrections.items():
            place = site.module.down_proj.data[expert]
            place += correction.T if site.down_proj_is_transposed else correction
            found[site.layer][expert] = place.clone()
    return found


@pytest.mark.parametrize(
    ("model_type", "scale"),
    [
        ("qwen3_moe", 1.0),
        ("gpt_oss", 1.0),
        ("granitemoe", None),
        ("glm4_moe", 1.0),
        ("deepseek_v3", 1.0),
        ("llama4_text", 1.0),
        ("mixtral", 1.0),
        ("nemotron_h", 1.0),
    ],
)
def test_streamed_repair_is_the_naive_one(model_type: str, scale: float | None, tmp_path: Path) -> None:
    model = tiny.build(model_type)
    tiny.save_hub_layout(model, tmp_path / "model")
    tokens = tiny_tokens(tmp_path / "tokens", lengths=LENGTHS)
    selection = half(model)
    expected = naive(
        tmp_path / "model", selection, tokens, model.config.residual_multiplier if scale is None else scale
    )
    found = repair(
        LayeredModel(tmp_path / "model", dtype="float32"),
        tokens,
        {"half": selection},
        tmp_path / "repair",
        batch_tokens=64,
    )["half"]
    assert expected and set(found.layers) == set(expected)
    for layer, experts in expected.items():
        stored = found.down_proj(layer)
        assert set(stored) == set(selection.keep[layer])
        for expert, matrix in experts.items():
            torch.testing.assert_close(stored[expert], matrix, rtol=2e-3, atol=2e-5)
    assert all(facts["held_out"] <= 1 for facts in found.facts["layers"].values())


def test_names_and_shapes_are_the_checkpoints(tmp_path: Path) -> None:
    for model_type, per_expert in (("qwen3_moe", True), ("gpt_oss", False)):
        model = tiny.build(model_type)
        path = tmp_path / model_type
        tiny.save_hub_layout(model, path)
        selection = half(model)
        out = tmp_path / f"{model_type}-repair"
        repair(
            LayeredModel(path),
            tiny_tokens(tmp_path / "tokens", lengths=LENGTHS),
            {"half": selection},
            out,
            batch_tokens=64,
        )
        weights = RepairedWeights.load(out / "half")
        tensors = weights.tensors()
        shapes = {}
        for shard in path.glob("*.safetensors"):
            with safe_open(shard, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        assert len(tensors) == sum(len(selection.keep[layer]) if per_expert else 1 for layer in weights.layers)
        for name, (_, info) in tensors.items():
            assert info.shape == (shapes[name] if per_expert else (8, *shapes[name][1:])), name


def test_the_mask_with_repaired_weights_is_closer_and_restored(tmp_path: Path) -> None:
    built = tiny.build("qwen3_moe")
    tiny.save_hub_layout(built, tmp_path / "model")
    selection = half(built)
    tokens = tiny_tokens(tmp_path / "tokens", lengths=LENGTHS * 6)
    weights = repair(LayeredModel(tmp_path / "model"), tokens, {"half": selection}, tmp_path / "repair")["half"]
    model = load_model(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    fresh = tiny_tokens(tmp_path / "fresh", lengths=LENGTHS, seed=9)
    ids = [fresh.row(number).input_ids[None] for number in range(fresh.num_rows)]
    base = torch.cat([final_hidden(model, each)[0] for each in ids])

    def distance() -> float:
        with masked(model, selection.keep):
            return float((torch.cat([final_hidden(model, each)[0] for each in ids]) - base).square().mean())

    plain = distance()
    with repaired(model, weights):
        assert distance() < plain
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())


def test_hidden_states_on_disk_give_the_same_bytes(tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe")
    tiny.save_hub_layout(model, tmp_path / "model")
    tokens, spool = tiny_tokens(tmp_path / "tokens", lengths=LENGTHS), tmp_path / "spool"

    def written(out: Path, **where: object) -> list[bytes]:
        selections = {"half": half(model)}
        repair(LayeredModel(tmp_path / "model"), tokens, selections, out, batch_tokens=64, **where)
        return [file.read_bytes() for file in sorted((out / "half").glob("*.safetensors"))]

    held = written(tmp_path / "held")
    assert held and held == written(tmp_path / "parked", hidden_bytes=30_000, offload_directory=spool)
    assert spool.is_dir() and not list(spool.iterdir())


def test_a_norm_behind_the_experts_is_refused(tmp_path: Path) -> None:
    model = tiny.build("gemma4_text")
    tiny.save_hub_layout(model, tmp_path / "model")
    with pytest.raises(UnusableError, match=r"prune\.repair: layer \d+ does not simply add its experts' output"):
        repair(
            LayeredModel(tmp_path / "model"),
            tiny_tokens(tmp_path / "tokens", lengths=LENGTHS),
            {"half": half(model)},
            tmp_path / "repair",
        )


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    model = tiny.build("deepseek_v3")
    tiny.save_hub_layout(model, tmp_path / "model")
    tiny.as_block_fp8(tmp_path / "model", block=16)
    with pytest.raises(UnusableError, match="re-fits plain weights, but this checkpoint is quantized"):
        repair(
            LayeredModel(tmp_path / "model"),
            tiny_tokens(tmp_path / "tokens", lengths=LENGTHS),
            {"half": half(model)},
            tmp_path / "repair",
        )
