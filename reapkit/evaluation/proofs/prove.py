"""Proves in a fresh process that a pruned or quantized directory is what it claims to be.

`prove` starts `python -m reapkit.evaluation.proofs` once for all directories; `pruned.py` and `quantized.py` say what
is proven.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reapkit.core.atomic_files import naming
from reapkit.core.errors import StageFailed
from reapkit.core.programs import run_program
from reapkit.evaluation.proofs.proof import Proof
from reapkit.recipe.schema import QuantizeSpec
from reapkit.selection.selection import Selection

__all__ = ["Proof", "Request", "prove"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Request:
    """What is to be proven: `directories` by label, `pruned` against `source` and `quantized` against the pruned one
    (or `source`).

    `quantize`: what the quantized directory was asked to be; without it, what its config.json says. `probe`: token rows
    for logits and generation, made up where there are none. `repaired`: the directory of the kept experts' re-fitted
    weights.
    """

    source: Path
    directories: Mapping[str, Path]
    selection: Selection | None = None
    device: str = "cpu"
    quantize: QuantizeSpec | None = None
    probe: Sequence[Sequence[int]] = field(default=())
    repaired: Path | None = None
    trust_remote_code: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "directories": {name: str(path) for name, path in self.directories.items()},
            "selection": self.selection and self.selection.to_json(),
            "device": self.device,
            "quantize": self.quantize and self.quantize.model_dump(mode="json"),
            "probe": [list(row) for row in self.probe],
            "repaired": self.repaired and str(self.repaired),
            "trust_remote_code": self.trust_remote_code,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Request:
        """The inverse of `to_json`."""
        return cls(
            Path(data["source"]),
            {name: Path(path) for name, path in data["directories"].items()},
            data["selection"] and Selection.from_json(data["selection"]),
            data["device"],
            data["quantize"] and QuantizeSpec.model_validate_json(json.dumps(data["quantize"])),
            data["probe"],
            data["repaired"] and Path(data["repaired"]),
            data["trust_remote_code"],
        )


def prove(request: Request) -> list[Proof]:
    """Every proof of the request, from one fresh process. Raises StageFailed with the end of its output where that
    process dies."""
    with tempfile.TemporaryDirectory(prefix="reapkit-verify-") as scratch:
        question, answer = Path(scratch) / "request.json", Path(scratch) / "proofs.json"
        with naming(question):
            question.write_text(json.dumps(request.to_json()))
        environment = dict(
            os.environ,
            PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        )
        run = run_program(
            [sys.executable, "-m", "reapkit.evaluation.proofs", question, answer], environment=environment | _threads()
        )
        if run.code or not answer.is_file():
            raise StageFailed(f"verify: the process that proves the result {run.how}: {run.stderr.strip()[-2000:]}")
        return [Proof(**proof) for proof in json.loads(answer.read_text(encoding="utf-8"))]


def _threads() -> dict[str, str]:
    """The fresh process uses as many threads as this one does."""
    if "torch" not in sys.modules:
        return {}
    return dict.fromkeys(THREAD_VARIABLES, str(sys.modules["torch"].get_num_threads()))
