"""Hashes that name content: canonical JSON for specs, sha256 for files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """sha256 (hex) of `value` as canonical JSON: sorted keys, no spaces, UTF-8. Raises TypeError for what JSON cannot
    say."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # names of files need not be UTF-8


def digest_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read through one small buffer."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
