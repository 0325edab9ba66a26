"""Fetches single files of datasets on the hub, named by `hf://datasets/org/name@revision/path`. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reapkit.calibration.data_files import matching
from reapkit.checkpoint.hub import silent_bar
from reapkit.core.errors import UnusableError
from reapkit.core.refusals import hub_cache_refusal
from reapkit.recipe.schema import MixEntry

_ADDRESS = re.compile(
    r"hf://datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*?)(?:@(?P<late>[^@/]+))?)?/?"
)


@dataclass(frozen=True)
class HubAddress:
    """A dataset's id, its revision where the address has one, and the path or pattern of files in it (empty: all)."""

    name: str
    revision: str | None
    path: str


def hub_address(source: str) -> HubAddress | None:
    """What an address on the hub names; None for what is no such address."""
    if (found := _ADDRESS.fullmatch(source)) is None:
        return None
    revision = found["revision"] or found["late"]
    return HubAddress(found["name"], revision and revision.replace("%2F", "/"), found["path"] or "")


def has_path(source: str) -> bool:
    """Whether a source names files of a dataset on the hub."""
    address = hub_address(source)
    return address is not None and bool(address.path)


def pinned(entry: MixEntry, address: HubAddress) -> str | None:
    """The revision that is read: the recipe's field, else the address's own."""
    return entry.revision or address.revision


def fetched(address: HubAddress, entry: MixEntry) -> list[Path]:
    """The files in the hub's cache, after fetching what is missing there; sorted by name. Raises UnusableError naming
    the source."""
    import httpx
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(
                address.name,
                repo_type="dataset",
                revision=pinned(entry, address),
                allow_patterns=[address.path],
                tqdm_class=silent_bar(),
            )
        )
    except (httpx.HTTPError, OSError, ValueError) as error:
        told = hub_cache_refusal(error) or (
            f"{entry.source} cannot be fetched ({type(error).__name__}: {str(error).strip().splitlines()[0]})."
            " Check the address, the network, and `hf auth login` for gated data."
        )
        raise UnusableError(f"source '{entry.name}': {told}") from None
    if not (files := list(matching(folder / address.path).values())):
        raise UnusableError(
            f"source '{entry.name}': {address.name} has no file {address.path} on the hub. Compare the path with its"
            " list of files."
        )
    return files
