"""What things are compared at. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from reapkit.planning.plan import Plan
from reapkit.recipe.loading import LoadedRecipe
from reapkit.recipe.schema import DEFAULT_CRITERION


@dataclass(frozen=True)
class ComparisonTerms:
    """What observations are compared at: the kept set of `criterion` after ⌊E·ratio⌋ experts of each layer went.

    `make_plan`: how recipes are planned, to compare the keys of their stages; None: only their fields are compared.
    """

    criterion: str = DEFAULT_CRITERION
    ratio: Decimal = Decimal("0.5")
    different_models: bool = False
    make_plan: Callable[[LoadedRecipe], Plan] | None = None
