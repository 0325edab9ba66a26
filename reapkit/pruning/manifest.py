"""Writes the record inside a model directory, and checks a directory against it, wherever it was copied to.
Torch-free."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint, is_file_name
from reapkit.core.artifact_store import Damage
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import UnusableError
from reapkit.core.formatting import plural
from reapkit.core.hashing import digest_file
from reapkit.core.json_text import parse_json
from reapkit.core.progress import SILENT, Progress
from reapkit.pruning.checkpoint import MANIFEST


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, whether it holds, and what was seen."""

    name: str
    passed: bool
    detail: str


def seal(directory: Path, facts: Mapping[str, Any], progress: Progress = SILENT) -> dict[str, Any]:
    """Writes the record of a finished directory: bytes and sha256 of each shard, and `facts` (source, kept experts,
    scheme)."""
    shards = {}
    names = Checkpoint.open(directory).shards
    with progress.task("sha256", sum((directory / name).stat().st_size for name in names), "B") as task:
        for name in names:
            size = (directory / name).stat().st_size
            shards[name] = {"bytes": size, "sha256": digest_file(directory / name)}
            task.advance(size)
    record = {**facts, "complete": True, "shards": shards}
    write_json(directory / MANIFEST, record)
    return record


def sealed_with(directory: Path, others: Mapping[str, bytes]) -> bytes:
    """The record of a directory that is handed on with `others` in place of its files of these names: the sealed facts,
    and the sha256 of every file that is not a shard."""
    names = {str(file.relative_to(directory)): file for file in sorted(directory.rglob("*")) if file.is_file()}
    record = read_manifest(directory)
    kept = sorted({*names, *others} - {MANIFEST, *record["shards"]})
    files = {
        name: hashlib.sha256(others[name]).hexdigest() if name in others else digest_file(names[name]) for name in kept
    }
    return (json.dumps({**record, "files": files}, indent=1) + "\n").encode()


def read_manifest(directory: Path) -> dict[str, Any]:
    """What reapkit recorded inside a directory it wrote: source, kept experts, sha256 and bytes of each shard.

    Raises UnusableError where there is no record, or one of an unfinished directory.
    """
    try:
        manifest = parse_json((directory / MANIFEST).read_text(encoding="utf-8"))
        complete = manifest["complete"]
        if not isinstance(manifest.get("keep", {}), dict):
            raise ValueError("keep is no JSON object")
        for name, shard in manifest["shards"].items():
            sized = type(shard["bytes"]) is int and 0 <= shard["bytes"] < 1 << 63
            if not sized or not isinstance(shard["sha256"], str) or not is_file_name(name):
                raise ValueError(f"shard {name[:80]} is not described by bytes and sha256")
    except FileNotFoundError:
        raise UnusableError(
            f"{directory}: there is no {MANIFEST}. Either reapkit did not write this directory, or a version without"
            " records did."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UnusableError(
            f"{directory / MANIFEST}: the record cannot be read ({type(error).__name__}: {error}). Write the"
            " directory again."
        ) from None
    if not complete:
        raise UnusableError(
            f"{directory}: writing was not finished there. Run the same command again; it continues where it stopped."
        )
    return manifest


def sealed_shards(payload: Path) -> dict[str, str] | Damage:
    """sha256 (hex) of each shard as the record in a model directory states it; nothing for what is no model."""
    if not any((payload / name).is_file() for name in (MANIFEST, "config.json")):
        return {}
    try:
        return {name: shard["sha256"] for name, shard in read_manifest(payload)["shards"].items()}
    except UnusableError:
        return Damage(f"payload/{MANIFEST}", "is missing or cannot be read")


def written_directories(path: Path) -> list[Path]:
    """The model directories that a path means: itself, a store artifact's payload, or those of a run. Raises
    UnusableError for none."""
    places = [
        path,
        path / "payload",
        *(path / f"{name}{suffix}" for name in ("pruned", "quantized") for suffix in ("", ".rejected")),
    ]
    found = [place for place in places if (place / "config.json").is_file() or (place / MANIFEST).is_file()]
    if not found:
        raise UnusableError(
            f"{path}: there is no model directory. Give one that prune or quantize wrote, or a run that has one."
        )
    return found[:1] if found[0] == path else found


def check_directory(directory: Path, progress: Progress = SILENT) -> list[Finding]:
    """Everything the record promises, each thing on its own: structure first, then sha256 by shard.

    Raises UnusableError where there is no record to check against.
    """
    manifest = read_manifest(directory)
    checks: list[tuple[str, Callable[[], str]]] = [
        ("config, index, headers", lambda: _headers(directory)),
        ("shards as recorded", lambda: _shards(directory, manifest)),
        ("experts, config", lambda: _experts(directory, manifest)),
        ("other files", lambda: _files(directory, manifest)),
    ]
    return [*(_tried(name, check) for name, check in checks), *_hashes(directory, manifest, progress)]


def _tried(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except UnusableError as error:
        return Finding(name, False, str(error))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, OSError) as error:
        return Finding(name, False, f"cannot be read ({type(error).__name__}: {error})")


def _headers(directory: Path) -> str:
    checkpoint = Checkpoint.open(directory)
    return (
        f"{len(checkpoint.tensors):,} tensors in {plural(len(checkpoint.shards), 'shard')}, {checkpoint.nbytes:,} bytes"
    )


def _shards(directory: Path, manifest: Mapping[str, Any]) -> str:
    """The index names exactly the recorded shards, and no other safetensors file lies beside them."""
    recorded, named = set(manifest["shards"]), set(Checkpoint.open(directory).shards)
    lying = {file.name for file in directory.glob("*.safetensors")}
    if odd := sorted(recorded ^ named) or sorted(lying - recorded):
        raise UnusableError(
            f"{odd[0]}: {'recorded' if odd[0] in recorded else 'not recorded'}, {'in' if odd[0] in named else 'not in'}"
            f" the index, {'there' if odd[0] in lying else 'not there'}"
        )
    for name, shard in sorted(manifest["shards"].items()):
        if (size := (directory / name).stat().st_size) != shard["bytes"]:
            raise UnusableError(f"{name}: {size:,} bytes, recorded {shard['bytes']:,}")
    return f"{len(recorded)} of {len(recorded)} of the recorded size"


def _experts(directory: Path, manifest: Mapping[str, Any]) -> str:
    """Every layer holds as many experts as config.json says and as were kept."""
    layout = Checkpoint.open(directory).layout
    kept = {int(layer): len(experts) for layer, experts in manifest.get("keep", {}).items()}
    held = {index: layer.num_experts for index, layer in {**layout.layers, **layout.mtp}.items()}
    if kept and (odd := sorted(index for index in kept.keys() | held.keys() if kept.get(index) != held.get(index))):
        raise UnusableError(
            f"layer {odd[0]} holds {held.get(odd[0], 'no')} experts, recorded {kept.get(odd[0], 'none')}"
        )
    counts = sorted(set(held.values()))
    return (
        f"{len(held)} MoE layers of {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} experts, as"
        " config.json says"
    )


def _files(directory: Path, manifest: Mapping[str, Any]) -> str:
    """Every file that is not a shard has the bytes it was handed on with; files that were added are the user's."""
    files = manifest.get("files", {})
    for name, sha256 in sorted(files.items()):
        place = directory / name
        if not place.is_file():
            raise UnusableError(f"{name}: missing")
        if (found := digest_file(place)) != sha256:
            raise UnusableError(f"{name}: changed since it was written (sha256 {found[:12]}…, recorded {sha256[:12]}…)")
    return f"{len(files)} of {len(files)} as written"


def _hashes(directory: Path, manifest: Mapping[str, Any], progress: Progress) -> Iterator[Finding]:
    """A finding for every shard that differs, or one for all."""
    wrong = 0
    total = sum(shard["bytes"] for shard in manifest["shards"].values())
    with progress.task("sha256", total, "B") as task:
        for name, shard in sorted(manifest["shards"].items()):
            task.note(name)
            place = directory / Path(name).name
            found = digest_file(place) if place.is_file() else None
            if found != shard["sha256"]:
                wrong += 1
                yield Finding(
                    f"sha256 {name}",
                    False,
                    "missing" if found is None else f"{found[:12]}…, recorded {shard['sha256'][:12]}…",
                )
            task.advance(shard["bytes"])
    if not wrong:
        yield Finding(
            "sha256", True, f"{len(manifest['shards'])} of {len(manifest['shards'])} shards, {total:,} bytes as written"
        )
