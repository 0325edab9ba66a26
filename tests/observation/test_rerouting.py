"""The fast path against a double loop that runs the masked model for every removal, and what a path must be."""

from __future__ import annotations

import pytest
import torch

from reapkit.model.expert_calls import intercepted
from reapkit.model.expert_pairs import observed_forward
from reapkit.model.masking import masked
from reapkit.model.routed_experts import find_experts
from reapkit.observation.reroute_layer import Router, is_local, measure_layer
from reapkit.observation.rerouting import InnerProducts, Vectors, projection
from tests.support import tiny

SMALL = {
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=2),  # softmax, renormalised
    "qwen2_moe": dict(num_experts=8, num_experts_per_tok=2),  # softmax, not renormalised; shared expert
    "glm4_moe": dict(n_routed_experts=8, num_experts_per_tok=2),  # sigmoid and correction bias; shared experts
    "deepseek_v3": dict(n_routed_experts=16, num_experts_per_tok=2),  # groups
    "mixtral": dict(num_local_experts=8),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2),  # biases, softmax over the chosen
    "nemotron_h": dict(n_routed_experts=8, num_experts_per_tok=2),  # no gate projection
}
TOKENS, SOURCES, SCORED = 48, 2, torch.tensor([30, 900])


class Layer:
    """The last MoE layer of a tiny model on random inputs, and its error by running the masked model."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32):
        self.model = tiny.build(name, dtype, **SMALL[name])
        self.site = find_experts(self.model)[-1]
        draw = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(TOKENS, 64, generator=draw).to(dtype)
        self.residual = 1 + torch.rand(TOKENS, generator=draw)
        self.source = (torch.arange(TOKENS) % 3 == 0).long()
        self.outputs: dict[tuple[int, int], torch.Tensor] = {}
        self.whole = self.routed(range(self.site.num_experts))

    @torch.no_grad()
    def routed(self, alive) -> torch.Tensor:
        """y_t(A), by the model with the others masked; in half precision its terms are added up in float32."""
        found = []

        def keep(site, hidden, index, gates, inner):
            found.append(
                inner(hidden, index, gates) if hidden.dtype == torch.float32 else self.added_up(hidden, index, gates)
            )
            return hidden

        with intercepted((self.site,), keep), masked(self.model, {self.site.layer: sorted(alive)}):
            self.site.block(self.inputs[None])
        return found[0]

    def added_up(self, hidden, index, gates) -> torch.Tensor:
        out = torch.zeros(hidden.shape)
        for token, experts in enumerate(index.tolist()):
            for slot, expert in enumerate(experts):
                if (token, expert) not in self.outputs:
                    self.outputs[token, expert] = self.site.expert(hidden[token : token + 1], expert)[0].float()
                out[token] += float(gates[token, slot]) * self.outputs[token, expert]
        return out

    def error(self, alive, weight: torch.Tensor) -> float:
        each = (self.routed(alive) - self.whole).double().square().sum(1) / self.residual
        return float((each * weight).sum() / weight.sum())

    @torch.no_grad()
    def load(self, alive, weight: torch.Tensor) -> dict[int, float]:
        found = dict.fromkeys(alive, 0.0)

        def keep(site, hidden, index, gates, inner):
            pairs = observed_forward(site, hidden, index, gates)[1]
            for order, expert, gate, norm in zip(
                pairs.order.tolist(), pairs.expert.tolist(), pairs.gate.tolist(), pairs.norm.tolist(), strict=True
            ):
                token = order // pairs.top_k
                found[expert] += float(weight[token]) * gate * norm / float(self.residual[token]) ** 0.5
            return inner(hidden, index, gates)

        inputs = self.inputs
        with intercepted((self.site,), keep), masked(self.model, {self.site.layer: sorted(alive)}):
            self.site.block(inputs[None])
        return found

    def measured(self, **how):
        return measure_layer(self.model, self.site, self.inputs, self.residual, self.source, SCORED, **how)

    def weights(self) -> list[torch.Tensor]:
        """Each source alone, all with equal weights, all by their scored tokens."""
        mine = [(self.source == s).double() for s in range(SOURCES)]
        return [
            *mine,
            sum(m / m.sum() for m in mine),
            sum(m / m.sum() * count for m, count in zip(mine, SCORED.tolist(), strict=True)),
        ]


def greedy(layer: Layer, weight: torch.Tensor, least: int) -> list[tuple[int, float]]:
    """Every removal of every step, by running the model."""
    alive, steps = set(range(layer.site.num_experts)), []
    while len(alive) > least:
        errors = {e: layer.error(alive - {e}, weight) for e in sorted(alive)}
        best = min(errors, key=lambda e: (round(errors[e], 9), e))
        alive.remove(best)
        steps.append((best, errors[best]))
    return steps


def greedy_in_rounds(layer: Layer, weight: torch.Tensor, groups: int, least: int) -> list[tuple[list[int], float]]:
    alive, rounds, size = set(range(layer.site.num_experts)), [], layer.site.num_experts // groups
    while len(alive) - groups >= least:
        load = layer.load(alive, weight)
        picks = [min((e for e in sorted(alive) if e // size == g), key=load.get) for g in range(groups)]
        for g in range(groups):
            errors = {
                e: layer.error(alive - {e, *picks[:g], *picks[g + 1 :]}, weight)
                for e in sorted(alive)
                if e // size == g
            }
            picks[g] = min(errors, key=lambda e: (round(errors[e], 9), e))
        alive -= set(picks)
        rounds.append((picks, errors[picks[-1]]))
    return rounds


@pytest.mark.parametrize("name", [name for name in SMALL if name != "deepseek_v3"])
def test_path_equals_a_double_loop_over_masked_models(name: str) -> None:
    layer = Layer(name)
    found = layer.measured()
    for number, weight in enumerate(layer.weights()):
        steps = greedy(layer, weight, least=2)
        assert found["order"][number].tolist() == [expert for expert, _ in steps] + [-1, -1]
        torch.testing.assert_close(
            found["error"][number][: len(steps)],
            torch.tensor([error for _, error in steps]).double(),
            rtol=1e-4,
            atol=1e-9,
        )
    alone = [[layer.error(set(range(8)) - {e}, layer.weights()[s]) for e in range(8)] for s in range(SOURCES)]
    torch.testing.assert_close(
        found["single"] / torch.bincount(layer.source)[:, None], torch.tensor(alone).double(), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize("name", [name for name in SMALL if name != "deepseek_v3"])
def test_path_in_half_precision_is_the_double_loops_up_to_ties(name: str) -> None:
    """Near ties may go either way, so every step is checked on its own: the loop finds the path's error there, and none
    below it."""
    layer = Layer(name, torch.bfloat16)
    found = layer.measured()
    for number, weight in enumerate(layer.weights()):
        alive = set(range(8))
        for expert, reached in zip(
            found["order"][number][:6].tolist(), found["error"][number][:6].tolist(), strict=True
        ):
            errors = {e: layer.error(alive - {e}, weight) for e in alive}
            assert (
                reached == pytest.approx(errors[expert], rel=5e-3, abs=1e-9)
                and reached <= 1.005 * min(errors.values()) + 1e-9
            )
            alive.remove(expert)


def test_groups_lose_an_expert_each_in_rounds() -> None:
    layer = Layer("deepseek_v3")
    found, weight = layer.measured(), layer.weights()[-1]
    rounds = greedy_in_rounds(layer, weight, groups=4, least=8)
    assert found["order"][-1].tolist() == [expert for picks, _ in rounds for expert in picks] + [-1] * 8
    torch.testing.assert_close(
        found["error"][-1][3:8:4], torch.tensor([error for _, error in rounds]).double(), rtol=1e-4, atol=1e-9
    )
    load, everyone = layer.load(range(16), layer.weights()[2]), set(range(16))
    picks = [min(range(4 * g, 4 * g + 4), key=load.get) for g in range(4)]
    alone = [
        layer.error(everyone - {e, *(pick for pick in picks if pick // 4 != e // 4)}, torch.ones(TOKENS))
        for e in range(16)
    ]
    torch.testing.assert_close(found["single"].sum(0) / TOKENS, torch.tensor(alone).double(), rtol=1e-4, atol=1e-9)


def test_locality_is_found_out() -> None:
    for name, local in {
        "qwen3_moe": True,
        "qwen2_moe": False,
        "glm4_moe": True,
        "mixtral": True,
        "gpt_oss": True,
    }.items():
        layer = Layer(name)
        for dtype in (torch.float32, torch.bfloat16):
            layer.model.to(dtype)
            with Router(layer.site, layer.inputs.to(dtype)) as router:
                assert is_local(router, 8, 2) is local, (name, dtype)
        assert all(parameter.dtype == torch.bfloat16 for parameter in layer.site.block.parameters())


def test_block_is_whole_again_after_routing() -> None:
    layer = Layer("qwen2_moe")
    with torch.no_grad():
        before = layer.site.block(layer.inputs[None])
        layer.measured()
        assert torch.equal(layer.site.block(layer.inputs[None]), before)


def test_ties_go_to_the_lower_index_and_unused_experts_first() -> None:
    layer = Layer("glm4_moe")
    gate = layer.site.block.gate
    gate.e_score_correction_bias[torch.tensor([5, 3])] = -50.0
    found = layer.measured()
    assert found["order"][-1][:2].tolist() == [3, 5] and found["error"][-1][:2].tolist() == [0, 0]


def test_all_three_ways_give_the_squared_norm_and_projections_its_known_error() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs, coefficients = torch.randn(1000, 4, 512, generator=draw), torch.randn(1000, 4, generator=draw)
    tokens, experts = torch.arange(1000), torch.arange(4).expand(1000, 4)
    weighed = (outputs.double() * coefficients.double()[..., None]).sum(1)
    exact, matrix = weighed.square().sum(1), projection(512)
    products = InnerProducts(outputs @ outputs.mT).squared(tokens, experts, coefficients)
    torch.testing.assert_close(products, exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(Vectors(outputs).squared(tokens, experts, coefficients), exact, rtol=1e-5, atol=1e-4)
    near = Vectors(outputs @ matrix).squared(tokens, experts, coefficients)
    torch.testing.assert_close(near, (weighed @ matrix.double()).square().sum(1), rtol=1e-4, atol=1e-3)
    error = near / exact - 1  # of variance 2 / 256 around 0, as of chi-squared with 256 degrees of freedom over 256
    assert matrix.shape == (512, 256) and abs(float(error.mean())) < 0.015
    assert float(error.std()) == pytest.approx((2 / 256) ** 0.5, rel=0.15)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "deepseek_v3"])
def test_projections_hardly_change_what_is_kept(name: str) -> None:
    """Random experts are near ties, so what counts is that the set chosen by projections is as good, by the loop's own
    error."""
    layer = Layer(name)
    exactly, projected = layer.measured()["order"], layer.measured(projected=True)["order"]
    assert not torch.equal(layer.measured()["error"], layer.measured(projected=True)["error"])
    same = 0
    for number, weight in enumerate(layer.weights()):
        kept = [set(range(8)) - set(order[number][:4].tolist()) for order in (exactly, projected)]
        same += len(kept[0] & kept[1])
        assert layer.error(kept[1], weight) <= 1.05 * layer.error(kept[0], weight)
    assert same >= 14, "of 16: four paths, four kept in each"
