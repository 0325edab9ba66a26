"""Writes the quantized directory: the source's names and config, its tokenizer and templates, and what was measured on
disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reapkit.checkpoint.architecture import QUANTIZATION_KEY, quantization_path
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.companions import companions
from reapkit.checkpoint.projection_names import COMPRESSED_PARTS, CONSTANT_PARTS, expert_modules
from reapkit.checkpoint.weight_files import INDEX
from reapkit.core.atomic_files import copy_file, replacing, write_text
from reapkit.core.dtypes import BITS, FLOATS, torch_dtypes
from reapkit.core.progress import Progress
from reapkit.core.safetensors_header import read_header
from reapkit.model.loaded_names import LoadedNames
from reapkit.model.loading import load_config, model_class
from reapkit.model.stored_tensors import PlainTensors
from reapkit.pruning.checkpoint import QUANTIZER_FILES
from reapkit.pruning.config_edits import edit_json
from reapkit.quantization.formats import quantization_config
from reapkit.quantization.targets import Targets

ABOUT_THE_SOURCE = ("config.json", INDEX, "README.md", "recipe.yaml", "reapkit.json", *QUANTIZER_FILES)


class ShardWriter:
    """Writes what becomes of the source's shards to `out`, one file for each, or several of at most `max_shard_bytes`
    of tensors.

    A larger tensor has a file of its own. Shards may come in any order; `finish` gives the files their names in the
    source's order.
    """

    def __init__(self, checkpoint: Checkpoint, out: Path, max_shard_bytes: int):
        self.order, self.out, self.max_shard_bytes = list(checkpoint.shards), out, max_shard_bytes
        self._pieces: dict[str, list[Path]] = {}

    @contextmanager
    def shard(self, name: str) -> Iterator[Callable[[dict[str, Tensor]], None]]:
        """Takes the tensors that stand for one shard of the source, of any shape and dtype, as they come; no more than
        one file's are held."""
        held: dict[str, Tensor] = {}

        def add(tensors: dict[str, Tensor]) -> None:
            for key, tensor in tensors.items():
                if held and sum(each.nbytes for each in held.values()) + tensor.nbytes > self.max_shard_bytes:
                    self._save(name, held)
                    held.clear()
                held[key] = tensor.contiguous()  # blocks that overhang a matrix leave a view of the padded one

        yield add
        if held:
            self._save(name, held)

    def finish(self) -> None:
        """The files' final names, as the hub has them."""
        files = [piece for shard in self.order for piece in self._pieces.get(shard, [])]
        for number, file in enumerate(files, 1):
            file.rename(
                self.out
                / ("model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors")
            )

    def _save(self, name: str, tensors: dict[str, Tensor]) -> None:
        pieces = self._pieces.setdefault(name, [])
        pieces.append(self.out / f"{name}.{len(pieces)}.part")
        with replacing(pieces[-1]) as partial:
            save_file(tensors, partial, metadata={"format": "pt"})


def write_shards(
    checkpoint: Checkpoint,
    out: Path,
    replacement: Callable[[str], dict[str, Tensor] | None],
    progress: Progress,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the source's shards one at a time, in plain numbers: the named tensors, of any shape and dtype, that
    `replacement` gives for a tensor's name stand in its place; where it gives None the tensor is copied."""
    writer = ShardWriter(checkpoint, out, max_shard_bytes)
    plain = checkpoint.plain.tensors
    with PlainTensors(checkpoint) as read, progress.task("write weights", len(plain), "tensors") as task:
        for shard in checkpoint.shards:
            with writer.shard(shard) as add:
                for name in _in_file_order(checkpoint, shard):
                    new = replacement(name)
                    add({name: read(name)} if new is None else new)
                    task.advance()
    writer.finish()


def _in_file_order(checkpoint: Checkpoint, shard: str) -> list[str]:
    """The tensors of a plain model whose weights lie in the shard, as safetensors lists them."""
    roots = {matrix.parts[matrix.packing.root].name: name for name, matrix in checkpoint.matrices.items()}
    with safe_open(checkpoint.path / shard, "pt") as file:
        names = [roots.get(str(name), str(name)) for name in file.keys()]
    return [name for name in names if name in checkpoint.plain.tensors]


def finish_directory(
    checkpoint: Checkpoint, out: Path, scheme: QuantizationScheme, plan: Targets, *, trust_remote_code: bool
) -> None:
    """Adds everything but the weights; config.json is the source's own text with `quantization_config` set."""
    copy_companions(checkpoint, out)
    ignore = sorted(
        {"lm_head", *plan.left, *_loaded_names(checkpoint, plan, trust_remote_code), *_stacked_patterns(plan)}
    )
    text = (checkpoint.path / "config.json").read_text(encoding="utf-8")
    write_index(out)
    write_text(out / "config.json", edit_json(text, {quantized_at(checkpoint): quantization_config(scheme, ignore)}))


def quantized_at(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Where config.json is to say how the result is quantized: where the source's said it, else at the top."""
    return quantization_path(checkpoint.config) or (QUANTIZATION_KEY,)


def _stacked_patterns(plan: Targets) -> set[str]:
    """Patterns for experts that stay stacked: engines ask for each expert's matrix by a name that no such checkpoint
    holds."""
    modules = "|".join(map(re.escape, expert_modules()))
    sites = {match[1] for name in plan.left if (match := re.fullmatch(rf"(.*\.(?:{modules}))\.[a-z_]+", name))}
    touched = {site for site in sites if any(matrix.module.startswith(f"{site}.") for matrix in plan.matrices.values())}
    return {f"re:{re.escape(site)}\\..*" for site in sites - touched}


def copy_companions(checkpoint: Checkpoint, out: Path) -> None:
    """Copies what travels with the weights: tokenizer, chat templates, processor and generation configs, the
    checkpoint's own code; not what is about the source alone, and no other weights of it."""
    copies, strays = companions(checkpoint)
    for name in (*copies, *strays, *checkpoint.shards):
        if name in ABOUT_THE_SOURCE or name not in copies:  # llm-compressor copies everything
            if not name.endswith(("/", ".safetensors")):
                (out / name).unlink(missing_ok=True)
        else:
            copy_file(checkpoint.path / name, out / name)


def write_index(out: Path) -> None:
    """Writes the index of several shards; one shard needs none."""
    shards = sorted(out.glob("*.safetensors"))
    (out / INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        tensors = [tensor for shard in shards for tensor in read_header(shard).values()]
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
            "weight_map": {tensor.name: tensor.shard for tensor in tensors},
        }
        write_text(out / INDEX, json.dumps(index, indent=2) + "\n")


def measure(out: Path, plan: Targets, written: Mapping[str, list[str]]) -> dict[str, Any]:
    """Bits per weight on disk over the quantized matrices (packed weights and scales; constants per matrix aside), and
    bytes."""
    directory = Checkpoint.open(out)
    bits = weights = constants = 0
    for name, prefixes in written.items():
        matrix = plan.matrices[name]
        weights += matrix.count * matrix.rows * matrix.columns
        for prefix in prefixes:
            for part in COMPRESSED_PARTS:
                tensor = directory.tensors.get(f"{prefix}.{part}")
                if tensor is not None and part in CONSTANT_PARTS:
                    constants += tensor.nbytes
                elif tensor is not None:
                    bits += tensor.numel * BITS[tensor.dtype]
    return {
        "bits_per_weight": bits / weights,
        "quantized_weights": weights,
        "quantized_matrices": sum(map(len, written.values())),
        "constant_bytes": constants,
        "nbytes": directory.nbytes,
    }


def _loaded_names(checkpoint: Checkpoint, plan: Targets, trust_remote_code: bool) -> set[str]:
    """What transformers calls the modules that are left alone, once loaded, and every other linear module of its class
    that no quantized matrix becomes; engines match `ignore` against either spelling."""
    config = load_config(checkpoint.path, trust_remote_code=trust_remote_code)
    kind = model_class(config, trust_remote_code)
    names = LoadedNames.of_class(kind, config, trust_remote_code=trust_remote_code)
    left = {target for module in plan.left for target in names.targets(f"{module}.weight")}
    quantized = {target for name in plan.matrices for target in names.targets(name)}
    return {target.removesuffix(".weight") for target in left} | {
        module for module in names.linears if f"{module}.weight" not in quantized
    }


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of the checkpoint's plain form, of any shape, in its shape and dtype, read by itself."""
    with PlainTensors(checkpoint) as read:
        return read(name)


def load_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype in which the checkpoint's matrices are stored."""
    codes = {code: torch_dtypes()[code] for code in FLOATS}
    found = [
        codes[tensor.dtype]
        for tensor in checkpoint.plain.tensors.values()
        if tensor.dtype in codes and len(tensor.shape) >= 2
    ]
    return max(set(found), key=found.count) if found else torch.bfloat16
