"""Every proof holds for what is right and fails for what is wrong, in a fresh process too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from safetensors.torch import load_file, save_file

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import StageFailed
from reapkit.evaluation.proofs.proof import Proof, logits_of
from reapkit.evaluation.proofs.prove import Request, prove
from reapkit.evaluation.proofs.pruned import in_doubt_wider, prove_pruned
from reapkit.evaluation.proofs.quantized import prove_quantized
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.pruning.refitted_weights import LayerNames, RepairedWeights
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.recipe.schema import QuantizeSpec
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import build, save_hub_layout

SPEC = QuantizeSpec(scheme="W4A16", method="rtn", group_size=32)
WEIGHTS = "model.safetensors"


def halved(source: Path, out: Path) -> Selection:
    """Prunes every second expert of every layer."""
    checkpoint = Checkpoint.open(source)
    experts = checkpoint.architecture.num_experts
    keep, drop = tuple(range(0, experts, 2)), tuple(range(1, experts, 2))
    selection = Selection(
        "reap", {layer: LayerSelection(keep, drop, (0.0,) * experts) for layer in checkpoint.layout.layers}
    )
    prune_checkpoint(checkpoint, selection, out)
    return selection


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path, Selection]:
    """A source, its pruned and its quantized directory, and the selection."""
    root = tmp_path_factory.mktemp("made")
    save_hub_layout(build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=2), root / "source")
    selection = halved(root / "source", root / "pruned")
    quantize_checkpoint(root / "pruned", root / "quantized", SPEC)
    return root / "source", root / "pruned", root / "quantized", selection


def copied(directory: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(directory, tmp_path / "copy"))


def edit(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def failing(proofs: list[Proof]) -> set[str]:
    return {proof.name for proof in proofs if not proof.passed}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "granitemoe", "gpt_oss", "gemma4_text", "ernie4_5_moe"])
def test_a_pruned_checkpoint_holds_every_proof(tmp_path: Path, model_type: str) -> None:
    source = save_hub_layout(build(model_type), tmp_path / "source")
    proofs = prove_pruned(source, tmp_path / "out", halved(source, tmp_path / "out"))
    assert [proof.name for proof in proofs] == ["tensors", "config", "loads", "logits", "generates"]
    assert not [proof for proof in proofs if not proof.passed or not proof.measured]


def test_all_directories_are_proven_in_one_fresh_process(made) -> None:
    source, pruned, quantized, selection = made
    proofs = prove(
        Request(
            source, {"pruned": pruned, "quantized": quantized}, selection, quantize=SPEC, probe=[[5, 6, 7, 8] * 4] * 2
        )
    )
    assert [proof.directory for proof in proofs] == ["pruned"] * 5 + ["quantized"] * 5
    assert not failing(proofs)
    assert next(proof for proof in proofs if proof.name == "logits").value == 0


def test_a_fresh_process_that_dies_is_a_failed_stage(made, tmp_path: Path) -> None:
    _, pruned, _, selection = made
    with pytest.raises(StageFailed, match="the process that proves the result ended with code 1"):
        prove(Request(tmp_path / "nowhere", {"pruned": pruned}, selection))


def test_a_request_survives_json(made) -> None:
    source, pruned, quantized, selection = made
    request = Request(source, {"pruned": pruned, "quantized": quantized}, selection, "cpu", SPEC, [[1, 2]], True)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))).to_json() == request.to_json()


def test_a_changed_expert_is_found(made, tmp_path: Path) -> None:
    source, pruned, _, selection = made
    wrong = copied(pruned, tmp_path)
    edit(wrong, lambda tensors: tensors["model.layers.0.mlp.experts.3.up_proj.weight"].mul_(2))
    proofs = prove_pruned(source, wrong, selection)
    assert failing(proofs) == {"tensors", "logits"}
    assert proofs[0].detail == (
        "model.layers.0.mlp.experts.3.up_proj.weight differs from what it was cut from, "
        "model.layers.0.mlp.experts.6.up_proj.weight of the source"
    )


def test_router_rows_in_another_order_are_found(made, tmp_path: Path) -> None:
    source, pruned, _, selection = made
    wrong = copied(pruned, tmp_path)
    edit(
        wrong,
        lambda tensors: tensors.update(
            {"model.layers.1.mlp.gate.weight": tensors["model.layers.1.mlp.gate.weight"].flip(0).contiguous()}
        ),
    )
    assert failing(prove_pruned(source, wrong, selection)) == {"tensors", "logits"}


def test_a_config_that_counts_otherwise_is_found(made, tmp_path: Path) -> None:
    source, pruned, _, selection = made
    wrong = copied(pruned, tmp_path)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"num_experts": 16}))
    proofs = prove_pruned(source, wrong, selection)
    assert {"config", "loads"} <= failing(proofs)
    assert "layer 0 holds 8 experts where config.json says 16" in proofs[1].detail


def test_refitted_experts_are_proven_against_their_files(made, tmp_path: Path) -> None:
    source, pruned, _, selection = made
    names = {expert: f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in selection.keep[1]}
    old = load_file(source / WEIGHTS)
    (tmp_path / "repair").mkdir()
    save_file({name: old[name] * 1.5 for name in names.values()}, tmp_path / "repair" / "layer-0001.safetensors")
    weights = RepairedWeights(
        tmp_path / "repair", {1: LayerNames("layer-0001.safetensors", selection.keep[1], None, names)}, {"layers": {}}
    )
    weights.save_index()
    prune_checkpoint(Checkpoint.open(source), selection, tmp_path / "out", repaired=weights)
    assert not failing(prove_pruned(source, tmp_path / "out", selection, repaired=tmp_path / "repair"))
    assert failing(prove_pruned(source, tmp_path / "out", selection)) == {"tensors", "logits"}
    assert failing(prove_pruned(source, pruned, selection, repaired=tmp_path / "repair")) == {"tensors", "logits"}


def test_what_a_directory_says_it_is_suffices(made) -> None:
    _, pruned, quantized, _ = made
    proofs = prove_quantized(pruned, quantized)
    assert not failing(proofs)
    assert proofs[1].by_layer == pytest.approx(error_by_layer(pruned, quantized), rel=1e-3)


def error_by_layer(pruned: Path, quantized: Path) -> dict[str, float]:
    """‖packed − source‖ / ‖source‖ of all of a layer's packed matrices laid end to end, unpacked by compressed-tensors
    itself."""
    source, packed = load_file(pruned / WEIGHTS), load_file(quantized / WEIGHTS)
    ends: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for name in (name.removesuffix("_packed") for name in packed if name.endswith(".weight_packed")):
        weight = source[name].float()
        levels = unpack_from_int32(packed[f"{name}_packed"], 4, torch.Size(weight.shape)).float()
        scale = (
            packed[f"{name}_scale"].float().repeat_interleave(weight.shape[1] // packed[f"{name}_scale"].shape[1], 1)
        )
        ends.setdefault(name.split(".")[2], []).append((levels * scale, weight))
    flat = {
        layer: [torch.cat([part.flatten() for part in side]) for side in zip(*pairs, strict=True)]
        for layer, pairs in ends.items()
    }
    return {layer: float((made - weight).norm() / weight.norm()) for layer, (made, weight) in flat.items()}


def test_swapped_projections_are_found_by_value(made, tmp_path: Path) -> None:
    _, pruned, quantized, _ = made
    wrong = copied(quantized, tmp_path)

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        up, gate = (f"model.layers.0.mlp.experts.1.{name}_proj.weight_" for name in ("up", "gate"))
        for part in ("packed", "scale"):
            tensors[up + part], tensors[gate + part] = tensors[gate + part], tensors[up + part]

    edit(wrong, swap)
    proofs = prove_quantized(pruned, wrong, SPEC)
    assert failing(proofs) == {"dequantized"}
    assert "model.layers.0.mlp.experts.1." in proofs[1].detail


def test_names_that_do_not_load_are_found(made, tmp_path: Path) -> None:
    _, pruned, quantized, _ = made
    wrong = copied(quantized, tmp_path)
    edit(
        wrong,
        lambda tensors: tensors.update(
            {
                name.replace(".mlp.experts.", ".block_sparse_moe.experts."): tensors.pop(name)
                for name in list(tensors)
                if ".mlp.experts." in name
            }
        ),
    )
    proofs = prove_quantized(pruned, wrong, SPEC)
    assert "tensors" in failing(proofs)
    assert "missing, such as model.layers.0.mlp.experts.0.down_proj.weight_packed" in proofs[0].detail


def test_an_unquantized_tensor_that_changed_is_found(made, tmp_path: Path) -> None:
    _, pruned, quantized, _ = made
    wrong = copied(quantized, tmp_path)
    edit(wrong, lambda tensors: tensors["model.norm.weight"].add_(0.5))
    assert failing(prove_quantized(pruned, wrong, SPEC)) == {"tensors"}


def test_a_pruned_model_is_proven_in_the_dtype_that_it_runs_in(made, monkeypatch: pytest.MonkeyPatch) -> None:
    source, pruned, _, selection = made
    seen: list[torch.dtype] = []

    def spied(model, rows: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, rows)
        seen.append(logits.dtype)
        return logits

    monkeypatch.setattr("reapkit.evaluation.proofs.pruned.logits_of", spied)
    monkeypatch.setattr("reapkit.evaluation.proofs.proof.logits_of", spied)
    assert not failing(prove_pruned(source, pruned, selection))
    assert seen == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("holds_in", "wider", "asked", "passes"),
    [
        ({"auto"}, "float32", ["auto"], True),
        ({"float32"}, "float32", ["auto", "float32"], True),
        (set(), "float32", ["auto", "float32"], False),
        ({"float32"}, None, ["auto"], False),
    ],
)
def test_logits_that_differ_are_looked_at_again_in_a_wider_dtype(
    holds_in: set[str], wider: str | None, asked: list[str], passes: bool
) -> None:
    """A near-tie of a router that rounding decides is no fault, an expert that is not the same is one in any dtype."""
    seen: list[str] = []

    def computed(dtype: str) -> list[Proof]:
        seen.append(dtype)
        return [Proof("loads", True, "loads"), Proof("logits", dtype in holds_in, f"differ in {dtype}")]

    loads, logits = in_doubt_wider(computed, wider)
    assert seen == asked
    assert loads.passed
    assert logits.passed == passes
    if passes and wider in seen:
        assert logits.detail == "in float32 they differ in float32; in the model's own dtype they differ in auto"
