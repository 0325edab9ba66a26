"""Of several truths in a directory the loader's own counts: what transformers reads is what is read here; everything
else that holds weights of the model is named and left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

from reapkit.checkpoint import weight_files
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.companions import companions, stray_note, unheld_note
from reapkit.checkpoint.hub import download_snapshot, hub_checkpoint
from reapkit.core.errors import UnusableError
from reapkit.pruning.checkpoint import prune_checkpoint
from reapkit.selection.selection import LayerSelection, Selection
from tests.support import tiny
from tests.support.fake_hub import Repository, reached, serve

EXPERT = "model.layers.0.mlp.experts.{}.down_proj.weight"
INDEX = "model.safetensors.index.json"


def weights(value: float, *, experts: int = 4) -> dict[str, torch.Tensor]:
    return {EXPERT.format(expert): torch.full((2, 3), float(value)) for expert in range(experts)}


def directory(path: Path, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None, **config) -> Path:
    path.mkdir()
    for name, tensors in files.items():
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        save_file(tensors, path / name, {"format": "pt"})
    if index is not None:
        (path / config.get("transformers_weights", INDEX)).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    return path


A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DIRECTORIES = {
    "the single file before an index that disagrees": (
        {"model.safetensors": weights(1), A: weights(2)},
        dict.fromkeys(weights(0), A),
    ),
    "the index before what it does not name": (
        {A: weights(1), B: weights(2), "model.fp16.safetensors": weights(3), "consolidated.safetensors": weights(4)},
        dict.fromkeys(weights(0), A),
    ),
    "all that a shard holds, whatever the index says of it": (
        {A: weights(1, experts=3), B: {EXPERT.format(3): torch.ones(2, 3)}},
        {EXPERT.format(0): A, EXPERT.format(3): B},
    ),
    "of two of one name the last": (
        {A: weights(1), B: weights(2, experts=2)},
        {EXPERT.format(expert): A for expert in range(4)} | {"other": B},
    ),
}


def transformers_reads(path: Path) -> tuple[list[str], dict[str, float]]:
    """Its own resolution: file names, and one value of every tensor that it would take."""
    config = json.loads((path / "config.json").read_text())
    files, _ = _get_resolved_checkpoint_files(
        str(path), None, None, None, {}, False, config.get("transformers_weights")
    )
    taken: dict[str, float] = {}
    for file in files or ():
        with safe_open(file, "pt") as shard:  # as `_load_pretrained_model` merges them
            taken |= {name: shard.get_tensor(name)[0, 0].item() for name in shard.keys()}
    return [Path(file).name for file in files or ()], taken


def reapkit_reads(path: Path) -> tuple[list[str], dict[str, float]]:
    source, values = Checkpoint.open(path), {}
    for name, tensor in source.tensors.items():
        raw = (path / tensor.shard).read_bytes()[tensor.begin : tensor.end]
        values[name] = torch.frombuffer(bytearray(raw), dtype=torch.float32)[0].item()
    return list(source.weights.shards), values


@pytest.mark.parametrize("kind", DIRECTORIES)
def test_what_transformers_reads_is_what_is_read(kind: str, tmp_path: Path) -> None:
    files, index = DIRECTORIES[kind]
    path = directory(tmp_path / "model", files, index)
    assert reapkit_reads(path) == transformers_reads(path)


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_the_file_that_the_config_names_comes_first(name: str, tmp_path: Path) -> None:
    files = {"model.safetensors": weights(1), "other.safetensors": weights(2)}
    index = dict.fromkeys(weights(0), "other.safetensors") if name.endswith(".json") else None
    path = directory(tmp_path / "model", files, index, transformers_weights=name)
    assert reapkit_reads(path) == transformers_reads(path)
    assert set(reapkit_reads(path)[1].values()) == {2.0}


@torch.no_grad()
def test_of_two_shards_that_hold_a_tensor_the_models_is_cut(tmp_path: Path) -> None:
    """The model that transformers loads, and the one it loads once cut by nothing: the same."""
    source = tiny.save_hub_layout(tiny.build("qwen3_moe", num_hidden_layers=1), tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    stale = {name: tensor * 3 for name, tensor in tensors.items()}
    save_file(stale, source / A, {"format": "pt"})
    save_file(tensors, source / B, {"format": "pt"})
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, A) | {"x": B}}))
    (source / "consolidated.safetensors").write_bytes(b"")
    checkpoint = Checkpoint.open(source)
    written = prune_checkpoint(
        checkpoint, Selection("x", {0: LayerSelection(tuple(range(16)), (), ())}), tmp_path / "out"
    )
    assert written.left_out == ("consolidated.safetensors",)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    ids = torch.arange(3, 20)[None]
    with tiny.quiet():
        before, after = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (source, tmp_path / "out"))
    assert torch.equal(before, after)
    assert unheld_note(checkpoint) == [
        f"{INDEX} names 1 tensors that no shard holds, such as x. transformers does not look for them; where the model"
        " needs one, it is refused before a token runs."
    ]


def test_what_is_written_is_found_without_the_configs_field(tmp_path: Path) -> None:
    source = tiny.save_hub_layout(tiny.build("qwen3_moe", num_hidden_layers=1), tmp_path / "model")
    (source / "model.safetensors").rename(source / "second.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"transformers_weights": "second.safetensors"}
    (source / "config.json").write_text(json.dumps(config))
    everything = Selection("x", {0: LayerSelection(tuple(range(8)), (), ())})
    prune_checkpoint(Checkpoint.open(source), everything, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["transformers_weights"] is None
    assert Checkpoint.open(tmp_path / "out").shards == ("model.safetensors",)


@pytest.mark.parametrize(
    ("files", "config", "words"),
    [
        ({"consolidated.safetensors": weights(1)}, {}, "found consolidated.safetensors, but neither model.safetensors"),
        ({A: weights(1), B: weights(1)}, {}, "no loader knows which of them to read. Download the index too"),
        ({"model.safetensors": weights(1)}, {"transformers_weights": "gone.safetensors"}, "is no safetensors file"),
        ({"model.safetensors": weights(1)}, {"transformers_weights": "../x.safetensors"}, "is no safetensors file"),
        ({}, {}, "there are no safetensors weights"),
    ],
)
def test_what_no_loader_reads_is_refused(files: dict, config: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=words):
        Checkpoint.open(directory(tmp_path / "model", files, None, **config))


def test_an_adapter_is_left_out_unless_the_loader_would_put_it_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"model.safetensors": weights(1), "adapter_model.safetensors": {"lora_A": torch.ones(1)}}
    path = directory(tmp_path / "model", files, None)
    (path / "adapter_config.json").write_text("{}")
    assert companions(Checkpoint.open(path), {"config.json"}) == (
        [],
        ("adapter_config.json", "adapter_model.safetensors"),
    )
    monkeypatch.setattr(weight_files, "find_spec", lambda name: importlib.util.find_spec("json"))
    with pytest.raises(UnusableError, match=r"peft is\s+installed.*Merge it into the weights first"):
        Checkpoint.open(path)


def test_other_weights_of_the_model_are_strays_and_configs_travel(tmp_path: Path) -> None:
    files = {
        "model.safetensors": weights(1),
        "model.fp16.safetensors": weights(1),
        "fp8/model.safetensors": weights(1),
        "checkpoint-10/adapter_model.safetensors": {"base.layers.0.mlp.experts.0.up_proj.lora_A.weight": torch.ones(1)},
        "codec/model.safetensors": {"encoder.weight": torch.ones(1)},
        "onnx/model.safetensors": {"x": torch.ones(1)},
    }
    path = directory(tmp_path / "model", files, dict.fromkeys(weights(0), A))
    small = (
        *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
        *("feature_extractor/preprocessor_config.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"),
        *("audio_config.json", "tokenizer.json", "LICENSE", "fp8/config.json", "codec/config.json"),
    )
    for name in (*small, "pytorch_model.bin", "consolidated.00.pth", "model.fp16.safetensors.index.json", "x.gguf"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    copies, strays = companions(Checkpoint.open(path), {"config.json"})
    assert set(copies) == {*small, "codec/model.safetensors"} - {"fp8/config.json"}
    assert set(strays) == {
        *("fp8/", "checkpoint-10/", "onnx/model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "x.gguf"),
        *("model.fp16.safetensors", "model.fp16.safetensors.index.json", INDEX),
    }
    [note] = stray_note(strays)
    assert note.startswith("Not read by the loader, and left out of what is written: ") and "and 4 more" in note


def test_the_hub_gives_only_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "model.safetensors": weights(1),
        "model.fp16.safetensors": weights(2),
        A: weights(3),
        "consolidated.safetensors": weights(4),
        "fp8/model.safetensors": weights(5),
    }
    path = directory(tmp_path / "model", files, dict.fromkeys(weights(0), A))
    used = {"preprocessor_config.json", "chat_template.jinja", "code/extra.py", "LICENSE", "config.json"}
    unused = {"pytorch_model.bin", "figures/benchmark.png", "teaser.png", "original/params.json", "x.gguf"}
    for name in used - {"config.json"} | unused:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    with serve() as hub:
        reached(hub, tmp_path / "cache", monkeypatch)
        hub.repositories["org/x"] = Repository(path)
        planned = hub_checkpoint("org/x", None)
        downloaded = download_snapshot("org/x", None)
        assert planned.identity == Checkpoint.open(downloaded).identity
        found = {file.relative_to(downloaded).as_posix() for file in downloaded.rglob("*") if file.is_file()}
        assert found == used | {"model.safetensors", INDEX}
        assert reapkit_reads(downloaded)[1] == reapkit_reads(path)[1]
