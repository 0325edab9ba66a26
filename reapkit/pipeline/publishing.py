"""Shows in the run's directory what a run made, records it, and uploads the result where the recipe says so."""

from __future__ import annotations

import json
import time
from typing import Any

from reapkit.core.errors import StageFailed
from reapkit.core.progress import Progress
from reapkit.pipeline.run_state import Run, describe, directory_of
from reapkit.planning.lock import lock_of, source_entries
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import Stage
from reapkit.pruning.checkpoint import MANIFEST
from reapkit.pruning.manifest import sealed_with
from reapkit.report.facts import recipe_yaml


def publish(run: Run, *, proven: bool) -> None:
    """The run directory as DESIGN lays it out, and what this run did.

    Models stay in the store until their proofs hold (`proven`), or nobody asked for proofs.
    """
    for stage in run.plan.stages:
        artifact = run.artifacts.get(stage.name)
        if artifact is None or not artifact.has_payload:
            continue
        if stage.definition.makes_model:
            if proven:
                _publish_model(run, stage)
        elif stage.definition.file is not None:
            run.published.put(stage.definition.file, artifact.payload / stage.definition.file)
        else:
            run.published.mirror(artifact, directory_of(stage))
    if run.got_as_far or not run.published.holds({name: artifact.key for name, artifact in run.artifacts.items()}):
        run.published.put("recipe.resolved.yaml", recipe_yaml(run.plan.recipe).encode())
        run.published.put("lock.json", _json(_lock(run.plan) | {"drawn": _drawn(run)}))
        run.published.put("run.json", _json(describe(run)))
        run.published.remove("run.failed.json")


def _lock(plan: Plan) -> dict[str, Any]:
    """The lock of what this run read, wherever the hub and the files have moved meanwhile."""
    known = plan.identities
    sources = dict(zip(source_entries(plan.loaded), (*known.sources, *known.extra_sources), strict=True))
    return lock_of(plan.loaded, plan.checkpoint, known.tokenizer, sources, known.date)


def _publish_model(run: Run, stage: Stage) -> None:
    """A model directory with its card; the final one of a rejected run under a name that nobody takes for a result."""
    name, artifact = directory_of(stage), run.artifacts[stage.name]
    rejected = f"{name}.rejected"
    final = stage.name == run.models[-1].name
    wrong = final and run.summary("verify").get("verdict") == "reject"
    run.published.remove(name if wrong else rejected)
    others, report = {}, run.artifacts.get("report")
    if report is not None and (card := report.payload / f"{name}.md").is_file():
        others["README.md"] = card.read_bytes()
    others |= {MANIFEST: sealed_with(artifact.payload, others)}
    run.published.mirror(artifact, rejected if wrong else name, others)


def drop_unwanted(run: Run) -> None:
    """Payloads of models that `output.keep` does not name go once the verified result is there."""
    for stage in run.models if "report" in run.artifacts else ():
        if stage.definition.directory not in run.plan.recipe.output.keep:
            run.artifacts[stage.name].drop_payload()
            run.published.remove(directory_of(stage))


def keep_attempt(run: Run, error: BaseException) -> None:
    """What a run that did not come to its end leaves: its results, unless those of one that got further are there."""
    if run.got_as_far and run.artifacts:
        publish(run, proven=False)
    told = {"error": f"{type(error).__name__}: {error}", "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    run.published.put("run.failed.json", _json(describe(run) | told))


def push(run: Run, progress: Progress) -> None:
    """Uploads the final directory, card included, where the recipe says so and the run came to its end."""
    repository = run.plan.recipe.output.push_to_hub
    if repository is None or "report" not in run.artifacts or not run.models:
        return
    final = run.directory / directory_of(run.models[-1])
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    progress.say(f"upload: {repository}")
    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(
            repo_id=repository, folder_path=final, commit_message=f"{run.plan.recipe.name} by reapkit"
        )
    except (httpx.HTTPError, OfflineModeIsEnabled, OSError) as error:
        raise StageFailed(
            f"upload to {repository} failed: {error}. The result is in {final}; run the same command again to retry."
        ) from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _drawn(run: Run) -> dict[str, Any]:
    """Which rows of each source the calibration took, by index, and the hash of their texts."""
    artifact = run.artifacts.get("calibrate")
    if artifact is None or not artifact.has_payload:
        return {}
    summary = json.loads((artifact.payload / "calibration.json").read_text(encoding="utf-8"))
    return {source["name"]: {"indices": source["indices"], "sha256": source["sha256"]} for source in summary["sources"]}
