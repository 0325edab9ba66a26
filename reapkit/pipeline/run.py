"""Runs a plan: skips finished stages, runs the others, stops on a failed gate, links the results into the run
directory."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from reapkit.core.artifact_store import Artifact
from reapkit.core.atomic_files import write_text
from reapkit.core.bus_errors import during
from reapkit.core.errors import RecipeError, RejectedByGates, StageFailed, UnusableError
from reapkit.core.formatting import human_bytes
from reapkit.core.garbage_collection import register, release_measurements
from reapkit.core.json_text import parse_json
from reapkit.core.notebook import html_table
from reapkit.core.progress import SILENT, Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.core.refusals import refusal_in
from reapkit.evaluation.metrics.table import in_view
from reapkit.evaluation.outcome import Outcome, outcome
from reapkit.evaluation.task_benchmarks import require_lm_eval
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.measurements import KeptMeasurements
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.run_directory import RunDirectory, refuse_foreign, run_directory
from reapkit.pipeline.stages.context import Context
from reapkit.planning.disk import missing_disk, tight_disk
from reapkit.planning.lock import make_lock, versions
from reapkit.planning.measuring import reason
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import Stage
from reapkit.pruning.checkpoint import MANIFEST
from reapkit.pruning.manifest import sealed_with
from reapkit.recipe.loading import LoadedRecipe, as_loaded
from reapkit.recipe.schema import Recipe
from reapkit.report.facts import recipe_yaml
from reapkit.report.run_report import unfinished_report


@dataclass(repr=False)
class Run:
    """What a walk did: artifacts by stage, which stages were executed, seconds and warnings."""

    plan: Plan
    published: RunDirectory
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    ranks: Alone = ALONE
    sound: SoundPlans = field(default_factory=SoundPlans)

    def __repr__(self) -> str:
        done = ", ".join(self.executed) or "nothing"
        return f"<Run {self.plan.recipe.name} in {self.directory}: {self.outcome.headline}; ran: {done}>"

    def _repr_html_(self) -> str:
        stages = [
            (name, "ran" if name in self.executed else "in the store", f"{artifact.manifest['seconds']:.1f} s")
            for name, artifact in self.artifacts.items()
        ]
        made = html_table(f"{self.plan.recipe.name}: {self.outcome.headline}", ("stage", "", "took"), stages)
        rows = self.summary("verify").get("rows", ())
        columns = in_view("narrow")
        measured = [
            (
                row["name"],
                row["experts"],
                human_bytes(row["bytes"]),
                *(metric.show(row.get(metric.name)) for metric in columns),
            )
            for row in rows
        ]
        names = ("", "experts", "size", *(metric.label for metric in columns))
        return made + (html_table("measured on held-out rows", names, measured) if measured else "")

    @property
    def directory(self) -> Path:
        """Where its results are."""
        return self.published.path

    @property
    def got_as_far(self) -> bool:
        """Whether it came at least as far as the run whose results are in its directory."""
        names = [definition.name for definition in self.plan.definitions]
        earlier = [names.index(name) for name in self.published.earlier_stages() if name in names]
        return max((names.index(name) for name in self.artifacts), default=-1) >= max(earlier, default=-1)

    @property
    def models(self) -> tuple[Stage, ...]:
        """The stages of this run whose models were made, the final one last."""
        return tuple(
            stage for stage in self.plan.stages if stage.definition.makes_model and stage.name in self.artifacts
        )

    @property
    def outcome(self) -> Outcome:
        """What was judged, by which gates, and how the final directory stands to the same limits."""
        return outcome(self._record("evaluate", "evaluation.json"), self._record("verify", "verify.json"))

    def _record(self, stage: str, file: str) -> Mapping[str, Any] | None:
        artifact = self.artifacts.get(stage)
        return (
            parse_json((artifact.payload / file).read_bytes())
            if artifact is not None and artifact.has_payload
            else None
        )

    def summary(self, stage: str) -> Mapping[str, Any]:
        """What the stage reported, or nothing if it did not come to it."""
        artifact = self.artifacts.get(stage)
        return artifact.summary if artifact else {}


class _Listening(Progress):
    """Passes everything on and keeps the warnings for the manifest."""

    def __init__(self, inner: Progress):
        self.inner, self.heard = inner, []
        self.task, self.say = inner.task, inner.say

    def warn(self, text: str) -> None:
        self.heard.append(text)
        self.inner.warn(text)


def _check_raw_recipe(loaded: LoadedRecipe) -> None:
    """llm-compressor's own classes read a raw recipe before any stage runs. Raises RecipeError with its place."""
    if loaded.quantize.recipe is not None:
        from reapkit.quantization.calibrated import raw_modifiers

        try:
            raw_modifiers(loaded.quantize)
        except RecipeError as error:
            raise loaded.located(error) from error


def apply(
    recipe: Recipe | LoadedRecipe | str | Path,
    *,
    until: str | None = None,
    progress: Progress = SILENT,
    observation: str | Path | None = None,
    ranks: Alone = ALONE,
    check: bool = False,
) -> Run:
    """Runs the recipe to its end, or what the end of stage `until` needs. Finished stages are skipped, interrupted ones
    resumed.

    `observation`: the directory of one made elsewhere of this model, by which it decides instead of observing.
    `check`: every byte of finished artifacts is read before they are used, not only of small files and of those whose
    size, modification time or inode changed.
    Of several `ranks` only rank 0 calls this; the others wait and help to observe.
    Raises RejectedByGates when the verdict stops the run, StageFailed when a stage fails for want of disk or memory.
    """
    made = make_plan(as_loaded(recipe), observation=None if observation is None else Path(observation))
    return walk(made, until=until, progress=progress, ranks=ranks, check=check)


def walk(
    plan: Plan, *, until: str | None = None, progress: Progress = SILENT, ranks: Alone = ALONE, check: bool = False
) -> Run:
    """Carries out a plan; else as `apply`. Raises RecipeError where its directory holds what no run put there."""
    refuse_foreign(plan)
    if shortage := missing_disk(plan, until):
        raise UnusableError(f"disk: {shortage}")
    if tight := tight_disk(plan, until):
        progress.warn(f"disk: {tight}")
    make_runs_folder(run_directory(plan).parent, plan.store.root.parent)
    plan = plan.date_kept()
    # entered before the plan that counts looks at the store, so that nobody clears away in between what it found
    hits = {stage.name: stage.artifact.directory.name for stage in plan.stages if stage.artifact and stage.hit}
    register(plan.store, run_directory(plan), hits)
    with RunDirectory.opened(run_directory(plan), progress) as directory:
        return _walk(
            Run(plan, directory, ranks=ranks, sound=SoundPlans(full=check, progress=progress)), until, progress
        )


def _walk(run: Run, until: str | None, progress: Progress) -> Run:
    plan = run.plan
    reads_model = set(plan.leading_to(until)) - {"select"} - ({"observe"} if plan.imported else set())
    run.plan = plan = plan.downloaded() if reads_model else plan.anew()  # to decide anew takes no weights
    _check_raw_recipe(plan.loaded)
    if plan.recipe.evaluate.lm_eval is not None and "verify" in plan.leading_to(until):
        require_lm_eval()  # now, not after everything else
    run.ranks.share(plan.store.root)
    try:
        while not _came_to_its_end(run, until, progress):
            pass
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide why the run ended
            _keep_attempt(run, error)
        raise
    if warning := run.outcome.warning:
        progress.warn(warning)
        run.warnings.append(warning)
    _publish(run, proven="verify" in run.artifacts or until in {stage.name for stage in run.models})
    _drop_unwanted(run)
    _stop_if_final_rejected(run)
    _push(run, progress)
    return run


def make_runs_folder(*parents: Path) -> None:
    """A folder `runs` that is not there yet is made with a .gitignore: what it will hold is large, and can be made
    again."""
    for folder in parents:
        if folder.name == "runs" and not folder.exists():
            write_text(folder / ".gitignore", "*\n")


def _came_to_its_end(run: Run, until: str | None, progress: Progress) -> bool:
    """Carries out the stages in their order; False where it must begin anew: what was sound when the run began, which
    may be hours ago, is damaged now."""
    run.artifacts.clear()
    run.plan = run.sound.of(run.plan, until)  # now: before this, a model was downloaded, or another run waited for
    for name in run.plan.leading_to(until):
        if undecided := run.plan.stage(name).key is None:
            run.plan = run.plan.decided(run.summary("evaluate")["chosen"])
        time_passed = run.executed and not run.plan.stage(name).hit
        if (undecided or time_passed) and not _is_sound(run, until):
            return False
        _one_stage(run, name, until, progress)
    return not run.executed or _is_sound(run, until)


def _is_sound(run: Run, until: str | None) -> bool:
    """Whether the plan's artifacts are as they were; where they are not, the plan is made anew."""
    before, run.plan = run.plan, run.sound.of(run.plan, until)
    return run.plan is before


def _one_stage(run: Run, name: str, until: str | None, progress: Progress) -> None:
    run.artifacts[name] = _finished(run, run.plan.stage(name), progress)
    if name == "evaluate":
        _stop_if_rejected(run, progress)
        if name == until and run.got_as_far:
            run.published.put("report.html", unfinished_report(run.plan, run.artifacts))


def _push(run: Run, progress: Progress) -> None:
    """Uploads the final directory, card included, where the recipe says so and the run came to its end."""
    repository = run.plan.recipe.output.push_to_hub
    if repository is None or "report" not in run.artifacts or not run.models:
        return
    final = run.directory / _name(run.models[-1])
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


def _finished(run: Run, stage: Stage, progress: Progress) -> Artifact:
    """The stage's artifact: from the store, or made now."""
    store, key = run.plan.store, stage.known_key
    register(store, run.directory, {stage.name: store.directory(stage.name, key).name})
    if (
        stage.artifact is not None and stage.hit and store.get(stage.name, key) is not None
    ):  # registered by now, so nobody clears it away any more
        progress.say(f"{stage.name}: in the store ({stage.artifact.directory.name})")
        run.warnings += stage.artifact.manifest.get("warnings", [])
        return stage.artifact

    def waiting() -> None:
        progress.say(f"{stage.name}: another run is working on this stage; waiting")

    with store.locked(stage.name, key, waiting):
        made = store.get(stage.name, key)  # by whoever held the lock
        if made is not None and made.has_payload:
            return made
        progress.say(f"{stage.name}: running ({reason(run.plan, stage)})")
        artifact = _execute(run, stage, progress)
    progress.say(
        f"{stage.name}: done in {artifact.manifest['seconds']:.0f} s{stage.definition.remark(artifact.summary)}"
    )
    run.executed = list(dict.fromkeys((*run.executed, stage.name)))
    run.warnings += artifact.manifest["warnings"]
    return artifact


def _execute(run: Run, stage: Stage, progress: Progress) -> Artifact:
    if shortage := missing_disk(replace(run.plan), only=stage.name):  # by what earlier stages made of the recipe
        raise StageFailed(f"{stage.name}: {shortage}")
    store, listening = run.plan.store, _Listening(progress)
    payload = store.begin(stage.name, stage.known_key, resume=stage.definition.resumes_in_place)
    work = payload.parent / "work"
    work.mkdir(exist_ok=True)
    inputs = {name: run.artifacts[name] for name in (*stage.inputs, *stage.after)}
    measurements = KeptMeasurements(store, run.directory, run.sound, listening)
    context = Context(run.plan, inputs, payload, work, listening, run.ranks, measurements=measurements)
    started = time.time()
    try:
        with during(stage.name):
            summary = stage.definition.run(context)
            artifact = store.finish(
                stage.name,
                stage.known_key,
                {
                    "spec": stage.spec,
                    "inputs": {name: run.artifacts[name].key for name in stage.inputs},
                    "summary": summary,
                    "seconds": round(time.time() - started, 3),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "versions": versions(),
                    "warnings": listening.heard,
                    "measurements": sorted(measurements.used),
                },
                hashes=context.hashes,
                progress=progress,
            )
    except Exception as error:
        if (refusal := refusal_in(error)) is None:
            raise
        raise StageFailed(f"{stage.name}: {refusal.told()} It resumes where it stopped.") from error
    shutil.rmtree(work, ignore_errors=True)  # only now: a run that is killed while files are hashed resumes from it
    if measurements.used:
        release_measurements(store, run.directory)
        progress.say(f"{stage.name}: {measurements}")
    return artifact


def _stop_if_rejected(run: Run, progress: Progress) -> None:
    summary, evaluate = run.summary("evaluate"), run.plan.recipe.evaluate
    action = {"reject": evaluate.on_reject, "undecided": evaluate.on_undecided}.get(summary["verdict"], "go on")
    if action == "stop":
        name = "report.html" if run.got_as_far else "report.rejected.html"
        run.published.put(name, unfinished_report(run.plan, run.artifacts))
        told = f"{summary['advice']}\nNo weight was written. All numbers: {run.directory / name}"
        raise RejectedByGates(told).with_facts(
            verdict=summary["verdict"], chosen=summary["chosen"], directory=str(run.directory), report=name
        )
    if action == "warn":
        progress.warn(summary["advice"])
        run.warnings.append(summary["advice"])


def _stop_if_final_rejected(run: Run) -> None:
    """A rejected directory is not published; an undecided one is there, and the command says so."""
    summary, evaluate = run.summary("verify"), run.plan.recipe.evaluate
    final = run.directory / _name(run.models[-1]) if run.models else run.directory
    where = {
        "reject": f"The rejected model was kept as {final}.rejected and was not uploaded.",
        "undecided": f"The model was written to {final} and was not uploaded.",
    }.get(summary.get("verdict", "not judged"))
    if where and (summary["verdict"] == "reject" or evaluate.on_undecided == "stop"):
        told = f"{summary['advice']}\n{where} All numbers: {run.directory / 'report.html'}"
        raise RejectedByGates(told).with_facts(
            verdict=summary["verdict"], directory=str(run.directory), report="report.html"
        )


def _drop_unwanted(run: Run) -> None:
    """Payloads of models that `output.keep` does not name go once the verified result is there."""
    for stage in run.models if "report" in run.artifacts else ():
        if stage.definition.directory not in run.plan.recipe.output.keep:
            run.artifacts[stage.name].drop_payload()
            run.published.remove(_name(stage))


def _keep_attempt(run: Run, error: BaseException) -> None:
    """What a run that did not come to its end leaves: its results, unless those of one that got further are there."""
    if run.got_as_far and run.artifacts:
        _publish(run, proven=False)
    told = {"error": f"{type(error).__name__}: {error}", "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    run.published.put("run.failed.json", _json(describe(run) | told))


def _publish(run: Run, *, proven: bool) -> None:
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
            run.published.mirror(artifact, _name(stage))
    if run.got_as_far or not run.published.holds({name: artifact.key for name, artifact in run.artifacts.items()}):
        run.published.put("recipe.resolved.yaml", recipe_yaml(run.plan.recipe).encode())
        run.published.put("lock.json", _json(make_lock(run.plan.loaded) | {"drawn": _drawn(run)}))
        run.published.put("run.json", _json(describe(run)))
        run.published.remove("run.failed.json")


def _publish_model(run: Run, stage: Stage) -> None:
    """A model directory with its card; the final one of a rejected run under a name that nobody takes for a result."""
    name, artifact = _name(stage), run.artifacts[stage.name]
    rejected = f"{name}.rejected"
    final = stage.name == run.models[-1].name
    wrong = final and run.summary("verify").get("verdict") == "reject"
    run.published.remove(name if wrong else rejected)
    others, report = {}, run.artifacts.get("report")
    if report is not None and (card := report.payload / f"{name}.md").is_file():
        others["README.md"] = card.read_bytes()
    others |= {MANIFEST: sealed_with(artifact.payload, others)}
    run.published.mirror(artifact, rejected if wrong else name, others)


def _name(stage: Stage) -> str:
    """The directory in which the run shows the payload of a stage that has one."""
    return cast(str, stage.definition.directory)


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _drawn(run: Run) -> dict[str, Any]:
    """Which rows of each source the calibration took, by index, and the hash of their texts."""
    artifact = run.artifacts.get("calibrate")
    if artifact is None or not artifact.has_payload:
        return {}
    summary = json.loads((artifact.payload / "calibration.json").read_text(encoding="utf-8"))
    return {source["name"]: {"indices": source["indices"], "sha256": source["sha256"]} for source in summary["sources"]}


def describe(run: Run) -> dict[str, Any]:
    """What ran, from what, in which time, with which versions."""
    stages = {}
    for name, artifact in run.artifacts.items():
        stages[name] = {
            "key": artifact.key,
            "artifact": artifact.directory.name,
            "executed": name in run.executed,
            "seconds": artifact.manifest["seconds"],
            "summary": dict(artifact.summary),
        }
    return {
        "name": run.plan.recipe.name,
        "recipe": run.plan.loaded.shown,
        "model": run.plan.recipe.model.source,
        "outcome": {"word": run.outcome.word, "sentence": run.outcome.sentence},
        "stages": stages,
        "warnings": list(dict.fromkeys(run.warnings)),
        "versions": versions(),
    }
