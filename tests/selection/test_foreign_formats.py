"""Other tools' files: what they measured becomes ours, what they lack is named, and no code of theirs is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from reapkit.checkpoint.architecture import Architecture
from reapkit.cli.main import app
from reapkit.core.errors import UnusableError
from reapkit.observation.observation import Observation
from reapkit.recipe.schema import SaliencySpec
from reapkit.selection.decide import select
from reapkit.selection.foreign_formats import read_foreign
from reapkit.selection.saliency import saliency
from reapkit.selection.selection import Selection
from tests.support.specs import prune

MODEL = Architecture("qwen3_moe", 2, 4, 2)


def state(layers: int = 2) -> dict[int, dict[str, torch.Tensor]]:
    """As the observer keeps it: 10 tokens, 2 of 4 experts each."""
    count = torch.tensor([8, 6, 4, 2])
    return {
        layer: {
            "total_tokens": torch.tensor(10),
            "expert_frequency": count,
            "pairwise_expert_frequency": count[:, None] + count,
            "ean_sum": torch.tensor([8.0, 12.0, 4.0, 8.0]).double(),
            "weighted_ean_sum": torch.tensor([4.0, 1.5, 2.0, 0.2], dtype=torch.float64),
            "weighted_expert_frequency_sum": torch.tensor([5.0, 3.0, 1.0, 1.0]).double(),
            "ean_mean": torch.tensor([1.0, 2.0, 1.0, 4.0]),
            "reap": torch.tensor([0.5, 0.25, 0.5, 0.1]),
            "max_activations": torch.ones(4),
        }
        for layer in range(layers)
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "state.pt")
    return tmp_path / "state.pt"


def test_a_cerebras_state_becomes_an_observation(file: Path, tmp_path: Path) -> None:
    read_foreign(file).save(tmp_path / "observation")
    observation = Observation.load(tmp_path / "observation")
    assert (observation.layers, observation.num_experts, observation.num_experts_per_tok) == ((0, 1), 4, 2)
    assert observation.tokens.tolist() == [10] and observation.statistics["gate_norm_sum"][1, 0].tolist() == [
        4.0,
        1.5,
        2.0,
        0.2,
    ]
    for criterion, expected in (
        ("reap", [0.5, 0.25, 0.5, 0.1]),
        ("ean", [8, 12, 4, 8]),
        ("ean-mean", [1, 2, 1, 4]),
        ("frequency", [8, 6, 4, 2]),
        ("weighted-frequency", [5, 3, 1, 1]),
    ):
        assert saliency(observation, SaliencySpec(criterion=criterion))[0].tolist() == pytest.approx(expected), (
            criterion
        )
    spec = prune(ratio=0.5, protect={"super_experts": False})
    assert select(observation, SaliencySpec(), spec, MODEL).keep == {0: (0, 2), 1: (0, 2)}


def test_what_is_lacking_is_named_by_what_needs_it(tmp_path: Path) -> None:
    old = {
        layer: {name: entry[name] for name in ("total_tokens", "expert_frequency", "ean_mean", "reap")}
        for layer, entry in state().items()
    }
    torch.save(old, tmp_path / "old.pt")
    observation = read_foreign(tmp_path / "old.pt")
    assert saliency(observation, SaliencySpec(criterion="reap"))[0].tolist() == pytest.approx([0.5, 0.25, 0.5, 0.1])
    with pytest.raises(UnusableError, match="this observation has no gate_sum"):
        saliency(observation, SaliencySpec(criterion="weighted-frequency"))
    with pytest.raises(
        UnusableError, match=r"protect\.super_experts: this observation has no activation_max, which is needed"
    ):
        select(observation, SaliencySpec(), prune(ratio=0.5), MODEL)
    with pytest.raises(UnusableError, match="eaft"):
        saliency(observation, SaliencySpec(criterion="eaft-reap"))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({0: {"expert_frequency": Malicious()}}, tmp_path / "bad.pt")
    result = CliRunner().invoke(app, ["import", str(tmp_path / "bad.pt"), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()
    assert isinstance(result.exception, UnusableError) and result.exception.exit_code == 3
    assert "holds more than tensors and plain data" in str(result.exception) and "refuses" in str(result.exception)


def test_a_report_becomes_a_selection(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps({"model.layers.1.mlp": [3, 0], "model.layers.0.mlp": [1, 2]}))
    read_foreign(tmp_path / "report.json", MODEL).save(tmp_path / "selection")
    selection = Selection.load(tmp_path / "selection")
    assert selection.keep == {0: (1, 2), 1: (0, 3)} and selection.layers[1].drop == (1, 2)
    with pytest.raises(UnusableError, match=r"not how many there were\. Add --model"):
        read_foreign(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_frequency": torch.ones(4, 2)}, r"expert_frequency of layer 0 has shape \[4, 2\]"),
        ({"ean_sum": torch.tensor([1.0, float("inf"), 1.0, 1.0])}, "ean_sum of layer 0 holds NaN, infinity"),
        ({"total_tokens": torch.tensor(7)}, "the number of experts per token cannot be derived from"),
    ],
)
def test_broken_states_are_named(tmp_path: Path, change: dict[str, torch.Tensor], message: str) -> None:
    torch.save({0: {**state()[0], **change}}, tmp_path / "state.pt")
    with pytest.raises(UnusableError, match=message):
        read_foreign(tmp_path / "state.pt")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"a": 1}')
    (tmp_path / "some.pt").write_text("no")
    with pytest.raises(UnusableError, match="is neither a llm-compressor REAP report"):
        read_foreign(tmp_path / "some.json", MODEL)
    with pytest.raises(UnusableError, match=r"some\.pt"):
        read_foreign(tmp_path / "some.pt")
