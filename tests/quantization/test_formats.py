"""What a quantized directory's config.json says is read back as a scheme of reapkit's, or refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from reapkit.core.errors import UnusableError
from reapkit.quantization.formats import preset, quantization_config, spec_on_disk
from reapkit.quantization.schemes import SCHEMES
from reapkit.recipe.schema import QuantizeSpec


def written(**weights: Any) -> dict[str, Any]:
    """A config.json's quantization in W4A16, its weights' settings changed."""
    config = quantization_config(preset(QuantizeSpec(scheme="W4A16")), ["lm_head"])
    config["config_groups"]["group_0"]["weights"].update(weights)
    return {"quantization_config": config}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_written_scheme_is_read_back(scheme: str) -> None:
    spec = QuantizeSpec(scheme=scheme, method="rtn", ignore=("lm_head",))
    config = {"quantization_config": quantization_config(preset(spec), ["lm_head"])}
    assert spec_on_disk(config) == spec


def test_a_group_of_another_size_is_read_back() -> None:
    assert spec_on_disk(written(group_size=32)).group_size == 32


def test_a_quantization_that_is_none_of_ours_is_refused() -> None:
    message = (
        "config.json: found quantization pack-quantized of 4 bits, which is not a scheme of reapkit's. Known: W2A16,"
    )
    with pytest.raises(UnusableError, match=re.escape(message)):
        spec_on_disk(written(symmetric=False))


def test_a_quantization_of_activations_alone_is_refused() -> None:
    config = written()
    config["quantization_config"]["config_groups"]["group_0"]["weights"] = None
    message = (
        "config.json: found a quantization that leaves the weights as they are, which is not a scheme of reapkit's. "
        f"Known: {', '.join(SCHEMES)}."
    )
    with pytest.raises(UnusableError, match=f"^{re.escape(message)}$"):
        spec_on_disk(config)
