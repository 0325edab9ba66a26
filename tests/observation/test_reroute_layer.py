"""What one expert puts out for the token sample."""

from __future__ import annotations

import pytest
import torch

from reapkit.model.routed_experts import find_experts
from reapkit.observation.reroute_layer import _output
from tests.support import tiny


@torch.no_grad()
@pytest.mark.parametrize(
    "model_type", [name for name in tiny.ARCHITECTURES if name not in ("llama4_text", "gemma4_text")]
)
def test_half_precision_experts_put_out_what_their_weights_say_in_float32(model_type: str) -> None:
    site = find_experts(tiny.build(model_type, torch.bfloat16))[-1]
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = [_output(site, hidden, expert) for expert in range(site.num_experts)]
    site.module.float()
    for expert, out in enumerate(found):
        torch.testing.assert_close(out, site.expert(hidden.float(), expert), rtol=1e-5, atol=1e-6)
