"""Loads multi-token-prediction blocks as transformers does, runs them on the model's batches and observes them like its
layers.

Block k = 1, 2, … stands at position p of a row where it reads token p and, from position p - 1, what stood before it:
the decoder's final hidden state, or the output of block k - 1. There it predicts token p + 1, as the decoder does at p.
So a position counts for the block exactly where it counts for the decoder (padding, scored, EAFT signal, whose p and H
are the decoder's for that token), except the first k positions of a row (of a sample, where rows isolate their
samples), before which nothing stands.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.calibration.tokens import Batch
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.shard_reader import ShardReader
from reapkit.core.errors import UnusableError
from reapkit.model.loading import widened
from reapkit.model.routed_experts import RoutedExperts, find_experts
from reapkit.model.stored_tensors import CheckpointTensors, StoredTensor
from reapkit.model.streaming.layers import no_progress_bars
from reapkit.observation.accumulate import Positions

if TYPE_CHECKING:
    from transformers.modeling_layers import MtpModel


@dataclass(frozen=True, eq=False)
class Slots:
    """The positions of a batch at which the block of depth k runs, packed to the left of each row.

    `at` int64 [b, t]: positions in the row; `position_ids` int64 [b, t]: as the block is told. `positions`: what
    statistics need to know of the slots. `signals` int64: which of the batch's `num_signals` signals are those of
    `positions`.
    """

    at: Tensor
    position_ids: Tensor
    positions: Positions
    signals: Tensor
    num_signals: int

    @classmethod
    def of(cls, batch: Batch, depth: int) -> Slots:
        rows, width = batch.input_ids.shape
        ahead = torch.arange(width).expand(rows, width) if batch.position_ids is None else batch.position_ids
        runs = batch.valid & (ahead >= depth)
        at = torch.sort(runs.logical_not().int(), dim=1, stable=True).indices[:, : int(runs.sum(1).max())]
        filled = runs.gather(1, at)
        told = (
            ahead.gather(1, at)
            if batch.position_ids is not None
            else (depth + torch.arange(at.shape[1])).expand(at.shape)
        )
        signal = (batch.signal.gather(1, at) & filled).reshape(-1).nonzero()[:, 0]
        number = batch.signal.reshape(-1).cumsum(0).view(rows, width).gather(1, at).reshape(-1) - 1
        source = batch.source[:, None].expand(at.shape).reshape(-1)
        of_source = tuple((int(one), (batch.source == one).nonzero()[:, 0]) for one in batch.source.unique())
        positions = Positions(
            source,
            filled.reshape(-1),
            (batch.scored.gather(1, at) & filled).reshape(-1),
            signal,
            of_source,
            (rows, at.shape[1]),
        )
        return cls(at, told, positions, number[signal], int(batch.signal.sum()))

    def spread(self, expert: Tensor, gate_norm: Tensor) -> tuple[Tensor, Tensor]:
        """What the slots with a signal were routed to, one row per signal of the batch: expert -1 and gate·norm 0 where
        no slot is.

        `expert` int16 [n, k] and `gate_norm` float32 [n, k] of the slots in `signals`; the result is [num_signals, k]
        each, in the same dtypes.
        """
        shape = (self.num_signals, expert.shape[1])
        where = self.signals.to(expert.device)
        return (
            expert.new_full(shape, -1).index_copy(0, where, expert),
            gate_norm.new_zeros(shape).index_copy(0, where, gate_norm),
        )


class MtpBlocks:
    """The blocks of a loaded model, `sites` their routed experts under the numbers that follow the decoder's.

    Embedding, rotary table and head are the model's own modules.
    """

    def __init__(self, model: PreTrainedModel, layers: Sequence[int], device: torch.device):
        """`layers`: the blocks' numbers in the checkpoint that `model` came from. Raises UnusableError where
        transformers cannot load them."""
        self.device = device
        self.model = _loaded(model, layers, device)
        found = {site.layer: site for site in find_experts(self.model)}
        self.sites = tuple(
            replace(found[number], layer=layer, decoder_layer=_decoder_layer(block))
            for number, (layer, block) in enumerate(zip(layers, self.model.layers, strict=True))
        )

    def run(self, input_ids: Tensor, hidden: Tensor, entering: Callable[[RoutedExperts, int], Slots]) -> list[Tensor]:
        """Runs every block on rows `input_ids` int64 [b, t] whose final hidden states are `hidden` [b, t, hidden]; each
        one's output at its slots, [b, t', hidden], in the model's dtype.

        `entering(site, depth)`: the slots of the block that comes next; one without slots is not run.
        """
        outputs: list[Tensor] = []
        hidden = hidden.to(self.device)
        for depth, (block, site) in enumerate(zip(self.model.layers, self.sites, strict=True), start=1):
            slots = entering(site, depth)
            if slots.at.shape[1] == 0:
                continue
            at = slots.at.to(self.device)
            outputs.append(self._block(block, depth, input_ids, slots, _taken(hidden, (at - 1).clamp_min(0))))
            if depth < len(self.sites):
                hidden = torch.zeros_like(hidden).scatter(
                    1, at[..., None].expand(*at.shape, hidden.shape[-1]), outputs[-1]
                )
        return outputs

    def _block(self, block: nn.Module, depth: int, input_ids: Tensor, slots: Slots, previous: Tensor) -> Tensor:
        model = self.model
        near = next(model.embed_tokens.parameters()).device
        embeds = model.embed_tokens(input_ids.cpu().gather(1, slots.at).to(near))
        rotary = self._rotary(embeds, slots.position_ids.to(near))
        embeds, position_ids = embeds.to(self.device), slots.position_ids.to(self.device)
        # transformers itself calls it without a cache, which its annotation leaves out
        masks = model.create_masks_for_mtp_layer(depth - 1, embeds, None, position_ids)  # pyright: ignore[reportArgumentType]
        return block(
            embeds, previous, position_embeddings=rotary, position_ids=position_ids, past_key_values=None, **masks
        )

    def _rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, ...] | None:
        """The model's own rotary table at these positions; None where the model learned its positions."""
        table = self.model.rotary_emb
        if table is None:
            return None
        return tuple(part.to(self.device) for part in table(embeds, position_ids=position_ids))

    def logits(self, output: Tensor) -> Tensor:
        """Logits of a block's output [b, t, hidden], float32 [b, t, vocabulary], by the model's own head."""
        return self.model._project_to_logits(output).float()


def _taken(hidden: Tensor, at: Tensor) -> Tensor:
    return hidden.gather(1, at[..., None].expand(*at.shape, hidden.shape[-1]))


def _loaded(model: PreTrainedModel, layers: Sequence[int], device: torch.device) -> MtpModel:
    from transformers.modeling_layers import MtpModel

    directory = model.config.name_or_path
    assert directory is not None, "a loaded model says where it came from"
    with _named(model, layers), _dequantized(Checkpoint.open(directory)), no_progress_bars():
        try:
            blocks = MtpModel.from_pretrained(model, device_map={"": device})
        except (RuntimeError, ValueError) as error:
            raise UnusableError(
                f"{model.config.name_or_path}: transformers {transformers.__version__} cannot load the"
                f" multi-token-prediction layers {', '.join(map(str, layers))}: {error} Set prune.mtp: drop."
            ) from error
    widened(blocks.layers.eval().requires_grad_(False), model.dtype)
    for block, layer in zip(blocks.layers, layers, strict=True):
        _unround(_decoder_layer(block), layer, model)
    return blocks


def _decoder_layer(block: nn.Module) -> nn.Module:
    """What of a block is a layer like the decoder's."""
    return block.get_submodule("mtp_block")


def _unround(block: nn.Module, layer: int, model: PreTrainedModel) -> None:
    """Reads again what the model's class keeps in float32 whatever the rest is in, which transformers does not tell its
    blocks: rounded biases of a router would choose other experts.
    """
    kept = [
        (re.compile(pattern.replace("*", ".*")), dtype)
        for pattern, dtype in (model._get_dtype_plan(model.dtype) or {}).items()
    ]
    directory = model.config.name_or_path
    assert directory is not None, "a loaded model says where it came from"
    files = Checkpoint.open(directory)
    for module_name, module in block.named_modules():
        for name, tensor in {**module._parameters, **module._buffers}.items():
            own = f"{module_name}.{name}"
            dtype = next((dtype for pattern, dtype in kept if pattern.search(own)), None)
            if tensor is None or dtype is None:
                continue
            stored = next((key for key in files.tensors if key.endswith(f".layers.{layer}.{own}")), None)
            if stored is None:  # computed, not stored
                continue
            with safe_open(files.path / files.tensors[stored].shard, "pt") as file:
                wide = file.get_tensor(stored).to(tensor.device, dtype)
            if name in module._buffers:
                module._buffers[name] = wide
            else:
                module._parameters[name] = nn.Parameter(wide, requires_grad=False)


@contextmanager
def _dequantized(checkpoint: Checkpoint) -> Iterator[None]:
    """Inside the block transformers reads the tensors of blocks as a plain model has them: what it knows of
    quantization it tells the decoder's layers alone."""
    if not checkpoint.matrices:
        yield
        return
    tensors = CheckpointTensors(checkpoint)
    with ShardReader(checkpoint.path) as reader:

        def opened(file: str, **options: object) -> _PlainFile:
            return _PlainFile(tensors, Path(file).name, reader)

        def files(**options: object) -> tuple[list[str], None]:
            return [str(checkpoint.path / shard) for shard in checkpoint.shards], None

        with (
            patch("transformers.modeling_layers.safe_open", opened),
            patch("transformers.modeling_layers._get_resolved_checkpoint_files", files),
        ):
            yield


class _PlainFile:
    """A shard as transformers opens it, with the tensors of a plain model."""

    def __init__(self, tensors: CheckpointTensors, shard: str, reader: ShardReader):
        self._tensors, self._shard, self._reader = tensors, shard, reader

    def keys(self) -> list[str]:
        return [name for name, info in self._tensors.items() if info.shard == self._shard]

    def get_slice(self, name: str) -> StoredTensor:
        return self._tensors.stored(name, self._reader)

    def __exit__(self, *error: object) -> None:
        pass  # the reader closes the shards


@contextmanager
def _named(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """transformers finds a checkpoint's blocks by what the model's class leaves unread, where only the published sizes
    stand."""
    held = model.__dict__.get("_keys_to_ignore_on_load_unexpected")
    model._keys_to_ignore_on_load_unexpected = [rf"\.layers\.{layer}\." for layer in layers]
    try:
        yield
    finally:
        if held is None:
            del model._keys_to_ignore_on_load_unexpected
        else:
            model._keys_to_ignore_on_load_unexpected = held
