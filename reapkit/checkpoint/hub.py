"""Reads hub repositories: a checkpoint's metadata, its snapshot in the local cache, its commits. Torch-free.

A plan needs config, tokenizer files, index, and of each shard its header and its sha256: megabytes, whatever the
weights take.
"""

from __future__ import annotations

import glob
import re
import struct
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

from reapkit.checkpoint.checkpoint import AbsentShard, Checkpoint, read_index
from reapkit.checkpoint.companions import OF_OTHER_FORMATS
from reapkit.checkpoint.weight_files import ADAPTER, INDEX_ENDING, WeightFiles, is_found, is_stray, weight_files
from reapkit.core.errors import UnusableError
from reapkit.core.json_text import parse_json
from reapkit.core.refusals import hub_cache_refusal
from reapkit.core.safetensors_header import FIRST_READ_BYTES, MAX_HEADER_BYTES

TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "chat_template.json",
    "*vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "normalizer.json",
    "bpe.codes",
    "dict.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
TEMPLATES = "additional_chat_templates"
"""The folder of a tokenizer's named chat templates, one `.jinja` file each."""
TOKENIZER_EXTRAS = ("*.py", f"{TEMPLATES}/*.jinja")
"""What a tokenizer reads beside its own files: code that it brings (and whatever that imports), named templates."""
PLANNED_FILES = ("config.json", ADAPTER, f"*{INDEX_ENDING}", *TOKENIZER_FILES, *TOKENIZER_EXTRAS)
NEVER_FETCHED = ("*.bin", "*.pth", "*.gguf", "original/*")
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".mov", ".wav", ".mp3", ".pdf", ".gitattributes")
"""Endings of what a repository shows people beside its model."""
READ_IN_FOLDERS = (".py", ".json", ".jinja", ".txt", ".model", ".tiktoken")
"""Endings of what a run may read, or copy, in the folders of a repository: code, configs, vocabularies, templates."""
CONNECTIONS = 16


def hub_checkpoint(repository: str, revision: str | None) -> Checkpoint:
    """The checkpoint of a hub model that is not downloaded, with the `identity` that it has once it is.

    Its small files go into the hub's cache, at the commit that `revision` (default: the main branch) names now; of
    shards only headers are read. Raises UnusableError where the hub cannot be reached, does not give the repository, or
    holds no safetensors there.
    """
    with _explained(repository, revision, "is not in the local hub cache with all its safetensors"):
        commit, files = _listing(repository, revision)
        path = _planned(repository, commit, files)
        shards = [files[name] for name in _weights(repository, path, files).shards if name in files]
        remote = [file for file in shards if file.lfs is not None]
        if small := [file.rfilename for file in shards if file.lfs is None]:  # kept in git itself
            _planned(repository, commit, files, small)
        absent = {} if cached_snapshot(repository, commit) else _absent_shards(repository, commit, remote)
    return Checkpoint.open(path, absent=absent)


def _listing(repository: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """The commit that a revision names now, and its files by name. Raises UnusableError where they are no checkpoint,
    and what the hub's client raises."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(
        repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
    )
    files = {file.rfilename: file for file in info.siblings or ()}
    _check_listing(repository, [name for name in files if "/" not in name])
    return cast(str, info.sha), files


def _planned(repository: str, revision: str | None, files: Iterable[str], more: Iterable[str] = ()) -> Path:
    """The snapshot's directory once the files that a plan reads are there, and some more."""
    from huggingface_hub import snapshot_download

    names = [name for name in files if _is_read(name) and any(fnmatchcase(name, one) for one in PLANNED_FILES)]
    return Path(
        snapshot_download(
            repository, revision=revision, allow_patterns=_exactly([*names, *more]), tqdm_class=silent_bar()
        )
    )


def _exactly(names: Iterable[str]) -> list[str]:
    """Patterns that match these names alone."""
    return [glob.escape(name) for name in names]


def _weights(repository: str, path: Path, names: Iterable[str]) -> WeightFiles:
    """The files of weights among a repository's, by config and indexes in the snapshot. Raises UnusableError where the
    loader would read none."""
    at_top = {name for name in names if "/" not in name}
    return weight_files(f"model.source: {repository}", at_top, _config(path), lambda name: read_index(path / name))


def _config(path: Path) -> Mapping[str, Any]:
    """The snapshot's config.json; empty where it cannot be read, which is said where the checkpoint is opened."""
    try:
        config = parse_json((path / "config.json").read_text(encoding="utf-8"), infinite=True)
    except ValueError:
        return {}
    return config if isinstance(config, dict) else {}


def used_files(names: Iterable[str], weights: WeightFiles) -> list[str]:
    """Those of a repository's files that a run reads or copies: the weights that the loader takes, and everything small
    that travels with them; no other formats, precisions or checkpoints."""
    return [name for name in names if _is_used(name, weights)]


def _is_used(name: str, weights: WeightFiles) -> bool:
    if "/" not in name:
        return not is_stray(name, weights.shards, weights.index) and not name.lower().endswith(PICTURES)
    folder = name.split("/")[0]
    return folder not in OF_OTHER_FORMATS and name.endswith(READ_IN_FOLDERS) and ".index" not in name


def cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The model's directory in the hub's cache if everything is there that a plan and a run read, else None.

    Raises UnusableError for what is not a hub id, or for a broken index.
    """
    path = _cached(repository, revision, PLANNED_FILES)
    if path is None or not (path / "config.json").is_file():
        return None
    lying = {entry.name for entry in path.iterdir() if entry.is_file()}
    if not is_found(lying, _config(path)):
        return None
    return path if lying.issuperset(_weights(repository, path, lying).shards) else None


def download_snapshot(repository: str, revision: str | None) -> Path:
    """The model's directory in the hub's cache, after fetching what is missing there; offline, as it is if it is
    complete.

    Raises UnusableError naming the model and what would help.
    """
    import httpx
    from huggingface_hub import snapshot_download

    with _explained(repository, revision, "could not be downloaded"):
        try:
            commit, files = _listing(repository, revision)
            path = _planned(repository, revision, files)  # under the revision's own name, by which it is found offline
            used = used_files(files, _weights(repository, path, files))
            return Path(snapshot_download(repository, revision=commit, allow_patterns=_exactly(used)))
        except (httpx.HTTPError, OSError):
            if (path := cached_snapshot(repository, revision)) is None:
                raise
            return path


def hub_revision(repository: str, kind: str) -> str:
    """The commit that a hub repository's main branch has now (`kind`: model or dataset), or that the local cache holds.

    Raises UnusableError where neither the hub nor the cache knows it.
    """
    if (commit := known_commit(repository, kind, None)) is None:
        raise UnusableError(
            f"{repository}: its commit cannot be determined. Go online, or write `revision:` into the recipe."
        )
    return commit


def known_commit(repository: str, kind: str, revision: str | None) -> str | None:
    """The commit that a revision (default: the main branch) of a hub repository names now, or that the local cache
    holds for it; None where neither the hub nor the cache knows it. Files that were fetched by their commit leave no
    name in the cache: of one commit alone it is clear that it is meant."""
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    try:
        found = HfApi().repo_info(
            repository, repo_type=kind, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        )
        return found.sha
    except (httpx.HTTPError, HFValidationError, OSError):
        folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{repository.replace('/', '--')}"
        named = folder / "refs" / (revision or "main")
        if named.is_file():
            return named.read_text(encoding="utf-8").strip()
        commits = [found.name for found in folder.glob("snapshots/*")] if revision in (None, "main") else []
        return commits[0] if len(commits) == 1 else None


def _cached(repository: str, revision: str | None, patterns: Iterable[str]) -> Path | None:
    """The snapshot's directory, unless the cache knows that a file of these patterns is missing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with _explained(repository, revision, "cannot be read in the local hub cache"):
        try:
            return Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    local_files_only=True,
                    allow_patterns=list(patterns),
                    ignore_patterns=list(NEVER_FETCHED),
                )
            )
        except LocalEntryNotFoundError:
            return None


def _is_read(name: str) -> bool:
    """Whether a plan or a run reads a repository's file: those at its top, and named templates."""
    return "/" not in name or name.rpartition("/")[0] == TEMPLATES


def _check_listing(repository: str, names: Iterable[str]) -> None:
    if "config.json" not in names:
        raise UnusableError(
            f"model.source: {repository} has no config.json on the hub. Give the id of a transformers model."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise UnusableError(
            f"model.source: {repository} has no safetensors weights on the hub. reapkit reads safetensors only; choose "
            "another repository, or convert its weights and give the local directory."
        )


def _absent_shards(repository: str, commit: str, files: list[Any]) -> Mapping[str, AbsentShard]:
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        headers = pool.map(lambda file: _header(repository, commit, file.rfilename, file.lfs.size), files)
        return {
            file.rfilename: AbsentShard(file.lfs.size, header, file.lfs.sha256)
            for file, header in zip(files, headers, strict=True)
        }


def _header(repository: str, commit: str, shard: str, size: int) -> bytes:
    """A shard's header as it is stored, in one request or, where it is long, two."""
    start = _read(repository, commit, shard, 0, min(FIRST_READ_BYTES, size))
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
        raise UnusableError(
            f"model.source: {shard} of {repository} is not a safetensors file, or is cut short ({size} bytes) on the"
            " hub. Choose another revision."
        )
    if len(start) < 8 + length:
        start += _read(repository, commit, shard, len(start), 8 + length)
    return start[8 : 8 + length]


def _read(repository: str, commit: str, shard: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file on the hub."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    part = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    response = http_backoff(
        "GET",
        hf_hub_url(repository, shard, revision=commit),
        headers=build_hf_headers() | part,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
    )
    hf_raise_for_status(response)
    return response.content if response.status_code == 206 else response.content[begin:end]


def silent_bar() -> type:
    """A plan shows no bars for the few small files it fetches."""
    from huggingface_hub.utils import tqdm

    class SilentBar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": True})

    return SilentBar


@contextmanager
def _explained(repository: str, revision: str | None, state: str) -> Generator[None]:
    """Raises what goes wrong between us and the hub as UnusableError: what was found, and what would help."""
    import httpx
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except HFValidationError:
        raise UnusableError(f"model.source: '{repository}' is neither a directory nor a hub id (org/name).") from None
    except (httpx.HTTPError, OSError) as error:
        if told := hub_cache_refusal(error):
            raise UnusableError(f"model.source: {repository}: {told}") from None
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        raise UnusableError(_explanation(cause, repository, revision, state)) from None


def _explanation(error: BaseException, repository: str, revision: str | None, state: str) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT.split("://")[-1]
    if isinstance(error, GatedRepoError):
        return (
            f"model.source: {repository} is gated. Accept its terms at {hub}/{repository}, log in with `hf auth login`"
            " and run again."
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"model.revision: {repository} has no revision '{revision}' on {hub}. Name one of its commits, tags or"
            " branches."
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"model.source: {repository} is neither a directory, nor in the local hub cache, nor to be seen on {hub}."
            " Check the name; if it is private, log in with `hf auth login`."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"model.source: {repository} {state}, and HF_HUB_OFFLINE forbids to ask {hub}. Unset it, or give a local"
            " directory."
        )
    response = getattr(error, "response", None)
    found = (
        f"HTTP {response.status_code}"
        if response is not None
        else getattr(error, "strerror", None) or type(error).__name__
    )
    return (
        f"model.source: {repository} {state} ({hub}: {found}). Check the network and run again, or give a local"
        " directory."
    )
