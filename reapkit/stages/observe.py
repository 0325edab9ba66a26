"""observe: the calibration runs through the model once; what every expert contributed is summed per source."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from reapkit.calibration.isolation import check_isolation
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.models import final_hidden, load_model
from reapkit.observation import Observation
from reapkit.observe.resident import observe
from reapkit.observe.streaming import observe_streaming
from reapkit.planning import store_of
from reapkit.shards import ShardHashes, record_of
from reapkit.stages import Context
from reapkit.statistics import first_half, first_half_sentence


def run(context: Context) -> dict[str, Any]:
    tokens = CalibrationTokens.load(context.inputs["calibrate"].payload)
    started = time.time()
    checkpoint = context.plan.checkpoint
    with ShardHashes(checkpoint.path, record_of(store_of(context.recipe).root, checkpoint.identity)) as hashes:
        observation = (_streaming if context.streams else _resident)(context, tokens, hashes)
        hashes.begin(checkpoint.shards)  # also those that a resumed run had no need to read
        hashes.keep()
    observation.save(context.payload)
    _say_how_settled(context, observation)
    count = int(observation.tokens.sum())
    never = int((sum(observation.statistics["count"].unbind(1)) == 0).sum())
    return {"tokens": count, "scored_tokens": int(observation.scored_tokens.sum()), "never_routed": never, "device": context.device,
            "placement": context.estimates.placement, "tokens_per_second": round(count / max(time.time() - started, 1e-9))}


def _say_how_settled(context: Context, observation: Observation) -> None:
    """At the counts that the recipe keeps: what the first half of the rows would have kept."""
    candidate = context.plan.candidates[0]
    kept = context.plan.kept(candidate)
    half = first_half(observation, {layer: kept.get(layer, observation.num_experts // 2) for layer in observation.layers})
    if half is not None:
        context.progress.say(f"observe: at the budget of {candidate.name}, {first_half_sentence(half)}")


def _resident(context: Context, tokens: CalibrationTokens, hashes: ShardHashes) -> Observation:
    recipe = context.recipe
    model: nn.Module = load_model(context.model_directory, device=context.device, trust_remote_code=recipe.model.trust_remote_code)
    hashes.begin(context.plan.checkpoint.shards)
    check_isolation(lambda ids, positions: final_hidden(model, ids.to(model.device), positions.to(model.device)).cpu(), tokens)
    return observe(model, tokens, recipe.observe, batch_tokens=recipe.runtime.batch_tokens, work_directory=context.work,
                   identity=context.plan.checkpoint.identity, progress=context.progress)


def _streaming(context: Context, tokens: CalibrationTokens, hashes: ShardHashes) -> Observation:
    recipe = context.recipe
    return observe_streaming(context.model_directory, tokens, recipe.observe, batch_tokens=recipe.runtime.batch_tokens,
                             work_directory=context.work, device=context.device, trust_remote_code=recipe.model.trust_remote_code,
                             identity=context.plan.checkpoint.identity, checkpoint_minutes=recipe.runtime.checkpoint_minutes,
                             reading=hashes.begin, progress=context.progress, **context.streaming)
