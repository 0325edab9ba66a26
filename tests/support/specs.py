"""Recipe sections from plain Python values, read as strictly as a recipe file is."""

from __future__ import annotations

import json
from typing import Any

from reapkit.recipe.schema import PruneSpec, SaliencySpec


def prune(**values: Any) -> PruneSpec:
    return PruneSpec.model_validate_json(json.dumps(values))


def saliency_spec(criterion: str = "reap", **values: Any) -> SaliencySpec:
    return SaliencySpec.model_validate_json(json.dumps({"criterion": criterion, **values}))
