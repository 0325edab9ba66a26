"""What was measured is not measured again: other limits are judged at once, another candidate is measured alone, and a
measurement that was not finished, or is damaged, is the only one that is made again."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from reapkit.core.artifact_store import Store
from reapkit.core.errors import RejectedByGates
from reapkit.core.garbage_collection import collect
from reapkit.core.measurements import Measure, load_facts, save_facts
from reapkit.evaluation import bench, directory, generation
from reapkit.evaluation.proofs import prove as proving
from reapkit.evaluation.proofs.proof import Proof
from reapkit.pipeline.damaged import SoundPlans
from reapkit.pipeline.measurements import KeptMeasurements
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.run import Run, walk
from reapkit.planning.disk import file_systems
from reapkit.planning.plan import Plan
from reapkit.recipe.loading import load
from reapkit.report.tables import plan_as_json
from tests.support.damage import flip
from tests.support.heard import Heard

SMALL = (
    'calibration={samples: 8, max_length: 128, mix: [{name: prose, source: "builtin:prose"}]}',
    "evaluate={packs: {samples: 8, lengths: [128]}, generation: {prompts: 2, max_new_tokens: 4}, throughput: null}",
    "evaluate.equal_bytes=false",
    "evaluate.controls=[random]",
    "quantize.scheme=null",
    "runtime.device=cpu",
)
TIGHT, LOOSE = "evaluate.gates={kl_mean: {max: 0.000001}}", "evaluate.gates={kl_mean: {max: 50}}"


def planned(root: Path, *more: str) -> Plan:
    where = (f"runtime.store={root / 'store'}", f"output.directory={root / 'run'}")
    return make_plan(load("demo", (*SMALL, *where, *more)))


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def applied(root: Path, *more: str, until: str = "evaluate", heard: Heard | None = None) -> Run:
    with one_thread():
        return walk(planned(root, *more), until=until, progress=heard or Heard())


def evaluation(run: Run) -> bytes:
    return (run.artifacts["evaluate"].payload / "evaluation.json").read_bytes()


def kept(root: Path, *kinds: str) -> dict[str, tuple[int, bytes]]:
    """Files of measurements, with the inode that each has."""
    found = [file for kind in kinds for file in sorted((root / "store").glob(f"{kind}-*/payload/*"))]
    return {str(file.relative_to(root)): (file.stat().st_ino, file.read_bytes()) for file in found}


@pytest.fixture(scope="module")
def rejected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose candidate was rejected, smaller cuts and all."""
    root = tmp_path_factory.mktemp("rejected")
    with pytest.raises(RejectedByGates):
        applied(root, TIGHT)
    return root


def copied_inputs(rejected: Path, root: Path) -> None:
    """What the evaluation reads, without a measurement."""
    for stage in ("calibrate", "packs", "observe", "select"):
        [artifact] = [path for path in (rejected / "store").glob(f"{stage}-*") if path.is_dir()]
        shutil.copytree(artifact, root / "store" / artifact.name)


@pytest.fixture(scope="module")
def fresh(rejected: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Everything measured under the loose limits, in a store that holds no measurement."""
    root = tmp_path_factory.mktemp("fresh")
    copied_inputs(rejected, root)
    return applied(root, LOOSE)


@pytest.fixture
def root(rejected: Path, tmp_path: Path) -> Path:
    shutil.copytree(rejected / "store", tmp_path / "store", ignore=shutil.ignore_patterns("runs"))
    return tmp_path


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What runs a model from now on, by the titles that are shown."""
    titles: list[str] = []

    def noting(module: Any, name: str, title: str = "") -> None:
        plain = getattr(module, name)

        def noted(*arguments: Any, **how: Any) -> Any:
            titles.append(title or how["title"])
            return plain(*arguments, **how)

        monkeypatch.setattr(module, name, noted)

    noting(bench, "measure")
    noting(bench, "base_hidden", "evaluate base")
    noting(generation, "write")
    noting(directory, "measure")
    return titles


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch, measured: list[str]) -> None:
    """A model that is loaded is an error."""

    def refused(*arguments: Any, **how: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("reapkit.model.loading.load_model", refused)
    monkeypatch.setattr(directory, "load_model", refused)


# ---------------------------------------------------------------------------------------------- judging is free


def test_other_limits_are_judged_without_a_model(root: Path, fresh: Run, no_model: None) -> None:
    before, heard = kept(root, "signals", "hidden", "continuations"), Heard()
    run = applied(root, LOOSE, heard=heard)
    assert run.summary("evaluate")["verdict"] == "pass" and run.executed == ["evaluate"]
    assert kept(root, "signals", "hidden", "continuations") == before
    assert evaluation(run) == evaluation(fresh), "a verdict says nothing of when its numbers were measured"
    assert "evaluate: nothing was measured: 9 measurements were there" in heard.said
    with pytest.raises(RejectedByGates):
        applied(root, "evaluate.gates={kl_mean: {max: 0.000002}}")


def test_the_plan_says_that_only_judging_is_left(root: Path) -> None:
    plan = planned(root, LOOSE)
    [told] = [stage for stage in plan_as_json(plan)["stages"] if stage["stage"] == "evaluate"]
    assert told["state"] == "run" and told["measures"] == {"there": 9, "missing": []}
    assert told["reason"] == (
        "evaluate.gates.kl_mean.max: 1e-06 → 50.0; nothing is measured: it is judged again from what was measured; a"
        " rejection measures smaller cuts"
    )
    assert told["reason"] in plan._repr_html_()
    first = plan_as_json(planned(root / "elsewhere", LOOSE))["stages"]
    assert [stage["measures"] for stage in first] == [None] * len(first)


def test_the_plan_names_what_is_left_to_measure(root: Path) -> None:
    grid = "prune={candidates: {ratio: [0.5, 0.375]}}"
    applied(root, LOOSE, grid, until="select")
    [told] = [stage for stage in plan_as_json(planned(root, LOOSE, grid))["stages"] if stage["stage"] == "evaluate"]
    missing = ["reap-r0.375 (128 tokens, decide)", "reap-r0.375 (128 tokens, confirm)", "reap-r0.375 (continuations)"]
    assert told["measures"]["missing"] == [*missing, "random-beside-reap-r0.375 (128 tokens, decide)"]
    assert f"measures at most {', '.join(missing)} and 1 more; 9 measurements are there" in told["reason"]


def test_disk_is_counted_for_what_is_not_there(rejected: Path, root: Path, fresh: Run) -> None:
    def planned_bytes(root: Path) -> int:
        [disk] = file_systems(planned(root, LOOSE), until="evaluate")
        return sum(use.kept for stage, use in disk.uses if stage == "evaluate")

    def on_disk(*kinds: str) -> int:
        names = [name for name in fresh.artifacts["evaluate"].manifest["measurements"] if name.startswith(kinds)]
        return sum(file.stat().st_size for name in names for file in (fresh.plan.store.root / name).rglob("*"))

    copied_inputs(rejected, root / "bare")
    bare, again = planned_bytes(root / "bare"), planned_bytes(root)
    assert bare > on_disk("hidden", "signals", "continuations") and bare - again > on_disk("hidden") > 0


# ---------------------------------------------------------------------------------------------- one thing is measured


def test_a_further_ratio_is_measured_alone(root: Path, measured: list[str]) -> None:
    before = kept(root, "signals", "hidden", "continuations")
    applied(root, TIGHT, "evaluate.on_reject=warn", "prune={candidates: {ratio: [0.5, 0.375]}}")
    titles = set(measured)
    assert {title for title in titles if "r0.5" in title or "base" in title} == set(), titles
    assert {"evaluate reap-r0.375", "generate reap-r0.375"} <= titles
    assert before.items() <= kept(root, "signals", "hidden", "continuations").items()


def test_other_prompts_are_continued_and_nothing_else_is_measured(root: Path, measured: list[str]) -> None:
    before = kept(root, "signals", "hidden")
    applied(root, LOOSE, "evaluate.generation={prompts: 3, max_new_tokens: 4}")
    assert measured == ["generate reap-r0.5", "generate base"] or measured == ["generate base", "generate reap-r0.5"]
    assert kept(root, "signals", "hidden") == before


@pytest.mark.parametrize("at", ["evaluate reap-r0.5", "generate reap-r0.5"])
def test_a_killed_run_goes_on_with_what_was_not_finished(
    fresh: Run, rejected: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    module, name = (bench, "measure") if at.startswith("evaluate") else (generation, "write")
    copied_inputs(rejected, tmp_path)
    plain = getattr(module, name)

    def killed(*arguments: Any, **how: Any) -> Any:
        if how["title"] == at:
            raise KeyboardInterrupt
        return plain(*arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, killed)
        with pytest.raises(KeyboardInterrupt):
            applied(tmp_path, LOOSE)
    finished = list(measured)
    measured.clear()
    run = applied(tmp_path, LOOSE)
    assert finished and not {*finished} & {*measured} - {"evaluate reap-r0.5", "evaluate base"}
    assert measured[0] == at and "evaluate base" in finished
    assert evaluation(run) == evaluation(fresh)


def test_a_damaged_measurement_is_set_aside_and_the_only_one_made_again(
    root: Path, fresh: Run, measured: list[str]
) -> None:
    names = fresh.artifacts["evaluate"].manifest["measurements"]
    [name] = [each for each in names if is_of(fresh, each, "reap-r0.5")]
    flip(root / "store" / name / "payload" / "signals.safetensors")
    heard = Heard()
    run = applied(root, LOOSE, heard=heard)
    [warned] = [line for line in heard.warned if "damaged" in line]
    assert warned.startswith(f"signals: {name} is damaged: payload/signals.safetensors has other bytes")
    assert warned.endswith(f"Kept as {name}.damaged-1; made again.")
    assert measured == ["evaluate reap-r0.5"] and evaluation(run) == evaluation(fresh)


def is_of(run: Run, artifact: str, name: str) -> bool:
    """Whether the measurement is of that candidate's signals on the rows that decide."""
    facts = json.loads((run.plan.store.root / artifact / "manifest.json").read_text())
    return facts["summary"].get("title") == f"{name} (128 tokens, decide)"


# ---------------------------------------------------------------------------------------------- the final directory


def test_other_limits_on_the_final_directory_load_nothing(
    root: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[Any] = []
    proof = Proof("loads", True, "as it should", directory="pruned")
    monkeypatch.setattr(proving, "prove", lambda request: proved.append(request) or [proof])
    run = applied(root, LOOSE, until="verify")
    assert measured == ["measure pruned"], "the base's own numbers are those that the evaluation measured"
    verified = json.loads((run.directory / "verify.json").read_text())
    assert len(proved) == 1 and verified["verdict"] == "not judged"
    measured.clear()
    monkeypatch.setattr(directory, "load_model", None)
    monkeypatch.setattr("reapkit.model.loading.load_model", None)
    judged = "evaluate.gates_quantized={kl_mean: {max: 0.000001}}"
    [told] = [s for s in plan_as_json(planned(root, LOOSE, judged))["stages"] if s["stage"] == "verify"]
    assert told["reason"].endswith("; nothing is measured: it is judged again from what was measured")
    with pytest.raises(RejectedByGates):
        applied(root, LOOSE, judged, until="verify")
    again = json.loads((root / "run" / "verify.json").read_text())
    assert measured == [] and len(proved) == 1 and again["verdict"] == "reject"
    assert {name: again[name] for name in ("rows", "metrics", "proofs")} == {
        name: verified[name] for name in ("rows", "metrics", "proofs")
    }


@pytest.mark.parametrize("placement", ["resident", "streaming"])
def test_a_store_that_lost_its_measurements_measures_them_again(
    placement: str, rejected: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "prove", lambda request: [Proof("loads", True, "as it should", directory="pruned")])
    settings = (LOOSE, f"runtime.placement={placement}", "evaluate.generation=null")
    copied_inputs(rejected, tmp_path)
    before = json.loads((applied(tmp_path, *settings, until="verify").directory / "verify.json").read_text())
    for kind in ("signals", "hidden", "verify"):
        for found in (tmp_path / "store").glob(f"{kind}-*"):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    after = json.loads((applied(tmp_path, *settings, until="verify").directory / "verify.json").read_text())
    assert after == before


def test_the_final_directory_is_judged_by_its_own_continuations(
    root: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proving, "prove", lambda request: [Proof("loads", True, "as it should", directory="pruned")])
    applied(root, LOOSE)
    measured.clear()
    limits = "evaluate.gates_quantized={preset: strict, loop_share_delta: {max: 1.0}, kl_mean: {max: 50}}"
    with pytest.raises(RejectedByGates):  # the preset's other limits
        applied(root, LOOSE, limits, until="verify")
    assert measured == ["measure pruned", "generate pruned"], "the base's texts are those of the evaluation"
    found = json.loads((root / "run" / "verify.json").read_text())
    [loops] = [each for each in found["gates"] if each["metric"] == "loop_share_delta"]
    chosen = json.loads((root / "run" / "evaluation" / "evaluation.json").read_text())["candidates"][0]
    assert loops["verdict"] == "pass" and loops["pack"] == "generation"
    assert loops["value"] == chosen["generation"]["all"]["loop_share_delta"]["value"], "the mask's, once more"


# ---------------------------------------------------------------------------------------------- the store


def test_what_a_kept_run_was_judged_from_stays(root: Path, no_model: None) -> None:
    before = {path.name for path in (root / "store").glob("signals-*") if path.is_dir()}
    run = applied(root, LOOSE)
    used = set(run.artifacts["evaluate"].manifest["measurements"])
    gone = {each.artifact for each in collect(run.plan.store).removed}
    assert not used & gone and {name for name in gone if name.startswith("signals-")} == before - used != set()
    assert {name.partition("-")[0] for name in used} == {"signals", "hidden", "continuations"}
    entered = json.loads(next((root / "store" / "runs").glob("*.json")).read_text())["artifacts"]
    assert set(entered) == {"calibrate", "packs", "observe", "select", "evaluate"}
    shutil.rmtree(root / "run")
    collect(run.plan.store)
    assert not list((root / "store").glob("signals-*/payload"))


def shelf(root: Path, heard: Heard) -> KeptMeasurements:
    return KeptMeasurements(Store(root / "store"), root / "run", SoundPlans(progress=heard), heard)


def test_two_runs_that_measure_the_same_measure_it_once(tmp_path: Path) -> None:
    measure, begun, others = Measure("signals", 1, {"of": "base"}, "base"), threading.Event(), Heard()
    made: list[str] = []
    waits = threading.Event()
    others.say = lambda text: waits.set() if "another run is measuring this" in text else None  # type: ignore[method-assign]

    def first(work: Path | None) -> int:
        begun.set()
        assert waits.wait(30), "the other run does not wait"
        made.append("first")
        return 1

    def second(work: Path | None) -> int:
        made.append("second")
        return 2

    results: dict[str, int] = {}

    def run(name: str, make: Any, heard: Heard) -> None:
        results[name] = shelf(tmp_path, heard).get(measure, make, save_facts, load_facts)

    one = threading.Thread(target=run, args=("one", first, Heard()))
    one.start()
    assert begun.wait(30)
    other = threading.Thread(target=run, args=("other", second, others))
    other.start()
    one.join(30)
    other.join(30)
    assert results == {"one": 1, "other": 1} and made == ["first"]


def test_what_collects_while_a_run_measures_leaves_its_measurements(tmp_path: Path) -> None:
    measure, kept_here = Measure("signals", 1, {"of": "base"}, "base"), shelf(tmp_path, Heard())
    assert kept_here.get(measure, lambda work: 1, save_facts, load_facts) == 1
    assert collect(Store(tmp_path / "store")).removed == []
    assert kept_here.find(measure, load_facts) == 1


def test_a_measurement_is_found_by_what_it_measures_alone(tmp_path: Path) -> None:
    measure, kept_here = Measure("signals", 1, {"of": "base"}, "base"), shelf(tmp_path, Heard())
    kept_here.get(measure, lambda work: 1, save_facts, load_facts)
    assert kept_here.find(Measure("signals", 1, {"of": "base"}, "called otherwise"), load_facts) == 1
    for other in (Measure("signals", 2, {"of": "base"}, "base"), Measure("signals", 1, {"of": "mask"}, "base")):
        assert kept_here.find(other, load_facts) is None


def test_a_measure_that_needs_itself_is_a_defect_and_not_a_wait(root: Path) -> None:
    kept, measure = shelf(root, Heard()), Measure("signals", 1, {"of": "itself"}, "itself")

    def make(work: Path | None) -> Any:
        return kept.get(measure, make, save_facts, load_facts)

    with pytest.raises(AssertionError, match="itself is measured while it is being measured"):
        make(None)
