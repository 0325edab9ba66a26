"""reapkit compresses Mixture-of-Experts language models from one YAML recipe.

Public names (`reapkit.api`) load on first use, so that `import reapkit` and everything up to the plan stays free of
torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reapkit.api import (
        Observation,
        Plan,
        Problem,
        ReapkitError,
        Recipe,
        RecipeError,
        RejectedByGates,
        Run,
        Selection,
        StageFailed,
        Totals,
        UnusableError,
        apply,
        load_model,
        load_recipe,
        plan,
        select,
    )

__version__ = "0.1.0"
__all__ = [
    "Observation",
    "Plan",
    "Problem",
    "ReapkitError",
    "Recipe",
    "RecipeError",
    "RejectedByGates",
    "Run",
    "Selection",
    "StageFailed",
    "Totals",
    "UnusableError",
    "apply",
    "load_model",
    "load_recipe",
    "plan",
    "select",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'reapkit' has no attribute '{name}'")
    from reapkit import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
