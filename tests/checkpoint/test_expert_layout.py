"""Which tensors carry an expert axis, on the names that checkpoints are published with."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.parameter_counts import active_parameters, pruned_sizes
from reapkit.core.errors import UnusableError
from reapkit.core.safetensors_header import TensorInfo

HIDDEN, INNER, EXPERTS, TOP_K = 12, 6, 4, 2
CONFIG = {
    "model_type": "some_moe",
    "num_hidden_layers": 2,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "hidden_size": HIDDEN,
}
BITS = {"BF16": 16, "F32": 32, "I32": 32, "U8": 8, "F8_E4M3": 8, "I64": 64}


def checkpoint(
    tensors: dict[str, tuple[int, ...]], dtypes: dict[str, str] | None = None, **config: object
) -> Checkpoint:
    """A checkpoint that exists in headers only; `*` stands for every expert, `%` for layers 0 and 1."""
    infos = {}
    for pattern, shape in tensors.items():
        for layer in range(2) if "%" in pattern else (0,):
            for expert in range(EXPERTS) if "*" in pattern else (0,):
                name = pattern.replace("%", str(layer)).replace("*", str(expert))
                dtype = (dtypes or {}).get(pattern, "BF16")
                size = BITS[dtype] // 8
                for extent in shape:
                    size *= extent
                infos[name] = TensorInfo(name, dtype, shape, "model.safetensors", 0, size)
    return Checkpoint(Path("somewhere"), {**CONFIG, **config}, infos)


PER_EXPERT = {
    "model.embed_tokens.weight": (50, HIDDEN),
    "model.layers.%.self_attn.q_norm.weight": (EXPERTS,),
    "model.layers.%.mlp.experts.*.up_proj.weight": (INNER, HIDDEN),
    "model.layers.%.mlp.experts.*.down_proj.weight": (HIDDEN, INNER),
    "model.layers.%.mlp.gate.weight": (EXPERTS, HIDDEN),
    "model.layers.%.mlp.shared_experts.up_proj.weight": (EXPERTS, HIDDEN),
    "model.layers.%.mlp.shared_expert_gate.weight": (1, HIDDEN),
}


def test_per_expert_tensors_and_router_rows_are_found_and_shared_experts_left():
    layer = checkpoint(PER_EXPERT).layout.layers[1]
    assert layer.num_experts == EXPERTS
    assert layer.per_expert[2] == (
        "model.layers.1.mlp.experts.2.up_proj.weight",
        "model.layers.1.mlp.experts.2.down_proj.weight",
    )
    assert layer.stacked == {"model.layers.1.mlp.gate.weight": 0}


@pytest.mark.parametrize(
    "router, shape, axis",
    [
        ("mlp.gate.weight", (EXPERTS, HIDDEN), 0),
        ("mlp.router.weight", (EXPERTS, HIDDEN), 0),
        ("mlp.router.bias", (EXPERTS,), 0),
        ("mlp.gate.wg.weight", (EXPERTS, HIDDEN), 0),
        ("mlp.router.layer.weight", (EXPERTS, HIDDEN), 0),
        ("mlp.router.proj.weight", (EXPERTS, HIDDEN), 0),
        ("mlp.router.gate.weight", (EXPERTS, HIDDEN), 0),
        ("mlp.router.per_expert_scale", (EXPERTS,), 0),
        ("mlp.gate.e_score_correction_bias", (EXPERTS,), 0),
        ("mlp.e_score_correction_bias", (EXPERTS,), 0),
        ("mlp.moe_statics.e_score_correction_bias", (1, EXPERTS), 1),
        ("mlp.expert_bias", (EXPERTS,), 0),
        ("mlp.gate.weight", (HIDDEN, EXPERTS), 1),
        ("mlp.gate.weight", (EXPERTS, EXPERTS), 0),
    ],
)
def test_router_tensors_are_found_under_every_published_name(router, shape, axis):
    tensors = {
        "model.layers.%.mlp.experts.*.w1.weight": (INNER, HIDDEN),
        "model.layers.%.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"model.layers.%.{router}": shape,
    }
    assert checkpoint(tensors).layout.layers[0].stacked[f"model.layers.0.{router}"] == axis


@pytest.mark.parametrize(
    "names",
    [
        {
            "model.layers.%.mlp.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER),
            "model.layers.%.mlp.experts.gate_up_proj_bias": (EXPERTS, INNER),
        },
        {
            "model.layers.%.mlp.experts.down_proj_blocks": (EXPERTS, 5, 7, 16),
            "model.layers.%.mlp.experts.down_proj_scales": (EXPERTS, 5, 7),
        },
        {
            "model.layers.%.block_sparse_moe.input_linear.weight": (EXPERTS, INNER, HIDDEN),
            "model.layers.%.block_sparse_moe.output_linear.weight": (EXPERTS, HIDDEN, INNER),
        },
        {
            "model.layers.%.moe.gate_proj.weight": (EXPERTS, INNER, HIDDEN),
            "model.layers.%.moe.down_proj.weight_scale_inv": (EXPERTS, 1, 1),
        },
        {"model.language_model.layers.%.feed_forward.experts.down_proj": (EXPERTS, INNER, HIDDEN)},
    ],
)
def test_stacked_experts_are_found_with_their_scales_and_biases(names):
    site = next(iter(names)).split(".experts")[0].rsplit(".input_linear", 1)[0].rsplit(".gate_proj", 1)[0]
    layer = checkpoint({**names, f"{site}.router.weight": (EXPERTS, HIDDEN)}).layout.layers[1]
    assert layer.stacked == {name.replace("%", "1"): 0 for name in [*names, f"{site}.router.weight"]}


def test_a_scale_for_all_experts_together_carries_no_axis():
    tensors = {
        "model.layers.%.mlp.experts.down_proj": (EXPERTS, INNER, HIDDEN),
        "model.layers.%.mlp.experts.down_proj_input_scale": (1,),
        "model.layers.%.mlp.router.weight": (EXPERTS, HIDDEN),
        "model.layers.%.mlp.router.scale": (HIDDEN,),
    }
    assert set(checkpoint(tensors).layout.layers[0].stacked) == {
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.router.weight",
    }


def test_rows_that_belong_to_no_routed_expert_stay():
    tensors = {
        "model.layers.%.mlp.experts.*.w1.weight": (INNER, HIDDEN),
        "model.layers.%.mlp.router.classifier.weight": (EXPERTS + 3, HIDDEN),
    }
    source = checkpoint(tensors, zero_expert_num=3)
    assert source.layout.layers[0].stacked == {"model.layers.0.mlp.router.classifier.weight": 0}
    expected = source.numel - 2 * 2 * (INNER * HIDDEN + HIDDEN)
    assert pruned_sizes(source, {0: 2, 1: 2}) == (expected, 2 * expected)


@pytest.mark.parametrize(
    "name, shape, words",
    [
        ("model.layers.%.mlp.mystery.weight", (EXPERTS, 3), "mystery.weight has shape [4, 3] in a layer of 4 experts"),
        ("model.layers.%.mlp.gate.qweight", (HIDDEN, 1), "gate.qweight has shape [12, 1]"),
        ("model.layers.%.mlp.experts.down_proj", (EXPERTS + 1, 3), "experts.down_proj has shape [5, 3]"),
        ("model.layers.9.mlp.local_experts.3.weight", (3, 3), "names an expert in a layer where reapkit finds none"),
    ],
)
def test_what_cannot_be_decided_is_an_error_that_names_the_tensor(name, shape, words):
    with pytest.raises(UnusableError) as error:
        _ = checkpoint({**PER_EXPERT, name: shape}).layout
    assert words in str(error.value) and name.replace("%", "0") in str(error.value)


def test_a_token_to_expert_table_is_no_router_row():
    layer = checkpoint({**PER_EXPERT, "model.layers.%.mlp.gate.tid2eid": (50, TOP_K)}).layout.layers[1]
    assert layer.table == "model.layers.1.mlp.gate.tid2eid" and layer.table not in layer.stacked


def test_a_hole_in_the_experts_is_named():
    source = checkpoint(PER_EXPERT)
    tensors = {name: info for name, info in source.tensors.items() if ".experts.1." not in name}
    with pytest.raises(UnusableError, match="has experts up to 3 but no expert 1"):
        _ = Checkpoint(source.path, source.config, tensors).layout


def test_config_and_tensors_must_agree():
    with pytest.raises(UnusableError, match=r"layer 0 holds 4 experts where config\.json says 8"):
        _ = checkpoint(PER_EXPERT, num_experts=8).layout


def test_dense_layers_hold_no_experts():
    dense = {name: info for name, info in checkpoint(PER_EXPERT).tensors.items() if "layers.0.mlp" not in name}
    dense |= checkpoint({"model.layers.0.mlp.gate_proj.weight": (EXPERTS, HIDDEN)}).tensors
    assert list(Checkpoint(Path("x"), CONFIG, dense).layout.layers) == [1]


@pytest.mark.parametrize(
    "block, index",
    [("model.layers.2", 2), ("mtp.layers.0", 2), ("model.mtp.layers.1", 3), ("model.mtp_block.0", 2), ("mtp.0", 2)],
)
def test_multi_token_prediction_is_kept_apart(block, index):
    tensors = {
        **PER_EXPERT,
        f"{block}.mlp.experts.*.up_proj.weight": (INNER, HIDDEN),
        f"{block}.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"{block}.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    }
    source = checkpoint(tensors)
    layout = source.layout
    assert list(layout.layers) == [0, 1] and list(layout.mtp) == [index]
    assert layout.mtp_tensors == {name for name in source.tensors if name.startswith(f"{block}.")}
    block_numel = EXPERTS * INNER * HIDDEN + EXPERTS * HIDDEN + 2 * HIDDEN * HIDDEN
    whole = {0: EXPERTS, 1: EXPERTS}
    assert pruned_sizes(source, whole)[0] == source.numel - block_numel
    assert pruned_sizes(source, {**whole, index: 2})[0] == source.numel - 2 * (INNER * HIDDEN + HIDDEN)
    assert active_parameters(source, layout).total == source.numel - block_numel


def test_layers_of_a_vision_tower_are_no_multi_token_prediction():
    tensors = {name.replace("model.", "model.language_model."): shape for name, shape in PER_EXPERT.items()}
    layout = checkpoint({**tensors, "model.visual.blocks.7.attn.weight": (4, 4)}).layout
    assert not layout.mtp_tensors and layout.stack == "model.language_model.layers."


def test_active_parameters_count_the_experts_of_one_token():
    source = checkpoint(PER_EXPERT)
    expert = 2 * INNER * HIDDEN
    counted = active_parameters(source, source.layout)
    assert counted.total == source.numel
    assert counted.active == source.numel - 2 * (EXPERTS - TOP_K) * expert
    pruned = active_parameters(source, source.layout, kept={0: 3, 1: 3}, experts_per_token=1)
    assert pruned.total == source.numel - 2 * (expert + HIDDEN) and pruned.active == pruned.total - 2 * 2 * expert


def test_packed_weights_count_as_what_they_stand_for():
    tensors = {
        "model.layers.%.mlp.experts.*.up_proj.weight_packed": (INNER, 3),
        "model.layers.%.mlp.experts.*.up_proj.weight_scale": (INNER, 1),
        "model.layers.%.mlp.experts.*.up_proj.weight_shape": (2,),
        "model.layers.%.mlp.gate.weight": (EXPERTS, HIDDEN),
    }
    source = checkpoint(
        tensors,
        {"model.layers.%.mlp.experts.*.up_proj.weight_packed": "I32"},
        quantization_config={"config_groups": {"group_0": {"weights": {"num_bits": 8}}}},
    )
    assert active_parameters(source, source.layout).total == 2 * (EXPERTS * INNER * HIDDEN + EXPERTS * HIDDEN)


def test_a_trillion_parameters_are_laid_out_at_once():
    layers, experts = 60, 256
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.{kind}"
        for layer in range(layers)
        for expert in range(experts)
        for part in ("gate", "up", "down")
        for kind in ("weight", "weight_scale_inv")
    ]
    infos = {name: TensorInfo(name, "F8_E4M3", (2048, 7168), "a", 0, 2048 * 7168) for name in names}
    infos |= {
        f"model.layers.{layer}.mlp.gate.weight": TensorInfo(
            f"model.layers.{layer}.mlp.gate.weight", "BF16", (experts, 7168), "a", 0, 2
        )
        for layer in range(layers)
    }
    source = Checkpoint(
        Path("x"), {**CONFIG, "num_hidden_layers": layers, "num_experts": experts, "hidden_size": 7168}, infos
    )
    begin = time.process_time()
    layout = source.layout
    assert time.process_time() - begin < 1 and len(layout.layers) == layers


def test_no_torch_is_needed():
    code = "import sys, reapkit.checkpoint.expert_layout, reapkit.pruning.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
