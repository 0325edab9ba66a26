"""Opens what `datasets` reads: table files, folders that `save_to_disk` wrote, datasets in the hub's layout, here or on
the hub. Torch-free."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from reapkit.calibration.data_files import LocalFile, saved_splits
from reapkit.calibration.row_filter import missing_column, passes
from reapkit.calibration.row_readers import ArrowRows, StreamedRows
from reapkit.calibration.table_files import AS_WRITTEN, SEPARATORS, columns
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest, digest_file
from reapkit.core.refusals import hub_cache_refusal
from reapkit.recipe.schema import MixEntry
from reapkit.recipe.split_expression import SplitPart, split_parts

STREAM_ABOVE_BYTES = 2 << 30
"""Hub datasets that are larger, or of unknown size, are streamed instead of downloaded."""
STREAM_BUFFER = 10_000
"""Rows among which a stream is shuffled."""
LONGEST_REASON = 800
COMMIT = re.compile("[0-9a-f]{40}")
CACHED = ("Using the latest cached version", "Found the latest cached dataset")
"""How `datasets` begins to say that it is offline."""


def open_tables(files: Sequence[LocalFile], entry: MixEntry) -> list[ArrowRows]:
    """The rows of table files of one kind, in the order of the files; those with the same columns that follow each
    other are one table. Raises UnusableError naming source and file."""
    groups = [
        (list(group), found) for found, group in groupby(files, lambda file: (*_columns(file, entry), file.packed))
    ]
    return [_open_group(group, list(found[:-1]), entry) for group, found in groups]


def _columns(file: LocalFile, entry: MixEntry) -> tuple[Any, ...]:
    try:
        found = columns(file.path)
    except ValueError as error:
        raise UnusableError(f"source '{entry.name}', {file.name}: {error}.") from None
    return tuple(found)


def _open_group(files: Sequence[LocalFile], found: Sequence[Any], entry: MixEntry) -> ArrowRows:
    with quiet() as unread:
        try:
            table = _load(files, found)
        except Exception as error:  # datasets raises about twenty kinds here; all mean that a file cannot be read
            if told := hub_cache_refusal(error):
                raise UnusableError(f"source '{entry.name}': {told}") from None
            names = [file.name for file in files if str(file.path) in unread] or [file.name for file in files]
            raise UnusableError(f"source '{entry.name}', {', '.join(names)}: {reason(error)}") from None
    return ArrowRows(table, files[0].name if len(files) == 1 else f"{len(files)} {files[0].kind[1:]} files", held=files)


def _load(files: Sequence[LocalFile], found: Sequence[Any]) -> Any:
    import datasets

    kind, options = files[0].kind, {}
    if kind in SEPARATORS:
        features = datasets.Features({column: datasets.Value("string") for column in found})
        options = {"sep": SEPARATORS[kind], "features": features, **AS_WRITTEN}
    paths = [file.path for file in files]
    # what was unpacked goes, and so does what is made of it
    options["cache_dir"] = str(paths[0].parent) if files[0].packed else cache_of(paths)
    return datasets.load_dataset(
        "csv" if kind in SEPARATORS else kind[1:],
        data_files=[_escaped(file.path) for file in files],
        split="train",
        **options,
    )


def cache_of(files: Sequence[Path]) -> str:
    """Where `datasets` keeps the tables that it makes of these files: a place named by their bytes. It names its own by
    their paths and times, so that a file which was exchanged under its old time would be read as it was before."""
    from datasets import config

    content = digest([[str(file), digest_file(file)] for file in files])
    return str(Path(config.HF_DATASETS_CACHE) / f"by-content-{content[:24]}")


def _escaped(path: Path) -> str:
    """`datasets` takes brackets in paths for patterns."""
    import glob

    return glob.escape(str(path))


def open_saved(entry: MixEntry, folder: Path) -> ArrowRows | None:
    """The rows of a folder that `save_to_disk` wrote, parts of splits in the order of the recipe; None for other
    folders. Raises UnusableError naming the source."""
    import datasets

    if (splits := saved_splits(folder)) is None:
        return None
    try:
        parts = [
            (cast("datasets.Dataset", datasets.load_from_disk(str(splits[part.name]))), part)
            for part in split_parts(entry.split)
        ]
        selected = [table if part.whole else table.select(part.rows(len(table))) for table, part in parts]
        return ArrowRows(selected[0] if len(selected) == 1 else datasets.concatenate_datasets(selected), folder.name)
    except Exception as error:  # whatever is wrong with the folder, this source cannot be read
        raise UnusableError(f"source '{entry.name}': {folder} cannot be opened: {reason(error)}") from None


def open_dataset(entry: MixEntry, path: str, seed: int) -> ArrowRows | StreamedRows:
    """A dataset in the hub's layout, from the hub or a local directory; streamed where it is large.

    Raises UnusableError naming source, reason and what would help.
    """
    with quiet() as unread:
        try:
            return _opened(entry, path, seed)
        except UnusableError:
            raise
        except Exception as error:  # datasets raises about twenty kinds here; all mean that this source cannot be read
            if told := hub_cache_refusal(error):
                raise UnusableError(f"source '{entry.name}': {told}") from None
            files = f" ({', '.join(unread)})" if unread else ""
            raise UnusableError(
                f"source '{entry.name}': {entry.source} (config {entry.config}, split {entry.split}) cannot be opened: "
                f"{reason(error).rstrip('.')}{files}. Check the name, config and split, the network, and `hf auth"
                " login` for gated data; or give local files."
            ) from None


def _opened(entry: MixEntry, path: str, seed: int) -> ArrowRows | StreamedRows:
    import datasets

    own: dict[str, Any] = {}
    if Path(path).is_dir():  # not on the hub, whose files a commit names
        own["cache_dir"] = cache_of(sorted(file for file in Path(path).rglob("*") if file.is_file()))
    builder = datasets.load_dataset_builder(path, entry.config, revision=entry.revision, **own)
    _refuse_another_commit(builder.hash, entry)
    if _bytes_of(builder, entry) > STREAM_ABOVE_BYTES:
        return StreamedRows(
            _stream(builder, entry).shuffle(seed=seed, buffer_size=STREAM_BUFFER),
            entry.source,
            lambda row: _passes(row, entry),
            _commit(builder, entry),
        )
    table = datasets.load_dataset(path, entry.config, split=entry.split, revision=entry.revision, **own)
    return ArrowRows(table, entry.source, _commit(builder, entry))


def _refuse_another_commit(found: str | None, entry: MixEntry) -> None:
    """Offline `datasets` takes what its cache holds, whatever revision was asked for."""
    wanted = entry.revision
    if wanted and found and found != wanted and COMMIT.fullmatch(wanted) and COMMIT.fullmatch(found):
        raise UnusableError(
            f"source '{entry.name}': {entry.source} is wanted at commit {wanted}, but the local cache holds {found}. Go"
            " online, or change `revision:`."
        )


def _passes(row: Mapping[str, Any], entry: MixEntry) -> bool:
    """Whether a streamed row passes the filter. Every row of a stream has all columns, so a missing one is an error."""
    if (column := missing_column([row], entry)) is not None:
        raise UnusableError(
            f"source '{entry.name}', {entry.source}: the filter's column '{column}' is missing; the row has"
            f" {', '.join(row)}. Filter by one of these."
        )
    return passes(row, entry)


def _stream(builder: Any, entry: MixEntry) -> Any:
    """The parts of the recipe's split, one after the other, not yet shuffled."""
    import datasets

    parts = [_streamed_part(builder, part, entry) for part in split_parts(entry.split)]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _streamed_part(builder: Any, part: SplitPart, entry: MixEntry) -> Any:
    stream = builder.as_streaming_dataset(split=part.name)
    if part.whole:
        return stream
    if part.needs_total:
        known = (builder.info.splits or {}).get(part.name)
        if not (known and known.num_examples):
            raise UnusableError(
                f"source '{entry.name}': split {entry.split}: {entry.source} is streamed and does not say how many rows"
                f" '{part.name}' has, so only numbers of rows from its start can be taken. Write {part.name}[:1000]."
            )
        rows = part.rows(known.num_examples)
        return stream.skip(rows.start).take(len(rows))
    stream = stream.skip(part.start or 0)
    return stream if part.stop is None else stream.take(max(0, part.stop - (part.start or 0)))


def _files(builder: Any, entry: MixEntry) -> list[str]:
    """The addresses of the files of the recipe's splits, where the dataset consists of files."""
    found = builder.config.data_files or {}
    return [str(file) for part in split_parts(entry.split) for file in found.get(part.name) or ()]


def _commit(builder: Any, entry: MixEntry) -> str | None:
    """The commit in the hub's file addresses (hf://datasets/org/name@commit/...), else what the recipe says."""
    found = re.search(r"@([0-9a-f]{40})/", next(iter(_files(builder, entry)), ""))
    return found.group(1) if found else entry.revision


def _bytes_of(builder: Any, entry: MixEntry) -> float:
    """Download size of the split, from the dataset card or the hub's file list; infinite where neither says."""
    if builder.info.download_size:
        return builder.info.download_size
    files = _files(builder, entry)
    if not files:
        return float("inf")
    if not any(file.startswith("hf://") for file in files):
        return sum(Path(file).stat().st_size for file in files)
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem()
    return sum(hub.info(file)["size"] for file in files[:64]) * max(1, len(files) / 64)


def reason(error: BaseException) -> str:
    """An error of `datasets` in one line, with what caused it: it hides file, column and types there."""
    told: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(told) < 4:
        text = " ".join(str(cause).split())
        told.append(f"{type(cause).__name__}: {text}" if text else type(cause).__name__)
        cause = cause.__cause__
    shown = " Caused by ".join(text.rstrip(".") + "." for text in told)
    return shown if len(shown) <= LONGEST_REASON else f"{shown[:LONGEST_REASON]}..."


@contextmanager
def quiet() -> Iterator[list[str]]:
    """`datasets` draws bars of its own; ours are the only ones. What it writes about files that it could not read is
    not shown either; the list holds their paths."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    unread = _Unread()
    handlers = datasets.logging.get_logger("datasets").handlers
    datasets.disable_progress_bars()
    for handler in handlers:
        handler.addFilter(unread)
    try:
        yield unread.paths
    finally:
        for handler in handlers:
            handler.removeFilter(unread)
        if not disabled:
            datasets.enable_progress_bars()


class _Unread(logging.Filter):
    """Takes messages about files that cannot be read, and about its cache, out of a log."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        found = re.match(r"Failed to (?:read|load JSON from) file '(.+?)' with error", message)
        if found is not None and found[1] not in self.paths:
            self.paths.append(found[1])
        return found is None and not message.startswith(CACHED)
