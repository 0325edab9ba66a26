"""Tiny random MoE models of many transformers architectures, and their checkpoints as the hub publishes them.

`build("qwen3_moe")` is a float32 causal LM of three layers, hidden 64, mostly 16 experts, 256 tokens; `save_hub_layout`
writes it with the tensor names and config keys of the published checkpoints (per-expert tensors where the hub has
them).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

COMMON = dict(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MLA = dict(
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=16,
    num_key_value_heads=4,
    head_dim=8,
)
LINEAR = dict(
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    layer_types=["linear_attention", "full_attention", "linear_attention"],
)
INDEXER = dict(index_head_dim=16, index_n_heads=2, index_topk=16)
QWEN = dict(num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32)
SHARED = dict(shared_expert_intermediate_size=32)
ROUTED = dict(
    n_routed_experts=16, num_experts_per_tok=4, moe_intermediate_size=32, n_shared_experts=1, first_k_dense_replace=1
)
LOCAL = dict(num_local_experts=16, num_experts_per_tok=4, intermediate_size=32)

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(QWEN, norm_topk_prob=True),
    "qwen2_moe": dict(QWEN, **SHARED),
    "qwen3_next": dict(QWEN, **SHARED, **LINEAR),
    "qwen3_5_moe_text": dict(QWEN, **SHARED, **LINEAR),
    "glm4_moe": dict(ROUTED, n_group=1, topk_group=1),
    "glm4_moe_lite": dict(ROUTED, n_group=1, topk_group=1, **MLA),
    "glm_moe_dsa": dict(ROUTED, n_group=1, topk_group=1, **MLA, **INDEXER),
    "deepseek_v2": dict(ROUTED, n_group=4, topk_group=2, topk_method="group_limited_greedy", **MLA),
    "deepseek_v3": dict(ROUTED, n_group=4, topk_group=2, **MLA),
    "deepseek_v32": dict(ROUTED, n_group=4, topk_group=2, **MLA, **INDEXER),
    "gpt_oss": dict(LOCAL),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "minimax_m2": dict(LOCAL),
    "olmoe": dict(num_experts=16, num_experts_per_tok=4, intermediate_size=32),
    "llama4_text": dict(LOCAL, num_experts_per_tok=1, intermediate_size_mlp=64, interleave_moe_layer_step=1),
    "ernie4_5_moe": dict(
        moe_num_experts=16, moe_k=4, moe_intermediate_size=32, moe_num_shared_experts=1, moe_layer_start_index=1
    ),
    "granitemoe": dict(LOCAL),
    "phimoe": dict(num_local_experts=16, num_experts_per_tok=2),
    "dots1": dict(ROUTED, n_group=1, topk_group=1),
    "hunyuan_v1_moe": dict(num_experts=16, moe_topk=4, moe_intermediate_size=32),
    "nemotron_h": dict(
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        num_hidden_layers=4,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
        ssm_state_size=16,
        chunk_size=16,
    ),
    "gemma4_text": dict(
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=32,
        enable_moe_block=True,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=8,
    ),
    "kimi_linear": dict(
        QWEN,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_key_value_heads=4,
        head_dim=8,
        linear_head_dim=16,
        linear_num_heads=4,
        mlp_layer_types=["dense", "sparse", "sparse"],
    ),
    "lfm2_moe": dict(QWEN, num_dense_layers=1, layer_types=["conv", "full_attention", "conv"]),
    "qwen3_vl_moe": dict(
        text_config=dict(
            COMMON,
            **QWEN,
            rope_parameters=dict(
                rope_type="default", rope_theta=10000.0, mrope_section=[4, 2, 2], mrope_interleaved=True
            ),
        ),
        vision_config=dict(
            depth=1,
            hidden_size=32,
            intermediate_size=64,
            num_heads=2,
            patch_size=4,
            out_hidden_size=64,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    ),
}
VISION = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, patch_size=4)
QWEN_VISION = dict(
    depth=3,
    hidden_size=32,
    intermediate_size=64,
    num_heads=2,
    patch_size=4,
    out_hidden_size=64,
    num_position_embeddings=16,
)
ROPE = dict(rope_type="default", rope_theta=10000.0)
WRAPPERS: dict[str, dict[str, Any]] = {  # towers around a text model, each of as many layers as it has
    "llama4": dict(
        text_config=dict(
            COMMON, **{**LOCAL, "num_experts_per_tok": 1}, intermediate_size_mlp=64, interleave_moe_layer_step=1
        ),
        vision_config=dict(
            VISION, image_size=16, vision_output_dim=64, projector_input_dim=64, projector_output_dim=64
        ),
    ),
    "qwen3_5_moe": dict(
        text_config=dict(
            COMMON,
            **QWEN,
            **SHARED,
            **LINEAR,
            rope_parameters=dict(ROPE, mrope_section=[2, 1, 1], partial_rotary_factor=0.5),
        ),
        vision_config=QWEN_VISION,
    ),
    "gemma4": dict(
        text_config=dict(
            COMMON,
            num_experts=16,
            top_k_experts=4,
            moe_intermediate_size=32,
            enable_moe_block=True,
            vocab_size_per_layer_input=256,
            hidden_size_per_layer_input=8,
        ),
        vision_config=dict(VISION, num_key_value_heads=2, head_dim=16),
        audio_config=None,
    ),
    "mistral3": dict(
        text_config=dict(
            COMMON,
            model_type="mistral4",
            **ROUTED,
            n_group=1,
            topk_group=1,
            **{**MLA, "head_dim": 16},
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=10000.0,
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
                partial_rotary_factor=0.5,
            ),
        ),
        vision_config=dict(VISION, model_type="pixtral", image_size=16, head_dim=16),
    ),
    "step3p7": dict(
        text_config=dict(
            COMMON,
            n_routed_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=32,
            share_expert_dim=32,
            num_sliding_attention_heads=4,
            sliding_window=16,
            layer_types=["full_attention"] * 3,
            mlp_layer_types=["dense", "sparse", "sparse"],
        ),
        vision_config=dict(VISION, image_size=16),
        image_token_id=255,
    ),
}
TABLES: dict[str, dict[str, Any]] = {  # the first layer's tokens go to experts by a table
    "deepseek_v4": dict(
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=32,
        num_hash_layers=1,
        head_dim=32,
        num_key_value_heads=1,
        q_lora_rank=16,
        o_groups=2,
        o_lora_rank=16,
        **INDEXER,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        hc_mult=2,
        sliding_window=16,
        num_nextn_predict_layers=0,
    )
}
MULTIMODAL = {
    "llama4": transformers.Llama4ForConditionalGeneration,
    "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
    "gemma4": transformers.Gemma4ForConditionalGeneration,
    "mistral3": transformers.Mistral3ForConditionalGeneration,
    "qwen3_vl_moe": transformers.Qwen3VLMoeForConditionalGeneration,
    "step3p7": transformers.Step3p7ForConditionalGeneration,
}
PUBLISHED_KEYS = {  # what transformers renames when it saves, and the hub still spells the old way
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe_text": {"num_local_experts": "num_experts"},
}


def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random model in evaluation mode whose routing is decisive and whose experts matter.

    Fresh weights of 0.02 route almost by chance and hide an expert's share of the logits below rounding, and biases
    start at zero: matrices are drawn larger, and vectors that a checkpoint would have trained (router biases, scales)
    are drawn too.
    """
    common = {} if model_type in MULTIMODAL else COMMON
    config = AutoConfig.for_model(
        model_type, **{**common, **{**ARCHITECTURES, **WRAPPERS, **TABLES}[model_type], **overrides}
    )
    torch.manual_seed(seed)
    auto = MULTIMODAL.get(model_type)
    model = auto(config) if auto else transformers.AutoModelForCausalLM.from_config(config)
    return decisive(model, config).to(dtype).eval()


def decisive(model: nn.Module, config: Any) -> nn.Module:
    """The model with matrices drawn larger, and what a checkpoint would have trained drawn too."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if any(
                part in name for part in ("e_score_correction_bias", "per_expert_scale", "expert_bias")
            ) or name.endswith("_bias"):
                tensor.add_(0.2 * torch.randn_like(tensor))
            elif name.endswith(("router.bias", "gate.bias")):
                tensor.copy_(0.5 * torch.randn_like(tensor))
            elif name.endswith("tid2eid"):
                rows = [torch.randperm(config.num_local_experts)[: tensor.shape[1]] for _ in range(len(tensor))]
                tensor.copy_(torch.stack(rows))
            elif tensor.dim() >= 2 and "embed" not in name and "norm" not in name and "conv" not in name:
                tensor.copy_(4 * tensor if tensor.any() else 0.08 * torch.randn_like(tensor))
    return model


def save_hub_layout(model: nn.Module, path: str | Path, *, mtp: int = 0, max_shard_size: str = "50GB") -> Path:
    """Writes `model` as the hub publishes its kind: tensor names, config keys; returns `path`.

    With `mtp` so many DeepSeek-style multi-token-prediction blocks are added after the last layer: copies of that
    layer, four tensors of their own each, and `num_nextn_predict_layers` in the config.
    """
    path = Path(path)
    with quiet():
        model.save_pretrained(path, max_shard_size=max_shard_size)
    file = path / "config.json"
    config = json.loads(file.read_text())
    for part in (config, config.get("text_config", {})):
        for saved, published in PUBLISHED_KEYS.get(part.get("model_type"), {}).items():
            part[published] = part.pop(saved)
    if mtp:
        config["num_nextn_predict_layers"] = int(mtp)
        _add_mtp_blocks(path, config["num_hidden_layers"], int(mtp), config["hidden_size"])
    file.write_text(json.dumps(config, indent=2) + "\n")
    return path


def as_block_fp8(path: Path, block: int = 128) -> Path:
    """Rewrites a saved checkpoint's expert matrices (sides divisible by `block`) as block FP8 with `…_scale_inv`, in
    the way of DeepSeek-V3.
    """
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if re.search(r"experts\..*proj\.weight$", name)]:
        weight = tensors.pop(name)
        blocks = weight.view(weight.shape[0] // block, block, weight.shape[1] // block, block)
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        tensors[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    return _rewritten(
        path,
        tensors,
        {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [block] * 2,
            "modules_to_not_convert": ["self_attn", "mlp.gate", "lm_head", "layers.0.mlp"],
        },
    )


def as_mxfp4(path: Path) -> Path:
    """Rewrites a saved gpt_oss checkpoint's experts (inputs divisible by 32) as random MXFP4 blocks and scales."""
    tensors, draw = load_file(path / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, outputs = tensors.pop(
            name
        ).shape  # published outputs first, in blocks of 32 inputs, two values per byte
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=draw).to(
            torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(118, 123, (experts, outputs, inputs // 32), generator=draw).to(
            torch.uint8
        )
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _rewritten(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": left})


def _rewritten(path: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))
    return path


def _add_mtp_blocks(path: Path, depth: int, count: int, hidden: int) -> None:
    """Saves one more shard `model-mtp.safetensors` and an index that covers it; beside a `model.safetensors` no index
    is read."""
    if (path / "model.safetensors").exists():
        (path / "model.safetensors").rename(path / "model-decoder.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    where: dict[str, str] = {}
    prefix = f"model.layers.{depth - 1}."
    for shard in sorted(path.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            where |= dict.fromkeys(file.keys(), shard.name)
            for block in range(depth, depth + count):
                tensors |= {
                    f"model.layers.{block}." + name.removeprefix(prefix): file.get_tensor(name).clone()
                    for name in file.keys()
                    if name.startswith(prefix)
                }
    dtype = next(iter(tensors.values())).dtype
    for block in range(depth, depth + count):
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"model.layers.{block}.{name}.weight"] = torch.ones(hidden, dtype=dtype)
        tensors[f"model.layers.{block}.eh_proj.weight"] = 0.1 * torch.randn(hidden, 2 * hidden, dtype=dtype)
    save_file(tensors, path / "model-mtp.safetensors", metadata={"format": "pt"})
    where |= dict.fromkeys(tensors, "model-mtp.safetensors")
    index = {"metadata": {}, "weight_map": dict(sorted(where.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers draws no progress bars inside the block."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()
