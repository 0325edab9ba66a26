"""quantize: the pruned checkpoint through llm-compressor, under the source's own tensor names."""

from __future__ import annotations

from typing import Any

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint import Checkpoint
from reapkit.quantize import quantize_checkpoint
from reapkit.stages import Context


def run(context: Context) -> dict[str, Any]:
    tokens = context.inputs.get("calibrate")
    facts = quantize_checkpoint(context.inputs["prune"].payload, context.payload, context.recipe.quantize,
                                calibration=CalibrationTokens.load(tokens.payload) if tokens else None,
                                device=context.device, progress=context.progress)
    quantized = Checkpoint.open(context.payload)
    return {"bytes": quantized.nbytes, **facts}
