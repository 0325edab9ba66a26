"""The table of dtypes against numpy, torch and what safetensors writes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

from reapkit.core.dtypes import BITS, DTYPES, FLOATS, torch_dtypes


@pytest.mark.parametrize("code", torch_dtypes())
def test_safetensors_writes_each_torch_dtype_under_its_code(code):
    data = save({"x": torch.zeros(2, dtype=torch_dtypes()[code])})
    entry = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["x"]
    assert entry["dtype"] == code and 8 * entry["data_offsets"][1] == 2 * BITS[code]


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES.values() if dtype.numpy], ids=lambda dtype: dtype.code)
def test_numpy_has_the_same_width(dtype):
    assert np.dtype(dtype.numpy).itemsize * 8 == dtype.bits


def test_floats_are_the_floats_that_need_no_scale():
    assert {torch_dtypes()[code] for code in FLOATS} == {
        dtype for dtype in torch_dtypes().values() if dtype.is_floating_point and dtype.itemsize > 1
    }
