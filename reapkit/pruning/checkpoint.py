"""Writes a checkpoint without the experts that a selection drops: file to file, without building a model.
Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reapkit.checkpoint import companions as travelling
from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import Layout, is_mtp_name
from reapkit.checkpoint.readable import way_out
from reapkit.checkpoint.weight_files import EXPLICIT, INDEX
from reapkit.core.atomic_files import copy_file, remove_unfinished, write_bytes, write_json
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.formatting import listed
from reapkit.core.hashing import digest
from reapkit.core.json_text import parse_json
from reapkit.core.payload_files import sha256_of
from reapkit.core.progress import SILENT, Progress
from reapkit.core.safetensors_header import TensorInfo
from reapkit.pruning.byte_ranges import Shard, cut_tensors, encode_index, lay_out
from reapkit.pruning.config_edits import (
    Counts,
    Renumber,
    config_edits,
    edit_json,
    expert_renamer,
    renamed,
    text_section,
)
from reapkit.pruning.refitted_weights import RepairedWeights
from reapkit.pruning.write import explained, require_space, write_shards
from reapkit.selection.selection import Selection

MANIFEST = "reapkit.json"
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
RAGGED_KEY = "num_routed_experts_per_layer"
RAGGED_MODULE = "modeling_ragged"
OUTLINE_BYTES = 5_000_000_000
"""Of a shard that is not written: any file system holds a file of holes of that size."""


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What was written: sha256 and bytes of each shard, experts kept by layer, whether multi-token prediction was
    dropped."""

    path: Path
    shards: Mapping[str, Mapping[str, Any]]
    kept: Mapping[int, int]
    mtp_dropped: bool
    left_out: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard["bytes"] for shard in self.shards.values())


def prune_checkpoint(
    source: Checkpoint,
    selection: Selection,
    out: Path,
    *,
    max_shard_bytes: int = 5_000_000_000,
    mtp: Literal["auto", "observe", "drop"] = "auto",
    layout: Literal["uniform", "ragged"] = "uniform",
    repaired: RepairedWeights | None = None,
    progress: Progress = SILENT,
) -> PrunedCheckpoint:
    """Writes to `out` the checkpoint without the dropped experts: kept tensors bit-equal, config edited, other files
    copied.

    `mtp`: `drop` removes multi-token-prediction blocks and their config fields; `observe` needs the selection to cover
    them; `auto` keeps them if it does (or if they hold no experts) and else drops them with a warning. Layers the
    selection omits stay whole. `layout: ragged` allows different numbers of experts per layer: config.json lists them,
    and a modelling file that transformers can load them with travels along. `repaired`: re-fitted expert matrices that
    take the place of the source's. Interrupted, it continues after the last finished shard when called again with the
    same arguments, and gives the same bytes.

    Raises UnusableError for a selection that does not fit, StageFailed where the disk or the source gives way.
    """
    out = Path(out)
    found = source.layout
    drop_mtp = _drops_mtp(found, selection, mtp, progress)
    keep, shards, texts = _decided(source, selection, max_shard_bytes, drop_mtp, layout, repaired)
    copies, left_out = companions(source)
    with explained(source.path, out):
        out.mkdir(parents=True, exist_ok=True)
        if out.resolve() == source.path.resolve():
            raise StageFailed(f"{out} is the source itself. Choose another output directory.")
        manifest = _resume(out, _plan_key(source, keep, texts, shards, drop_mtp, repaired), progress)
        remove_unfinished(out)
        written = dict(manifest["shards"])
        left = [shard for shard in shards if shard.name not in written]
        require_space(out, sum(shard.nbytes for shard in left))
        with progress.task("prune", sum(shard.nbytes for shard in shards), "B") as task:
            task.advance(sum(shard.nbytes for shard in shards) - sum(shard.nbytes for shard in left))

            def finished(shard: Shard, sha256: str) -> None:
                written[shard.name] = {"bytes": shard.nbytes, "sha256": sha256}
                write_json(out / MANIFEST, {**manifest, "shards": written})

            write_shards(source.path, out, left, task, finished)
        _write_small_files(source, out, shards, copies, texts)
        kept = {index: len(experts) for index, experts in keep.items()}
        kept_by_layer = {str(index): list(keep[index]) for index in sorted(keep)}
        write_json(
            out / MANIFEST,
            {
                **manifest,
                "complete": True,
                "source": source.identity,
                "keep": kept_by_layer,
                "shards": dict(sorted(written.items())),
            },
        )
    if left_out:
        progress.warn(
            f"prune: not copied, since the loader does not read them and they hold the unpruned weights:"
            f" {listed(left_out)}."
        )
    return PrunedCheckpoint(out, written, kept, drop_mtp and bool(found.mtp_tensors), left_out)


def outline_checkpoint(
    source: Checkpoint,
    selection: Selection,
    out: Path,
    *,
    mtp: Literal["auto", "observe", "drop"] = "auto",
    layout: Literal["uniform", "ragged"] = "uniform",
) -> None:
    """Writes to the empty directory `out` what `prune_checkpoint` would, with files of holes in place of the shards'
    numbers: their headers are there, so that the model's class can be asked whether it takes them. No weight is read.

    Raises UnusableError for a selection that does not fit.
    """
    drop_mtp = _drops_mtp(source.layout, selection, mtp, SILENT)
    _, shards, texts = _decided(source, selection, OUTLINE_BYTES, drop_mtp, layout, None)
    for shard in shards:
        with (out / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    _write_small_files(source, out, shards, companions(source)[0], texts)


def _decided(
    source: Checkpoint,
    selection: Selection,
    max_shard_bytes: int,
    drop_mtp: bool,
    layout: str,
    repaired: RepairedWeights | None,
) -> tuple[dict[int, tuple[int, ...]], list[Shard], dict[str, str]]:
    """Kept experts by layer, the shards of the result, and the texts that surgery writes. Raises UnusableError for a
    source that cannot be cut, or a selection that does not fit."""
    if source.method is not None and not source.method.cut:
        raise UnusableError(
            f"{source.path}: the weights are quantized ({source.method_name}), whose files name every tensor once more"
            f" in their metadata, so no expert can be taken out. {way_out()}"
        )
    found = source.layout
    keep = _kept(found, selection, source, drop_mtp)
    is_ragged = _is_ragged(source, keep, layout)
    replaced = None if repaired is None else _fitting(repaired, keep)
    shards = lay_out(source, cut_tensors(source, found, keep, drop_mtp=drop_mtp, replaced=replaced), max_shard_bytes)
    rename = _renamer(source, found, keep, drop_mtp)
    texts = _edited_texts(source, found, keep, selection.experts_per_token, drop_mtp, rename, is_ragged=is_ragged)
    return keep, shards, texts


def _fitting(repaired: RepairedWeights, keep: Mapping[int, Sequence[int]]) -> dict[str, tuple[Path, TensorInfo]]:
    for layer, names in repaired.layers.items():
        if tuple(keep.get(layer, ())) != names.keep:
            raise UnusableError(
                f"{repaired.directory}: layer {layer} was re-fitted for other kept experts than the selection's. Run"
                " the repair stage again."
            )
    return repaired.tensors()


def _drops_mtp(layout: Layout, selection: Selection, mtp: str, progress: Progress) -> bool:
    lacking = sorted(index for index in layout.mtp if index not in selection.layers)
    if mtp == "observe" and lacking:
        raise UnusableError(
            "prune.mtp: observe, but the selection has no experts for the multi-token-prediction layers "
            f"{lacking}. Observe them, or set prune.mtp to drop."
        )
    if mtp == "auto" and lacking:
        progress.warn(
            f"prune: multi-token-prediction layers {lacking} were not observed and are dropped; speculative decoding "
            "with them is lost."
        )
    return mtp == "drop" or bool(lacking)


def _kept(layout: Layout, selection: Selection, source: Checkpoint, drop_mtp: bool) -> dict[int, tuple[int, ...]]:
    """Kept experts of every routing layer, proven to fit the checkpoint and its router."""
    layers = {**layout.layers, **({} if drop_mtp else layout.mtp)}
    known = {**layout.layers, **layout.mtp}
    if strange := sorted(set(selection.layers) - set(known)):
        raise UnusableError(
            f"the selection names layers {strange}, where {source.path} routes no experts. It has experts in "
            f"layers {min(known)} to {max(known)}. Use the selection of this model."
        )
    architecture = source.architecture
    top_k = selection.experts_per_token or architecture.num_experts_per_tok
    keep: dict[int, tuple[int, ...]] = {}
    for index, layer in layers.items():
        chosen = tuple(selection.layers[index].keep) if index in selection.layers else tuple(range(layer.num_experts))
        if list(chosen) != sorted(set(chosen)) or not chosen or chosen[0] < 0 or chosen[-1] >= layer.num_experts:
            raise UnusableError(
                f"the selection of layer {index} must list different experts from 0 to {layer.num_experts - 1} "
                f"in ascending order, but it is {list(chosen)}."
            )
        if layer.table and len(chosen) < layer.num_experts:
            raise UnusableError(
                f"layer {index} assigns tokens to experts by a fixed table ({layer.table}); dropping an expert "
                "would leave its tokens without one. Give a selection that keeps all of them."
            )
        if len(chosen) < top_k:
            raise UnusableError(
                f"the selection keeps {len(chosen)} experts in layer {index}, but each token is routed to {top_k}."
            )
        group = layer.num_experts // architecture.n_group
        sizes = {sum(1 for expert in chosen if expert // group == number) for number in range(architecture.n_group)}
        if len(sizes) > 1:
            raise UnusableError(
                f"the selection keeps unequal numbers of experts in the {architecture.n_group} groups of layer "
                f"{index}; the router cuts its experts into equal groups (n_group)."
            )
        keep[index] = chosen
    return keep


def _is_ragged(source: Checkpoint, keep: Mapping[int, Sequence[int]], layout: str) -> bool:
    counts = {len(chosen) for chosen in keep.values()}
    if len(counts) == 1:
        return False
    if layout == "uniform":
        raise UnusableError(
            f"the selection keeps between {min(counts)} and {max(counts)} experts per layer; a checkpoint "
            "without ragged layout declares one number. Set prune.layout to ragged or loosen the caps."
        )
    if source.config.get("auto_map") and not _is_ragged_source(source):
        raise UnusableError(
            f"{source.path}: its config names modelling code of its own (auto_map), which cannot be told a "
            "number of experts per layer. Set prune.layout to uniform."
        )
    if not source.config.get("architectures"):
        raise UnusableError(
            f"{source.path}: config.json names no class in `architectures`, so no ragged model of it could be "
            "loaded. Set prune.layout to uniform."
        )
    return True


def _is_ragged_source(source: Checkpoint) -> bool:
    return any(str(name).startswith(f"{RAGGED_MODULE}.") for name in (source.config.get("auto_map") or {}).values())


def _renamer(source: Checkpoint, layout: Layout, keep: Mapping[int, Sequence[int]], drop_mtp: bool) -> Renumber:
    places = {index: {expert: new for new, expert in enumerate(chosen)} for index, chosen in keep.items()}
    depth = source.architecture.num_hidden_layers

    def renumber(name: str, layer: int, expert: int) -> int | None:
        if not name.startswith(layout.stack) and is_mtp_name(f"{name}.", layout.stack, depth):
            layer += depth
        return places[layer].get(expert) if layer in places else expert

    def gone(name: str) -> bool:
        return drop_mtp and is_mtp_name(f"{name}.", layout.stack, depth)

    return expert_renamer(renumber, gone, f"{source.path}: quantization config")


def _edited_texts(
    source: Checkpoint,
    layout: Layout,
    keep: Mapping[int, Sequence[int]],
    experts_per_token: int | None,
    drop_mtp: bool,
    rename: Renumber,
    *,
    is_ragged: bool,
) -> dict[str, str]:
    """The text files of the result that surgery writes, by file name."""
    architecture = source.architecture
    count = max(len(chosen) for chosen in keep.values())
    counts = Counts(
        (architecture.num_experts, count),
        (architecture.num_experts_per_tok, experts_per_token or architecture.num_experts_per_tok),
        architecture.n_group,
        drop_mtp and bool(layout.mtp_tensors),
    )
    edits = config_edits(source.config, counts, rename)
    texts = {}
    if is_ragged or RAGGED_KEY in text_config(
        source.config
    ):  # a ragged source's list must say what its layers now hold
        depth = max(architecture.num_hidden_layers, *(index + 1 for index in keep))
        edits[(*text_section(source.config), RAGGED_KEY)] = [len(keep.get(layer, ())) for layer in range(depth)]
    if is_ragged:
        edits[("auto_map",)] = _auto_map(source.config["architectures"][0])
    if is_ragged or _is_ragged_source(source):
        texts[f"{RAGGED_MODULE}.py"] = (Path(__file__).parents[1] / "model/ragged_modeling.py").read_text(
            encoding="utf-8"
        )
    if source.config.get(EXPLICIT) is not None:
        edits[(EXPLICIT,)] = None  # what is written has the names that are looked for without it
    texts["config.json"] = edit_json(_exact_text(source.path / "config.json"), edits)
    for name in QUANTIZER_FILES:
        if (source.path / name).is_file():
            text = _exact_text(source.path / name)
            try:
                texts[name] = edit_json(text, renamed(parse_json(text, infinite=True), rename))
            except ValueError as error:
                raise UnusableError(
                    f"{source.path / name}: the file is not valid JSON ({error}). Download it again."
                ) from None
    return texts


def _exact_text(path: Path) -> str:
    """The file's text with its own line ends."""
    return path.read_bytes().decode()


def _auto_map(model_class: str) -> dict[str, str]:
    """Sends the loaders of causal and of multimodal models to the modelling file, where the class has its own name."""
    auto = "AutoModelForCausalLM" if model_class.endswith("ForCausalLM") else "AutoModelForImageTextToText"
    return {auto: f"{RAGGED_MODULE}.{model_class}"}


def companions(source: Checkpoint) -> tuple[list[str], tuple[str, ...]]:
    """(files to copy, other weights to leave out), relative to the source."""
    return travelling.companions(source, {"config.json", INDEX, MANIFEST, f"{RAGGED_MODULE}.py", *QUANTIZER_FILES})


def written_names(source: Checkpoint) -> tuple[str, ...]:
    """The names of the files that a directory made of the source may hold, shards as patterns."""
    shards = ("model.safetensors", "model-*-of-*.safetensors", *source.shards)
    return (*shards, INDEX, "config.json", MANIFEST, f"{RAGGED_MODULE}.py", *QUANTIZER_FILES, *companions(source)[0])


def _plan_key(
    source: Checkpoint,
    keep: Mapping[int, Sequence[int]],
    texts: Mapping[str, str],
    shards: Sequence[Shard],
    drop_mtp: bool,
    repaired: RepairedWeights | None,
) -> str:
    return digest(
        {
            **({} if repaired is None else {"repaired": repaired.describe()}),
            "source": source.identity,
            "keep": sorted((index, list(chosen)) for index, chosen in keep.items()),
            "texts": dict(texts),
            "drop_mtp": drop_mtp,
            "shards": [(shard.name, shard.nbytes, shard.whole) for shard in shards],
        }
    )


def _resume(out: Path, key: str, progress: Progress) -> dict[str, Any]:
    """The manifest of an earlier attempt at the same work with the shards that have the bytes it wrote, or a fresh
    one."""
    try:
        found = parse_json((out / MANIFEST).read_text(encoding="utf-8"))
        same = found["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        if any(path.name.endswith(".safetensors") for path in out.iterdir()):
            raise StageFailed(f"{out} already holds another checkpoint. Remove it or choose another output directory.")
        return {"key": key, "complete": False, "shards": {}}
    written = {out / name: shard for name, shard in found["shards"].items() if (out / name).is_file()}
    hashed = sha256_of(written, progress, "check what is there")
    present = {file.name: written[file] for file, sha256 in hashed if sha256 == written[file]["sha256"]}
    return {"key": key, "complete": False, "shards": present}


def _write_small_files(
    source: Checkpoint, out: Path, shards: Sequence[Shard], copies: Sequence[str], texts: Mapping[str, str]
) -> None:
    """Everything but the shards; config.json last, so that an unfinished directory is no model."""
    for name in copies:
        copy_file(source.path / name, out / name)
    (out / INDEX).unlink(missing_ok=True)
    if len(shards) > 1:
        write_bytes(out / INDEX, encode_index(shards))
    for name in sorted(texts, key=lambda name: name == "config.json"):
        write_bytes(out / name, texts[name].encode())
