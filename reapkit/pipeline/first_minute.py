"""Proves in a minute what a run would find out in its last hour: that the model's class takes the checkpoint, that its
first layers run, that an expert can be quantized and read back, that the pruned model can be built.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from reapkit.checkpoint.projection_names import Role
from reapkit.core.errors import ReapkitError, UnusableError
from reapkit.core.formatting import human_bytes
from reapkit.planning.plan import Plan
from reapkit.selection.candidates import Candidate
from reapkit.selection.selection import LayerSelection, Selection

if TYPE_CHECKING:
    from torch import Tensor

    from reapkit.model.routed_experts import RoutedExperts

CLASS, LAYERS, MATRIX, PRUNED = "the model's class", "the first layers", "a quantized expert", "the pruned model"
NOT_HERE = "the weights are not on this machine: apply fetches them, then tries this"
TOKENS = 16
"""That the first layers are run on."""
STRIDE = 7919
"""A prime: the tokens are spread over the vocabulary."""
LARGEST_ERROR = {2: 0.9, 3: 0.5, 4: 0.3}
"""Of a matrix after rounding, relative to its norm, by the bits of its scheme; of more bits as of 4."""


@dataclass(frozen=True)
class Proven:
    """One thing that was tried: `detail` says what was seen, or why it was not tried (`ran` is False then)."""

    name: str
    detail: str
    ran: bool = True


def first_minute(plan: Plan, until: str | None = None) -> list[Proven]:
    """Everything that the stages up to `until` need and that can be tried without an observation, in the order in which
    a run would meet it.

    Reads the embeddings, the head and the layers up to the first one with routed experts; everything else from config
    and headers. Raises UnusableError with all that failed.
    """
    tried: list[Proven] = []
    failed: list[str] = []
    stages = plan.leading_to(until)
    for name, check in CHECKS.items():
        try:
            tried += check(plan, stages)
        except ReapkitError as error:
            failed.append(f"{name}: {error}")
            if name == CLASS:
                break  # the others build it too
    if failed:
        raise UnusableError("\n".join(failed))
    return tried


def _class(plan: Plan, stages: Collection[str]) -> list[Proven]:
    """The class that transformers has for the checkpoint, built without weights: it has a place for every tensor, and
    its routed experts are where the plan has them."""
    from reapkit.model.loading import skeleton
    from reapkit.model.routed_experts import find_experts

    model = skeleton(plan.checkpoint, trust_remote_code=plan.recipe.model.trust_remote_code)
    found = {site.layer: site.num_experts for site in find_experts(model)}
    wanted = {index: layer.num_experts for index, layer in plan.layout.layers.items()}
    if found != wanted:
        raise UnusableError(
            f"{plan.checkpoint.path}: {type(model).__name__} has routed experts in layers {_counted(found)}, but the"
            f" checkpoint in layers {_counted(wanted)}. Please report the model, with its config.json."
        )
    said = f"{type(model).__name__} takes all {len(plan.checkpoint.tensors):,} tensors"
    return [Proven(CLASS, f"{said}; routed experts in layers {_counted(found)}")]


def _counted(experts: Mapping[int, int]) -> str:
    layers, counts = sorted(experts), sorted(set(experts.values()))
    said = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{layers[0]} to {layers[-1]} ({said} each)"


def _first_layers(plan: Plan, stages: Collection[str]) -> list[Proven]:
    """The layers up to the first one with routed experts, run on a few tokens, and an expert of it quantized."""
    if plan.checkpoint.shard_hashes:
        return [Proven(LAYERS, NOT_HERE, ran=False)]
    from reapkit.model.first_layers import run_first_layers
    from reapkit.model.streaming.layers import LayeredModel

    spec = plan.recipe.quantize
    quantizes = "quantize" in stages and spec.scheme is not None and spec.recipe is None
    layered = LayeredModel(
        plan.checkpoint.path, device=_device(plan), trust_remote_code=plan.recipe.model.trust_remote_code
    )
    vocabulary = cast("Tensor", layered.model.get_input_embeddings().weight).shape[0]
    tokens = [number * STRIDE % vocabulary for number in range(TOKENS)]
    seen, error = run_first_layers(layered, tokens, lambda site: _rounding_error(plan, site) if quantizes else None)
    dtype, read = str(layered.dtype).removeprefix("torch."), human_bytes(seen.nbytes)
    found = [Proven(LAYERS, f"0 to {seen.layer} run on {TOKENS} tokens in {dtype}; {read} read")]
    if error is not None:
        found.append(Proven(MATRIX, f"of layer {seen.layer}, in {spec.scheme} and back: relative error {error:.3f}"))
    return found


def _device(plan: Plan) -> str:
    import torch

    wanted = plan.recipe.runtime.device
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _rounding_error(plan: Plan, site: RoutedExperts) -> float:
    """How far an expert's down projection is from itself after it was quantized, written and read."""
    if site.linearised:
        return _written_and_read(cast("Tensor", site.module.get_submodule("0.down_proj").weight), plan)
    matrix = site.matrix(Role.DOWN)[0]
    return _written_and_read(matrix.T if site.down_proj_is_transposed else matrix, plan)


def _written_and_read(matrix: Tensor, plan: Plan) -> float:
    from safetensors.torch import load_file, save_file

    from reapkit.model.dequantizing import decompress
    from reapkit.quantization.dense import relative_error
    from reapkit.quantization.formats import preset, quantization_config, round_to_nearest, scheme_on_disk
    from reapkit.quantization.quiet import quiet

    matrix, scheme = matrix.cpu().contiguous(), preset(plan.recipe.quantize)
    with tempfile.TemporaryDirectory(prefix="reapkit-") as directory, quiet():
        file = Path(directory, "matrix.safetensors")
        save_file(round_to_nearest(matrix, scheme), file)
        config = json.dumps({"quantization_config": quantization_config(scheme, [])})
        read = decompress(load_file(file), scheme_on_disk(json.loads(config)))
    error = relative_error(read.float(), matrix.float())
    bits = 16 if scheme.weights is None else scheme.weights.num_bits
    most = LARGEST_ERROR.get(bits, LARGEST_ERROR[4])
    if not error <= most:
        raise UnusableError(
            f"quantize.scheme: an expert's matrix {list(matrix.shape)} comes back from {plan.recipe.quantize.scheme}"
            f" with a relative error of {error:.3g}; rounding to {bits} bits stays below {most}. Please report it, with"
            " the versions that `reapkit --version` prints."
        )
    return error


def _pruned_model(plan: Plan, stages: Collection[str]) -> list[Proven]:
    """For every size that a candidate has: the pruned directory as it would be written, but for its weights' bytes, and
    the class that takes it."""
    from reapkit.checkpoint.checkpoint import Checkpoint
    from reapkit.model.loading import skeleton
    from reapkit.pruning.checkpoint import outline_checkpoint

    if "prune" not in stages:
        return []
    if plan.checkpoint.shard_hashes:
        return [Proven(PRUNED, NOT_HERE, ran=False)]
    prune, found = plan.recipe.prune, dict[tuple[int, ...], Proven]()
    for candidate in plan.candidates:
        selection = _first_experts(plan, candidate)
        kept = {index: len(layer.keep) for index, layer in selection.layers.items()}
        if tuple(kept.values()) in found:
            continue
        with tempfile.TemporaryDirectory(prefix="reapkit-") as directory:
            outline_checkpoint(plan.checkpoint, selection, Path(directory), mtp=prune.mtp, layout=prune.layout)
            model = skeleton(Checkpoint.open(directory), trust_remote_code=plan.recipe.model.trust_remote_code)
        detail = f"{type(model).__name__} takes it with the experts of layers {_counted(kept)}"
        found[tuple(kept.values())] = Proven(PRUNED, f"{candidate.name}: {detail}")
    return list(found.values())


def _first_experts(plan: Plan, candidate: Candidate) -> Selection:
    """A selection of as many experts as the candidate keeps: the first of each of the router's groups."""
    groups = plan.checkpoint.architecture.n_group
    layers = {**plan.layout.layers, **plan.layout.mtp}
    chosen: dict[int, LayerSelection] = {}
    for index, count in plan.kept(candidate).items():
        number = layers[index].num_experts
        size, each = number // groups, count // groups
        if plan.recipe.prune.layout == "ragged" and groups == 1:  # as uneven as it can be with these numbers
            each = _uneven(index, count, plan)
        keep = tuple(group * size + expert for group in range(groups) for expert in range(each))
        drop = tuple(sorted(set(range(number)) - set(keep)))
        chosen[index] = LayerSelection(keep, drop, (0.0,) * number)
    return Selection(candidate.criterion, chosen, candidate.experts_per_token)


def _uneven(layer: int, count: int, plan: Plan) -> int:
    """One expert more in the first layer and one fewer in the last, where that is allowed."""
    layers, least = sorted(plan.layout.layers), plan.checkpoint.architecture.num_experts_per_tok
    if layer == layers[0]:
        return min(count + 1, plan.layout.layers[layer].num_experts)
    return max(count - 1, least) if layer == layers[-1] else count


Check = Callable[[Plan, Collection[str]], list[Proven]]
CHECKS: Mapping[str, Check] = {CLASS: _class, LAYERS: _first_layers, PRUNED: _pruned_model}
"""What is tried, by what it is called where it fails; each is given the stages that will run."""
