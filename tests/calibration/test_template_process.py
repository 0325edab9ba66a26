"""Chat templates that loop or grow without end, in Python or in C, are ended; a signal ends the run in seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reapkit.calibration import template_process
from reapkit.calibration.prepare import prepare
from reapkit.calibration.template_process import TemplateProcess, TemplateRefused, TemplateStopped
from reapkit.core.errors import UnusableError
from tests.support.paths import ROOT
from tests.support.words import spec, word_tokenizer, write_lines

LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
ENDLESS = {"in Python": LOOP, "in C": "{{ 7 ** (10 ** 9) }}"}
CHAT = {"conversations": [[{"role": "user", "content": "hello"}]]}


def prepared(directory: Path, template: str) -> None:
    word_tokenizer(directory / "tokenizer", ["hello there user"], template)
    rows = [{"messages": [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "hello there"}]}]
    write_lines(directory / "data.jsonl", rows)
    calibration = spec({"name": "chat", "source": "data.jsonl"}, samples=1, packing="none", max_length=64)
    prepare(calibration, directory / "tokenizer", directory, directory / "out")


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_endless_template_has_a_time_limit(tmp_path: Path, monkeypatch, kind: str) -> None:
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 1.0)
    begin = time.monotonic()
    with pytest.raises(
        UnusableError, match=r"chat.*data.jsonl:1.* did not end within 1 seconds.*calibration\.chat_temp"
    ):
        prepared(tmp_path, ENDLESS[kind])
    assert time.monotonic() - begin < 60


def test_a_huge_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableError, match=r"the chat template refuses this conversation .*MemoryError"):
        prepared(tmp_path, "{{ 'x' * 100000000000 }}")


def test_after_an_ended_row_the_next_is_rendered_and_after_close_none(monkeypatch) -> None:
    monkeypatch.setattr(template_process, "RENDER_SECONDS", 1.0)
    process = TemplateProcess()
    with pytest.raises(TemplateStopped, match="did not end"):
        process.render(LOOP, **CHAT)
    assert process.render("{{ messages[0].content }}", **CHAT)[0] == ["hello"]
    with pytest.raises(TemplateRefused, match="TemplateError: no system"):
        process.render("{{ raise_exception('no system') }}", **CHAT)
    process.close()
    with pytest.raises(TemplateStopped, match="was stopped"):
        process.render("x", **CHAT)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        signal.SIGTERM,
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_signal_ends_a_run_whose_template_is_endless(tmp_path: Path, number: int) -> None:
    (tmp_path / "loop.jinja").write_text(LOOP)
    fields = {"runtime.store": "store", "output.directory": "run", "calibration.chat_template": "loop.jinja"}
    where = [f"--set={field}={tmp_path / name}" for field, name in fields.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "reapkit", "apply", str(ROOT / "recipes" / "demo.yaml"), *where],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    children = Path(f"/proc/{process.pid}/task")
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not _has_child(children):
        time.sleep(0.1)
    time.sleep(1)
    begin = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert time.monotonic() - begin < 15 < template_process.RENDER_SECONDS


def _has_child(tasks: Path) -> bool:
    return any(file.read_text().strip() for file in tasks.glob("*/children"))
