"""Reads, writes and checks the lock of a recipe: revisions, file hashes, versions. Torch-free.

`reapkit lock` writes it beside the recipe; `apply --locked` takes the hub revisions from it and refuses to differ in
anything else.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from reapkit.calibration.identity import source_identity, tokenizer_identity
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.hub import hub_revision
from reapkit.checkpoint.locate import is_local, model_checkpoint
from reapkit.core.atomic_files import write_json
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.hashing import digest
from reapkit.core.json_text import parse_json
from reapkit.planning.template_date import template_date
from reapkit.recipe.loading import LoadedRecipe
from reapkit.recipe.schema import MixEntry, Recipe

FORMAT = 1
PACKAGES = (
    "reapkit",
    "torch",
    "transformers",
    "llmcompressor",
    "compressed-tensors",
    "datasets",
    "tokenizers",
    "safetensors",
)
NOT_LOCKED = ("runtime", "output")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that shape results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def make_lock(loaded: LoadedRecipe) -> dict[str, Any]:
    """Everything outside the recipe that its result depends on, as it is now.

    Raises UnusableError where a model, source or hub revision cannot be found.
    """
    checkpoint = model_checkpoint(loaded.model, loaded.directory)
    sources = {place: _source(entry, loaded.directory) for place, entry in source_entries(loaded).items()}
    tokenizer = tokenizer_identity(checkpoint.path)
    return lock_of(loaded, checkpoint, tokenizer, sources, template_date(loaded, checkpoint.path))


def lock_of(
    loaded: LoadedRecipe,
    checkpoint: Checkpoint,
    tokenizer: Mapping[str, str],
    sources: Mapping[str, Mapping[str, Any]],
    date: str | None,
) -> dict[str, Any]:
    """The lock of a recipe whose model, tokenizer, sources (by place, see `source_entries`) and date are known."""
    return {
        "format": FORMAT,
        "name": loaded.name,
        "recipe": recipe_digest(loaded),
        "model": {
            "source": loaded.model.source,
            "revision": _model_revision(loaded, checkpoint.path),
            "identity": checkpoint.identity,
            "tokenizer": dict(tokenizer),
        },
        "sources": dict(sources),
        "versions": versions(),
        **({"date": date} if date else {}),
    }


def source_entries(recipe: Recipe) -> dict[str, MixEntry]:
    """The sources of the mix and of the extra packs, by their place in a lock."""
    entries = {f"calibration.mix.{entry.name}": entry for entry in recipe.calibration.mix}
    return entries | {f"evaluate.extra_packs.{entry.name}": entry for entry in recipe.evaluate.extra_packs}


def _source(entry: MixEntry, directory: Path) -> dict[str, Any]:
    identity = source_identity(entry, directory)
    if "hub" in identity and identity["revision"] is None:
        return identity | {"revision": hub_revision(identity["hub"], "dataset")}
    return identity


def _model_revision(loaded: LoadedRecipe, path: Path) -> str | None:
    source = loaded.model.source
    if source.startswith("builtin:") or is_local(source, loaded.directory):
        return None
    return path.name if path.parent.name == "snapshots" else loaded.model.revision


def lock_path(loaded: LoadedRecipe, recipe_file: Path) -> Path:
    """`NAME.lock.json` beside the recipe. Raises RecipeError for a recipe that is not a file: a pipe has no place."""
    if not recipe_file.is_file():
        raise RecipeError(
            f"{loaded.shown}: a lock lies beside its recipe, and this one comes from a pipe. Write it to a file first."
        )
    return recipe_file.with_name(f"{loaded.name}.lock.json")


def write_lock(loaded: LoadedRecipe, path: Path) -> dict[str, Any]:
    """Writes and returns the lock."""
    lock = make_lock(loaded)
    write_json(path, lock)
    return lock


def read_lock(path: Path) -> dict[str, Any]:
    """Raises UnusableError where there is no lock that this version reads."""
    try:
        lock = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(lock, dict) or not all(isinstance(lock.get(name, {}), dict) for name in ("model", "sources")):
            raise ValueError("it holds no JSON object with model and sources")
        if not all(isinstance(source, dict) for source in lock.get("sources", {}).values()):
            raise ValueError("a source is no JSON object")
    except (OSError, ValueError) as error:
        raise UnusableError(
            f"{path}: the lock cannot be read ({error}). Write a new one with `reapkit lock`."
        ) from None
    if lock.get("format") != FORMAT:
        raise UnusableError(
            f"{path}: found lock format {lock.get('format')}, but this version of reapkit reads format"
            f" {FORMAT}. Write a new one with `reapkit lock`."
        )
    return lock


def revisions(lock: Mapping[str, Any], loaded: LoadedRecipe) -> list[str]:
    """The `--set` overrides that pin what the recipe leaves open: hub revisions of the model and of its datasets, and
    the date that chat templates see."""
    pins = {"model": lock["model"]["revision"]} if loaded.model.revision is None else {}
    entries = {f"calibration.mix.{entry.name}": entry for entry in loaded.calibration.mix}
    entries |= {f"evaluate.extra_packs.{entry.name}": entry for entry in loaded.evaluate.extra_packs}
    pins |= {
        place: lock["sources"].get(place, {}).get("revision")
        for place, entry in entries.items()
        if entry.revision is None
    }
    dates = [lock["date"]] if lock.get("date") and loaded.calibration.date is None else []
    return [
        *(f"{place}.revision='{revision}'" for place, revision in pins.items() if revision),
        *(f"calibration.date='{date}'" for date in dates),
    ]


def check_lock(lock: Mapping[str, Any], loaded: LoadedRecipe, own_digest: str, path: Path) -> None:
    """Raises UnusableError listing everything in which the recipe, its sources or the environment differ from the lock.

    `own_digest`: `recipe_digest` of the recipe before the lock's revisions were put in.
    """
    found = make_lock(loaded) | {"recipe": own_digest}
    differences = [
        f"  {place}: locked {_shown(locked)}, found {_shown(now)}" for place, locked, now in _differences(lock, found)
    ]
    if differences:
        raise UnusableError(
            "\n".join(
                [
                    f"{path}: {len(differences)} things differ from the lock:",
                    *differences,
                    "Restore the locked state, or accept the differences with `reapkit lock`.",
                ]
            )
        )


def recipe_digest(loaded: LoadedRecipe) -> str:
    """What names a recipe's own text in its lock; where it runs and where the result goes do not count."""
    return digest(loaded.model_dump(mode="json", exclude=set(NOT_LOCKED)))


def _differences(left: Any, right: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in dict.fromkeys((*left, *right)):
            yield from _differences(left.get(key), right.get(key), f"{place}.{key}" if place else key)
    elif left != right:
        yield place, left, right


def _shown(value: Any) -> str:
    text = (
        "nothing"
        if value is None
        else json.dumps(value)
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )
    return text if len(text) <= 40 else f"{text[:37]}..."
