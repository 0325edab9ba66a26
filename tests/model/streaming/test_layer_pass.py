"""One loop for all who stream layers: what is in memory when, where forwards wait, and where they may begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reapkit.core.errors import UnusableError
from reapkit.model.loading import final_hidden, load_model
from reapkit.model.streaming.layer_pass import LayerPass, in_turn
from reapkit.model.streaming.layers import LayeredModel
from reapkit.model.streaming.lockstep import Forward
from tests.support import tiny

pytestmark = pytest.mark.usefixtures("layer_blocks")
LAYERS = 4


def checkpoint(path: Path, model_type: str = "qwen3_moe") -> Path:
    with tiny.quiet():
        return tiny.save_hub_layout(tiny.build(model_type, num_hidden_layers=LAYERS), path)


def in_memory(layered: LayeredModel) -> list[int]:
    return [
        number
        for number, layer in enumerate(layered.layers)
        if all(parameter.device.type != "meta" for parameter in layer.parameters())
    ]


class Told:
    """A task that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str | float] = []

    def note(self, text: str) -> None:
        self.told.append(text)

    def advance(self, units: float = 1) -> None:
        self.told.append(units)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2], []])
def test_each_layer_is_in_memory_when_its_turn_comes_and_no_longer(order: list[int], tmp_path: Path):
    layered, task = LayeredModel(checkpoint(tmp_path / "model")), Told()
    for place, layer in enumerate(in_turn(layered, order, task)):
        assert layer == order[place] and layer in in_memory(layered)
        assert set(in_memory(layered)) <= set(order[place : place + 2])
    assert in_memory(layered) == []
    assert task.told == [told for layer in order for told in (f"layer {layer}", 1)]


def test_a_body_that_fails_leaves_no_layer_behind(tmp_path: Path):
    layered = LayeredModel(checkpoint(tmp_path / "model"))
    with pytest.raises(RuntimeError, match="the body"):
        for layer in in_turn(layered, range(LAYERS)):
            if layer == 1:
                raise RuntimeError("the body")
    assert in_memory(layered) == []
    assert list(in_turn(layered, range(LAYERS))) == list(range(LAYERS))


def test_a_layer_that_cannot_be_read_ends_the_loop_at_its_turn(tmp_path: Path):
    layered, turns = LayeredModel(checkpoint(tmp_path / "model")), []
    layered._keys[2] = [key for key in layered._keys[2] if not key.endswith("mlp.gate.weight")]
    with pytest.raises(UnusableError, match="1 tensors that Qwen3MoeForCausalLM needs are missing"):
        turns.extend(in_turn(layered, range(LAYERS)))
    assert turns == [0, 1] and in_memory(layered) == []


def forwards(layered: LayeredModel, ids: list[Tensor], made: dict[int, Tensor]) -> list[Callable[[], None]]:
    """Each leaves its final hidden states in `made`."""

    def of(number: int) -> Callable[[], None]:
        return lambda: made.update({number: final_hidden(layered.model, ids[number])})

    return [of(number) for number in range(len(ids))]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
@torch.no_grad()
def test_forwards_begin_at_any_layer_while_others_ride_through_the_later_ones(model_type: str, tmp_path: Path):
    """As a measurement of what each layer's experts are worth does it: from the kept hidden states of another forward,
    one more forward sets out at every layer, and all go on together under a budget of bytes."""
    path = checkpoint(tmp_path / "model", model_type)
    ids = [torch.arange(3, 20)[None], torch.arange(90, 101)[None]]
    layered, spool = LayeredModel(path), tmp_path / "spool"
    layered.load_rest()
    made: dict[int, Tensor] = {}
    with LayerPass(layered, 3 * 17 * 64 * 4, spool) as layer_pass:
        whole = [layer_pass.begin(run) for run in forwards(layered, ids, made)]
        late: list[tuple[dict[int, Tensor], Forward]] = []
        for layer in layer_pass.through(range(LAYERS)):
            if layer:
                with layer_pass.starting_at(layer):
                    late.append(
                        (found := {}, forward := layer_pass.begin(forwards(layered, ids, found)[0], park=False))
                    )
                with layer_pass.at_hand(whole[0]) as hidden:
                    forward.replace_hidden(hidden.clone())
                layer_pass.park(forward)
                assert layer < 3 or layer_pass.held_on_disk, "more than the budget waits"
                assert not list(spool.iterdir() if spool.exists() else ()), "a killed process would leave it behind"
            for forward in (*whole, *(each for _, each in late)):
                layer_pass.advance(forward)
        assert all(forward.finished for forward in (*whole, *(each for _, each in late)))
        layer_pass.forget(whole)
        assert not list(spool.iterdir())
    with tiny.quiet():
        resident = load_model(path)
    for number, rows in enumerate(ids):
        assert torch.equal(made[number], final_hidden(resident, rows))
    assert len(late) == LAYERS - 1 and all(torch.equal(found[0], made[0]) for found, _ in late)


@torch.no_grad()
def test_what_waits_is_counted_whatever_was_parked(tmp_path: Path):
    layered = LayeredModel(checkpoint(tmp_path / "model"))
    layered.load_rest()
    with LayerPass(layered) as layer_pass:
        runs = forwards(layered, [torch.arange(3, 20)[None]] * 3, {})
        kept, parked, given_up = (layer_pass.begin(run, park=number > 0) for number, run in enumerate(runs))
        assert layer_pass.held == 2 * parked.nbytes
        layer_pass.park(kept)
        layer_pass.forget([given_up])
        assert layer_pass.held == 2 * parked.nbytes
        for _ in layer_pass.through(range(LAYERS)):
            layer_pass.advance(kept, park=False)
            layer_pass.advance(parked)
            layer_pass.park(kept)
        assert layer_pass.held == 0
