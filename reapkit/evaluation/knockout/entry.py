"""Begins a model's forward behind one of its decoder layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from reapkit.core.errors import UnusableError
from reapkit.model.expert_calls import give_forward
from reapkit.model.loading import final_hidden


def hidden_behind(
    model: PreTrainedModel,
    layers: nn.ModuleList,
    layer: int,
    hidden: Tensor,
    input_ids: Tensor,
    position_ids: Tensor | None,
    *,
    returns_tuple: bool,
) -> Tensor:
    """Final hidden states [n, t, hidden] of a forward in which layer number `layer` puts out `hidden` [n, t, hidden],
    in the model's dtype; the layers up to it are not computed. `input_ids`, `position_ids`: int64 [n, t].

    Raises UnusableError where later layers need more of earlier ones than their output.
    """
    try:
        with _entered(layers, layer, hidden, returns_tuple):
            return final_hidden(model, input_ids, position_ids)
    except (LookupError, TypeError, AttributeError) as error:  # the whole forward ran
        raise leaves_more_behind(layer, f"fails ({type(error).__name__}: {error})") from error


def leaves_more_behind(layer: int, what: str) -> UnusableError:
    """The error for a model whose forward cannot begin behind a layer; `what` it does instead."""
    return UnusableError(
        f"knockout: a forward that begins behind layer {layer} without any change {what}, where the whole one does not:"
        " layers of this architecture leave more behind for later ones than their output. Choose a criterion that the"
        " observation alone decides."
    )


@contextmanager
def _entered(layers: nn.ModuleList, layer: int, hidden: Tensor, returns_tuple: bool) -> Iterator[None]:
    with ExitStack() as stack:
        for number in range(layer + 1):
            stack.callback(give_forward(layers[number], _passing(hidden, returns_tuple)))
        yield


def _passing(hidden: Tensor, returns_tuple: bool) -> Callable[..., Any]:
    return lambda *args, **kwargs: (hidden,) if returns_tuple else hidden
