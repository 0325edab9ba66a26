"""REAPModifier inside llm-compressor's oneshot: what it removes, what it sees, what it saves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.recipe import Recipe
from pydantic import ValidationError
from torch.utils.data import DataLoader

import reapkit.llmcompressor  # noqa: F401  (registers REAPModifier)
from reapkit.calibration.loader import tokens_of_loader
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import UnusableError
from reapkit.model.loading import load_model
from reapkit.model.masking import masked
from reapkit.observation.resident import observe
from reapkit.quantization.quiet import quiet
from reapkit.recipe.schema import ObserveSpec
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.tiny import build, save_hub_layout


class NoProcessor:
    def save_pretrained(self, directory: str) -> None:
        pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    directories: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in directories:
            model = build(model_type, dtype=torch.bfloat16, num_hidden_layers=2)
            directories[model_type] = save_hub_layout(model, tmp_path_factory.mktemp(model_type) / "model")
        return directories[model_type]

    return of


def rows(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    """Three batches of two rows of 16; with padding, 5 more positions at the left or right that no mask lets count."""
    draw = torch.Generator().manual_seed(1)
    batches = [
        {
            "input_ids": torch.randint(3, 250, (2, 16), generator=draw),
            "attention_mask": torch.ones(2, 16, dtype=torch.long),
        }
        for _ in range(3)
    ]
    if padded:
        batches = [
            {name: torch.nn.functional.pad(tensor, (0, 5) if number % 2 else (5, 0)) for name, tensor in batch.items()}
            for number, batch in enumerate(batches)
        ]
    return batches


def run(
    source: Path, modifiers: dict[str, Any], out: Path | None = None, batches: list | None = None
) -> torch.nn.Module:
    """The model after oneshot with these modifiers, in the recipe as YAML."""
    model = load_model(source)
    data = rows() if batches is None else batches
    with quiet():
        try:
            oneshot(
                model=model,
                processor=NoProcessor(),
                dataset=DataLoader(data, batch_size=None),
                num_calibration_samples=len(data),
                recipe=yaml.safe_dump({"some_stage": {"some_modifiers": modifiers}}),
                moe_calibrate_all_experts=False,
                output_dir=None if out is None else str(out),
            )
        finally:
            reset_session()
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(rows()[0]["input_ids"], use_cache=False).logits.float()


@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "mixtral", "glm4_moe", pytest.param("granitemoe", marks=pytest.mark.long), "gpt_oss"]
)
def test_pruned_in_memory_and_on_disk_equal_the_masked_original(saved, tmp_path: Path, model_type: str) -> None:
    source = saved(model_type)
    pruned = run(
        source, {"REAPModifier": {"ratio": 0.5, "selection_path": str(tmp_path / "selection")}}, tmp_path / "out"
    )
    decision = Selection.load(tmp_path / "selection")
    original = load_model(source)
    with masked(original, decision.keep):
        expected = logits(original)
    assert torch.allclose(logits(pruned), expected, atol=0.05) and not torch.allclose(
        logits(original), expected, atol=0.05
    )
    assert torch.equal(logits(load_model(tmp_path / "out")), expected)
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    half = before.architecture.num_experts // 2
    assert after.architecture.num_experts == half and {len(kept) for kept in decision.keep.values()} == {half}
    numbers = {name: re.search(r"\.experts\.(\d+)\.", name) for name in before.tensors}
    assert set(after.tensors) == {name for name, number in numbers.items() if number is None or int(number[1]) < half}
    assert list(json.loads((tmp_path / "out" / "config.json").read_text())) == list(
        json.loads((source / "config.json").read_text())
    )


def test_it_decides_as_an_observation_of_the_same_tokens_does(saved, tmp_path: Path) -> None:
    source = saved("qwen3_moe")
    tokens = tokens_of_loader(rows(), tmp_path / "tokens")
    observe(load_model(source), tokens, ObserveSpec(), batch_tokens=64, work_directory=tmp_path / "work").save(
        tmp_path / "observation"
    )
    settings = {"ratio": 0.25, "criterion": "eaft-reap", "prune": {"caps": [{"layers": "0-1", "min_experts": 10}]}}
    for name, more in (("itself", {}), ("observed", {"observation": str(tmp_path / "observation")})):
        run(source, {"REAPModifier": {**settings, **more, "selection_path": str(tmp_path / name)}})
    itself, observed = (Selection.load(tmp_path / name) for name in ("itself", "observed"))
    assert (
        itself.keep == observed.keep
        and itself.criterion == "eaft-reap"
        and all(len(kept) == 12 for kept in itself.keep.values())
    )
    for layer, chosen in itself.layers.items():
        assert chosen.saliency == pytest.approx(
            observed.layers[layer].saliency, rel=0.02
        )  # bf16: stacked and single experts round apart


def test_what_cannot_be_measured_here_is_refused_before_anything_is_observed(saved) -> None:
    with pytest.raises(
        UnusableError,
        match=r"reroute needs removal paths, which .* an observation that was made with observe.reroute_tokens: 8192",
    ):
        run(saved("qwen3_moe"), {"REAPModifier": {"ratio": 0.25, "criterion": "reroute"}}, batches=[{"no": "rows"}])


def test_padding_is_not_observed(tmp_path: Path) -> None:
    plain, padded = (tokens_of_loader(rows(padded), tmp_path / str(padded)) for padded in (False, True))
    assert plain.num_tokens == padded.num_tokens == 96 and plain.score == "all"
    assert all(torch.equal(plain.row(row).input_ids, padded.row(row).input_ids) for row in range(6))
    marked = tokens_of_loader(
        [{**batch, "loss_mask": torch.arange(16).expand(2, 16) >= 10} for batch in rows()], tmp_path / "marked"
    )
    assert int(marked.row(0).scored.sum()) == 6 and bool(marked.row(0).scored[9])
    with pytest.raises(UnusableError, match="padding between its tokens"):
        tokens_of_loader(
            [{"input_ids": torch.arange(3)[None], "attention_mask": torch.tensor([[1, 0, 1]])}], tmp_path / "hole"
        )
    with pytest.raises(UnusableError, match=r"has no input_ids \(found pixel_values\)"):
        tokens_of_loader([{"pixel_values": torch.zeros(1)}], tmp_path / "none")


def test_a_selection_of_another_model_changes_nothing(saved, tmp_path: Path) -> None:
    Selection("reap", {0: LayerSelection((0, 1), (2,), (1.0, 1.0, 0.0))}).save(tmp_path / "selection")
    with pytest.raises(
        UnusableError, match="layer 0 has 16 experts, the selection decides about 3: it is of another model"
    ):
        run(saved("qwen3_moe"), {"REAPModifier": {"selection": str(tmp_path / "selection")}})
    ragged = {
        layer: LayerSelection(tuple(range(kept)), tuple(range(kept, 16)), (0.0,) * 16)
        for layer, kept in ((0, 8), (1, 10))
    }
    Selection("reap", ragged).save(tmp_path / "ragged")
    with pytest.raises(UnusableError, match="keeps 8 to 10 experts, but a model in memory has one number"):
        run(saved("qwen3_moe"), {"REAPModifier": {"selection": str(tmp_path / "ragged")}})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the amount to remove is missing"),
        ({"ratio": 0.5, "keep_experts": 4}, "both set the budget"),
        ({"ratio": 0.5, "selection": "there"}, "a selection is given, which decides already; remove ratio"),
        ({"ratio": 0.5, "prune": {"capz": []}}, "capz"),
        ({"ratios": 0.5}, "ratios"),
    ],
)
def test_settings_are_refused_before_anything_runs(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.create_instance(yaml.safe_dump({"a_stage": {"a_modifiers": {"REAPModifier": settings}}}))
