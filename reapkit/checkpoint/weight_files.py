"""Says which files of a model directory or repository hold its weights, by the rule of the loader. Torch-free.

transformers' rule, whatever else lies there: the file that config.json names in `transformers_weights`, else
`model.safetensors`, else the shards that `model.safetensors.index.json` lists. It takes every tensor that those files
hold, in the order of their names: of two of one name the last. What an index says of single tensors it does not read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from reapkit.core.errors import UnusableError
from reapkit.core.formatting import listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPLICIT = "transformers_weights"
"""The field of config.json that names the file of weights, or their index."""
ADAPTER = "adapter_config.json"
INDEX_ENDING = ".safetensors.index.json"
OTHER_FORMATS = (
    *(".bin", ".pth", ".pt", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".npz", ".onnx", ".onnx_data", ".tflite"),
    *(".nemo", ".pdparams", ".mlmodel"),
)
"""Endings of files that hold weights, or may hold any object, in formats that are not read here."""


@dataclass(frozen=True)
class WeightFiles:
    """The shards that a loader reads, in its order, and the index that names them, where one does. `tensors`: those
    that the index names."""

    shards: tuple[str, ...]
    index: str | None = None
    tensors: frozenset[str] = frozenset()


def weight_files(
    where: object, names: Collection[str], config: Mapping[str, Any], indexed: Callable[[str], dict[str, str]]
) -> WeightFiles:
    """The files of weights among the `names` of a directory's or repository's top level.

    `where`: what messages call it. `indexed`: tensor -> shard of the index of a name. Raises UnusableError where the
    loader would read none of them, or none of a format that is read here.
    """
    explicit = config.get(EXPLICIT)
    if explicit is not None:
        return _explicit(where, names, explicit, indexed)
    if SINGLE in names:
        return WeightFiles((SINGLE,))
    if INDEX in names:
        return _of_index(INDEX, indexed)
    lying = sorted(name for name in names if name.endswith(".safetensors"))
    if not lying:
        raise UnusableError(
            f"{where}: there are no safetensors weights. reapkit reads safetensors only; convert .bin files first."
        )
    raise UnusableError(
        f"{where}: found {listed(lying)}, but neither {SINGLE} nor {INDEX}, so no loader knows which of them to read."
        + (f" Rename it to {SINGLE}" if len(lying) == 1 else " Download the index too")
        + ", or convert the weights to the format of transformers where they are in another."
    )


def is_found(names: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether the file that the loader begins with is among the names."""
    explicit = config.get(EXPLICIT)
    return explicit in names if isinstance(explicit, str) else not {SINGLE, INDEX}.isdisjoint(names)


def _explicit(
    where: object, names: Collection[str], explicit: Any, indexed: Callable[[str], dict[str, str]]
) -> WeightFiles:
    found = isinstance(explicit, str) and explicit.endswith((".safetensors", INDEX_ENDING)) and explicit in names
    if not found:
        raise UnusableError(
            f"{where}: config.json says {EXPLICIT} {str(explicit)[:80]!r}, which is no safetensors file, or index of"
            f" some, beside it. Download that file, or remove the field to read {SINGLE}."
        )
    return _of_index(explicit, indexed) if explicit.endswith(INDEX_ENDING) else WeightFiles((explicit,))


def _of_index(name: str, indexed: Callable[[str], dict[str, str]]) -> WeightFiles:
    said = indexed(name)
    return WeightFiles(tuple(sorted(set(said.values()))), name, frozenset(said))


def refuse_adapter(where: object, names: Collection[str]) -> None:
    """Raises UnusableError where the loader would put an adapter, which cannot be cut, on the weights: where peft is
    installed. Without it transformers reads none, and neither does reapkit."""
    if ADAPTER in names and find_spec("peft") is not None:
        raise UnusableError(
            f"{where}: {ADAPTER} lies beside the weights, so that transformers puts an adapter on the model (peft is"
            " installed), which cannot be pruned with it. Merge it into the weights first (merge_and_unload, then"
            " save_pretrained), or remove the file to prune the model without it."
        )


def is_stray(name: str, shards: Collection[str], index: str | None) -> bool:
    """Whether a file holds weights, or says where weights lie, that the loader does not read. `name` stands at the top
    level."""
    if name in shards or name == index:
        return False
    return (
        name.endswith((".safetensors", *OTHER_FORMATS))
        or (".index" in name and name.endswith(".json"))
        or name == ADAPTER
    )
