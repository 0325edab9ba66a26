"""Checks that transformers and vLLM generate the same greedy tokens from a finished directory.

`serve_check` compares and says what could not be compared; vLLM runs in a process of its own, with a Python of its own
if need be.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.atomic_files import naming
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.programs import run_program
from reapkit.evaluation.serving.reference import Greedy, greedy, prompts_for

__all__ = ["EngineComparison", "ServeCheck", "ask_vllm", "serve_check", "vllm_python"]

VARIABLE = "REAPKIT_VLLM_PYTHON"
HERE = Path(__file__).parent
PLUGIN = HERE.parents[1] / "model" / "ragged_vllm.py"


@dataclass(frozen=True)
class EngineComparison:
    """vLLM against transformers on one directory.

    `outcome`: "equal", "differs", "format fits" and "format differs" (vLLM has no kernel here, so its loaders were
    asked instead) or "refused" (vLLM does not load it). `near_tie`: at the first
    difference transformers' own logits of the two tokens differ by no more than rounding. `gap`: that difference in
    standard deviations of the logits.
    """

    directory: str
    outcome: str
    detail: str
    tokens: int = 0
    near_tie: bool | None = None
    gap: float | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServeCheck:
    """What was compared; `exit_code` is 0 where nothing differs, 4 where something does, 3 where vLLM refuses a
    directory."""

    prompts: int
    new_tokens: int
    engines: Mapping[str, str]
    comparisons: Sequence[EngineComparison]
    notes: Sequence[str] = field(default=())

    @property
    def exit_code(self) -> int:
        outcomes = {comparison.outcome for comparison in self.comparisons}
        return (
            StageFailed.exit_code
            if outcomes & {"differs", "format differs"}
            else UnusableError.exit_code
            if "refused" in outcomes
            else 0
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def serve_check(
    directory: Path,
    base: Path | None = None,
    *,
    prompts: int = 4,
    new_tokens: int = 16,
    vllm: Path | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    tensor_parallel: int = 1,
    trust_remote_code: bool = False,
) -> ServeCheck:
    """Greedy tokens of `directory` (and of `base`) from transformers and from vLLM, compared token by token.

    `prompts` come from the built-in prose and code where there is a tokenizer and are made-up ids elsewhere. `vllm`: a
    Python that has vLLM; None takes REAPKIT_VLLM_PYTHON, else this Python.

    Raises UnusableError where there is no vLLM, before anything is generated, and for a directory that transformers
    cannot load or run.
    """
    python = vllm_python(vllm)
    if python is None:
        raise UnusableError(
            "nothing to compare with: this environment has no vLLM. Name a Python that has it: --vllm-python PATH, or"
            f" {VARIABLE}."
        )
    import transformers

    directories = [directory] if base is None else [directory, base]
    rows = prompts_for(directory, prompts)
    reference = [
        greedy(path, rows, new_tokens, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        for path in directories
    ]
    engines = {"transformers": transformers.__version__}
    notes = [] if base is None else [_against_base(*reference)]
    options = {"tensor_parallel_size": tensor_parallel} if tensor_parallel > 1 else {}
    options |= {"trust_remote_code": True} if trust_remote_code else {}
    dtype = str(reference[0].dtype).removeprefix("torch.")  # vLLM's own "auto" would narrow float32
    answer = ask_vllm(python, directories, rows, new_tokens, dtype=dtype, options=options)
    engine = engines["vllm"] = f"{answer['version']} ({answer['platform']})"
    comparisons = [
        _compared(path, result, mine, python, engine, dtype, options)
        for path, result, mine in zip(directories, answer["results"], reference, strict=True)
    ]
    if answer["plugin"] != "installed" and any(_is_ragged(path) for path in directories):
        notes.append(
            f"{python}: reapkit is not installed there, its plugin was loaded for this check only. To serve layers of"
            f" unequal numbers of experts: {python} -m pip install --no-deps reapkit"
        )
    return ServeCheck(len(rows), new_tokens, engines, comparisons, notes)


def vllm_python(given: Path | None = None) -> Path | None:
    """The Python to run vLLM with, or None where there is none. Raises UnusableError for one that has no vLLM."""
    import importlib.util
    import sys

    chosen = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if chosen is None:
        return Path(sys.executable) if importlib.util.find_spec("vllm") else None
    try:
        found = subprocess.run(
            [chosen, "-c", "import importlib.util, sys; sys.exit(not importlib.util.find_spec('vllm'))"], timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnusableError(
            f"{chosen}: cannot be run ({error}). Name a Python that has vLLM with --vllm-python or {VARIABLE}."
        ) from None
    if found.returncode:
        raise UnusableError(
            f"{chosen}: has no vLLM. Install it there, or name another Python with --vllm-python or {VARIABLE}."
        )
    return chosen


def ask_vllm(
    python: Path,
    directories: Sequence[Path],
    prompts: Sequence[Sequence[int]] = (),
    new_tokens: int = 16,
    *,
    task: str = "generate",
    dtype: str = "auto",
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The answer of `vllm_process.py`: one result per directory, an engine's refusals among them; each refusal ends a
    process.

    Raises UnusableError with the end of its output where the process dies: vLLM itself does not work there.
    """
    results: list[dict[str, Any]] = []
    while True:
        left = [str(path.resolve()) for path in directories[len(results) :]]
        request = {
            "task": task,
            "directories": left,
            "prompts": [list(row) for row in prompts],
            "new_tokens": new_tokens,
            "dtype": dtype,
            "plugin": str(PLUGIN),
            "options": dict(options or {}),
        }
        said = _one_process(python, request)
        results += said["results"]
        if len(results) >= len(directories):
            return {**said, "results": results}


def _one_process(python: Path, request: Mapping[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="reapkit-serving-") as scratch:
        question, answer = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        with naming(question):
            question.write_text(json.dumps(request))
        run = run_program([python, HERE / "vllm_process.py", question, answer], directory=scratch)
        if not answer.is_file():  # it is there from the first directory on
            raise UnusableError(f"{python}: vLLM's process {run.how}: {(run.stderr or run.stdout).strip()[-2000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


def _compared(
    path: Path,
    result: Mapping[str, Any],
    mine: Greedy,
    python: Path,
    engine: str,
    dtype: str,
    options: Mapping[str, Any],
) -> EngineComparison:
    if "error" not in result:
        return compare(path, mine, result["tokens"])
    if not _is_quantized(path):
        return EngineComparison(str(path), "refused", f"vLLM {engine} does not serve it: {result['error']}")
    form = ask_vllm(python, [path], task="formats", dtype=dtype, options=options)["results"][0]
    lacking = f"generation not measured, vLLM {engine} cannot run this format here ({result['error'][:200]})"
    if "error" in form:
        return EngineComparison(
            str(path), "format differs", f"{lacking}; its loaders refuse the tensors: {form['error']}"
        )
    if form["problems"]:
        return EngineComparison(
            str(path),
            "format differs",
            f"{lacking}; its loaders find {len(form['problems'])} gaps, first {form['problems'][0]}",
            problems=tuple(form["problems"]),
        )
    return EngineComparison(
        str(path),
        "format fits",
        f"{lacking}; instead its own loaders took all {form['tensors']} tensors and filled all "
        f"{form['parameters']} parameters, names, shapes and packing as they expect",
    )


def compare(path: Path, mine: Greedy, theirs: Sequence[Sequence[int]]) -> EngineComparison:
    """Token by token; at the first difference, how far apart transformers' logits of the two tokens are."""
    total = sum(map(len, mine.tokens))
    for row, (expected, got) in enumerate(zip(mine.tokens, theirs, strict=True)):
        if list(expected) == list(got):
            continue
        step = next(
            (index for index, pair in enumerate(zip(expected, got, strict=False)) if pair[0] != pair[1]),
            min(len(expected), len(got)),
        )
        if step >= min(len(expected), len(got)):
            return EngineComparison(
                str(path), "differs", f"prompt {row}: {len(got)} tokens where transformers made {len(expected)}", total
            )
        gap, near = mine.gap(row, step, got[step])
        kind = "a near-tie, within rounding: compare in float32 (--dtype float32) to be sure" if near else "not a tie"
        return EngineComparison(
            str(path),
            "differs",
            f"prompt {row}, token {step}: transformers says {expected[step]}, vLLM {got[step]}; "
            f"their logits are {gap:.2g} standard deviations apart, {kind}",
            total,
            near,
            gap,
        )
    return EngineComparison(str(path), "equal", f"all {total} greedy tokens are equal", total)


def _against_base(mine: Greedy, base: Greedy) -> str:
    same = sum(
        a == b for left, right in zip(mine.tokens, base.tokens, strict=True) for a, b in zip(left, right, strict=True)
    )
    return (
        f"{same} of {sum(map(len, mine.tokens))} tokens are the base's in the same place (transformers); pruning and"
        " quantizing change some"
    )


def _is_quantized(path: Path) -> bool:
    return bool(Checkpoint.open(path).quantization)


def _is_ragged(path: Path) -> bool:
    from reapkit.checkpoint.architecture import text_config
    from reapkit.model.loading import RAGGED_KEY

    return bool(text_config(Checkpoint.open(path).config).get(RAGGED_KEY))
