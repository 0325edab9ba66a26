"""What is damaged in the store is noticed before anything uses or publishes it, told in one line, and made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reapkit.core.artifact_check import damage_of
from reapkit.core.artifact_store import Store
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.garbage_collection import artifact_directories
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.run import Run, walk
from reapkit.pipeline.stages.context import Context
from reapkit.pipeline.stages.every_stage import STAGES
from reapkit.planning import plan as planning
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import StageDefinition
from reapkit.pruning.manifest import check_directory
from reapkit.recipe.loading import load
from tests.support.artifacts import without_list
from tests.support.command import command
from tests.support.damage import append, delete, flip, flip_unseen, link, truncate
from tests.support.disks import mounted, remount
from tests.support.heard import Heard
from tests.support.paths import ROOT

STAGE_NAMES = ("calibrate", "packs", "observe", "select", "repair", "evaluate", "prune", "quantize", "verify", "report")
SMALL = (
    'calibration={samples: 8, max_length: 256, mix: [{name: prose, source: "builtin:prose"}]}',
    "evaluate={packs: {samples: 8, lengths: [256]}, generation: null, throughput: null, equal_bytes: false}",
    "evaluate.gates={kl_mean: {max: 50}}",
    "evaluate.controls=[]",
    "prune.repair=ridge",
    "quantize.method=rtn",
    "runtime.device=cpu",
)


@dataclass(frozen=True)
class Place:
    """A finished run below `root`, its store, and a copy of both that nobody touches."""

    root: Path
    run: Run

    @property
    def store(self) -> Store:
        return Store(self.root / "store")

    @property
    def published(self) -> Path:
        return self.root / "run"

    def artifact(self, stage: str) -> Path:
        return self.run.artifacts[stage].directory

    def settings(self, *more: str) -> tuple[str, ...]:
        return (*SMALL, f"runtime.store={self.root / 'store'}", f"output.directory={self.published}", *more)

    def planned(self, *more: str, stages: tuple[StageDefinition, ...] = STAGES) -> Plan:
        return planning.make_plan(load("demo", self.settings(*more)), stages)

    def fast(self, *more: str) -> Plan:
        """Its stages give what they gave, at once."""
        return self.planned(*more, stages=tuple(replace(each, run=self._given) for each in STAGES))

    def _given(self, context: Context) -> dict[str, Any]:
        given = self.root / "untouched/store" / context.payload.parent.name
        shutil.copytree(given / "payload", context.payload, dirs_exist_ok=True)
        return json.loads((given / "manifest.json").read_text())["summary"]

    def restore(self) -> None:
        for name in ("store", "run"):
            shutil.rmtree(self.root / name)
            shutil.copytree(self.root / "untouched" / name, self.root / name)
        walk(self.fast())  # its weights share their bytes with the store, as they did


def bytes_of(directory: Path) -> dict[str, bytes]:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def results(directory: Path) -> dict[str, bytes]:
    """What a run published, but for what tells when and how it ran."""
    told = ("run.json", ".reapkit-run.json", ".reapkit-run.lock", "recipe.resolved.yaml", "lock.json")
    return {name: content for name, content in bytes_of(directory).items() if name not in told}


def payloads(store: Path) -> dict[str, dict[str, bytes]]:
    """Of each artifact in use."""
    directories = [path for path in sorted(store.iterdir()) if (path / "payload").is_dir() and not path.suffix]
    return {path.name: bytes_of(path / "payload") for path in directories}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("damaged")
    place = Place(root, Run(None, None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        place = Place(root, walk(place.planned()))
    finally:
        torch.set_num_threads(threads)
    assert tuple(place.run.artifacts) == STAGE_NAMES
    for name in ("store", "run"):
        shutil.copytree(root / name, root / "untouched" / name)
    return place


@pytest.fixture
def place(made: Place) -> Iterator[Place]:
    """The finished run as it was, also where the test before left it otherwise."""
    untouched = made.root / "untouched"
    if payloads(made.root / "store") != payloads(untouched / "store") or not (made.published / "pruned").is_dir():
        made.restore()
    yield made
    for kept in made.store.root.glob("*.damaged-*"):
        shutil.rmtree(kept)


def files_of(artifact: Path) -> list[Path]:
    return [file for file in sorted((artifact / "payload").rglob("*")) if file.is_file()]


def applied(place: Place, *more: str, until: str | None = None, **how: Any) -> tuple[Run, list[str]]:
    heard = Heard()
    run = walk(place.fast(*more), until=until, progress=heard, **how)
    return run, [line for line in heard.warned if "damaged" in line]


# ---------------------------------------------------------------------------------------------- each file of each


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_flipped_byte_of_any_file_is_noticed_told_and_made_good(place: Place, stage: str) -> None:
    """Of small files under their old time too: what a stage reads is not what the time says."""
    artifact, untouched = place.artifact(stage), place.root / "untouched"
    for file in [artifact / "manifest.json", *files_of(artifact)]:
        flip(file, keep_times=file.stat().st_size <= 1 << 20)
        run, told = applied(place)
        where = file.relative_to(artifact)
        assert len(told) == 1 and told[0].startswith(f"{stage}: {artifact.name} is damaged: {where} "), file
        assert told[0].endswith(f" Kept as {artifact.name}.damaged-1; made again.")
        assert run.executed == [stage]
        kept = Path(f"{artifact}.damaged-1")
        assert kept.joinpath(where).is_file() and damage_of(place.store, stage, run.artifacts[stage].key) is None
        shutil.rmtree(kept)
    assert payloads(place.store.root) == payloads(untouched / "store")
    assert results(place.published) == results(untouched / "run")


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("damage", [truncate, delete, append, link, flip], ids=lambda each: each.__name__)
def test_every_damage_of_every_file_is_noticed(
    place: Place, tmp_path: Path, stage: str, damage: Callable[[Path], None]
) -> None:
    artifact, key = place.artifact(stage), place.run.artifacts[stage].key
    for file in [artifact / "manifest.json", *files_of(artifact)]:
        if damage is link and file.name == "manifest.json":
            continue  # it is read all the same, and holds the hash of itself
        copy = Store(tmp_path / "copy")
        shutil.copytree(artifact, copy.directory(stage, key))
        assert damage_of(copy, stage, key) is None
        damage(copy.directory(stage, key) / file.relative_to(artifact))
        found = damage_of(copy, stage, key)
        assert found is not None and found.file == str(file.relative_to(artifact))
        shutil.rmtree(copy.root)


def test_what_does_not_belong_in_an_artifact_is_moved_out_of_it(place: Place) -> None:
    artifact = place.artifact("prune")
    (artifact / "payload/model-00002-of-00002.safetensors").write_bytes(b"x" * 100)
    run, told = applied(place)
    assert run.executed == [] and told == [
        f"prune: {artifact.name} is damaged: payload/model-00002-of-00002.safetensors was not written by the stage. "
        f"What does not belong there was moved to {artifact.name}.damaged-1."
    ]
    assert [file.name for file in files_of(Path(f"{artifact}.damaged-1"))] == ["model-00002-of-00002.safetensors"]
    assert results(place.published) == results(place.root / "untouched/run")


# ---------------------------------------------------------------------------------------------- whole commands


def apply_command(place: Place, *more: str) -> Any:
    settings = [part for setting in place.settings() for part in ("--set", setting)]
    return command("apply", "demo", *settings, *more)


def test_a_deleted_shard_is_written_again_and_published(place: Place) -> None:
    artifact = place.artifact("prune")
    (artifact / "payload/model.safetensors").unlink()
    planned = next(stage for stage in place.planned().stages if stage.name == "prune")
    assert planned.reason == "its result is damaged: payload/model.safetensors is missing" and planned.must_run
    done = apply_command(place)
    assert done.code == 0 and "Done: " in done.stdout, done.stderr
    told = [line for line in done.stderr.splitlines() if "damaged" in line]
    assert told == [
        f"warning: prune: {artifact.name} is damaged: payload/model.safetensors is missing."
        f" Kept as {artifact.name}.damaged-1; made again.",
        "prune: running (its damaged result was set aside)",
    ]
    assert (place.published / "pruned/model.safetensors").samefile(artifact / "payload/model.safetensors")
    assert all(finding.passed for finding in check_directory(place.published / "pruned"))
    assert results(place.published) == results(place.root / "untouched/run")
    done = apply_command(place)
    assert done.code == 0 and "Nothing to do, all results exist" in done.stdout and "damaged" not in done.stderr


def test_bytes_that_the_run_shares_with_a_damaged_artifact_are_published_anew(place: Place) -> None:
    shared = place.published / "pruned/model.safetensors"
    flip(shared)  # as an editor does, in place: the store has the same bytes
    assert shared.samefile(place.artifact("prune") / "payload/model.safetensors")
    heard = Heard()
    walk(place.fast(), progress=heard)
    assert len(heard.warned) == 1 and "prune-" in heard.warned[0] and "is damaged" in heard.warned[0]
    assert all(finding.passed for finding in check_directory(place.published / "pruned"))
    assert results(place.published) == results(place.root / "untouched/run")
    assert not list(place.published.rglob("*.yours*"))


def test_check_reads_what_seems_unchanged(place: Place) -> None:
    artifact = place.artifact("prune")
    flip_unseen(artifact / "payload/model.safetensors")
    done = apply_command(place)
    assert done.code == 0 and "Nothing to do" in done.stdout and "damaged" not in done.stderr
    done = apply_command(place, "--check")
    assert done.code == 0 and f"prune: {artifact.name} is damaged: payload/model.safetensors has other" in done.stderr
    assert payloads(place.root / "untouched/store")[artifact.name] == bytes_of(artifact / "payload")
    assert all(finding.passed for finding in check_directory(place.published / "pruned"))


def test_the_store_is_checked_and_cleared_by_command(place: Place) -> None:
    store, measurements = place.store.root, len(artifact_directories(place.store)) - len(STAGE_NAMES)
    done = command("gc", "--store", store, "--check")
    assert done.code == 0 and f"{10 + measurements} artifacts, " in done.stdout
    assert measurements >= 7 and "; 0 damaged; not read: none" in done.stdout
    observe, verify = place.artifact("observe"), place.artifact("verify")
    flip_unseen(observe / "payload/observation.safetensors")
    (verify / "manifest.json").unlink()
    done = command("gc", "--store", store, "--check", "--dry-run", "--json")
    assert done.code == 3
    found = done.json()
    assert [(each["artifact"], each["kept_as"]) for each in found["damaged"]] == [
        (observe.name, f"{observe.name}.damaged-1"),
        (verify.name, f"{verify.name}.damaged-1"),
    ]
    assert found["sound"] == 8 + measurements and found["damaged"][1]["damage"] == "manifest.json is missing"
    assert observe.is_dir() and verify.is_dir()
    done = command("gc", "--store", store, "--check")
    assert done.code == 3 and "Damaged and set aside; the next run that needs them makes them again" in done.stdout
    assert not observe.exists() and not verify.exists()
    done = command("gc", "--store", store, "--check", "--json")
    assert done.code == 0 and done.json()["not_read"] == {
        "damaged, set aside": [f"{observe.name}.damaged-1", f"{verify.name}.damaged-1"]
    }
    judged_from = json.loads((place.artifact("evaluate") / "manifest.json").read_text())["measurements"]
    done = command("gc", "--store", store)
    assert done.code == 0 and f"{8 + len(judged_from)} (a run uses it), 2 (damaged, set aside)" in done.stdout
    done = command("gc", "--store", store, "--damaged")
    assert done.code == 0 and "2 artifacts, " in done.stdout and not list(store.glob("*.damaged-*"))
    done = command("gc", "--store", store, "--check", "--damaged")
    assert done.code == 2
    assert "--check: removes nothing, and so goes without --damaged. Give one of the two." in done.stderr


# ---------------------------------------------------------------------------------------------- what depends on what


def test_dropped_files_are_made_again_where_a_damaged_artifact_needs_them(place: Place) -> None:
    keep = "output.keep=[quantized]"
    run, told = applied(place, keep)
    assert told == [] and run.executed == [] and not (place.artifact("prune") / "payload").exists()
    run, told = applied(place, keep)
    assert told == [] and run.executed == [], "what was dropped is no damage"
    flip(place.artifact("quantize") / "payload/model.safetensors")
    run, told = applied(place, keep)
    assert run.executed == ["prune", "quantize"] and len(told) == 1 and told[0].startswith("quantize: ")
    flip(place.artifact("prune") / "manifest.json")
    run, told = applied(place, keep)
    assert run.executed == ["prune"] and told[0].startswith(
        f"prune: {place.artifact('prune').name} is damaged: manifest"
    )


def test_a_verdict_from_a_damaged_evaluation_does_not_count(place: Place) -> None:
    plan = place.planned("prune={candidates: {ratio: [0.25, 0.5]}, repair: ridge}")
    key = plan.stage("evaluate").known_key
    (place.store.begin("evaluate", key, resume=False) / "evaluation.json").write_text("{}")
    artifact = place.store.finish("evaluate", key, {"summary": {"chosen": plan.candidates[1].name}})
    decided = plan.anew()
    assert decided.winner == plan.candidates[1].name and decided.stage("prune").key is not None
    flip(artifact.payload / "evaluation.json", keep_times=True)
    heard = Heard()
    sound = SoundPlans(progress=heard).of(decided, "evaluate")
    assert sound.winner is None and sound.stage("prune").key is None and sound.stage("evaluate").must_run
    assert len(heard.warned) == 1 and heard.warned[0].startswith(f"evaluate: {artifact.directory.name} is damaged")


def test_what_is_damaged_while_a_stage_runs_is_not_read_by_the_next(place: Place) -> None:
    """The selection is damaged by the time that the evaluation is done: it is made again before prune reads it."""
    selection = place.artifact("select") / "payload/candidates"
    order: list[str] = []

    def watched(definition: StageDefinition) -> StageDefinition:
        def run(context: Context) -> dict[str, Any]:
            order.append(definition.name)
            if definition.name == "evaluate":
                [file] = selection.glob("*/selection.json")
                flip(file, keep_times=True)
            if definition.name == "prune":
                assert damage_of(place.store, "select", context.inputs["select"].key) is None
            return place._given(context)

        return replace(definition, run=run)

    for stage in ("evaluate", "prune"):
        shutil.rmtree(place.artifact(stage))
    heard = Heard()
    run = walk(place.planned(stages=tuple(map(watched, STAGES))), progress=heard)
    assert order == ["evaluate", "select", "prune"] and run.executed == ["evaluate", "select", "prune"]
    assert len(heard.warned) == 1 and "select" in heard.warned[0]
    assert results(place.published) == results(place.root / "untouched/run")


def test_nothing_that_was_damaged_meanwhile_is_published(place: Place) -> None:
    def last(context: Context) -> dict[str, Any]:
        flip(place.artifact("prune") / "payload/model.safetensors")
        return place._given(context)

    shutil.rmtree(place.artifact("report"))
    stages = tuple(replace(each, run=last if each.name == "report" else place._given) for each in STAGES)
    run = walk(place.planned(stages=stages), progress=(heard := Heard()))
    assert run.executed == ["report", "prune"] and len(heard.warned) == 1
    assert all(finding.passed for finding in check_directory(place.published / "pruned"))


def test_a_disk_that_keeps_nothing_ends_the_run(place: Place) -> None:
    sound, plan = SoundPlans(progress=Heard()), place.fast()
    with pytest.raises(StageFailed, match=r"select-\w+: damaged again and again \(payload/index.json has other bytes"):
        for _ in range(9):
            flip(place.artifact("select") / "payload/index.json")
            sound.of(plan, "select")
            walk(plan, until="select")


# ---------------------------------------------------------------------------------------------- earlier reapkits


def test_artifacts_of_an_earlier_reapkit_are_taken_over_and_checked_from_then_on(place: Place) -> None:
    for artifact in place.run.artifacts.values():
        without_list(artifact)
    heard = Heard()
    run = walk(place.fast(), progress=heard)
    assert run.executed == [] and heard.warned == []
    assert [line for line in heard.said if "earlier reapkit" in line] == [
        f"{stage}: {place.artifact(stage).name} is from an earlier reapkit; its files were hashed, and will be checked"
        " from now on"
        for stage in STAGE_NAMES
    ]
    heard = Heard()
    assert walk(place.fast(), progress=heard).executed == [] and not any("earlier" in line for line in heard.said)
    flip(place.artifact("observe") / "payload/observation.safetensors", keep_times=True)
    assert applied(place)[0].executed == ["observe"]


def test_a_damaged_model_of_an_earlier_reapkit_is_told_by_the_record_in_it(place: Place) -> None:
    without_list(place.run.artifacts["prune"])
    flip_unseen(place.artifact("prune") / "payload/model.safetensors")
    run, told = applied(place)
    assert run.executed == ["prune"] and len(told) == 1 and "payload/model.safetensors has other bytes" in told[0]
    assert payloads(place.store.root) == payloads(place.root / "untouched/store")


# ---------------------------------------------------------------------------------------------- kills, other processes


def test_a_run_that_is_killed_after_it_set_something_aside_goes_on(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(place.artifact("select") / "payload/index.json")

    def killed(*arguments: Any, **more: Any) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "begin", killed)
        applied(place)
    assert not place.artifact("select").exists() and Path(f"{place.artifact('select')}.damaged-1").is_dir()
    run, told = applied(place)
    assert run.executed == ["select"] and told == []
    assert results(place.published) == results(place.root / "untouched/run")


def test_a_finished_artifact_outlives_a_kill_before_its_files_were_noted(place: Place) -> None:
    (place.artifact("prune") / "checked.json").unlink()
    run, told = applied(place)
    assert run.executed == [] and told == [] and (place.artifact("prune") / "checked.json").is_file()


def test_runs_at_once_set_a_damaged_artifact_aside_once(place: Place) -> None:
    flip(place.artifact("select") / "payload/index.json")
    settings = [part for setting in place.settings() for part in ("--set", setting)]
    arguments = [sys.executable, "-m", "reapkit", "apply", "demo", "--until", "select", *settings]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [*arguments, "--set", f"output.directory={place.root / 'others' / str(number)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for number in range(3)
    ]
    ended = [each.communicate()[1] for each in started]
    assert [each.returncode for each in started] == [0, 0, 0], ended
    assert len(list(place.store.root.glob("select-*.damaged-*"))) == 1
    assert sum("is damaged" in line for text in ended for line in text.splitlines()) == 1
    assert (
        bytes_of(place.artifact("select") / "payload")
        == payloads(place.root / "untouched/store")[place.artifact("select").name]
    )
    selections = [bytes_of(place.root / "others" / str(number) / "selection") for number in range(3)]
    assert selections[0] == selections[1] == selections[2] == bytes_of(place.published / "selection")


@pytest.mark.long
def test_of_two_ranks_one_looks_and_both_read_what_it_made_good(place: Place) -> None:
    flip(place.artifact("calibrate") / "payload/tokens.safetensors", keep_times=True)
    (place.artifact("observe") / "payload/observation.json").unlink()
    settings = [part for setting in place.settings() for part in ("--set", setting)]
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reapkit")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, "apply", "demo", "--until", "observe", *settings], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" is damaged: ") == 2 and done.stderr.count("its damaged result was set aside") == 2
    untouched = payloads(place.root / "untouched/store")
    assert bytes_of(place.artifact("calibrate") / "payload") == untouched[place.artifact("calibrate").name]
    name = "observation.safetensors"
    assert bytes_of(place.artifact("observe") / "payload")[name] == untouched[place.artifact("observe").name][name]


# ---------------------------------------------------------------------------------------------- read-only stores


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "store")

    monkeypatch.setattr("reapkit.core.locks.locked", refused)
    monkeypatch.setattr("reapkit.core.stat_record.write_json", refused)


def test_a_read_only_store_is_checked_and_used(place: Place, read_only: None) -> None:
    os.utime(place.artifact("prune") / "payload/model.safetensors")
    without_list(place.run.artifacts["observe"])
    plan = place.planned()
    try:
        assert SoundPlans().of(plan, None) is plan
    finally:
        shutil.rmtree(place.artifact("observe"))


def test_a_finished_run_is_applied_from_a_read_only_disk(place: Place, tmp_path: Path) -> None:
    settings = (f"runtime.store={tmp_path / 'disk/store'}", f"output.directory={tmp_path / 'run'}")
    with mounted(tmp_path / "disk"):
        shutil.copytree(place.store.root, tmp_path / "disk/store")
        remount(tmp_path / "disk", "ro")
        run = walk(place.planned(*settings), progress=(heard := Heard()))
        assert run.executed == [] and heard.warned == []
        assert results(tmp_path / "run") == results(place.root / "untouched/run")
        remount(tmp_path / "disk", "rw")
        flip_unseen(tmp_path / "disk/store" / place.artifact("prune").name / "payload/model.safetensors")
        remount(tmp_path / "disk", "ro")
        with pytest.raises(
            UnusableError, match=r"prune-\w+: the artifact is damaged, and cannot be set aside \(Read-only"
        ):
            walk(place.planned(*settings))


def test_a_damaged_artifact_of_a_read_only_store_is_refused(place: Place, read_only: None) -> None:
    flip(place.artifact("select") / "payload/index.json")
    expected = (
        rf"store/{place.artifact('select').name}: the artifact is damaged, and cannot be set aside \(Read-only file"
        r" system\)\. Make the store writable, or choose another runtime\.store\."
    )
    with pytest.raises(UnusableError, match=expected):
        SoundPlans().of(place.planned(), None)
    flip(place.artifact("select") / "payload/index.json")


# ---------------------------------------------------------------------------------------------- what commands are given


def test_commands_refuse_a_damaged_artifact(place: Place, tmp_path: Path) -> None:
    observe = place.artifact("observe")
    flip(observe / "payload/observation.safetensors", keep_times=True)
    settings = [part for setting in place.settings() for part in ("--set", setting)]
    expected = f"reapkit: {observe}: the artifact is damaged: payload/observation.safetensors has other bytes than were"
    for given in (observe, observe / "payload"):
        for arguments in (
            ("inspect", given),
            ("report", given, "-o", tmp_path / "page.html"),
            ("export", given, tmp_path / "tables"),
            ("compare", given, given),
            ("merge", observe / "payload", observe / "payload", "-o", tmp_path / "merged"),
            ("select", "demo", *settings, "--observation", given),
            ("apply", "demo", *settings, "--observation", given),
        ):
            done = command(*arguments)
            assert done.code == 3 and done.stderr.startswith(expected), arguments
            assert done.stderr.endswith("Apply its recipe again, which makes it anew.\n")
    done = command("verify", observe)
    assert done.code == 3 and "payload/observation.safetensors has other" in done.stdout
    assert not list(tmp_path.iterdir())
    done = command("verify", place.artifact("calibrate"))
    assert done.code == 0 and "2 files as written" in done.stdout


def test_commands_refuse_what_was_changed_in_a_run(place: Place, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(place.published, copied)
    assert command("inspect", copied).code == command("verify", copied).code == 0, "a copy is what it was"
    flip(copied / "selection/selection.json", keep_times=True)
    expected = f"reapkit: {copied}: selection/selection.json has other bytes than were written"
    for arguments in (
        ("inspect", copied),
        ("inspect", copied / "selection"),
        ("compare", copied, place.published),
        ("report", copied / "observation", "--selection", copied / "selection", "-o", tmp_path / "page.html"),
    ):
        done = command(*arguments)
        assert done.code == 3 and done.stderr.startswith(expected), arguments
        assert done.stderr.endswith("If the change is yours, copy the directory elsewhere and give the copy.\n")
    done = command("verify", copied)
    assert done.code == 3 and "selection/selection.json has other bytes" in done.stdout
    shutil.copytree(copied / "selection", tmp_path / "mine")
    assert command("inspect", tmp_path / "mine").code == 0
    (copied / "pruned/README.md").write_text("my own card")
    assert command("inspect", copied / "pruned").code == 0
