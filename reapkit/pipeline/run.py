"""Runs a plan: skips finished stages, runs the others, stops on a failed gate, links the results into the run
directory."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from reapkit.core.artifact_store import Artifact
from reapkit.core.atomic_files import write_text
from reapkit.core.bus_errors import during
from reapkit.core.errors import RecipeError, RejectedByGates, StageFailed, UnusableError
from reapkit.core.garbage_collection import register, release_measurements
from reapkit.core.progress import SILENT, Progress
from reapkit.core.ranks import ALONE, Alone
from reapkit.core.refusals import refusal_in
from reapkit.evaluation.task_benchmarks import require_lm_eval
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.measurements import KeptMeasurements
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.publishing import drop_unwanted, keep_attempt, publish, push
from reapkit.pipeline.run_directory import RunDirectory, refuse_foreign, run_directory
from reapkit.pipeline.run_state import Run, directory_of
from reapkit.pipeline.stages.context import Context
from reapkit.planning.disk import missing_disk, tight_disk
from reapkit.planning.lock import versions
from reapkit.planning.measuring import reason
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import Stage
from reapkit.recipe.loading import LoadedRecipe, as_loaded
from reapkit.recipe.schema import Recipe
from reapkit.report.run_report import unfinished_report


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
    if "observe" in plan.leading_to(until) and plan.stage("observe").must_run:
        _try_first(plan, until, progress)
    try:
        while not _came_to_its_end(run, until, progress):
            pass
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide why the run ended
            keep_attempt(run, error)
        raise
    if warning := run.outcome.warning:
        progress.warn(warning)
        run.warnings.append(warning)
    publish(run, proven="verify" in run.artifacts or until in {stage.name for stage in run.models})
    drop_unwanted(run)
    _stop_if_final_rejected(run)
    push(run, progress)
    return run


def _try_first(plan: Plan, until: str | None, progress: Progress) -> None:
    """What a run would find out in its last hour it finds out now."""
    from reapkit.pipeline.first_minute import first_minute

    started = time.monotonic()
    tried = list(dict.fromkeys(each.name for each in first_minute(plan, until)))
    progress.say(f"checked in {time.monotonic() - started:.0f} s: {', '.join(tried)}")


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
    final = run.directory / directory_of(run.models[-1]) if run.models else run.directory
    where = {
        "reject": f"The rejected model was kept as {final}.rejected and was not uploaded.",
        "undecided": f"The model was written to {final} and was not uploaded.",
    }.get(summary.get("verdict", "not judged"))
    if where and (summary["verdict"] == "reject" or evaluate.on_undecided == "stop"):
        told = f"{summary['advice']}\n{where} All numbers: {run.directory / 'report.html'}"
        raise RejectedByGates(told).with_facts(
            verdict=summary["verdict"], directory=str(run.directory), report="report.html"
        )
