"""REAP inside a llm-compressor recipe: importing this module registers `REAPModifier`.

    import reapkit.llmcompressor
    oneshot(model=..., dataset=..., recipe='''
    compress_stage:
      reap_modifiers:
        REAPModifier: {ratio: 0.5}
        GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head, "re:.*mlp.gate$"]}
    ''', output_dir=...)

The experts go before the calibration begins, so whatever follows in the recipe is calibrated on the pruned model, and
on no other.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from llmcompressor.core import Event, State
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from pydantic import Field, PrivateAttr, model_validator

from reapkit.calibration.loader import tokens_of_loader
from reapkit.checkpoint.architecture import Architecture
from reapkit.core.as_written import require_as_written
from reapkit.core.errors import UnusableError
from reapkit.observation.materials import EAFT_SIGNALS, Material, collecting
from reapkit.observation.observation import Observation
from reapkit.observation.resident import observe
from reapkit.pruning.in_memory import prune_loaded
from reapkit.quantization.oneshot import causal_tracing
from reapkit.quantization.saving import save_as_the_source
from reapkit.recipe.schema import PruneSpec, SaliencySpec
from reapkit.selection.criteria.criterion import Criterion
from reapkit.selection.criteria.registry import criterion
from reapkit.selection.decide import select
from reapkit.selection.selection import Selection

__all__ = ["REAPModifier"]

BUDGET = ("ratio", "keep_ratio", "keep_experts")


class REAPModifier(Modifier):
    """Prunes routed experts as a reapkit selection says, or decides itself from an observation; the rest of the recipe
    sees the pruned model.

    One of: `selection` (path: nothing is decided any more), `observation` (path, with a budget), or only a budget: then
    the calibration data is observed first, by a plain causal forward with the model's own routing, without its padding.
    `budget`: ratio, keep_ratio or keep_experts; `criterion` and all else as in a reapkit recipe's `saliency` and
    `prune` sections.

    `selection_path`: a directory where the decision is kept. Saving writes the tensor names and the config that the
    source has, so that transformers and vLLM load the result. Raises at construction what the sections would refuse in
    a recipe; UnusableError where model, selection and calibration do not fit.
    """

    selection: str | None = None
    observation: str | None = None
    ratio: float | None = None
    keep_ratio: float | None = None
    keep_experts: int | None = None
    criterion: str | None = None
    saliency: dict[str, Any] = Field(default_factory=dict)
    prune: dict[str, Any] = Field(default_factory=dict)
    selection_path: str | None = None
    batch_tokens: int = Field(default=8192, ge=1)

    _decision: Selection | None = PrivateAttr(default=None)
    _causal: ExitStack = PrivateAttr(default_factory=ExitStack)

    @model_validator(mode="after")
    def _check(self) -> REAPModifier:
        if self.selection is None:
            self.sections()
            return self
        said = [name for name in (*BUDGET, "observation", "criterion", "saliency", "prune") if getattr(self, name)]
        if said:
            raise ValueError(f"a selection is given, which decides already; remove {', '.join(said)}")
        return self

    def sections(self) -> tuple[SaliencySpec, PruneSpec]:
        """The settings as a recipe's sections."""
        budget = {name: value for name in BUDGET if (value := getattr(self, name)) is not None}
        criterion = {} if self.criterion is None else {"criterion": self.criterion}
        return (
            SaliencySpec.model_validate_json(json.dumps({**self.saliency, **criterion})),
            PruneSpec.model_validate_json(json.dumps({**self.prune, **budget})),
        )

    @property
    def decision(self) -> Selection | None:
        """What was decided, once the modifier has been initialized."""
        return self._decision

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        model = state.model
        self._decision = self._decide(state)
        prune_loaded(model, self._decision)
        save_as_the_source(model)
        self._causal.enter_context(causal_tracing())  # whoever calibrates next would otherwise look at later tokens
        if self.selection_path is not None:
            self._decision.save(Path(self.selection_path))
        return True

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._causal.close()
        return True

    def on_event(self, state: State, event: Event, **kwargs: Any) -> None:
        """Everything has happened before the first event."""

    def _decide(self, state: State) -> Selection:
        architecture = Architecture.from_config(state.model.config.to_dict())
        for given in (self.selection, self.observation):
            if given is not None:
                require_as_written(Path(given))
        if self.selection is not None:
            return Selection.load(Path(self.selection)).decoder(architecture)
        saliency, prune = self.sections()
        if self.observation is not None:
            return select(Observation.load(Path(self.observation)), saliency, prune, architecture).decoder(architecture)
        data = getattr(state.data, "calib", None) if state.data is not None else None
        if data is None:
            raise UnusableError(
                "REAPModifier: no calibration data to observe. Give oneshot a dataset, or the modifier an observation"
                " or selection."
            )
        needed = _materials(criterion(saliency.criterion), prune)
        with tempfile.TemporaryDirectory() as work:
            tokens = tokens_of_loader(data, Path(work) / "tokens")
            observation = observe(
                state.model,
                tokens,
                collecting(*needed),
                batch_tokens=self.batch_tokens,
                work_directory=Path(work) / "observe",
            )
            assert observation is not None, "a process alone has the observation"
            return select(observation, saliency, prune, architecture)


def _materials(criterion: Criterion, prune: PruneSpec) -> list[Material]:
    """What to record beyond the sums. Raises UnusableError for what cannot be recorded here."""
    for material in criterion.materials:
        if material is not EAFT_SIGNALS:
            raise UnusableError(
                f"REAPModifier: {criterion.name} needs {material.what}, which cannot be measured on the experts as"
                " llm-compressor unfolds them. Give an observation that was made with"
                f" observe.{material.setting}: {json.dumps(material.on)}, or choose another criterion."
            )
    return [EAFT_SIGNALS] if criterion.materials or prune.protect.core_per_layer else []


ModifierFactory.register("REAPModifier", REAPModifier)
