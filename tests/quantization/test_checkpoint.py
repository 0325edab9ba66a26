"""Quantized directories: exact bits on disk, the source's names and config, one progress of ours, and what is
refused."""

from __future__ import annotations

import gc
import json
import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import reapkit.quantization.oneshot as oneshot
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import RecipeError, StageFailed
from reapkit.evaluation.proofs.quantized import prove_quantized
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.quantization.dense import relative_error
from reapkit.quantization.oneshot import equal_batches
from reapkit.quantization.schemes import SCHEMES
from reapkit.quantization.sizes import quantized_bytes
from reapkit.quantization.targets import targets
from reapkit.recipe.schema import QuantizeSpec
from tests.support import quantized_sources
from tests.support.tiny import build, save_hub_layout
from tests.support.tiny_tokens import tiny_tokens

PER_EXPERT = ("qwen3_moe", "mixtral", "minimax_m2", "phimoe", "glm4_moe", "deepseek_v3")
STACKED = ("granitemoe", "gpt_oss", "gemma4_text")


def spec_of(scheme: str = "W3A16", method: str = "rtn", **more: object) -> QuantizeSpec:
    group = {} if SCHEMES[scheme].fixed else {"group_size": 32}
    return QuantizeSpec(scheme=scheme, method=method, **{**group, **more})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    """`saved(model_type)`: a tiny bf16 checkpoint with a companion file, saved once."""
    directories: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in directories:
            wide = {
                "gemma4_text": {"hidden_size_per_layer_input": 32},
                "deepseek_v3": {"kv_lora_rank": 32, "q_lora_rank": 32},
            }.get(model_type, {})
            path = save_hub_layout(
                build(model_type, dtype=torch.bfloat16, num_hidden_layers=2, **wide),
                tmp_path_factory.mktemp(model_type) / "model",
            )
            (path / "chat_template.jinja").write_text("{{ messages }}")
            (path / "README.md").write_text("the source's card")
            directories[model_type] = path
        return directories[model_type]

    return of


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory):
    return tiny_tokens(tmp_path_factory.mktemp("tokens"), lengths=(40, 24, 40, 24, 40, 17, 40, 24), score="all")


def holds(source: Path, out: Path, spec: QuantizeSpec) -> dict[str, bool]:
    """Every proof holds; name -> whether it could be measured."""
    proofs = prove_quantized(source, out, spec)
    assert not [proof for proof in proofs if not proof.passed]
    return {proof.name: proof.measured for proof in proofs}


@pytest.mark.parametrize(
    "scheme",
    [
        "W3A16",
        "W8A16",
        "FP8_DYNAMIC",
        "MXFP4A16",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("W2A16", "FP8_BLOCK", "MXFP8A16", "NVFP4A16")),
    ],
)
def test_every_scheme_takes_exactly_the_bytes_predicted_and_is_proven(saved, tmp_path: Path, scheme: str) -> None:
    source, spec = saved("qwen3_moe"), spec_of(scheme)
    facts = quantize_checkpoint(source, tmp_path / "out", spec)
    assert facts["nbytes"] == Checkpoint.open(tmp_path / "out").nbytes == quantized_bytes(Checkpoint.open(source), spec)
    assert holds(source, tmp_path / "out", spec)["loads"] == SCHEMES[scheme].experts_reload


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_w3a16_with_groups_of_128_is_three_and_an_eighth_bits_in_every_matrix(
    tokens, tmp_path: Path, method: str
) -> None:
    model = build(
        "qwen3_moe",
        dtype=torch.bfloat16,
        hidden_size=128,
        moe_intermediate_size=128,
        head_dim=32,
        num_experts=4,
        num_hidden_layers=2,
    )
    source, spec = save_hub_layout(model, tmp_path / "model"), QuantizeSpec(scheme="W3A16", method=method)
    facts = quantize_checkpoint(source, tmp_path / "out", spec, calibration=tokens)
    assert facts["bits_per_weight"] == 3.125
    assert facts["quantized_matrices"] == 2 * (4 * 3 + 4)
    before, after = Checkpoint.open(source).tensors, Checkpoint.open(tmp_path / "out").tensors
    bits = {
        name: sum(after[name.removesuffix("weight") + part].nbytes for part in ("weight_packed", "weight_scale"))
        * 8
        / before[name].numel
        for name in targets(Checkpoint.open(source), spec).matrices
    }
    assert len(bits) == facts["quantized_matrices"] and set(bits.values()) == {3.125}
    (proof,) = (proof for proof in prove_quantized(source, tmp_path / "out", spec) if proof.name == "tensors")
    assert proof.passed and "3.125 bits per weight" in proof.detail


@pytest.mark.parametrize("model_type", PER_EXPERT)
def test_gptq_is_saved_under_the_names_that_load(saved, tokens, tmp_path: Path, model_type: str) -> None:
    source, spec = saved(model_type), spec_of(method="gptq")
    facts = quantize_checkpoint(source, tmp_path / "out", spec, calibration=tokens, batch_tokens=80)
    assert holds(source, tmp_path / "out", spec) == dict.fromkeys(
        ("tensors", "dequantized", "loads", "logits", "generates"), True
    )
    assert facts["calibration_tokens"] == tokens.num_tokens


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        *((name, "rtn") for name in STACKED),
        ("gpt_oss", "gptq"),
        *(pytest.param(name, "gptq", marks=pytest.mark.long) for name in ("granitemoe", "gemma4_text")),
    ],
)
def test_stacked_experts_are_written_one_by_one(saved, tokens, tmp_path: Path, model_type: str, method: str) -> None:
    source, spec = saved(model_type), spec_of("W4A16", method)
    facts = quantize_checkpoint(source, tmp_path / "out", spec, calibration=tokens)
    measured = holds(source, tmp_path / "out", spec)
    assert measured["tensors"] and measured["dequantized"] and measured["logits"] and not measured["loads"]
    assert facts["nbytes"] == quantized_bytes(Checkpoint.open(source), spec)


def test_config_and_companions_are_the_sources_own(saved, tmp_path: Path) -> None:
    source = saved("mixtral")
    quantize_checkpoint(source, tmp_path / "out", spec_of())
    before, after = ((directory / "config.json").read_text() for directory in (source, tmp_path / "out"))
    quantization = json.loads(after)["quantization_config"]
    assert {**json.loads(before), "quantization_config": quantization} == json.loads(after)
    assert after.startswith(before.rstrip().removesuffix("}").rstrip())
    assert {"lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"} <= set(quantization["ignore"])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_shards_stay_shards_and_none_is_larger_than_allowed(tmp_path: Path, tokens, method: str) -> None:
    source, spec = (
        save_hub_layout(build("qwen3_moe", dtype=torch.bfloat16), tmp_path / "model", max_shard_size="200KB"),
        spec_of(method=method),
    )
    before, whole, limit = Checkpoint.open(source), {}, 20_000
    assert len(before.shards) > 1
    for name, most in (("kept", 200_000), ("split", limit)):
        quantize_checkpoint(source, tmp_path / name, spec, calibration=tokens, max_shard_bytes=most)
        result = Checkpoint.open(tmp_path / name)
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == result.nbytes == quantized_bytes(before, spec)
        assert index["weight_map"] == {tensor.name: tensor.shard for tensor in result.tensors.values()}
        assert sorted(result.shards) == sorted(
            file.name for file in (tmp_path / name).glob("*.safetensors")
        ) and not list((tmp_path / name).glob("*.part"))
        whole[name] = {
            key: value for shard in result.shards for key, value in load_file(tmp_path / name / shard).items()
        }
        sizes = {
            shard: [tensor.nbytes for tensor in result.tensors.values() if tensor.shard == shard]
            for shard in result.shards
        }
        assert all(sum(held) <= most or len(held) == 1 for held in sizes.values())
        assert result.shards == before.shards if name == "kept" else len(result.shards) > len(before.shards)
    assert whole["kept"].keys() == whole["split"].keys() and all(
        torch.equal(whole["kept"][key], whole["split"][key]) for key in whole["kept"]
    )
    holds(source, tmp_path / "split", spec)


def test_gptq_beats_rounding_on_what_it_was_calibrated_for(saved, tokens, tmp_path: Path) -> None:
    from reapkit.model.loading import load_model

    source = saved("glm4_moe")
    rows = [tokens.row(row).input_ids[None] for row in range(tokens.num_rows)]

    def logits(directory: Path) -> torch.Tensor:
        model = load_model(directory)
        with torch.no_grad():
            return torch.cat([model(row, use_cache=False).logits.float().flatten() for row in rows])

    base = logits(source)
    loss = {}
    for method in ("rtn", "gptq"):
        quantize_checkpoint(source, tmp_path / method, spec_of(method=method), calibration=tokens)
        loss[method] = relative_error(logits(tmp_path / method), base)
    assert loss["gptq"] < loss["rtn"]


def test_experts_that_saw_no_token_are_rounded_and_not_erased(saved, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    few = tiny_tokens(tmp_path / "tokens", lengths=(2,), groups=1, score="all")
    facts = quantize_checkpoint(source, tmp_path / "out", spec_of(method="gptq"), calibration=few)
    unseen = facts["experts_rounded_to_nearest"]["model.layers.0.mlp.experts"]
    assert len(unseen) >= 16 - 2 * 4 and set(unseen.values()) == {0}
    quantize_checkpoint(source, tmp_path / "rtn", spec_of(method="rtn"))
    calibrated, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "rtn"))
    ours = [name for name in rounded if any(f"layers.0.mlp.experts.{expert}." in name for expert in unseen)]
    assert len(ours) == len(unseen) * 3 * 3  # three projections: packed weights, scales, shape
    assert all(torch.equal(calibrated[name], rounded[name]) for name in ours)


@pytest.mark.parametrize("everywhere", [False, True])
def test_experts_are_calibrated_on_their_own_tokens_or_by_choice_on_all(
    saved, tokens, tmp_path: Path, monkeypatch, everywhere: bool
) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    seen, collect = Counter(), GPTQModifier.calibrate_module

    def spy(self, module, args, output):
        seen[self._module_names[module]] += args[0].flatten(0, -2).shape[0]
        return collect(self, module, args, output)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", spy)
    few = quantize_checkpoint(
        saved("qwen3_moe"),
        tmp_path / "out",
        spec_of(method="gptq", calibrate_all_experts=everywhere),
        calibration=tokens,
    )
    experts = [seen[f"model.layers.0.mlp.experts.{expert}.up_proj"] for expert in range(16)]
    assert seen["model.layers.0.self_attn.q_proj"] == tokens.num_tokens
    assert experts == [tokens.num_tokens] * 16 if everywhere else sum(experts) == 4 * tokens.num_tokens
    known = few["experts_with_few_tokens"].get("model.layers.0.mlp.experts", {})
    assert known == ({} if everywhere else {expert: count for expert, count in enumerate(experts) if 0 < count < 128})
    assert bool(few["experts_with_few_tokens"]) != everywhere


@pytest.mark.long
def test_autoround_is_saved_under_the_names_that_load(saved, tokens, tmp_path: Path) -> None:
    source, spec = saved("qwen3_moe"), spec_of("W4A16", "autoround")
    quantize_checkpoint(source, tmp_path / "out", spec, calibration=tokens)
    assert all(holds(source, tmp_path / "out", spec).values())


def test_awq_keeps_the_rescaled_norms_and_routers(saved, tokens, tmp_path: Path) -> None:
    source, spec = saved("qwen3_moe"), spec_of("W4A16", method="awq")
    quantize_checkpoint(source, tmp_path / "out", spec, calibration=tokens)
    measured = holds(source, tmp_path / "out", spec)
    assert measured["loads"] and measured["logits"] and not measured["dequantized"]
    old, new = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "out"))
    assert not torch.equal(old["model.layers.0.mlp.gate.weight"], new["model.layers.0.mlp.gate.weight"])


def test_block_fp8_sources_are_dequantized_first(saved, tokens, tmp_path: Path) -> None:
    source = Path(str(saved("qwen3_moe")))
    fp8 = tmp_path / "fp8"
    fp8.mkdir()
    tensors, plain, packed = load_file(source / "model.safetensors"), {}, {}
    plan = targets(Checkpoint.open(source), spec_of())
    for name, tensor in tensors.items():
        if name in plan.matrices:
            grid = [math.ceil(side / 32) for side in tensor.shape]
            scale = torch.rand(grid, generator=torch.Generator().manual_seed(len(packed))) * 0.01 + 0.001
            whole = scale.repeat_interleave(32, 0)[: tensor.shape[0]].repeat_interleave(32, 1)[:, : tensor.shape[1]]
            packed[name], packed[f"{name}_scale_inv"] = (tensor.float() / whole).to(torch.float8_e4m3fn), scale
            plain[name] = (packed[name].float() * whole).to(torch.bfloat16)
        else:
            packed[name] = plain[name] = tensor
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (fp8 / "config.json").write_text(json.dumps(config))
    save_file(packed, fp8 / "model.safetensors", metadata={"format": "pt"})
    for method in ("rtn", "gptq"):
        facts = quantize_checkpoint(fp8, tmp_path / method, spec_of(method=method), calibration=tokens)
        assert facts["nbytes"] == quantized_bytes(Checkpoint.open(fp8), spec_of())
        holds(fp8, tmp_path / method, spec_of(method=method))
    assert not list(tmp_path.glob("*.dequantized"))


def test_a_spec_that_does_not_fit_is_refused_before_anything_is_written(saved, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"quantize\.group_size: 64 does not divide the input width 32"):
        quantize_checkpoint(saved("qwen3_moe"), tmp_path / "out", spec_of(group_size=64))
    with pytest.raises(RecipeError, match="the patterns leave no matrix to quantize"):
        quantize_checkpoint(saved("qwen3_moe"), tmp_path / "out", spec_of(ignore=("re:.*",)))
    assert not (tmp_path / "out").exists()


def test_batches_are_rows_of_one_length_and_all_of_them(tokens) -> None:
    shapes = [tuple(batch["input_ids"].shape) for batch in equal_batches(tokens, 80)]
    assert shapes == [(2, 40), (2, 40), (3, 24), (1, 17)]


def test_nothing_is_printed(saved, tokens, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    quantize_checkpoint(saved("qwen3_moe"), tmp_path / "out", spec_of(method="gptq"), calibration=tokens)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_calibration_looks_at_no_later_token(
    saved, tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """With the repair taken out, llm-compressor's pipeline calibrates these two bidirectionally, and the run must
    notice."""
    quantize_checkpoint(saved(model_type), tmp_path / "right", spec_of(method="gptq"), calibration=tokens)
    monkeypatch.setattr(oneshot, "causal_tracing", nullcontext)
    with pytest.raises(StageFailed, match="calibration ran another attention than the model's own"):
        quantize_checkpoint(saved(model_type), tmp_path / "wrong", spec_of(method="gptq"), calibration=tokens)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_the_quantizer_sees_the_activations_of_a_plain_forward(
    tokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """In every layer: what enters it, behind the layers that are quantized already; in the first: behind its attention
    and in its experts.

    In float32, so that no rounding sends a token to another expert.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier

    from reapkit.model.loading import load_model
    from reapkit.quantization.loading import taken_apart

    source = save_hub_layout(build(model_type, num_hidden_layers=2), tmp_path / "model")
    seen, collect = {}, GPTQModifier.calibrate_module

    def spy(self, module, args, output):
        seen.setdefault(self._module_names[module], []).append(args[0].detach().float().flatten(0, -2))
        return collect(self, module, args, output)

    monkeypatch.setattr(GPTQModifier, "calibrate_module", spy)
    quantize_checkpoint(source, tmp_path / "out", spec_of("W8A16", "gptq"), calibration=tokens, batch_tokens=80)
    with taken_apart(source) as (plain, _):
        first = _inputs(plain, [name for name in seen if name.startswith("model.layers.0.")], tokens)
    later = _inputs(load_model(tmp_path / "out"), ["model.layers.1.self_attn.q_proj"], tokens)
    assert any(".experts." in name for name in first) and "model.layers.0.self_attn.o_proj" in first
    gaps = {name: relative_error(torch.cat(seen[name]), expected) for name, expected in (first | later).items()}
    assert max(gaps.values()) < 1e-4, max(gaps, key=gaps.get)


def _inputs(model: torch.nn.Module, names: list[str], tokens) -> dict[str, torch.Tensor]:
    """What enters these modules in a plain forward of all rows, in the order of calibration."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found[name].append(args[0].float().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in equal_batches(tokens, 80):
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_the_session_of_llmcompressor_is_released(saved, tokens, tmp_path: Path) -> None:
    from llmcompressor.core import active_session
    from transformers import Qwen3MoeForCausalLM

    def models() -> list[Qwen3MoeForCausalLM]:
        gc.collect()
        return [thing for thing in gc.get_objects() if isinstance(thing, Qwen3MoeForCausalLM)]

    others = models()  # what earlier tests of this process hold
    quantize_checkpoint(saved("qwen3_moe"), tmp_path / "out", spec_of(method="gptq"), calibration=tokens)
    assert active_session().state.model is None
    kept = [model for model in models() if not any(model is other for other in others)]
    assert not [
        name for model in kept for name, _ in (*model.named_parameters(), *model.named_buffers())
    ]  # whoever keeps it has no weights


def test_a_raw_recipe_decides_what_is_quantized(saved, tokens, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["re:.*experts.*_proj$"], "weights": weights}
    spec = QuantizeSpec(
        recipe={
            "quantize_stage": {
                "quantize_modifiers": {"GPTQModifier": {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}}
            }
        }
    )
    facts = quantize_checkpoint(saved("qwen3_moe"), tmp_path / "out", spec, calibration=tokens)
    assert (
        facts["quantized_matrices"] == 2 * 16 * 3
        and "model.layers.0.self_attn.q_proj" in facts["left"]["the recipe leaves it"]
    )
    assert holds(saved("qwen3_moe"), tmp_path / "out", spec)["loads"]
    names = set(Checkpoint.open(tmp_path / "out").tensors)
    assert (
        "model.layers.0.self_attn.q_proj.weight" in names
        and "model.layers.1.mlp.experts.7.up_proj.weight_packed" in names
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"quantize_stage": {"quantize_modifiers": {"GPTQModifierr": {}}}}, "llm-compressor refuses the recipe"),
        ({"stage": {"modifiers": {"GPTQModifier": {}}}}, "holds no modifier"),
        (
            {
                "quantize_stage": {
                    "quantize_modifiers": {"QuantizationModifier": {"targets": ["Linear"], "scheme": "FP8_DYNAMIC"}}
                }
            },
            "quantizes lm_head, which reapkit never does",
        ),
        (
            {
                "quantize_stage": {
                    "quantize_modifiers": {
                        "GPTQModifier": {"targets": ["Linear"], "scheme": "W4A16_ASYM", "ignore": ["lm_head"]}
                    }
                }
            },
            "stores zero points",
        ),
    ],
)
def test_a_raw_recipe_that_cannot_be_written_is_refused(
    saved, tokens, tmp_path: Path, recipe: dict, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize_checkpoint(saved("qwen3_moe"), tmp_path / "out", QuantizeSpec(recipe=recipe), calibration=tokens)


def test_an_int4_source_is_calibrated_to_fewer_bits(tokens, tmp_path: Path) -> None:
    """As Kimi is published; its plain form is a copy that is gone afterwards."""
    source = quantized_sources.write("compressed-tensors W4A16", tmp_path / "source")
    facts = quantize_checkpoint(source, tmp_path / "out", spec_of(method="gptq"), calibration=tokens)
    assert facts["nbytes"] == quantized_bytes(Checkpoint.open(source), spec_of(method="gptq"))
    holds(source, tmp_path / "out", spec_of(method="gptq"))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}
