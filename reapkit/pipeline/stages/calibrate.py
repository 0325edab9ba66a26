"""calibrate: the mix becomes token rows on disk, exactly in the declared shares."""

from __future__ import annotations

from typing import Any

from reapkit.calibration.prepare import prepare
from reapkit.pipeline.stages.context import Context


def run(context: Context) -> dict[str, Any]:
    with context.sample_cache() as cache:
        summary = prepare(
            context.recipe.calibration,
            context.model_directory,
            context.plan.loaded.directory,
            context.payload,
            context.progress,
            work=cache,
            trust_remote_code=context.recipe.model.trust_remote_code,
        )
    return shares(summary)


def shares(summary: dict[str, Any]) -> dict[str, Any]:
    """Per source what a table shows."""
    return {
        "sources": {
            source["name"]: {name: source[name] for name in ("samples", "rows", "tokens", "scored_tokens", "sha256")}
            for source in summary["sources"]
        }
    }
