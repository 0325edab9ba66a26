"""reapkit compresses Mixture-of-Experts language models from one YAML recipe.

Public names load on first use, so that `import reapkit` and everything up to the plan stays free of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reapkit.models import load_model
    from reapkit.observation import Observation
    from reapkit.planning import plan
    from reapkit.recipe import load_recipe
    from reapkit.run import apply
    from reapkit.selection import select

__version__ = "0.1.0"
__all__ = ["Observation", "apply", "load_model", "load_recipe", "plan", "select"]
_HOMES = {"Observation": "reapkit.observation", "load_model": "reapkit.models", "load_recipe": "reapkit.recipe", "plan": "reapkit.planning", "apply": "reapkit.run",
          "select": "reapkit.selection"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reapkit' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
