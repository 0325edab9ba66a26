"""Selections and other tools' files with absurd values are refused or mean what they say; none ends in a defect."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from reapkit.checkpoint.architecture import Architecture
from reapkit.core.errors import ReapkitError, UnusableError
from reapkit.observation.observation import Observation
from reapkit.report.inspection.selection import facts
from reapkit.selection.foreign_formats import read_foreign
from reapkit.selection.selection import LayerSelection, Selection
from tests.support.hostile_json import NUMBERS, absurd_texts

MODEL = Architecture("qwen3_moe", 2, 4, 2)
CHOSEN = Selection(
    "reap",
    {layer: LayerSelection((0, 2), (1, 3), (0.5, 0.1, 1.0, 0.0), {1: "lowest", 3: "lowest"}) for layer in range(2)},
    experts_per_token=2,
)


@pytest.mark.parametrize("seed", range(3))
def test_a_selection_is_refused_or_read_as_it_was_meant(tmp_path: Path, seed: int) -> None:
    refused = 0
    for text in absurd_texts(CHOSEN.to_json(), random.Random(seed), 150):
        (tmp_path / "selection.json").write_text(text)
        try:
            found = Selection.load(tmp_path)
        except ReapkitError as error:
            assert error.exit_code in (2, 3) and len(str(error)) < 500
            refused += 1
            continue
        facts(tmp_path)
        found.save(tmp_path / "again")
        assert Selection.load(tmp_path / "again") == found
        for layer in found.layers.values():
            assert {type(expert) for expert in (*layer.keep, *layer.drop)} == {int}
    assert refused > 75


@pytest.mark.parametrize("number", NUMBERS[:5])
def test_a_saliency_that_is_no_number_is_refused(tmp_path: Path, number: str) -> None:
    text = json.dumps(CHOSEN.to_json()).replace("0.1", number)
    (tmp_path / "selection.json").write_text(text)
    with pytest.raises(UnusableError, match="selection cannot be read"):
        Selection.load(tmp_path)


def test_experts_are_whole_numbers_and_fewer_than_are_routed_to_do_not_stay(tmp_path: Path) -> None:
    for damaged in (
        {"layers": {"0": {"keep": [0.0, True], "drop": []}}},
        {"layers": {"0": {"keep": [0, 1], "drop": []}}, "experts_per_token": 10**9},
        {"layers": {"0": {"keep": [0], "drop": [1], "saliency": [1.0]}}},
        {"layers": {"9" * 4000: {"keep": [0], "drop": []}}},
    ):
        with pytest.raises(UnusableError, match=r"selection\.json"):
            Selection.from_json({"criterion": "reap", **damaged})


REPORT = {f"model.layers.{layer}.mlp": [0, 2] for layer in range(2)}
STATE = {
    str(layer): {
        "total_tokens": 10,
        "expert_frequency": [8, 6, 4, 2],
        "ean_sum": [8.0, 12.0, 4.0, 8.0],
        "weighted_ean_sum": [4.0, 1.5, 2.0, 0.25],
    }
    for layer in range(2)
}


@pytest.mark.parametrize("data", [REPORT, STATE], ids=["report", "state"])
@pytest.mark.parametrize("architecture", [MODEL, None], ids=["model", "alone"])
def test_imports_are_refused_or_become_what_can_be_saved(tmp_path: Path, data: dict, architecture) -> None:
    refused = 0
    for number, text in enumerate(absurd_texts(data, random.Random(0), 150)):
        (tmp_path / "file.json").write_text(text)
        try:
            found = read_foreign(tmp_path / "file.json", architecture)
        except ReapkitError as error:
            assert error.exit_code in (2, 3) and len(str(error)) < 6000
            refused += 1
            continue
        found.save(tmp_path / str(number))
        type(found).load(tmp_path / str(number))
    assert refused > 75


def test_a_torn_state_is_refused(tmp_path: Path) -> None:
    torch.save({int(layer): entry for layer, entry in STATE.items()}, tmp_path / "state.pt")
    whole, draw = (tmp_path / "state.pt").read_bytes(), random.Random(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(draw.randrange(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "torn.pt").write_bytes(damaged[: draw.randrange(1, len(damaged) + 1)])
        try:
            assert isinstance(read_foreign(tmp_path / "torn.pt", MODEL), Observation)
        except ReapkitError as error:
            assert error.exit_code == 3
