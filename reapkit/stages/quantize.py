"""quantize: the pruned checkpoint through llm-compressor, under the source's own tensor names."""

from __future__ import annotations

from typing import Any

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.checkpoint import Checkpoint
from reapkit.quantize import quantize_checkpoint
from reapkit.stages import Context
from reapkit.surgery.sealed import read_manifest, seal


def run(context: Context) -> dict[str, Any]:
    tokens = context.inputs.get("calibrate")
    facts = quantize_checkpoint(context.inputs["prune"].payload, context.payload, context.recipe.quantize,
                                calibration=CalibrationTokens.load(tokens.payload) if tokens else None,
                                device=context.device, work=context.work, progress=context.progress,
                                batch_tokens=context.recipe.runtime.batch_tokens, max_shard_bytes=context.recipe.output.max_shard_bytes,
                                trust_remote_code=context.recipe.model.trust_remote_code)
    pruned = read_manifest(context.inputs["prune"].payload)
    seal(context.payload, {name: pruned.get(name) for name in ("key", "source", "keep")} | {"scheme": facts["scheme"], "method": facts["method"]},
         context.progress)
    quantized = Checkpoint.open(context.payload)
    return {"bytes": quantized.nbytes, **facts}
