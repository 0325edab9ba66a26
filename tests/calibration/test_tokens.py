"""Tokens on disk, read back row by row and batch by batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reapkit.calibration.tokens import CalibrationTokens, batches
from reapkit.core.errors import UnusableError
from reapkit.core.mapped_safetensors import create_tensors, map_tensors


def written(path: Path, *, score: str = "completion", packing: str = "concat") -> CalibrationTokens:
    """Three rows: two samples (3 + 2 tokens), one of four, one of a single token."""
    path.mkdir(exist_ok=True)
    file = create_tensors(
        path / "tokens.safetensors",
        {
            "input_ids": ("int32", 10),
            "assistant": ("uint8", 10),
            "row_offsets": ("int64", 4),
            "row_source": ("int16", 3),
            "sample_offsets": ("int64", 5),
            "part_sample": ("int32", 4),
        },
    )
    file["input_ids"][:] = np.arange(10, 20)
    file["assistant"][:] = [0, 1, 1, 1, 1, 0, 0, 1, 0, 1]
    file["row_offsets"][:] = [0, 5, 9, 10]
    file["row_source"][:] = [0, 1, 0]
    file["sample_offsets"][:] = [0, 3, 5, 9, 10]
    file["part_sample"][:] = [0, 1, 0, 2]
    for tensor in file.values():
        tensor.flush()
    (path / "calibration.json").write_text(
        json.dumps(
            {
                "sources": [{"name": "a"}, {"name": "b"}],
                "score": score,
                "packing": packing,
                "groups": [0, 2, 3],
                "snapshots": [0, 0, 0, 1],
            }
        )
    )
    return CalibrationTokens.load(path)


def test_rows(tmp_path: Path) -> None:
    tokens = written(tmp_path)
    assert (tokens.num_rows, tokens.num_tokens, tokens.row_lengths.tolist(), tokens.sources) == (
        3,
        10,
        [5, 4, 1],
        ("a", "b"),
    )
    assert tokens.groups == (range(2), range(2, 3))
    row = tokens.row(0)
    assert row.input_ids.tolist() == [10, 11, 12, 13, 14]
    assert row.input_ids.dtype == torch.int64 and row.sample.dtype == torch.int32
    assert row.sample.tolist() == [0, 0, 0, 1, 1]
    # position 2 comes before another sample's assistant token, which it does not predict
    assert row.scored.tolist() == row.signal.tolist() == [True, True, False, True, False]
    assert tokens.row(1).scored.tolist() == [False, True, False, False]
    assert tokens.row(2).scored.tolist() == [False]


def test_score_all_has_no_signal_at_a_samples_end(tmp_path: Path) -> None:
    tokens = written(tmp_path, score="all")
    assert tokens.row(0).scored.tolist() == [True] * 5
    assert tokens.row(0).signal.tolist() == [True, True, False, True, False]
    assert (tokens.row(2).scored.tolist(), tokens.row(2).signal.tolist()) == ([True], [False])


def test_batches_pad_on_the_right_and_keep_the_order(tmp_path: Path) -> None:
    tokens = written(tmp_path)
    both, single = batches(tokens, range(3), 10)
    assert both.rows == (0, 1) and single.rows == (2,)
    assert both.input_ids.tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 0]]
    assert both.valid.tolist() == [[True] * 5, [True] * 4 + [False]]
    assert both.scored.tolist() == [[True, True, False, True, False], [False, True, False, False, False]]
    assert (both.lengths.tolist(), both.source.tolist()) == ([5, 4], [0, 1])
    assert both.position_ids is None


@pytest.mark.parametrize(
    ("batch_tokens", "rows"), [(1, [(0,), (1,), (2,)]), (5, [(0,), (1,), (2,)]), (8, [(0,), (1, 2)]), (15, [(0, 1, 2)])]
)
def test_batches_stay_within_their_tokens(tmp_path: Path, batch_tokens: int, rows: list[tuple[int, ...]]) -> None:
    assert [batch.rows for batch in batches(written(tmp_path), range(3), batch_tokens)] == rows


def test_isolated_positions_restart_at_every_sample(tmp_path: Path) -> None:
    (batch,) = batches(written(tmp_path, packing="isolated"), [0, 2], 100)
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]]


def test_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    written(tmp_path)
    theirs, ours = load_file(tmp_path / "tokens.safetensors"), map_tensors(tmp_path / "tokens.safetensors")
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert np.array_equal(tensor.numpy(), ours[name])


def test_empty_tensors_are_written_too(tmp_path: Path) -> None:
    create_tensors(tmp_path / "x.safetensors", {"a": ("int64", 0), "b": ("uint8", 3)})["b"][:] = 1
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "x.safetensors").items()} == {
        "a": [],
        "b": [1, 1, 1],
    }


def test_missing_calibration_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=r"calibration\.json is missing, so this is not a finished calibration"):
        CalibrationTokens.load(tmp_path)


def test_a_calibration_has_no_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a calibration, not a pack"):
        written(tmp_path).rows("decide")
