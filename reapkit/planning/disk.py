"""Adds up what a run will write, by file system: what stays, the most at any time, and whether there is room. From
config and headers alone; torch-free."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit.core.formatting import human_bytes, listed
from reapkit.planning.disk_use import HUB, OFFLOAD, RUN, STORE, TEMPORARY, DiskUse, on_disk
from reapkit.planning.stage_disk import FACTS_BYTES

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan
    from reapkit.planning.stage_definitions import Stage

MANIFEST_BYTES = 16_384
"""What the store notes of an artifact: its manifest, its lock, which run uses it."""
WORTH_MOVING = 0.05
"""Of what is written to a disk: a setting that leads less there is no way out."""
DOWNLOAD, PUBLISH = "download", "publish"
"""What writes beside the stages: fetching the model before them, filling the run's directory behind them."""


@dataclass(frozen=True)
class FileSystem:
    """One disk that a run writes to: where it was met, its free bytes, the settings that lead there, and what each
    stage puts on it, in order."""

    path: Path
    free: int
    settings: tuple[str, ...]
    uses: tuple[tuple[str, DiskUse], ...]

    @cached_property
    def kept(self) -> int:
        """Bytes that stay."""
        return sum(use.kept for _, use in self.uses)

    @cached_property
    def peak(self) -> int:
        """The most bytes that are there at a time."""
        return self._peak(self.uses)[0]

    @property
    def shortage(self) -> str | None:
        """A sentence where what is certain finds no room."""
        certain, stage = self._peak([(stage, use) for stage, use in self.uses if use.is_exact])
        return None if certain <= self.free else self._told(f"{human_bytes(certain)} will be", stage, certain)

    @property
    def warning(self) -> str | None:
        """A sentence where room is found for what is certain, and perhaps not for what is counted from above."""
        if self.peak <= self.free or self.shortage is not None:
            return None
        most, stage = self._peak(self.uses)
        return self._told(f"up to {human_bytes(most)} may be", stage, most)

    def _peak(self, uses: Sequence[tuple[str, DiskUse]]) -> tuple[int, str]:
        """The most bytes at a time, and the stage in which that is."""
        kept, most, where = 0, 0, ""
        for stage in dict.fromkeys(name for name, _ in uses):
            mine = [use for name, use in uses if name == stage]
            kept += sum(use.kept for use in mine)
            if (there := kept + sum(use.meanwhile for use in mine)) > most:
                most, where = there, stage
        return most, where

    def _told(self, much: str, stage: str, needed: int) -> str:
        by_setting = dict.fromkeys(self.settings, 0)
        for _, use in self.uses:
            by_setting[use.place] += use.kept + use.meanwhile
        worth = [name for name, nbytes in by_setting.items() if nbytes >= WORTH_MOVING * sum(by_setting.values())]
        settings = listed(worth).replace(" and ", " or ")
        return (
            f"{self.path}: {much} written by the end of {stage}, but only {human_bytes(self.free)} are free. Free"
            f" {human_bytes(needed - self.free)} there, or set {settings} to another disk."
        )

    def to_json(self) -> dict[str, Any]:
        """What `plan --json` says of it."""
        return {
            "path": str(self.path),
            "free": self.free,
            "kept": self.kept,
            "peak": self.peak,
            "settings": list(self.settings),
            "stages": [{"stage": stage, **vars(use)} for stage, use in self.uses],
        }


def file_systems(plan: Plan, until: str | None = None, only: str | None = None) -> list[FileSystem]:
    """Every disk that a run up to the end of stage `until` writes to; `only`: what one stage alone puts there."""
    uses = _stage_uses(plan, until, only)
    devices: dict[int, list[str]] = {}
    for setting in (STORE, RUN, OFFLOAD, HUB, TEMPORARY):
        if any(use.place == setting for _, use in uses):
            devices.setdefault(_existing(_place(plan, setting)).stat().st_dev, []).append(setting)
    found = []
    for settings in devices.values():
        path = _existing(_place(plan, settings[0]))
        mine = tuple((stage, use) for stage, use in uses if use.place in settings)
        room = shutil.disk_usage(path)
        if room.total:  # /proc and its like have no size: what they refuse they say themselves
            found.append(FileSystem(path, room.free, tuple(settings), mine))
    return found


def missing_disk(plan: Plan, until: str | None = None, only: str | None = None) -> str | None:
    """A sentence per disk that has no room for what is certainly to be written, else None."""
    found = [shortage for disk in file_systems(plan, until, only) if (shortage := disk.shortage)]
    return "\n".join(found) or None


def tight_disk(plan: Plan, until: str | None = None) -> str | None:
    """A sentence per disk that may turn out too small, else None."""
    return "\n".join(warning for disk in file_systems(plan, until) if (warning := disk.warning)) or None


def _place(plan: Plan, setting: str) -> Path:
    """The directory that a setting names."""
    runtime = plan.recipe.runtime
    if setting == STORE:
        return Path(runtime.store)
    if setting == RUN:
        return Path(plan.recipe.output.directory or f"runs/{plan.recipe.name}")
    if setting == OFFLOAD:
        return Path(runtime.offload_directory or runtime.store)
    if setting == HUB:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
    return Path(os.environ.get("TMPDIR") or "/tmp")


def _existing(path: Path) -> Path:
    """The path, or the folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _stage_uses(plan: Plan, until: str | None, only: str | None) -> list[tuple[str, DiskUse]]:
    reached = plan.leading_to(until)
    runs = [stage for stage in plan.stages if stage.must_run and stage.name in ((only,) if only else reached)]
    uses = [] if only else [(DOWNLOAD, use) for use in _downloads(plan)]
    manifest = DiskUse(STORE, on_disk(MANIFEST_BYTES, 3), is_exact=True)
    written = {stage.name: (*stage.definition.writes(plan), manifest) for stage in runs}
    uses += [(stage, use) for stage, found in written.items() for use in found]
    if only is None:
        shown = [stage for stage in plan.stages if stage.name in reached]
        uses += [(PUBLISH, use) for stage in shown for use in _published(plan, stage, written)]
        uses.append((PUBLISH, DiskUse(STORE, on_disk(FACTS_BYTES, 4))))
    return [(stage, use) for stage, use in uses if use.kept or use.meanwhile]


def _downloads(plan: Plan) -> list[DiskUse]:
    """Shards that are not on this machine."""
    absent = {shard for shard in plan.checkpoint.shards if not (plan.checkpoint.path / shard).exists()}
    if not absent:
        return []
    missing = sum(tensor.nbytes for tensor in plan.checkpoint.tensors.values() if tensor.shard in absent)
    return [DiskUse(HUB, on_disk(missing, len(absent)), is_exact=True)]


def _published(plan: Plan, stage: Stage, written: Mapping[str, Sequence[DiskUse]]) -> list[DiskUse]:
    """What the run's directory gets of a stage: links to safetensors, or copies of them on another disk, and copies of
    everything else."""
    store, run = (_existing(_place(plan, setting)) for setting in (STORE, RUN))
    linked = store.stat().st_dev == run.stat().st_dev
    if stage.name in written:
        mine = [use for use in written[stage.name] if use.place == STORE and use.linked + use.copied]
        copied = sum(use.copied for use in mine)
        shards = sum(use.linked for use in mine)
        exact = bool(mine) and all(use.is_exact for use in mine)
        return [DiskUse(RUN, copied), DiskUse(RUN, 0 if linked else shards, is_exact=exact)]
    copied, shards = _not_there_yet(stage, _place(plan, RUN))
    return [DiskUse(RUN, copied, is_exact=True), DiskUse(RUN, 0 if linked else shards, is_exact=True)]


def _not_there_yet(stage: Stage, run: Path) -> tuple[int, int]:
    """Of a finished artifact: bytes of its other files and of its safetensors that the run's directory lacks."""
    if stage.artifact is None or not stage.artifact.has_payload:
        return 0, 0
    payload, found = stage.artifact.payload, {True: 0, False: 0}
    for file in payload.rglob("*"):
        if not file.is_file() or (stage.definition.file is not None and file.name != stage.definition.file):
            continue
        shown = run / (stage.definition.directory or "") / file.relative_to(payload)
        if not shown.exists():
            found[file.suffix == ".safetensors"] += on_disk(file.stat().st_size)
    return found[False], found[True]
