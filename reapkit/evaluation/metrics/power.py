"""Says what a number of prompts can show of a share, such as that of looping continuations. Torch-free.

The usual approximation for two proportions p and q of n samples each, at the two-sided level of 5 % and a power of
80 %: n (p - q)^2 = (1.96 + 0.84)^2 (p (1 - p) + q (1 - q)); see e.g. Fleiss, Levin and Paik, "Statistical Methods for
Rates and Proportions", chapter 4.
"""

from __future__ import annotations

from math import ceil, sqrt

FACTOR = (1.96 + 0.84) ** 2


def prompts_to_detect(share: float, change: float) -> int | None:
    """Prompts that show a change from `share` (in [0, 1]) by `change`; None for a change of nothing, or one beyond
    [0, 1]."""
    other = share + change
    if change == 0 or not 0 <= other <= 1:
        return None
    return ceil(FACTOR * (share * (1 - share) + other * (1 - other)) / change**2)


def detectable_rise(share: float, prompts: int) -> float:
    """The smallest rise above `share` that so many prompts show, at most 1 - `share`: the positive root d of
    n d² = F (p (1 - p) + (p + d) (1 - p - d))."""
    a = prompts + FACTOR
    b = -FACTOR * (1 - 2 * share)
    c = -2 * FACTOR * share * (1 - share)
    return min((-b + sqrt(b * b - 4 * a * c)) / (2 * a), 1 - share)
