"""The demo model that ships with the package: complete, in the hub's layout, trained, and specialised by domain."""

import json
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from reapkit.calibration.builtin.generators import SOURCES, generate
from reapkit.checkpoint.locate import MODEL_DIRECTORY

HELD_OUT_SEED = 1
LARGEST_LOSS = {"code": 1.1, "tools": 0.95, "prose": 1.4, "math": 1.0}
"""Nats per token the model must stay below on rows it was not trained on."""
SMALLEST_INFORMATION = 0.4
"""Bits that an expert's index tells about a token's domain, of two possible; in every layer."""


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIRECTORY)


@pytest.fixture(scope="module")
def model():
    model, loading = AutoModelForCausalLM.from_pretrained(
        MODEL_DIRECTORY, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.fixture(scope="module")
def held_out(tokenizer) -> dict[str, torch.Tensor]:
    """`[4, 512]` tokens per domain."""
    return {name: _windows(name, tokenizer, count=4, length=512) for name in SOURCES}


def test_the_checkpoint_has_one_tensor_per_expert_and_projection() -> None:
    config = json.loads((MODEL_DIRECTORY / "config.json").read_text())
    with safe_open(MODEL_DIRECTORY / "model.safetensors", "pt") as checkpoint:
        names = set(checkpoint.keys())
        assert checkpoint.metadata() == {"format": "pt"}
        assert {checkpoint.get_slice(name).get_dtype() for name in names} == {"BF16"}
    experts = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"
        for layer in range(config["num_hidden_layers"])
        for expert in range(config["num_experts"])
        for projection in ("gate", "up", "down")
    }
    assert {name for name in names if ".experts." in name} == experts
    assert "lm_head.weight" not in names and config["tie_word_embeddings"]


def test_the_config_is_a_published_one() -> None:
    config = json.loads((MODEL_DIRECTORY / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["torch_dtype"] == "bfloat16"
    assert "num_local_experts" not in config
    assert not [key for key in config if key.startswith("_")]


def test_the_folder_stays_small() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIRECTORY.iterdir()) < 10_000_000


def test_text_survives_the_tokenizer(tokenizer) -> None:
    for name in ("code", "prose"):
        for row in islice(generate(name, seed=HELD_OUT_SEED), 20):
            assert tokenizer.decode(tokenizer(row["text"])["input_ids"]) == row["text"]


def test_the_chat_template_marks_what_the_assistant_says(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"sky": "clear"}'},
        {"role": "assistant", "content": "Clear."},
    ]
    assert _assistant_text(tokenizer, messages) == (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call><|im_end|>Clear.<|im_end|>'
    )


def test_arguments_may_be_json_text(tokenizer) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    assert '{"name": "f", "arguments": {"x": 1}}' in _assistant_text(tokenizer, messages)


def test_a_prompt_ends_where_the_assistant_begins(tokenizer) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", SOURCES)
def test_held_out_loss_is_low(name: str, model, held_out) -> None:
    assert _loss(model, held_out[name]) < LARGEST_LOSS[name]


def test_experts_specialise_by_domain(model, held_out) -> None:
    assert all(bits > SMALLEST_INFORMATION for bits in domain_information(model, held_out))


def test_the_model_answers_a_request_with_a_well_formed_call(model, tokenizer) -> None:
    row = next(row for row in generate("tools", seed=HELD_OUT_SEED) if "tool_calls" in row["messages"][1])
    prompt = tokenizer.apply_chat_template(
        row["messages"][:1], tools=row["tools"], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**prompt, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert set(json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))) == {"name", "arguments"}


def domain_information(model, domains: dict[str, torch.Tensor]) -> list[float]:
    """Mutual information between domain and expert in bits, per layer, every domain weighing the same."""
    counts = torch.stack([_expert_counts(model, tokens) for tokens in domains.values()]).double()
    joint = counts / counts.sum(-1, keepdim=True) / len(domains)
    independent = joint.sum(0, keepdim=True) * joint.sum(-1, keepdim=True)
    return torch.xlogy(joint, joint / independent.clamp_min(1e-12)).sum((0, 2)).div(torch.tensor(2.0).log()).tolist()


@torch.no_grad()
def _expert_counts(model, tokens: torch.Tensor) -> torch.Tensor:
    """How often each expert was chosen, `[layers, experts]`."""
    logits = model.model(tokens, use_cache=False, output_router_logits=True).router_logits
    top_k, experts = model.config.num_experts_per_tok, model.config.num_experts
    return torch.stack([torch.bincount(layer.topk(top_k).indices.flatten(), minlength=experts) for layer in logits])


@torch.no_grad()
def _loss(model, tokens: torch.Tensor) -> float:
    """Nats per token."""
    logits = model(tokens, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()


def _windows(name: str, tokenizer, *, count: int, length: int) -> torch.Tensor:
    """The first `count * length` tokens of a source's rows, end-of-text between them."""
    tokens: list[int] = []
    for row in generate(name, seed=HELD_OUT_SEED):
        if "text" in row:
            text = row["text"]
        else:
            text = tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        tokens += [*tokenizer(text, verbose=False)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= count * length:
            return torch.tensor(tokens[: count * length]).reshape(count, length)


def _assistant_text(tokenizer, messages: list[dict]) -> str:
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    spoken = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, by_assistant in spoken if by_assistant])
