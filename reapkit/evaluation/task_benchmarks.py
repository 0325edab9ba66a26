"""Runs task benchmarks of a model directory with lm-eval, in a process of its own, and keeps lm-eval's output."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.core.programs import how_it_ended

MAX_NEW_TOKENS = 1024
"""Told to lm-eval explicitly: its own default cuts reasoning models off after 256 tokens. At most half of what the
model reads."""


def require_lm_eval() -> None:
    """Raises UnusableError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UnusableError(
            "evaluate.lm_eval needs the package lm-eval, which is not installed. Run: pip install 'reapkit[lm-eval]'."
        )


def run_benchmarks(
    model: Path,
    tasks: Sequence[str],
    out: Path,
    *,
    limit: int | None = None,
    device: str = "cpu",
    batch_size: int = 1,
    max_new_tokens: int = MAX_NEW_TOKENS,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`{"tasks": {task: {metric: value}}, "limit", "max_new_tokens", "lm_eval": version, "output": file}`.

    `tasks` are lm-eval's names or paths of its task files (YAML); all it writes lies below `out`. Its metrics keep its
    names (`acc`, `acc_stderr`, ...), the filter appended where it is not `none`. Raises UnusableError where lm-eval is
    not installed, StageFailed with its last words where it fails.
    """
    longest = text_config(Checkpoint.open(model).config).get("max_position_embeddings")
    if isinstance(longest, int):
        max_new_tokens = max(1, min(max_new_tokens, longest // 2))
    require_lm_eval()
    out.mkdir(parents=True, exist_ok=True)
    known = set(out.rglob("results_*.json"))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=auto",
        "--tasks",
        ",".join(tasks),
        "--output_path",
        str(out),
        "--device",
        device,
        "--batch_size",
        str(batch_size),
        "--gen_kwargs",
        f"max_gen_toks={max_new_tokens}",
        *([] if limit is None else ["--limit", str(limit)]),
        *(["--trust_remote_code"] if trust_remote_code else []),
    ]
    with (out / "lm_eval.log").open("w") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    written = sorted(path for path in out.rglob("results_*.json") if path not in known)
    if code != 0 or not written:
        said = (out / "lm_eval.log").read_text(encoding="utf-8", errors="replace")
        last = said.strip().splitlines()[-1:] or ["no output"]
        raise StageFailed(f"lm-eval on {model} {how_it_ended(code)}: {last[0]} (all of it in {out / 'lm_eval.log'}).")
    return {
        "tasks": _metrics(json.loads(written[-1].read_text(encoding="utf-8"))["results"]),
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "lm_eval": version("lm_eval"),
        "output": str(written[-1].relative_to(out)),
    }


def _metrics(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """lm-eval names a metric `acc,none`: metric, then filter."""
    return {
        task: {
            name.removesuffix(",none"): value
            for name, value in found.items()
            if "," in name and isinstance(value, (int, float))
        }
        for task, found in results.items()
    }
