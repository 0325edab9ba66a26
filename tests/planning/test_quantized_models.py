"""A plan takes the formats that are read, in the sizes of plain weights where they are quantized again, and refuses the
others with the way out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.pipeline.planned import make_plan
from reapkit.planning.plan import Plan
from reapkit.planning.starting_recipe import starting_recipe
from reapkit.quantization.checks import check_quantize
from reapkit.quantization.sizes import quantized_widths
from reapkit.quantization.targets import needs_plain_copy
from reapkit.recipe.loading import load
from reapkit.recipe.schema import QuantizeSpec
from tests.support import quantized_sources, tiny

LOWER = QuantizeSpec(scheme="W3A16", method="rtn", group_size=32)
CONFIG = "config.json"


def planned(model: Path, *overrides: str) -> Plan:
    recipe = model.parent / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nname: t\nmodel: {{source: '{model}'}}\nprune: {{ratio: 0.5}}\ncalibration: {{samples: 4, mix:"
        " [{name: d, source: 'builtin:code'}]}\nquantize: {scheme: W3A16, method: rtn, group_size: 32}\n"
    )
    return make_plan(load(recipe, overrides))


def written(name: str, path: Path) -> Path:
    with tiny.quiet():
        return quantized_sources.write(name, path / "model")


def with_settings(path: Path, **settings: object) -> None:
    config = json.loads((path / CONFIG).read_text())
    config["quantization_config"] |= settings
    (path / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize("name", quantized_sources.UNREAD)
def test_what_nothing_here_reads_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=rf"weights are quantized \({name}\), and no library here .* unquantized"):
        planned(written(name, tmp_path))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("fp8 by block", {"quant_method": "quark"}, r"\(quark\), and reapkit knows no such method"),
        ("fp8 by block", {"quant_method": None}, r"\(unknown\), and reapkit knows no such method"),
        ("compressed-tensors W4A16", {"format": "marlin-24"}, "its format is marlin-24"),
        ("awq", {"version": "gemv"}, "it is packed as gemv with 4 bits"),
        ("awq", {"quant_method": "modelopt"}, r"168 tensors belong to no matrix that could be dequantized: .*qweight"),
    ],
)
def test_what_a_known_method_does_otherwise_is_refused(name: str, settings: dict, said: str, tmp_path: Path) -> None:
    path = written(name, tmp_path)
    with_settings(path, **settings)
    with pytest.raises(UnusableError, match=said):
        planned(path)
    with pytest.raises(UnusableError, match=said):
        starting_recipe(str(path), tmp_path)


def test_reordered_columns_are_refused(tmp_path: Path) -> None:
    path = written("compressed-tensors W4A16", tmp_path)
    quantized_sources.add(path, "model.layers.0.self_attn.q_proj.weight_g_idx")
    with pytest.raises(UnusableError, match=r"its columns are reordered \(model\.layers\.0\.self_attn\.q_proj\."):
        planned(path)


def test_a_broken_recipe_is_told_beside_an_unreadable_model(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)evaluate\.controls.*no library here"):
        planned(written("gptq", tmp_path), "evaluate.controls=[nonsense]")


def test_modelopts_own_file_is_read_where_the_config_says_nothing(tmp_path: Path) -> None:
    path = written("modelopt NVFP4", tmp_path)
    config = json.loads((path / CONFIG).read_text())
    algorithm = config.pop("quantization_config")["quant_algo"]
    (path / CONFIG).write_text(json.dumps(config))
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
    assert len(Checkpoint.open(path).matrices) == quantized_sources.matrices(path)


@pytest.mark.parametrize("name", ["compressed-tensors W4A16", "fp8 by block", "modelopt NVFP4", "awq"])
def test_a_quantized_source_is_measured_in_its_plain_form(name: str, tmp_path: Path) -> None:
    plain = tiny.build("qwen3_moe", num_hidden_layers=2, moe_intermediate_size=64, num_experts=8)
    path = written(name, tmp_path)
    checkpoint, plan = Checkpoint.open(path), planned(path)
    assert plan.base.parameters == sum(parameter.numel() for parameter in plain.parameters())
    assert plan.estimates.placement == "resident"
    assert set(quantized_widths(checkpoint, LOWER)) == {64}
    assert not check_quantize(checkpoint, LOWER)
    (problem,) = check_quantize(checkpoint, LOWER.model_copy(update={"group_size": 48}))
    assert problem.message.startswith("48 does not divide the input width 64 (56 matrices")
    assert needs_plain_copy(checkpoint, LOWER) == (name in ("compressed-tensors W4A16", "awq"))
    assert needs_plain_copy(checkpoint, LOWER.model_copy(update={"method": "gptq"}))


def test_settings_of_a_matrix_are_those_of_the_group_that_names_it(tmp_path: Path) -> None:
    path = written("compressed-tensors W4A16", tmp_path)
    config = json.loads((path / CONFIG).read_text())
    (whole,) = config["quantization_config"]["config_groups"].values()
    named = {**whole, "targets": ["re:.*down_proj$"], "weights": {**whole["weights"], "num_bits": 8}}
    with_settings(path, config_groups={"classes": whole, "named": named})
    bits = {
        name.rpartition(".")[0].rpartition(".")[2]: matrix.settings["weights"]["num_bits"]
        for name, matrix in Checkpoint.open(path).matrices.items()
    }
    assert bits == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"), 4) | {"down_proj": 8}
