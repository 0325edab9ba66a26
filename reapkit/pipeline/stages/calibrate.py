"""calibrate: prepares the mix as token rows on disk, in exactly the declared shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reapkit.calibration.identity import tokenizer_facts
from reapkit.pipeline.stages.context import Context
from reapkit.planning import stage_disk
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition


def run(context: Context) -> dict[str, Any]:
    from reapkit.calibration.prepare import prepare

    with context.sample_cache() as cache:
        summary = prepare(
            context.plan.calibration,
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


def _content(plan: Plan) -> dict[str, Any]:
    known = plan.identities
    found = {"sources": known.sources, "tokenizer": known.tokenizer, "chat_template": known.chat_template}
    return found | ({"date": known.date} if known.date else {}) | tokenizer_of_rows(plan, known.sources)


def tokenizer_of_rows(plan: Plan, sources: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What else decides how rows that others wrote become tokens; nothing where all rows are generated."""
    if all("builtin" in source for source in sources):
        return {}
    trusted = plan.recipe.model.trust_remote_code
    facts = tokenizer_facts(plan.identities.tokenizer, plan.checkpoint.config, trust_remote_code=trusted)
    return {"tokenizer_facts": facts}


STAGE = StageDefinition(
    name="calibrate",
    version=1,
    run=run,
    writes=stage_disk.calibrate,
    shows=lambda plan: ("tokens.safetensors", "calibration.json"),
    directory="calibration",
    fields=("calibration",),
    content=_content,
)
