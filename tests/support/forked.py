"""Commands as processes of their own, forked off one that has everything imported: each costs its work, not its start.

`python -m tests.support.forked` is that one: it reads a request per line, forks, and answers with what became of it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tests.support.command import Finished
from tests.support.forked_program import run_or_fork
from tests.support.paths import ROOT

CLOSED, NOBODY = "closed", "nobody"
"""Streams: not open at all; a pipe that nobody reads any more, or writes to."""
PRELOADED = (
    "reapkit.cli.main", "reapkit.pipeline.run", "reapkit.cli.progress_bars", "reapkit.observation.job",
    "reapkit.healing.refit", "reapkit.evaluation.candidates", "reapkit.evaluation.streaming",
    "reapkit.quantization.rtn", "reapkit.quantization.calibrated", "reapkit.evaluation.proofs.prove",
    "reapkit.report.run_report", "reapkit.report.observation_report", "reapkit.report.export",
    "transformers.models.qwen3_moe.modeling_qwen3_moe", "datasets", "llmcompressor",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One command: `streams` are paths, CLOSED or NOBODY for standard input, output and error; `before` is Python that
    is run first; `limits` are soft limits of `resource`, by their names without RLIMIT_."""

    arguments: tuple[str, ...]
    directory: str
    streams: tuple[str, str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)
    before: str = ""


@dataclass
class Running:
    """A command that was started."""

    pid: int
    forks: Forks
    scratch: TemporaryDirectory[str]

    def wait(self) -> Finished:
        """How it ended; below 0 the signal that ended it."""
        code = self.forks._ask({"wait": self.pid})["code"]
        said = [self._read(name) for name in ("stdout", "stderr")]
        self.scratch.cleanup()
        return Finished(code, *said)

    def _read(self, name: str) -> str:
        file = Path(self.scratch.name) / name
        return file.read_text(encoding="utf-8", errors="surrogateescape") if file.exists() else ""


class Forks:
    """Starts commands; made by `forking()`."""

    def __init__(self, requests: IO[str], answers: IO[str]):
        self._requests, self._answers = requests, answers

    def start(
        self,
        *arguments: object,
        directory: Path,
        stdin: object = os.devnull,
        stdout: object = None,
        stderr: object = None,
        before: str = "",
        limits: Mapping[str, int] | None = None,
        **environment: str,
    ) -> Running:
        """`reapkit ARGUMENTS` in `directory`; streams that are None are kept and returned by `wait`."""
        scratch = TemporaryDirectory(prefix="forked-")
        streams = (
            str(stdin), str(stdout or Path(scratch.name) / "stdout"), str(stderr or Path(scratch.name) / "stderr")
        )  # fmt: skip
        request = Request(tuple(map(str, arguments)), str(directory), streams, environment, limits or {}, before)
        return Running(self._ask(asdict(request))["pid"], self, scratch)

    def run(self, *arguments: object, **where: Any) -> Finished:
        """`start` and `wait`."""
        return self.start(*arguments, **where).wait()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        self._requests.write(json.dumps(question) + "\n")
        self._requests.flush()
        return json.loads(self._answers.readline())


@contextmanager
def forking() -> Iterator[Forks]:
    """The process that everything is imported in, for the block."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.forked"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
    ) as server:  # fmt: skip
        assert server.stdin is not None and server.stdout is not None
        yield Forks(server.stdin, server.stdout)
        server.stdin.close()


# ---------------------------------------------------------------------------------------------- the other side


def serve() -> None:
    """Answers requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in PRELOADED:
        importlib.import_module(name)
    import encodings.idna
    import encodings.utf_8_sig  # noqa: F401 (codecs that users without our files would look for)
    import multiprocessing.popen_fork  # noqa: F401 (nor this)

    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])}
        else:
            answer = {"pid": _forked(Request(**question))}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _forked(request: Request) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        _prepare(request)
        code = _run(request.before)
    finally:
        os._exit(code)


def _prepare(request: Request) -> None:
    import resource
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, place in enumerate(request.streams):
        os.close(descriptor)
        if place == NOBODY:
            reading, writing = os.pipe()
            kept, other = (reading, writing) if descriptor == 0 else (writing, reading)
            os.close(other)
            if kept != descriptor:
                os.dup2(kept, descriptor)
                os.close(kept)
        elif place != CLOSED:
            flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT
            opened = os.open(place, flags, 0o666)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    os.environ |= dict(request.environment)
    os.chdir(request.directory)
    sys.argv = ["reapkit", *request.arguments]
    sys.modules["reapkit.evaluation.proofs.prove"].__dict__["run_program"] = run_or_fork
    for name, soft in request.limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(number, (soft, resource.getrlimit(number)[1]))


def _run(before: str) -> int:
    import atexit

    from reapkit.cli.main import main

    try:
        exec(before, {})
        main()
    except SystemExit as ended:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        atexit._run_exitfuncs()
        return ended.code if isinstance(ended.code, int) else 1
    return 98


if __name__ == "__main__":
    serve()
