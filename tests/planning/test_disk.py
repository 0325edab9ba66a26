"""What a run will write is counted by disk: what stays, the most at a time, and where there is no room."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from reapkit.core.errors import StageFailed, UnusableError
from reapkit.pipeline.planned import plan
from reapkit.pipeline.run import walk
from reapkit.pipeline.stages.every_stage import STAGES
from reapkit.planning import disk
from reapkit.planning.disk import FileSystem, file_systems, missing_disk, tight_disk
from reapkit.planning.disk_use import OFFLOAD, RUN, STORE, TEMPORARY, DiskUse, in_blocks
from reapkit.planning.plan import Plan
from reapkit.planning.stage_definitions import nothing_written
from reapkit.recipe.loading import load
from tests.support.broken_machines import RECIPE
from tests.support.disks import mounted


@pytest.fixture
def made(tmp_path: Path) -> Plan:
    return planned(tmp_path)


def planned(root: Path, *overrides: str) -> Plan:
    (root / "small.yaml").write_text(RECIPE)
    where = (f"runtime.store={root / 'store'}", f"output.directory={root / 'run'}")
    return plan(load(root / "small.yaml", (*where, *overrides)))


def free(nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=nbytes, total=10**15))


def test_every_stage_says_what_it_writes() -> None:
    assert not [stage.name for stage in STAGES if stage.writes is nothing_written]


def test_what_stays_adds_up_and_the_most_is_in_between() -> None:
    uses = (
        ("a", DiskUse(STORE, kept=10, meanwhile=5, is_exact=True)),
        ("b", DiskUse(STORE, kept=1, meanwhile=100)),
        ("b", DiskUse(STORE, meanwhile=7, is_exact=True)),
        ("c", DiskUse(RUN, kept=20, is_exact=True)),
    )
    found = FileSystem(Path("/data"), 40, (STORE, RUN), uses)
    assert (found.kept, found.peak) == (31, 118)
    assert found.shortage is None and found.warning == (
        "/data: up to 118 B may be written by the end of b, but only 40 B are free. Free 78 B there, or"
        " set runtime.store or output.directory to another disk."
    )
    assert replace(found, free=118).warning is None
    short = replace(found, free=29)
    assert short.warning is None and short.shortage == (
        "/data: 30 B will be written by the end of c, but only 29 B are free. Free 1 B there, or set"
        " runtime.store or output.directory to another disk."
    )


def test_weights_are_counted_to_the_block(made: Plan) -> None:
    [found] = file_systems(made)
    written = {stage: [use for name, use in found.uses if name == stage] for stage, _ in found.uses}
    pruned, quantized = (max(written[name], key=lambda use: use.kept) for name in ("prune", "quantize"))
    candidate = made.candidates[0]
    assert pruned.is_exact and quantized.is_exact
    assert made.pruned(candidate).nbytes < pruned.linked < 1.01 * made.pruned(candidate).nbytes
    assert made.quantized_nbytes(candidate) < quantized.linked < 1.07 * made.quantized_nbytes(candidate)
    tokenizer = (made.checkpoint.path / "tokenizer.json").stat().st_size
    assert in_blocks(tokenizer) < pruned.copied < tokenizer + 50_000
    assert found.settings == (STORE, RUN, TEMPORARY) or found.settings == (STORE, RUN)


def test_the_runs_directory_on_another_disk_takes_copies(tmp_path: Path) -> None:
    with mounted(tmp_path / "other", "size=100m") as other:
        made = planned(tmp_path, f"output.directory={other / 'run'}")
        store, run = (next(disk for disk in file_systems(made) if disk.settings[0] == name) for name in (STORE, RUN))
        assert run.path == other
        both = made.pruned(made.candidates[0]).nbytes + made.quantized_nbytes(made.candidates[0])
        assert both < run.kept < store.kept and run.kept > sum(use.linked for _, use in store.uses)
    [alone] = file_systems(planned(tmp_path))[:1]
    assert alone.kept - store.kept < run.kept - both


def test_what_waits_is_counted_where_it_waits(tmp_path: Path) -> None:
    with mounted(tmp_path / "off", "size=100m") as off:
        streaming = ("runtime.placement=streaming", f"runtime.offload_directory={off}", "quantize.method=gptq")
        [found] = [disk for disk in file_systems(planned(tmp_path, *streaming)) if disk.path == off]
        assert found.settings == (OFFLOAD,) and found.kept == 0
        assert found.peak > planned(tmp_path).pruned(planned(tmp_path).candidates[0]).nbytes / 2


def test_what_finds_no_room_is_refused_before_anything_runs(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    [found] = file_systems(made)[:1]
    free(6_000_000, monkeypatch)
    told = missing_disk(made)
    assert told is not None and told.startswith(f"{found.path}: 6.36 MB will be written by the end of quantize"), told
    assert told.endswith("or set runtime.store or output.directory to another disk."), told
    with pytest.raises(UnusableError, match=r"disk: .* will be written by the end of \w+, but only"):
        walk(made)
    assert not (found.path / "store").exists() and missing_disk(made, until="select") is None


def test_what_may_find_no_room_is_a_warning(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    [found] = file_systems(made)[:1]
    free(found.peak - 1, monkeypatch)
    assert missing_disk(made) is None and "may be written by the end of" in (tight_disk(made) or "")
    free(found.peak, monkeypatch)
    assert tight_disk(made) is None


def test_a_stage_is_refused_by_what_the_stages_before_it_made(made: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the calibration is there, its tokens are counted from above, which only warns."""
    walk(made, until="calibrate")
    again = plan(made.loaded)
    needed = sum(use.kept + use.meanwhile for use in STAGES[2].writes(again))
    free(needed - 1, monkeypatch)
    monkeypatch.setattr("reapkit.pipeline.run.tight_disk", lambda *arguments: None)
    with pytest.raises((StageFailed, UnusableError), match="will be written by the end of observe"):
        walk(again, until="observe")


def test_nothing_is_written_twice(made: Plan) -> None:
    walk(made, until="packs")
    stages = {stage for disk in file_systems(plan(made.loaded)) for stage, _ in disk.uses}
    assert stages.isdisjoint({"calibrate", "packs"}) and {"observe", "prune", disk.PUBLISH} <= stages
