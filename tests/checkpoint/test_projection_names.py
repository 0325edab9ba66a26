"""The table of spellings: one tiny model a row, and a spelling of our own that one more row teaches every room."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.parameter_counts import active_parameters, pruned_sizes
from reapkit.checkpoint.projection_names import (
    KNOWN_ROUTERS,
    LINEARISED,
    LOADED,
    SPELLINGS,
    Part,
    Role,
    Spelling,
    expert_tensor,
    part_of,
)
from reapkit.core.errors import UnusableError
from reapkit.model.routed_experts import find_experts
from reapkit.pipeline.planned import make_plan
from reapkit.planning.plan import Plan
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.pruning.config_edits import expert_renamer
from reapkit.quantization.sizes import quantized_bytes
from reapkit.quantization.targets import expert_prefixes, targets
from reapkit.recipe.loading import load
from reapkit.recipe.schema import QuantizeSpec
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import build, save_hub_layout

TINY_MODELS: Mapping[str, tuple[str, dict[str, Role]]] = {
    "gate_up_down": (
        "glm4_moe",
        {
            "gate_proj.weight": Role.GATE,
            "up_proj.weight": Role.UP,
            "down_proj.weight": Role.DOWN,
            "mlp.gate.weight": Role.ROUTER,
            "mlp.gate.e_score_correction_bias": Role.CORRECTION,
        },
    ),
    "mixtral": (
        "minimax_m2",
        {
            "w1.weight": Role.GATE,
            "w3.weight": Role.UP,
            "w2.weight": Role.DOWN,
            "block_sparse_moe.gate.weight": Role.ROUTER,
            "block_sparse_moe.e_score_correction_bias": Role.CORRECTION,
        },
    ),
    "stacked": (
        "gpt_oss",
        {
            "mlp.experts.gate_up_proj": Role.GATE_UP,
            "mlp.experts.gate_up_proj_bias": Role.GATE_UP,
            "mlp.experts.down_proj": Role.DOWN,
            "mlp.experts.down_proj_bias": Role.DOWN,
            "mlp.router.weight": Role.ROUTER,
            "mlp.router.bias": Role.ROUTER,
        },
    ),
    "granite": (
        "granitemoe",
        {
            "block_sparse_moe.input_linear.weight": Role.GATE_UP,
            "block_sparse_moe.output_linear.weight": Role.DOWN,
            "block_sparse_moe.router.layer.weight": Role.ROUTER,
        },
    ),
    "step": (
        "step3p7",
        {
            "moe.gate_proj.weight": Role.GATE,
            "moe.up_proj.weight": Role.UP,
            "moe.down_proj.weight": Role.DOWN,
            "moe.gate.weight": Role.ROUTER,
            "moe.router_bias": Role.CORRECTION,
        },
    ),
}
"""Row -> the tiny model whose checkpoint is spelled so, and the roles in its last layer, by name below the layer."""


def test_every_row_has_a_tiny_model() -> None:
    assert TINY_MODELS.keys() == SPELLINGS.keys()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Checkpoint]:
    """The tiny model's checkpoint of every row."""
    return {
        row: Checkpoint.open(save_hub_layout(build(model_type), tmp_path_factory.mktemp(row)))
        for row, (model_type, _) in TINY_MODELS.items()
    }


@pytest.mark.parametrize("row", SPELLINGS)
def test_the_layout_gives_every_matrix_its_role(row: str, tiny: Mapping[str, Checkpoint]) -> None:
    layer = tiny[row].layout.layers[2]
    assert layer.spelling is SPELLINGS[row]
    assert {name.split(".layers.2.")[-1]: role for name, role in layer.roles.items()} == TINY_MODELS[row][1]
    assert layer.routers == {name: role for name, role in layer.roles.items() if role in (Role.ROUTER, Role.CORRECTION)}
    axis = SPELLINGS[row].expert_axis
    assert {layer.stacked[name] for name in layer.stacked.keys() - layer.routers} == {axis} - {None}
    assert layer.num_experts == 16 and bool(layer.parts) == (axis is None)


@pytest.mark.parametrize("row", SPELLINGS)
def test_every_row_is_cut_bit_exactly(row: str, tiny: Mapping[str, Checkpoint], tmp_path: Path) -> None:
    source, keep = tiny[row], (1, 4, 5, 11)
    pruned = prune_checkpoint(source, _selection(source, keep), tmp_path / "out")
    before, after = _tensors(source.path), _tensors(tmp_path / "out")
    assert pruned_sizes(source, pruned.kept)[1] == sum(tensor.nbytes for tensor in after.values())
    for layer in source.layout.layers.values():
        for names in layer.parts.values():
            for new, expert in enumerate(keep):
                to = names[expert].replace(f"experts.{expert}.", f"experts.{new}.")
                assert torch.equal(before[names[expert]], after[to])
        for name, axis in layer.stacked.items():
            assert torch.equal(before[name].index_select(axis, torch.tensor(keep)), after[name])


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "nemotron_h", "granitemoe", "mixtral"])
def test_transformers_spells_them_in_memory_as_the_table_says(model_type: str) -> None:
    for site in find_experts(build(model_type)):
        roles = {LOADED.role(name) for name, _ in site.module.named_parameters(recurse=False)}
        assert roles == {Role.GATE_UP if site.module.has_gate else Role.UP, Role.DOWN}


def test_a_row_may_be_read_in_both_directions() -> None:
    for row in SPELLINGS.values():
        for word, role in row.matrices.items():
            assert row.word(role) == word and row.role(f"{word}.weight") is row.role(word) is role
        assert all(row.router_role(f"mlp.{name}") is Role.ROUTER for name in KNOWN_ROUTERS)
        assert row.split in SPELLINGS and SPELLINGS[row.split].expert_axis is None
    assert LINEARISED.role("w1.weight") is None
    with pytest.raises(KeyError, match="mixtral has no matrix that is gate and up in one matrix"):
        SPELLINGS["mixtral"].word(Role.GATE_UP)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mlp.experts.3.w1.weight", Part.WEIGHT),
        ("mlp.experts.gate_up_proj", Part.WEIGHT),
        ("mlp.experts.gate_up_proj_bias", Part.BIAS),
        ("mlp.router.per_expert_scale", Part.WEIGHT),
        ("mlp.experts.3.w1.weight_scale_inv", Part.SCALE),
        ("mlp.experts.3.w1.weight_scale", Part.SCALE),
        ("mlp.experts.3.w1.weight_global_scale", Part.SCALE),
        ("mlp.experts.3.w1.input_scale", Part.SCALE),
        ("mlp.experts.down_proj_scales", Part.SCALE),
        ("mlp.experts.down_proj_blocks", Part.PACKED),
        ("mlp.experts.3.w1.weight_packed", Part.PACKED),
        ("mlp.experts.3.w1.qweight", Part.PACKED),
        ("mlp.experts.3.w1.qzeros", Part.ZERO_POINT),
        ("mlp.experts.3.w1.weight_zero_point", Part.ZERO_POINT),
        ("mlp.experts.3.w1.weight_shape", Part.SHAPE),
        ("mlp.experts.3.w1.weight_g_idx", Part.ORDER),
    ],
)
def test_parts_of_published_formats(name: str, part: Part) -> None:
    assert part_of(name) is part


# ---------------------------------------------------------------------------------------------- one more row

MADE_UP = Spelling(
    "made up",
    {"choose": Role.GATE, "into": Role.UP, "out_of": Role.DOWN},
    experts="specialists",
    routers={"dispatcher": Role.ROUTER},
)
MADE_UP_STACKS = Spelling(
    "made up stacks",
    {"into_both": Role.GATE_UP, "out_of": Role.DOWN},
    experts=None,
    block="ffn",
    expert_axis=0,
    split="mixtral",
    routers={"dispatcher": Role.ROUTER},
)
KEEP = (0, 3, 4, 9, 10, 15)


def _selection(source: Checkpoint, keep: tuple[int, ...]) -> Selection:
    layers = {
        index: LayerSelection(
            keep, tuple(e for e in range(layer.num_experts) if e not in keep), (0.0,) * layer.num_experts
        )
        for index, layer in source.layout.layers.items()
    }
    return Selection("made up", layers)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in path.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def _respelled(tensors: Mapping[str, torch.Tensor], row: Spelling) -> dict[str, torch.Tensor]:
    """qwen3_moe's tensors as `row` spells them."""
    words = SPELLINGS["gate_up_down"]
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        expert = expert_tensor(name)
        block = name.split(".mlp.")[0] + ".ffn"
        if expert is None:
            found[name.replace(".mlp.gate.", ".ffn.dispatcher.")] = tensor
        elif row.expert_axis is None:
            word = row.word(words.matrices[expert.matrix])
            found[f"{block}.{row.experts}.{expert.expert}.{word}.{expert.part}"] = tensor
        else:
            stacks.setdefault(f"{block}.{expert.matrix}", {})[expert.expert] = tensor
    for name in [name for name in stacks if name.endswith(".up_proj")]:
        block = name.removesuffix(".up_proj")
        gate, up, down = (
            torch.stack([stacks[f"{block}.{words.word(role)}"][expert] for expert in sorted(stacks[name])])
            for role in (Role.GATE, Role.UP, Role.DOWN)
        )
        found[f"{block}.{row.word(Role.GATE_UP)}.weight"] = torch.cat([gate, up], 1)
        found[f"{block}.{row.word(Role.DOWN)}.weight"] = down
    return found


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same model in a spelling that is known."""
    return Checkpoint.open(save_hub_layout(build("qwen3_moe"), tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module", params=[MADE_UP, MADE_UP_STACKS], ids=lambda row: row.name)
def case(
    request: pytest.FixtureRequest, plain: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Spelling, Path]:
    """A made-up row, and a checkpoint that is spelled so."""
    path = tmp_path_factory.mktemp("made-up")
    for file in plain.path.iterdir():
        if file.suffix == ".json":
            (path / file.name).write_text(file.read_text())
    save_file(_respelled(_tensors(plain.path), request.param), path / "model.safetensors", metadata={"format": "pt"})
    return request.param, path


def taught(row: Spelling):
    """Inside the block the table has this row too."""
    return patch.dict(SPELLINGS, {row.name: row})


def test_without_its_row_a_spelling_is_refused(case: tuple[Spelling, Path]) -> None:
    with pytest.raises(UnusableError, match="no tensor holds any"):
        _ = Checkpoint.open(case[1]).layout


def test_one_row_teaches_the_layout_and_the_counts(case: tuple[Spelling, Path], plain: Checkpoint) -> None:
    row, path = case
    with taught(row):
        source = Checkpoint.open(path)
        layer, kept = source.layout.layers[1], dict.fromkeys(range(3), len(KEEP))
        assert layer.spelling is row and layer.num_experts == 16
        assert layer.routers == {"model.layers.1.ffn.dispatcher.weight": Role.ROUTER}
        assert set(row.matrices.values()) == set(layer.roles.values()) - {Role.ROUTER}
        for counted in (None, kept):
            assert active_parameters(source, source.layout, counted, 2) == active_parameters(
                plain, plain.layout, counted, 2
            )
        assert pruned_sizes(source, kept) == pruned_sizes(plain, kept)


def test_one_row_teaches_surgery(case: tuple[Spelling, Path], plain: Checkpoint, tmp_path: Path) -> None:
    row, path = case
    with taught(row):
        source = Checkpoint.open(path)
        prune_checkpoint(source, _selection(source, KEEP), tmp_path / "made-up")
        assert Checkpoint.open(tmp_path / "made-up").layout.layers[2].num_experts == len(KEEP)
    prune_checkpoint(plain, _selection(plain, KEEP), tmp_path / "plain")
    expected, found = _respelled(_tensors(tmp_path / "plain"), row), _tensors(tmp_path / "made-up")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in found)
    assert (tmp_path / "made-up/config.json").read_text() == (tmp_path / "plain/config.json").read_text()


def test_names_in_a_quantization_config_are_renumbered_by_the_same_row(case: tuple[Spelling, Path]) -> None:
    row, path = case
    names = [f"model.layers.1.ffn.specialists.{expert}.into" for expert in range(16)]
    with taught(row):
        rename = expert_renamer(
            lambda _, layer, expert: KEEP.index(expert) if expert in KEEP else None, lambda name: False, str(path)
        )
        kept = [new for new in map(rename, names) if new is not None]
    assert kept == (names[: len(KEEP)] if row.experts == "specialists" else names)


def test_a_stack_may_count_its_experts_on_another_axis(tmp_path: Path, plain: Checkpoint) -> None:
    row = replace(MADE_UP_STACKS, expert_axis=1)
    tensors = {
        name: tensor.transpose(0, 1).contiguous() if tensor.dim() == 3 else tensor
        for name, tensor in _respelled(_tensors(plain.path), row).items()
    }
    (tmp_path / "source").mkdir()
    (tmp_path / "source/config.json").write_text((plain.path / "config.json").read_text())
    save_file(tensors, tmp_path / "source/model.safetensors", metadata={"format": "pt"})
    with taught(row):
        source = Checkpoint.open(tmp_path / "source")
        pruned = prune_checkpoint(source, _selection(source, KEEP), tmp_path / "out")
        left = targets(source, QuantizeSpec(scheme="W4A16", group_size=32)).left
        assert pruned_sizes(source, pruned.kept) == pruned_sizes(plain, pruned.kept)
    cut = _tensors(tmp_path / "out")
    for name in ("model.layers.2.ffn.into_both.weight", "model.layers.2.ffn.out_of.weight"):
        assert torch.equal(cut[name], tensors[name][:, list(KEEP)])
        assert left[name.removesuffix(".weight")] == "a stack whose first axis does not count the experts"


def test_one_row_teaches_quantization(case: tuple[Spelling, Path], plain: Checkpoint) -> None:
    row, path = case
    spec = QuantizeSpec(scheme="W4A16", group_size=32)
    with taught(row):
        source = Checkpoint.open(path)
        plan, kept = targets(source, spec), dict.fromkeys(range(3), len(KEEP))
        assert quantized_bytes(source, spec, kept) == quantized_bytes(plain, spec, kept)
        routed = [matrix for matrix in plan.matrices.values() if matrix.routed]
        assert sum(matrix.count for matrix in routed) == 3 * 16 * 3
        assert {(matrix.rows, matrix.columns) for matrix in routed} == {(32, 64), (64, 32)}
        assert plan.left["model.layers.0.ffn.dispatcher"] == "router"
        if row.expert_axis is not None:
            both = plan.matrices["model.layers.0.ffn.into_both.weight"]
            assert expert_prefixes(both)[:3] == [
                f"model.layers.0.ffn.experts.{name}" for name in ("0.w1", "0.w3", "1.w1")
            ]
            assert expert_prefixes(plan.matrices["model.layers.0.ffn.out_of.weight"])[1] == (
                "model.layers.0.ffn.experts.1.w2"
            )


def test_one_row_teaches_the_plan(case: tuple[Spelling, Path], plain: Checkpoint, tmp_path: Path) -> None:
    row, path = case
    with taught(row):
        found, expected = _plan(path, tmp_path), _plan(plain.path, tmp_path)
    candidate = found.candidates[0]
    assert found.kept(candidate) == expected.kept(expected.candidates[0]) == dict.fromkeys(range(3), 8)
    assert found.base == expected.base and found.pruned(candidate) == expected.pruned(expected.candidates[0])
    assert found.quantized_nbytes(candidate) == expected.quantized_nbytes(expected.candidates[0])


def _plan(source: Path, directory: Path) -> Plan:
    data, recipe = directory / "data.jsonl", directory / "recipe.yaml"
    data.write_text('{"text": "a"}\n')
    recipe.write_text(
        f"version: 1\nname: t\nmodel: {{source: {json.dumps(str(source))}}}\n"
        "calibration: {samples: 4, mix: [{name: d, source: data.jsonl, format: text}]}\n"
        "prune: {ratio: 0.5}\nquantize: {scheme: W4A16, group_size: 32}\n"
    )
    return make_plan(load(recipe))


def test_taken_apart_names() -> None:
    assert expert_tensor("model.layers.3.mlp.experts.17.w1.weight") == (
        "model.layers.3.mlp.experts.",
        17,
        "w1",
        "weight",
    )
    assert expert_tensor("model.layers.3.mlp.experts.gate_up_proj") is None
    assert expert_tensor("model.layers.3.ffn.specialists.17.into.weight") is None
    with taught(MADE_UP):
        assert expert_tensor("model.layers.3.ffn.specialists.17.into.weight").expert == 17
