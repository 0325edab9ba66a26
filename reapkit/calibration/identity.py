"""Identifies a calibration's inputs by content, for keys: tokenizer, chat template and the sources of the mix.
Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from reapkit.calibration.builtin import generators
from reapkit.calibration.data_files import is_local_data, named_files, saved_files, saved_splits
from reapkit.calibration.hub_files import hub_address, pinned
from reapkit.checkpoint.architecture import text_config, whole_number
from reapkit.checkpoint.hub import TOKENIZER_EXTRAS, TOKENIZER_FILES, known_commit
from reapkit.checkpoint.locate import local_path
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest, digest_file
from reapkit.recipe.schema import MixEntry
from reapkit.recipe.split_expression import split_parts


def tokenizer_identity(directory: Path) -> dict[str, str]:
    """sha256 of each file of a model directory that a tokenizer's loader reads, by its path in the directory."""
    own = _files_like(directory, TOKENIZER_FILES)
    files = own | (_files_like(directory, TOKENIZER_EXTRAS) if own else set())
    return {file.relative_to(directory).as_posix(): digest_file(file) for file in sorted(files)}


def _files_like(directory: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}


def tokenizer_facts(tokenizer: Mapping[str, str], config: Mapping[str, Any], *, trust_remote_code: bool) -> dict:
    """What beside the tokenizer's files decides which tokens the rows of others become: the model's config names the
    tokenizer's class and how many ids there are, and code of the checkpoint's own is run or not.

    Keys of rows that are all generated are older and stay as they were: such a tokenizer is a defect of the model, not
    of data that somebody exchanged.
    """
    has_code = any(name.endswith(".py") for name in tokenizer)
    facts = {name: config[name] for name in ("model_type", "tokenizer_class", "auto_map") if name in config}
    return facts | {"vocabulary": vocabulary(config)} | ({"trust_remote_code": trust_remote_code} if has_code else {})


def vocabulary(config: Mapping[str, Any]) -> int | None:
    """How many token ids a model's embedding has, where its config says."""
    return whole_number(config, "vocab_size") or whole_number(text_config(config), "vocab_size")


def pinned_entries(entries: Sequence[MixEntry], identities: Sequence[Mapping[str, Any]]) -> tuple[MixEntry, ...]:
    """The entries with the commits that their identities name: what is read is what the key says."""
    return tuple(
        entry.model_copy(update={"revision": identity["revision"]}) if "hub" in identity else entry
        for entry, identity in zip(entries, identities, strict=True)
    )


def template_identity(template: str | None, directory: Path) -> str | None:
    """sha256 of the recipe's own chat template. Raises UnusableError where the file is not there."""
    if template is None:
        return None
    path = local_path(template, directory)
    if not path.is_file():
        raise UnusableError(f"calibration.chat_template: {path} is not a file. Paths start from the recipe's folder.")
    return digest_file(path)


def source_identity(entry: MixEntry, directory: Path) -> dict[str, Any]:
    """What names the content of a mix entry: generator version, file hashes, or hub id with its revision; and, of rows
    that others wrote, the rules by which they are read."""
    if entry.source.startswith("builtin:"):
        return {"builtin": entry.source.removeprefix("builtin:"), "generators": _generators_identity()}
    return {**_outside_identity(entry, directory), "reading": READING}


def _outside_identity(entry: MixEntry, directory: Path) -> dict[str, Any]:
    if not is_local_data(entry.source, directory):
        return _hub_identity(entry)
    path = local_path(entry.source, directory)
    files = _folder_files(path, entry) if path.is_dir() else named_files(entry, directory)
    return {"files": {name: digest_file(file) for name, file in files.items()}}


def _folder_files(folder: Path, entry: MixEntry) -> dict[str, Path]:
    """The files of a folder that its rows can depend on, by their paths in it: of one that `save_to_disk` wrote those
    of the split, of another all that are not hidden. They are named by content like single files: reading them costs a
    run less than tokenizing does, and neither size nor time tells that a file is the same."""
    if (splits := saved_splits(folder)) is not None:
        read = {splits[part.name] for part in split_parts(entry.split) if part.name in splits}
        inside = [place / name for place in sorted(read) for name in saved_files(place)]
    else:
        inside = sorted(file for file in folder.rglob("*") if not _is_hidden(file.relative_to(folder)))
    return {file.relative_to(folder).as_posix(): file for file in inside if file.is_file()}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _hub_identity(entry: MixEntry) -> dict[str, Any]:
    """A dataset's id and the commit that its revision names now; where neither hub nor cache knows, the revision as the
    recipe has it: nothing can be read then."""
    address = hub_address(entry.source)
    name, revision = (entry.source, entry.revision) if address is None else (address.name, pinned(entry, address))
    return {
        "hub": name,
        **({"path": address.path} if address and address.path else {}),
        "config": entry.config,
        "split": entry.split,
        "revision": known_commit(name, "dataset", revision) or revision,
    }


READING = 3
"""The version of the rules by which rows become samples; raised when the same row gives another sample."""


@cache
def _generators_identity() -> str:
    """The packaged generators are code and tables: their files' hashes name what they make."""
    here = Path(generators.__file__).parent
    return digest([digest_file(file) for file in sorted([*here.glob("*.py"), *here.glob("*.yaml")])])
