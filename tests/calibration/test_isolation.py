"""Full attention keeps the samples of a row apart when positions restart; linear attention does not and is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from reapkit.calibration.isolation import check_isolation
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.core.mapped_safetensors import create_tensors
from tests.support.tiny import build


def two_samples(path: Path, packing: str) -> CalibrationTokens:
    """A row of a single sample, then one of two."""
    file = create_tensors(
        path / "tokens.safetensors",
        {
            "input_ids": ("int32", 60),
            "assistant": ("uint8", 60),
            "row_offsets": ("int64", 3),
            "row_source": ("int16", 2),
            "sample_offsets": ("int64", 4),
            "part_sample": ("int32", 3),
        },
    )
    file["input_ids"][:] = np.random.default_rng(0).integers(3, 250, 60)
    file["assistant"][:] = 1
    file["row_offsets"][:] = [0, 20, 60]
    file["row_source"][:] = 0
    file["sample_offsets"][:] = [0, 20, 43, 60]
    file["part_sample"][:] = [0, 1, 2]
    for tensor in file.values():
        tensor.flush()
    (path / "calibration.json").write_text(
        json.dumps(
            {
                "sources": [{"name": "a"}],
                "score": "all",
                "packing": packing,
                "groups": [0, 2],
                "snapshots": [0, 0, 0, 0],
            }
        )
    )
    return CalibrationTokens.load(path)


def check(model_type: str, tokens: CalibrationTokens) -> None:
    model = build(model_type)

    def hidden(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    check_isolation(hidden, tokens)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_attention_passes(tmp_path: Path, model_type: str) -> None:
    check(model_type, two_samples(tmp_path, "isolated"))


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnusableError,
        match=r"isolated, but samples of one row influence each other in this model \(\d+% of .*Choose `packing: none`",
    ):
        check("qwen3_next", two_samples(tmp_path, "isolated"))


def test_other_packings_are_not_checked(tmp_path: Path) -> None:
    check_isolation(None, two_samples(tmp_path, "concat"))
