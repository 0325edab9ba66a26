"""Programs that observe and kill their own process in the middle; `str.format` fills them in."""

from __future__ import annotations

KILLED_RESIDENT = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import contextlib, torch
from tests.support import tiny
torch.set_num_threads(1)
from pathlib import Path
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.observation.resident import observe
from reapkit.core.progress import Progress
from reapkit.recipe.schema import ObserveSpec

class Fatal(Progress):
    @contextlib.contextmanager
    def task(self, *args, **kwargs):
        yield self
    steps = 0
    def advance(self, units=1):
        self.steps += 1
        if self.steps == {steps}:
            os.kill(os.getpid(), signal.SIGKILL)

observe(tiny.build("qwen3_moe"), CalibrationTokens.load({calibration!r}), ObserveSpec(), batch_tokens=24,
        work_directory=Path({work!r}), progress=Fatal())
"""
"""Fields: root, steps (of progress before it dies), calibration, work."""

KILLED_STREAMED = """
import contextlib, os, signal, sys
sys.path[:0] = [{root!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.observation.streamed import observe_streaming
from reapkit.core.progress import Progress
from reapkit.recipe.schema import ObserveSpec

class Fatal(Progress):
    done = 0
    @contextlib.contextmanager
    def task(self, *args, **kwargs):
        yield self
    def note(self, text):
        pass
    def advance(self, units=1):
        self.done += units
        if self.done >= {layers}:
            os.kill(os.getpid(), signal.SIGKILL)

observe_streaming({model!r}, CalibrationTokens.load({calibration!r}), ObserveSpec(), batch_tokens=48,
                  work_directory=Path({work!r}), checkpoint_minutes={minutes}, progress=Fatal())
"""
"""Fields: root, layers (finished before it dies), model, calibration, work, minutes."""
