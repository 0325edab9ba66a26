"""Says why a stage has no finished result: which setting differs from the nearest result in the store, and how.
Torch-free."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reapkit.core.artifact_store import Artifact

SHOWN = 3
"""Differences that are named; the others are counted."""
LONGEST = 40
"""Characters of a value that are shown."""
_HASH = re.compile(r"^[0-9a-f]{12,}$")
_ABSENT = object()


def why_new(spec: Mapping[str, Any], inputs: Mapping[str, str | None], made: Sequence[Artifact]) -> str:
    """The reason to run a stage of this spec with these input keys, against those of it that were `made`."""
    if not made:
        return "first run of this stage"
    wanted = json.loads(json.dumps(spec, default=str))
    nearest = min(made, key=lambda artifact: (_distance(wanted, inputs, artifact), _age(artifact)))
    changed = list(_differences(nearest.manifest.get("spec"), wanted, ""))
    others = [name for name, key in inputs.items() if _inputs(nearest).get(name) != key]
    if not changed and not others:
        return "made by another version of this stage"
    said = changed[:SHOWN] + ([f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else [])
    return "; ".join(said) or f"reads another {' and '.join(others)}"


def _distance(spec: Any, inputs: Mapping[str, str | None], artifact: Artifact) -> int:
    """How much an artifact differs: an input weighs as much as a setting."""
    differing = sum(1 for _ in _differences(artifact.manifest.get("spec"), spec, ""))
    return differing + sum(_inputs(artifact).get(name) != key for name, key in inputs.items())


def _age(artifact: Artifact) -> float:
    """Of equally near ones the one made last, by the time of its manifest."""
    try:
        return -(artifact.directory / "manifest.json").stat().st_mtime
    except OSError:
        return 0.0


def _inputs(artifact: Artifact) -> Mapping[str, Any]:
    found = artifact.manifest.get("inputs")
    return found if isinstance(found, Mapping) else {}


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    """`prune.ratio: 0.5 → 0.25` for every leaf that differs."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*now, *before]):
            yield from _differences(before.get(key, _ABSENT), now.get(key, _ABSENT), f"{path}.{key}" if path else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{path}[{_label(new, i)}]")
    elif before != now:
        if _is_hash(before) and _is_hash(now):
            yield f"{path} has other content"
        else:
            yield f"{path}: {_shown(before)} → {_shown(now)}"


def _label(item: Any, index: int) -> str:
    """The name of a named item, such as a source of the mix, else its place."""
    return str(item["name"]) if isinstance(item, Mapping) and "name" in item else str(index)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.match(value) is not None


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    if isinstance(value, (Mapping, list)):
        return f"{len(value)} values"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
