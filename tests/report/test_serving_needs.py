"""The cache's bytes against what transformers really keeps; how a directory is spoken to."""

import json

import pytest
import torch

from reapkit.report.serving_needs import cache_bytes_per_token, prompt_kind
from tests.support import tiny

QWEN = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}


@torch.no_grad()
def test_the_cache_of_a_token_is_what_transformers_keeps_of_it():
    model = tiny.build("qwen3_moe")
    cache = model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    kept = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert kept == 10 * cache_bytes_per_token({**model.config.to_dict(), "dtype": "float32"})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (QWEN | {"dtype": "bfloat16"}, 48 * 2 * 4 * 128 * 2),
        ({"text_config": QWEN | {"torch_dtype": "float32"}}, 48 * 2 * 4 * 128 * 4),
        (QWEN | {"layer_types": ["full_attention"] * 48, "sliding_window": 4096}, 48 * 2 * 4 * 128 * 2),
        ({"num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 64}, 2 * 2 * 64 * 2),
        ({"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}, 61 * 576 * 2),
        (QWEN | {"layer_types": ["sliding_attention", "full_attention"]}, None),
        (QWEN | {"layer_types": ["linear_attention", "full_attention"]}, None),
        (QWEN | {"sliding_window": 4096}, None),
        ({"num_hidden_layers": 2}, None),
        ({"num_hidden_layers": [1, 2], "num_attention_heads": 8}, None),
        ({"num_hidden_layers": 61, "kv_lora_rank": 512}, None),
    ],
)
def test_where_layers_keep_something_else_no_number_is_said(config, expected):
    assert cache_bytes_per_token(config) == expected


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"tokenizer_config.json": json.dumps({"chat_template": "{{ messages }}"})}, "chat"),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "x"}, "chat"),
        ({"tokenizer_config.json": "{}"}, "text"),
        ({"tokenizer_config.json": "{"}, "text"),
        ({"tokenizer.json": "{}"}, "text"),
        ({"config.json": "{}"}, "tokens"),
    ],
)
def test_how_a_directory_is_spoken_to(tmp_path, files, kind):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert prompt_kind(tmp_path) == kind
