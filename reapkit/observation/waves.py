"""Plans the waves of a streamed pass (row groups that pass the layers together), and tracks what each wave has on disk.

    wave-FFFFF-dddddd/            one set of row groups, named by the first and all of them
        groups.json               the set
        layer-LLLL.safetensors    its sums in one layer
        inputs-LLLL/              what its batches hand to layer LLLL, complete with facts.json
        done                      every layer is summed

Waves are only ever split when work is taken up again, never joined, so that of every layer's files some fit together
exactly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reapkit.core.atomic_files import write_text
from reapkit.core.hashing import digest


@dataclass(frozen=True)
class Wave:
    """Row groups that pass the layers together, from layer `start` on, whose input is in directory `taken_from` (None:
    layer 0)."""

    groups: tuple[int, ...]
    start: int = 0
    taken_from: str | None = None

    @property
    def name(self) -> str:
        return f"wave-{self.groups[0]:05d}-{digest(list(self.groups))[:6]}"

    def directory(self, root: Path) -> Path:
        """Where it leaves its files; there once this was called."""
        directory = root / self.name
        if not (directory / "groups.json").exists():
            directory.mkdir(parents=True, exist_ok=True)
            write_text(directory / "groups.json", json.dumps(self.groups))
        return directory


def plan_waves(
    root: Path, cost: Mapping[int, int], ranks: int, num_layers: int, budget: int | None
) -> list[list[Wave]]:
    """Every rank's waves: what `root` holds of earlier work is gone on from, whatever the number of ranks was then.

    `cost`: bytes of each row group's hidden states; a wave's fit `budget` together. Drops what earlier work left
    unusable.
    """
    shares: list[dict[tuple[int, str | None], list[int]]] = [{} for _ in range(ranks)]
    units = _unfinished(root, tuple(cost))
    if len(units) < ranks:
        units = [
            Wave(groups, unit.start, unit.taken_from) for unit in units for groups in _split(unit.groups, cost, ranks)
        ]
    load = [0] * ranks
    for unit in sorted(units, key=lambda unit: -_work(unit, cost, num_layers)):
        rank = load.index(min(load))
        load[rank] += _work(unit, cost, num_layers)
        shares[rank].setdefault((unit.start, unit.taken_from), []).extend(unit.groups)
    waves = [
        [Wave(groups, *where) for where, mine in share.items() for groups in _fitting(sorted(mine), cost, budget)]
        for share in shares
    ]
    return [sorted(share, key=lambda wave: wave.groups) for share in waves]


def covering(root: Path, name: str, groups: int) -> list[Path]:
    """Files `name` of waves that together hold every row group exactly once."""
    found, left = [], set(range(groups))
    for members, directory in sorted(_waves(root), key=lambda wave: -len(wave[0])):
        if left.issuperset(members) and (directory / name).exists():
            found.append(directory / name)
            left.difference_update(members)
    if left:
        raise FileNotFoundError(f"{root}: no wave left {name} of row group {min(left)}")
    return found


def finished(root: Path) -> set[int]:
    """Row groups that have passed all layers."""
    return {group for members, directory in _waves(root) if (directory / "done").exists() for group in members}


def drop_inputs(root: Path) -> None:
    """Hidden states that nobody will go on from."""
    for directory in root.glob("wave-*/inputs-*"):
        shutil.rmtree(directory)


def _waves(root: Path) -> list[tuple[tuple[int, ...], Path]]:
    return [
        (tuple(json.loads(file.read_text(encoding="utf-8"))), file.parent)
        for file in sorted(root.glob("wave-*/groups.json"))
    ]


def _unfinished(root: Path, groups: Sequence[int]) -> list[Wave]:
    """Unfinished groups by the deepest layer's input that is kept of them; those without start anew."""
    waves = _waves(root)
    done = finished(root)
    deepest: dict[int, tuple[int, str]] = {}
    for members, directory in waves:
        for facts in directory.glob("inputs-*/facts.json"):
            kept = (int(facts.parent.name.rsplit("-", 1)[1]), f"{directory.name}/{facts.parent.name}")
            deepest |= {group: max(kept, deepest.get(group, kept)) for group in members if group not in done}
    for members, directory in waves:
        if not done.intersection(members) and not any(group in deepest for group in members):
            shutil.rmtree(directory)
    for directory in root.glob("wave-*/inputs-*"):
        if f"{directory.parent.name}/{directory.name}" not in {name for _, name in deepest.values()}:
            shutil.rmtree(directory)
    units: dict[tuple[int, str | None], list[int]] = {}
    for group in groups:
        if group not in done:
            units.setdefault(deepest.get(group, (0, None)), []).append(group)
    return [Wave(tuple(members), start, taken_from) for (start, taken_from), members in units.items()]


def _work(unit: Wave, cost: Mapping[int, int], num_layers: int) -> int:
    return sum(cost[group] for group in unit.groups) * (num_layers - unit.start)


def _split(groups: Sequence[int], cost: Mapping[int, int], parts: int) -> list[tuple[int, ...]]:
    """Consecutive stretches of about equal cost, at most `parts` and none empty."""
    total, seen, out = sum(cost[group] for group in groups), 0, [[] for _ in range(parts)]
    for group in groups:
        out[min(parts - 1, (2 * seen + cost[group]) * parts // (2 * total))].append(group)
        seen += cost[group]
    return [tuple(part) for part in out if part]


def _fitting(groups: Sequence[int], cost: Mapping[int, int], budget: int | None) -> list[tuple[int, ...]]:
    """Consecutive stretches within the budget; a group that exceeds it alone stands alone."""
    if budget is None:
        return [tuple(groups)]
    out: list[list[int]] = []
    for group in groups:
        if out and sum(cost[member] for member in out[-1]) + cost[group] <= budget:
            out[-1].append(group)
        else:
            out.append([group])
    return [tuple(wave) for wave in out]
