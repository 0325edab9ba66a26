"""Lists all stages in the order of their dependencies. Torch-free."""

from __future__ import annotations

from reapkit.pipeline.stages import (
    calibrate,
    evaluate,
    imported,
    knockout,
    observe,
    packs,
    prune,
    quantize,
    repair,
    report,
    select,
    verify,
)
from reapkit.planning.stage_definitions import StageDefinition

STAGES: tuple[StageDefinition, ...] = tuple(
    module.STAGE
    for module in (
        calibrate,
        packs,
        observe,
        imported,
        knockout,
        select,
        repair,
        evaluate,
        prune,
        quantize,
        verify,
        report,
    )
)
STAGE_NAMES = tuple(dict.fromkeys(stage.name for stage in STAGES))
