"""What checking the store costs: an apply of a finished run with and without it, and sha256 of large files.

    python benchmarks/store_check.py [--runs 15] [--gigabytes 2] [--directory DIR] [--output FILE]

Runs the demo recipe once, small. Then, in turns and in one process, the same plan is carried out with all checks, with
`--check` (every byte is read), and with the checks taken out; each time every stage is a hit and nothing is executed.
Large files are hashed from the page cache by one thread and as the store does it. Wall-clock time says little on a busy
machine; the process's own CPU time is printed beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
from reapkit.core.hashing import digest_file
from reapkit.core.payload_files import THREADS, sha256_of
from reapkit.pipeline.planned import make_plan
from reapkit.pipeline.run import walk
from reapkit.recipe.loading import load

SMALL = (
    'calibration={samples: 8, max_length: 256, mix: [{name: prose, source: "builtin:prose"}]}',
    "evaluate={packs: {samples: 8, lengths: [256]}, generation: null, throughput: null, equal_bytes: false}",
    "evaluate.gates={kl_mean: {max: 50}}",
    "evaluate.controls=[]",
    "prune.repair=ridge",
    "quantize.method=rtn",
    "runtime.device=cpu",
)
FILES = 8
LIMIT_SECONDS = 0.1


@contextmanager
def without_checks() -> Iterator[None]:
    """The plan believes every manifest, as it did before there were checks."""
    with (
        patch("reapkit.pipeline.damaged.damage_of", lambda *arguments, **more: None),
        patch("reapkit.planning.stage_definitions.glance", lambda artifact: None),
    ):
        yield


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def applied(settings: tuple[str, ...], *, check: bool = False) -> None:
    run = walk(make_plan(load("demo", settings)), check=check)
    assert not run.executed, run.executed


def finished_runs(directory: Path, runs: int) -> dict[str, Any]:
    """Seconds of an apply where all is there, in three ways."""
    settings = (*SMALL, f"runtime.store={directory / 'store'}", f"output.directory={directory / 'run'}")
    walk(make_plan(load("demo", settings)))
    measured: dict[str, list[tuple[float, float]]] = {"checked": [], "in_full": [], "unchecked": []}
    for _ in range(runs):
        measured["checked"].append(timed(lambda: applied(settings)))
        measured["in_full"].append(timed(lambda: applied(settings, check=True)))
        with without_checks():
            measured["unchecked"].append(timed(lambda: applied(settings)))
    wall, cpu = (
        {name: statistics.median(each[column] for each in found) for name, found in measured.items()}
        for column in (0, 1)
    )
    files = [file for file in (directory / "store").glob("*/payload/**/*") if file.is_file()]
    return {
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "seconds": {name: round(value, 4) for name, value in wall.items()},
        "cpu_seconds": {name: round(value, 4) for name, value in cpu.items()},
        "ratio": round(wall["checked"] / wall["unchecked"], 3),
        "cpu_ratio": round(cpu["checked"] / cpu["unchecked"], 3),
        "added_seconds": round(wall["checked"] - wall["unchecked"], 4),
    }


def hashing(directory: Path, gigabytes: float) -> dict[str, Any]:
    """GB per second of sha256 over files in the page cache."""
    files, content = [directory / f"{number}.bin" for number in range(FILES)], os.urandom(1 << 20)
    for file in files:
        with file.open("wb") as stream:
            for _ in range(round(gigabytes * 1e9 / FILES) >> 20):
                stream.write(content)
    total = sum(file.stat().st_size for file in files)
    one = timed(lambda: [digest_file(file) for file in files])[0]
    many = timed(lambda: list(sha256_of(files)))[0]
    return {
        "bytes": total,
        "files": FILES,
        "one_thread_gb_per_s": round(total / one / 1e9, 2),
        "store_gb_per_s": round(total / many / 1e9, 2),
        "threads": min(THREADS, os.cpu_count() or 1),
    }


def benchmark(directory: Path, runs: int, gigabytes: float) -> dict[str, Any]:
    found = finished_runs(directory, runs)
    return {
        "benchmark": "apply of a finished run with and without checks of the store, and sha256 of large files",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} {platform.machine().replace('_', '-')} cores, "
        f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "versions": {"python": platform.python_version(), "reapkit": version("reapkit")},
        "finished_run": found,
        "sha256": hashing(directory, gigabytes),
        "load_average": round(os.getloadavg()[0], 2),
        "limit_added_seconds": LIMIT_SECONDS,
        "within_limit": found["added_seconds"] < LIMIT_SECONDS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument(
        "--directory", type=Path, help="where everything is written and stays; default: a temporary folder"
    )
    parser.add_argument("--output", type=Path, help="also write the result there as JSON")
    arguments = parser.parse_args()
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
        result = benchmark(arguments.directory, arguments.runs, arguments.gigabytes)
    else:
        with tempfile.TemporaryDirectory() as directory:
            result = benchmark(Path(directory), arguments.runs, arguments.gigabytes)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
