"""What observations are compared at. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal


@dataclass(frozen=True)
class Terms:
    """What observations are compared at: the kept set of `criterion` after ⌊E·ratio⌋ experts of each layer went."""

    criterion: str = "reap"
    ratio: Decimal = Decimal("0.5")
    different_models: bool = False
