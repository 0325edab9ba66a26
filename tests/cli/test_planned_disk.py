"""What the plan says a stage will write, against the blocks that are really taken while it runs."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.broken_machines import RECIPE, assert_told
from tests.support.disks import mounted
from tests.support.forked import Forks

STAGES = ("calibrate", "packs", "observe", "select", "repair", "evaluate", "prune", "quantize", "verify", "report")
BIG_BYTES = 1 << 20
"""From here on the plan is at most a quarter above; below it counts every file from above."""
CASES = {
    "resident, repaired": ("prune.repair=ridge", "evaluate.controls=[random]", "evaluate.equal_bytes=true"),
    "a layer at a time": (
        "runtime.placement=streaming",
        "runtime.checkpoint_minutes=0.0000001",
        "runtime.offload_directory={off}",
        "quantize.method=gptq",
        "calibration.samples=32",
    ),
    "a table, re-routed": ("observe.trace_bytes=0", "observe.reroute_tokens=64"),
}


@dataclass
class Taken:
    """Bytes that were taken on file systems: before, after, and at most."""

    before: dict[Path, int] = field(default_factory=dict)
    after: dict[Path, int] = field(default_factory=dict)
    most: dict[Path, int] = field(default_factory=dict)


@contextmanager
def watched(*disks: Path) -> Iterator[Taken]:
    taken, done = Taken(before={disk: used(disk) for disk in disks}), threading.Event()

    def watch() -> None:
        while not done.is_set():
            for disk in disks:
                taken.most[disk] = max(taken.most.get(disk, 0), used(disk))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield taken
    finally:
        done.set()
        watcher.join()
        taken.after = {disk: used(disk) for disk in disks}


def used(disk: Path) -> int:
    facts = os.statvfs(disk)
    return (facts.f_blocks - facts.f_bfree) * facts.f_frsize


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if "resident" in case else pytest.mark.long) for case in CASES]
)
def test_no_stage_writes_more_than_planned_nor_much_less(commands: Forks, tmp_path: Path, case: str) -> None:
    with (
        mounted(tmp_path / "disk", "size=200m") as disk,
        mounted(tmp_path / "run", "size=200m") as run,
        mounted(tmp_path / "off", "size=200m") as off,
    ):
        (disk / "small.yaml").write_text(RECIPE)
        settings = (*CASES[case], "output.directory={run}/run")
        recipe = ("small.yaml", *(f"--set={each.format(off=off, run=run)}" for each in settings))
        stages = [stage for stage in STAGES if stage != "repair" or "repair" in CASES[case][0]]
        big = 0
        for stage in stages:
            told = commands.run("plan", *recipe, "--json", directory=disk).json()
            planned = {setting: planned_of(told, stage, setting) for setting in ("store", "offload")}
            published = planned_of(told, "publish", "output")
            with watched(disk, off, run) as taken:
                until = () if stage == "report" else (f"--until={stage}",)
                assert_told(commands.run("apply", *recipe, *until, directory=disk), 0)
            for place, (kept, most) in zip((disk, off), planned.values(), strict=True):
                really, at_most = taken.after[place] - taken.before[place], taken.most[place] - taken.before[place]
                facts = f"{stage} in {place.name}: {really:,} of {kept:,} stay, at most {at_most:,} of {most:,}"
                assert really <= kept + (place == disk) * 4096 and at_most <= most, facts
                assert at_most < BIG_BYTES or most <= 1.25 * at_most, facts
                assert really < BIG_BYTES or kept <= 1.25 * really, facts
                if stage == "prune" and place == disk:
                    assert kept <= 1.01 * really + 32_768, facts  # what is exact
                big += at_most >= BIG_BYTES
        assert big >= 3 and taken.after[run] - taken.before[run] <= published[0]
        shutil.rmtree(run / "run")


def planned_of(told: dict[str, Any], stage: str, setting: str) -> tuple[int, int]:
    """Bytes that the plan says the stage leaves in a place, and takes there at most."""
    uses = [use for each in told["disk"] for use in each["stages"] if use["stage"] == stage and setting in use["place"]]
    kept = sum(use["kept"] for use in uses)
    return kept, kept + sum(use["meanwhile"] for use in uses)
