"""observe: the calibration runs through the model once; what every expert contributed is summed per source."""

from __future__ import annotations

import time
from typing import Any

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.models import load_model
from reapkit.observe.resident import observe
from reapkit.stages import Context


def run(context: Context) -> dict[str, Any]:
    recipe, tokens = context.recipe, CalibrationTokens.load(context.inputs["calibrate"].payload)
    model = load_model(context.model_directory, device=context.device, trust_remote_code=recipe.model.trust_remote_code)
    started = time.time()
    observation = observe(model, tokens, recipe.observe, batch_tokens=recipe.runtime.batch_tokens, work_directory=context.work,
                          progress=context.progress)
    observation.save(context.payload)
    count = int(observation.tokens.sum())
    never = int((sum(observation.statistics["count"].unbind(1)) == 0).sum())
    return {"tokens": count, "scored_tokens": int(observation.scored_tokens.sum()), "never_routed": never, "device": context.device,
            "tokens_per_second": round(count / max(time.time() - started, 1e-9))}
