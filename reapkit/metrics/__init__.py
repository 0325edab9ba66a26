"""How far a candidate is from its base: signals of logits, bootstrap intervals, statistics over rows. Pure tensor maths."""

from reapkit.metrics.bootstrap import bootstrap_weights, measurement, measurements
from reapkit.metrics.rows import RowIndex, regions, summarize_base, summarize_candidate, summarize_difference
from reapkit.metrics.signals import (
    Positions,
    Thresholds,
    describe,
    distinct_n,
    js_distance,
    kl_by_confidence,
    kl_divergence,
    loops,
    quantile,
    thresholds,
    top_entropy,
)

__all__ = [
    "Positions",
    "RowIndex",
    "Thresholds",
    "bootstrap_weights",
    "describe",
    "distinct_n",
    "js_distance",
    "kl_by_confidence",
    "kl_divergence",
    "loops",
    "measurement",
    "measurements",
    "quantile",
    "regions",
    "summarize_base",
    "summarize_candidate",
    "summarize_difference",
    "thresholds",
    "top_entropy",
]
