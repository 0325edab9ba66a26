"""Estimates what measuring knock-outs takes. From config and headers alone; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reapkit.observation.materials import KNOCKOUTS
from reapkit.selection.criteria.registry import described

if TYPE_CHECKING:
    from reapkit.planning.plan import Plan


@dataclass(frozen=True)
class KnockoutCost:
    """`tokens`: of the sampled rows, about. `forwards`: whole forwards of them that all knock-outs add up to, each from
    its layer on. `flops`: of those. `hours`: at the observation's tokens per second, None before it was made."""

    tokens: int
    forwards: float
    flops: float
    hours: float | None

    @property
    def token_forwards(self) -> float:
        return self.tokens * self.forwards


def measures_knockouts(plan: Plan) -> bool:
    """Whether a criterion of the recipe needs them."""
    named = [candidate.criterion for candidate in plan.candidates] + list(plan.recipe.evaluate.controls)
    return any(KNOCKOUTS in described(name).materials for name in named)


def knockout_cost(plan: Plan, tokens: int) -> KnockoutCost | None:
    """Of a calibration of so many tokens; None where nothing is measured."""
    if not measures_knockouts(plan):
        return None
    depth = plan.checkpoint.architecture.num_hidden_layers
    forwards = sum(layer.num_experts * (depth - index) / depth for index, layer in plan.layout.layers.items())
    calibrate, observe = plan.stage("calibrate"), next((s for s in plan.stages if s.name == "observe"), None)
    scored = tokens
    if calibrate.artifact is not None:
        scored = sum(source["scored_tokens"] for source in calibrate.artifact.summary["sources"].values())
    wanted = min(plan.recipe.observe.knockout_tokens, scored)
    sampled = round(wanted * tokens / max(scored, 1))
    speed = observe.artifact.summary["tokens_per_second"] if observe is not None and observe.artifact else None
    hours = sampled * forwards / speed / 3600 if speed else None
    return KnockoutCost(sampled, forwards, 2.0 * plan.base.active_parameters * sampled * forwards, hours)
