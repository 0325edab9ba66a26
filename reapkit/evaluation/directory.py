"""Measures a model directory on disk against the base, for the numbers that the verify stage publishes."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation import generation
from reapkit.evaluation.outputs import EAFT, BaseOutputs, Pack, base_outputs, compare, describe_base, measure
from reapkit.model.loading import load_model
from reapkit.recipe.schema import GenerationSpec


def final_packs(tokens: Mapping[int, CalibrationTokens]) -> dict[int, Pack]:
    """By length the rows of the final numbers: the confirm rows, or all where none confirm."""
    return {
        length: Pack.part(each, "confirm" if each.rows("confirm") else "decide", length)
        for length, each in tokens.items()
    }


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The base on the rows of the final numbers, kept so that directories can be measured after the base has left
    memory."""

    packs: Mapping[int, Pack]
    bases: Mapping[int, BaseOutputs]
    eaft: Mapping[str, Any]
    batch_tokens: int

    @classmethod
    def of(
        cls,
        base: PreTrainedModel,
        tokens: Mapping[int, CalibrationTokens],
        *,
        eaft: Mapping[str, Any] = EAFT,
        batch_tokens: int = 16384,
        work_directory: Path | None = None,
        progress: Progress = SILENT,
    ) -> Yardstick:
        """Measures the loaded base on the confirm rows of each length's pack; on all its rows where it confirms
        nothing."""
        packs = final_packs(tokens)
        bases = {
            length: base_outputs(
                base,
                pack,
                batch_tokens=batch_tokens,
                top_k=eaft["top_k"],
                work_directory=work_directory,
                progress=progress,
            )
            for length, pack in packs.items()
        }
        return cls(packs, bases, eaft, batch_tokens)

    @property
    def base_metrics(self) -> dict[str, Any]:
        """The base's own numbers: `{length: {group: metrics}}`."""
        return {str(length): describe_base(self.bases[length], pack, self.eaft) for length, pack in self.packs.items()}

    def measure(self, model: PreTrainedModel, *, title: str = "verify", progress: Progress = SILENT) -> dict[str, Any]:
        """A loaded model's numbers and distances from the base: `{length: {group: metrics}}`, what `gates.judge`
        reads."""
        return {
            str(length): compare(
                self.bases[length],
                measure(
                    model,
                    pack,
                    self.bases[length],
                    batch_tokens=self.batch_tokens,
                    top_k=self.eaft["top_k"],
                    title=title,
                    progress=progress,
                ),
                pack,
                self.eaft,
            )
            for length, pack in self.packs.items()
        }

    def measure_directory(
        self,
        path: Path,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        title: str | None = None,
        progress: Progress = SILENT,
    ) -> dict[str, Any]:
        """Loads the directory, measures it, lets it go. Raises UnusableError where its weights do not fit its class."""
        model = load_model(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        try:
            return self.measure(model, title=title or f"measure {path.name}", progress=progress)
        finally:
            del model
            gc.collect()


def continued(
    path: Path,
    pack: Pack,
    spec: GenerationSpec,
    tokenizer: Any = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    batch_tokens: int = 16384,
    title: str | None = None,
    progress: Progress = SILENT,
) -> dict[str, Any] | None:
    """What a directory's model writes after the prompts that `evaluate` drew from the pack: `{"generation": {group:
    shares over continuations}, "examples": [{"source", "prompt", "text"}]}`; None where the pack gives no prompt.

    The shares are the model's own, without the differences from the base; examples need a tokenizer.
    """
    prompts = generation.draw_prompts(pack, spec.prompts)
    if not prompts:
        return None
    model = load_model(path, device=device, trust_remote_code=trust_remote_code)
    try:
        written = generation.write(
            model,
            prompts,
            max_new_tokens=spec.max_new_tokens,
            batch_tokens=batch_tokens,
            title=title or f"generate {path.name}",
            progress=progress,
        )
    finally:
        del model
        gc.collect()
    sources = pack.tokens.sources
    shares = generation.summarize(written, written, prompts, sources, pack.outside, tokenizer)
    shown = generation.examples(written, written, prompts, sources, tokenizer) if tokenizer else []
    return {
        "generation": {
            group: {name: found for name, found in metrics.items() if not name.endswith("_delta")}
            for group, metrics in shares.items()
        },
        "examples": [{"source": each["source"], "prompt": each["prompt"], "text": each["base"]} for each in shown],
    }
