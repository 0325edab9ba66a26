"""Every statistic of an observation by loops over tokens and slots, from what the model handed to its experts."""

from __future__ import annotations

import functools
import math

import torch

from reapkit.calibration.tokens import batches
from reapkit.model.routed_experts import find_experts
from reapkit.observation.observation import MAXIMA, SUMS
from tests.support import tiny

DISPATCHED = [name for name in tiny.ARCHITECTURES if name != "llama4_text"]
QUICK = dict(lengths=(12, 7, 1, 10), groups=2)


def captured_calls(model, ids):
    """What each layer's experts module was called with, by wrapping the modules of the running model."""
    calls, undo = {}, []
    for site in find_experts(model):

        def call(*args, site=site, forward=site.module.forward, **kwargs):
            calls[site.layer] = (site, *args, *kwargs.values())
            return forward(*args, **kwargs)

        site.module.forward = call
        undo.append(site.module)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    for module in undo:
        del module.forward
    return calls, logits


def captured_residuals(model, ids):
    """What each MoE layer passes on, [positions, hidden] by layer: the residual stream, from hooks on the layers."""
    passed, hooks = {}, []
    for site in find_experts(model):
        layer = model.get_submodule(site.name[: site.name.index(f".{site.layer}.") + len(f".{site.layer}")])
        hooks.append(
            layer.register_forward_hook(
                lambda module, args, output, number=site.layer: passed.__setitem__(
                    number, (output if isinstance(output, torch.Tensor) else output[0]).flatten(0, 1).cpu().double()
                )
            )
        )
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return passed


def expert_outputs(site, hidden, index):
    """{expert: {token: f(x)}}, through the class's own forward with a gate of one, on the tokens the expert was chosen
    for."""
    forward = functools.partial(type(site.module).forward.__wrapped__, site.module)
    outputs = {}
    for e in index.unique().tolist():
        chosen = (index == e).any(dim=1).nonzero()[:, 0]
        ones = torch.ones(len(chosen), 1, dtype=hidden.dtype, device=hidden.device)
        f = forward(hidden[chosen], torch.full((len(chosen), 1), e, device=hidden.device), ones).cpu()
        outputs[e] = dict(zip(chosen.tolist(), f.double(), strict=True))
    return outputs


@torch.no_grad()
def naive(model, tokens, batch_tokens):
    """Every statistic of the contract by loops over tokens and slots, in Python floats."""
    sites, sources = find_experts(model), len(tokens.sources)
    shape = (len(sites), sources, sites[0].num_experts)
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name in SUMS}
    maxima = {name: torch.zeros(shape, dtype=torch.float64) for name in MAXIMA}
    coactivation = torch.zeros(*shape, shape[-1], dtype=torch.int64)
    for group in tokens.groups:
        for batch in batches(tokens, group, batch_tokens):
            calls, _ = captured_calls(model, batch.input_ids.to(model.device))
            residuals = captured_residuals(model, batch.input_ids.to(model.device))
            for layer, (site, hidden, index, gates) in enumerate(calls.values()):
                behind = residuals[site.layer]
                outputs, index, gates = expert_outputs(site, hidden, index), index.cpu(), gates.cpu()
                for row, length in enumerate(batch.lengths.tolist()):
                    for t in range(length):
                        where, s = row * batch.input_ids.shape[1] + t, int(batch.source[row])
                        experts, scored = index[where].tolist(), bool(batch.scored[row, t])
                        for slot, e in enumerate(experts):
                            f = outputs[e][where]
                            g, n, peak = (
                                float(gates[where, slot]),
                                math.sqrt(float((f * f).sum())),
                                float(f.abs().max()),
                            )
                            for name, value in zip(MAXIMA[:3], (n, g * n, peak), strict=True):
                                for key in (name, name + "_scored") if scored else (name,):
                                    maxima[key][layer, s, e] = max(maxima[key][layer, s, e], value)
                            if scored:
                                relative = g * n / math.sqrt(float((behind[where] ** 2).sum()))
                                values = (1, g, n, g * n, (g * n) ** 2, relative**2)
                                for name, value in zip(SUMS, values, strict=True):
                                    sums[name][layer, s, e] += value
                                coactivation[layer, s, e, experts] += 1
    return sums, maxima, coactivation
