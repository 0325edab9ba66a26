"""Write a trained qwen3_moe the way Qwen publishes it: one tensor per expert and projection, and a plain config."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

PUBLISHED_KEYS = (
    "attention_bias", "attention_dropout", "bos_token_id", "decoder_sparse_step", "eos_token_id", "head_dim",
    "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings",
    "mlp_only_layers", "model_type", "moe_intermediate_size", "norm_topk_prob", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "output_router_logits", "rms_norm_eps",
    "router_aux_loss_coef", "tie_word_embeddings", "use_cache", "use_sliding_window", "vocab_size",
)  # fmt: skip


def export(model: Qwen3MoeForCausalLM, folder: Path, *, turn_end: int, end_of_text: int) -> None:
    """Write `model.safetensors` in bfloat16, `config.json` and `generation_config.json` into `folder`."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in per_expert(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    _write_json(folder / "config.json", published_config(model.config))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": end_of_text,
            "do_sample": False,
            "eos_token_id": [turn_end, end_of_text],
            "pad_token_id": end_of_text,
        },
    )


def per_expert(model: Qwen3MoeForCausalLM) -> dict[str, torch.Tensor]:
    """The state dict with the fused experts split, and without the output head that is tied to the embedding."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, fused in enumerate(tensor):
                gate, up = fused.chunk(2)
                tensors[f"{prefix}{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}{expert}.up_proj.weight"] = up
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                tensors[f"{prefix}{expert}.down_proj.weight"] = down
        elif name != "lm_head.weight":
            tensors[name] = tensor
    return tensors


def published_config(config: Qwen3MoeConfig) -> dict:
    """The keys of a published qwen3_moe `config.json`, in alphabetical order."""
    known = config.to_dict()
    published = {key: known[key] for key in PUBLISHED_KEYS if key in known} | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": config.num_experts,
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "sliding_window": None,
        "torch_dtype": "bfloat16",
    }
    return dict(sorted(published.items()))


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
