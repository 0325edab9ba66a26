"""Links in a model directory: what leads out of it is refused, for what is read there may be copied and uploaded.
Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from reapkit.core.errors import UnusableError


def refuse_links_out(directory: Path) -> None:
    """Raises UnusableError naming the first link that leaves the directory, whether or not there is something behind
    it. The hub cache's own links, from a snapshot to the blobs beside it, are no such links.
    """
    inside = Path(os.path.realpath(directory))
    blobs = next((parent.parent / "blobs" for parent in inside.parents if parent.name == "snapshots"), None)
    for link in _links(directory):
        target = Path(os.path.realpath(link))
        if not target.is_relative_to(inside) and (blobs is None or target.parent != blobs):
            raise UnusableError(
                f"{directory}: {link.relative_to(directory)} is a link that leads out of the directory, to {target}."
                " What lies in a model's directory may be copied into one that is uploaded, so such links are not"
                " followed. Put the file itself there (cp -L), or remove the link."
            )


def _links(directory: Path) -> Iterator[Path]:
    """Every link below the directory, itself not followed; in the order of their names."""
    for folder, folders, files in os.walk(directory):
        folders.sort()
        for name in sorted((*folders, *files)):
            if os.path.islink(path := os.path.join(folder, name)):
                yield Path(path)
