"""How long preparing a calibration takes, and how much memory; the goal is 200,000 samples in 3 minutes and 2 GB on two
cores.

    python benchmarks/calibration.py [--samples 200000] [--directory /big/disk] [--json FILE]

Rows come from the package's generators in four equal parts (code, prose, tool calls, mathematics), go through the demo
model's chat template and tokenizer, and are packed into rows of 2,048 tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import datasets
import numpy
import tokenizers
import transformers

from reapkit.calibration.prepare import prepare
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from reapkit.recipe.schema import CalibrationSpec, MixEntry


def machine() -> str:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{len(os.sched_getaffinity(0))} {platform.machine()} cores, {memory:.0f} GiB"


def measure(samples: int, directory: Path) -> dict:
    mix = tuple(MixEntry(name=name, source=f"builtin:{name}") for name in ("code", "prose", "tools", "math"))
    calibration = CalibrationSpec(samples=samples, max_length=2048, mix=mix)
    imported, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    summary = prepare(calibration, MODEL_DIRECTORY, directory, directory / "calibration")
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "samples": samples,
        "rows": summary["rows"],
        "tokens": summary["tokens"],
        "scored_tokens": summary["scored_tokens"],
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime - imported.ru_utime - imported.ru_stime, 1),
        "peak_megabytes": round(used.ru_maxrss * 1024 / 1e6),
        "peak_megabytes_after_imports": round(imported.ru_maxrss * 1024 / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--directory", type=Path, default=None, help="where the tokens are written and removed again")
    parser.add_argument("--json", type=Path, default=None, help="write the result here as well")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        result = measure(arguments.samples, Path(directory))
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "load_before": round(LOAD_BEFORE, 1),
        **result,
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (datasets, numpy, tokenizers, transformers)},
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


LOAD_BEFORE = os.getloadavg()[0]
"""What else the machine was doing: seconds mean little above about half the cores."""

if __name__ == "__main__":
    main()
