"""Describes a checkpoint on disk by its config and safetensors headers; no weight is read. Torch-free."""

from __future__ import annotations

import gc
import hashlib
import os
import stat
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import isinf
from pathlib import Path
from typing import Any, NamedTuple

from reapkit.checkpoint.agreement import require_agreement
from reapkit.checkpoint.architecture import Architecture, computing_dtype, quantization_of, without_quantization
from reapkit.checkpoint.expert_layout import Layout
from reapkit.checkpoint.layout_reading import read_layout
from reapkit.checkpoint.links import refuse_links_out
from reapkit.checkpoint.quantization_methods import METHODS, QuantizationMethod
from reapkit.checkpoint.stored_matrices import StoredMatrix, dense_tensors, stored_matrices
from reapkit.checkpoint.weight_files import WeightFiles, refuse_adapter, weight_files
from reapkit.core.errors import UnusableError
from reapkit.core.hashing import digest, digest_file
from reapkit.core.json_text import parse_json
from reapkit.core.safetensors_header import TensorInfo, read_header_text, tensors_of

HASHED_SHARD_BYTES = 64_000_000  # a tenth of a second; larger shards are hashed while observe first reads them
MODELOPT_FILE = "hf_quant_config.json"
"""Where ModelOpt says how it quantized, sometimes there alone."""
LONGEST_NAME = 255
"""Bytes of a file's name on common file systems."""


def is_file_name(name: str) -> bool:
    """Whether a name that a file gives can only be that of a file beside it: no path, nothing that no disk takes."""
    return name == Path(name).name and "\0" not in name and len(name.encode(errors="surrogatepass")) <= LONGEST_NAME


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard; shards lie in the directory itself. Raises UnusableError where the index says anything
    else."""
    try:
        weight_map = parse_json(path.read_text(encoding="utf-8"))["weight_map"]
        wrong = [shard for shard in weight_map.values() if type(shard) is not str]
        wrong = wrong or [shard for shard in sorted(set(weight_map.values())) if not is_file_name(shard)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnusableError(
            f"{path}: the index of shards cannot be read ({type(error).__name__}: {error}). Download it again."
        ) from None
    if wrong:
        raise UnusableError(
            f"{path}: the index names the shard {str(wrong[0])[:80]!r}, which is not a file of this directory."
            " Download it again."
        )
    return weight_map


class AbsentShard(NamedTuple):
    """A shard that is not on this machine: its size, its header as it is stored, and the sha256 of the whole file."""

    nbytes: int
    header: bytes
    sha256: str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A complete model directory: config, tensors by name, files."""

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    stored: str | None = None
    """sha256 of index and headers as they are stored; None for tensors that were never read."""
    weights: WeightFiles = field(default_factory=lambda: WeightFiles(()))
    """The files that the tensors come from, as the loader finds them."""
    shard_hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 of the shards that are not on this machine."""

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, absent: Mapping[str, AbsentShard] | None = None) -> Checkpoint:
        """Reads config.json and the header of every shard that is not `absent`. Raises UnusableError naming what is
        missing, or a link that leads out of the directory."""
        path = Path(path)
        refuse_links_out(path)
        if not (path / "config.json").is_file():
            raise UnusableError(f"{path}: there is no config.json. Give a model directory or a hub id.")
        try:
            config = parse_json((path / "config.json").read_text(encoding="utf-8"), infinite=True)
        except ValueError as error:
            raise UnusableError(
                f"{path / 'config.json'}: the file is not valid JSON ({error}). Download it again."
            ) from None
        if not isinstance(config, dict):
            raise UnusableError(f"{path / 'config.json'}: the file does not hold a JSON object. Download it again.")
        with collector_paused():
            return cls(
                path,
                config,
                *_read_tensors(path, config, absent or {}),
                {name: shard.sha256 for name, shard in (absent or {}).items()},
            )

    @cached_property
    def architecture(self) -> Architecture:
        """What config.json says about the experts, and the headers of tables that route to them. Raises UnusableError
        where it names none, or as `layout` does."""
        declared = Architecture.from_config(self.config)
        tables = {index for index, layer in self.layout.layers.items() if layer.table} | set(declared.tables)
        return replace(declared, tables=tuple(sorted(tables)))

    @cached_property
    def layout(self) -> Layout:
        """Where the experts are. Raises UnusableError where a tensor might count experts and cannot be decided,
        or where config and headers contradict each other."""
        with collector_paused():
            layout = read_layout(self.path, self.config, self.tensors)
            require_agreement(self.path, self.config, self.tensors, layout)
            return layout

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """How the weights are quantized, as config.json or ModelOpt's own file says; empty where they are plain. Raises
        UnusableError where that is no mapping."""
        return quantization_of(self.config) or _modelopt(self.path / MODELOPT_FILE)

    @property
    def method_name(self) -> str | None:
        """The `quant_method` of a quantized checkpoint, `unknown` where none is named; None of a plain one."""
        found = self.quantization
        if not found:
            return None
        legacy = any(found.get(key) for key in ("load_in_4bit", "load_in_8bit"))
        return str(found.get("quant_method") or ("bitsandbytes" if legacy else "unknown"))

    @property
    def method(self) -> QuantizationMethod | None:
        """What reapkit knows of that method; None of a plain checkpoint, and of methods that it does not know."""
        return METHODS.get(self.method_name or "")

    @cached_property
    def matrices(self) -> Mapping[str, StoredMatrix]:
        """The quantized matrices that can be read, by the names that they would have unquantized; none of a plain
        checkpoint."""
        method, quantization = self.method, self.quantization
        if method is None:
            return {}
        with collector_paused():
            return stored_matrices(
                self.tensors,
                method.packings,
                lambda module: method.settings(quantization, module),
                computing_dtype(self.config),
            )

    @cached_property
    def plain(self) -> Checkpoint:
        """The same model as it would be stored without quantization: dense names, dtypes and shapes, whose places on
        disk are those of the packed weights. A plain checkpoint is its own."""
        if not self.quantization:
            return self
        dense = dense_tensors(self.tensors, self.matrices)
        return replace(self, config=without_quantization(self.config), tensors=dense)

    @cached_property
    def shards(self) -> tuple[str, ...]:
        """The files that hold tensors, sorted by name."""
        return tuple(sorted({tensor.shard for tensor in self.tensors.values()}))

    @cached_property
    def unheld(self) -> tuple[str, ...]:
        """Tensors that the index names and no shard holds: the loader does not look for them."""
        return tuple(sorted(self.weights.tensors - self.tensors.keys()))

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def numel(self) -> int:
        """Elements of all tensors; a packed tensor counts as it is stored."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @cached_property
    def identity(self) -> str:
        """What names this checkpoint in keys: config, headers and each shard's content where it is small, else its size
        and mtime."""
        return digest(
            {
                "config": _nameable(self.config),
                "tensors": self.stored or sorted(self.tensors.values()),
                "shards": [
                    [shard, self.shard_hashes[shard]]
                    if shard in self.shard_hashes
                    else _shard_identity(self.path / shard)
                    for shard in self.shards
                ],
            }
        )


def _read_tensors(
    path: Path, config: Mapping[str, Any], absent: Mapping[str, AbsentShard]
) -> tuple[dict[str, TensorInfo], str, WeightFiles]:
    """The tensors of all shards that the loader reads, of two of one name the last; the sha256 of all that was read;
    and the files.

    Raises UnusableError naming what is missing.
    """
    lying = {entry.name for entry in path.iterdir() if entry.is_file()} | absent.keys()
    refuse_adapter(path, lying)
    files = weight_files(path, lying, config, lambda name: read_index(path / name))
    sha = hashlib.sha256(b"" if files.index is None else (path / files.index).read_bytes())
    tensors: dict[str, TensorInfo] = {}
    for shard in files.shards:
        if shard not in lying:
            raise UnusableError(f"{path}: shard {shard} is missing. Download it again.")
        size, text = absent[shard][:2] if shard in absent else read_header_text(path / shard)
        sha.update(f"{shard}\n{len(text)}\n".encode() + text)
        tensors.update(tensors_of(path / shard, size, text))
    return tensors, sha.hexdigest(), files


def _modelopt(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = parse_json(path.read_text(encoding="utf-8"))["quantization"]
        if isinstance(found, Mapping):
            return {"quant_method": "modelopt", **found} if found.get("quant_algo") else {}
    except (ValueError, TypeError, KeyError):
        pass
    raise UnusableError(f"{path}: the file does not say how the weights are quantized. Download it again.")


@contextmanager
def collector_paused() -> Generator[None]:
    """Without the garbage collector, which would walk hundreds of thousands of new and lasting objects again and
    again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _nameable(value: Any) -> Any:
    """The same config with words for the infinite numbers, which canonical JSON has not."""
    if isinstance(value, dict):
        return {key: _nameable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nameable(item) for item in value]
    return str(value) if isinstance(value, float) and isinf(value) else value


def _shard_identity(path: Path) -> list[str | int]:
    """Hub caches name a shard by its sha256 and link to it; small files are hashed; others count as changed when
    touched."""
    facts = path.lstat()
    if stat.S_ISLNK(facts.st_mode):
        blob = path.resolve()
        if len(blob.name) == 64 and blob.parent.name == "blobs":
            return [path.name, blob.name]
        facts = blob.stat()
    if facts.st_size <= HASHED_SHARD_BYTES:
        return [path.name, digest_file(path)]
    return [path.name, facts.st_size, facts.st_mtime_ns]
