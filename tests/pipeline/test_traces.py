"""Traces: what the base model answers by itself, as a source; through transformers and through a server."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from reapkit.core.errors import RecipeError, StageFailed, UnusableError
from reapkit.core.hashing import digest_file
from reapkit.evaluation import answer_journal, answering
from reapkit.evaluation.answering import Sampling
from reapkit.pipeline import traces
from reapkit.pipeline.planned import load_and_plan
from reapkit.pipeline.traces import Asked, make_traces, record_path
from reapkit.planning.lock import make_lock
from tests.support.command import command
from tests.support.words import write_lines

SMALL = ("runtime.batch_tokens=1024", "runtime.store=store")
SETTINGS = tuple(each for setting in SMALL for each in ("--set", setting))
ASKING = ("traces", "r.yaml", "--prompts", 6, "--max-new-tokens", 48, "-o", "out.jsonl", *SETTINGS)
RECIPE = (
    "version: 1\nname: mine\nmodel: {source: 'builtin:demo'}\n"
    "calibration: {samples: 4, max_length: 256, mix: [SOURCES]}\nprune: {ratio: 0.5}\nquantize: {group_size: 64}\n"
)
TOOLS = "{name: tools, source: 'builtin:tools'}"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(RECIPE.replace("SOURCES", TOOLS))
    return tmp_path


def asked(output: str = "out.jsonl", prompts: int = 6, server: str | None = None, **sampling: Any) -> Asked:
    return Asked(Sampling(**({"max_new_tokens": 48} | sampling)), prompts, Path(output), server=server)


def made(request: Asked) -> dict[str, Any]:
    return make_traces(load_and_plan("r.yaml", SMALL), request)


def rows(file: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------- in this process


def test_answers_that_ended_are_a_source(home: Path) -> None:
    done = command(*ASKING)
    assert done.code == 0, done.stderr
    record = json.loads(record_path(Path("out.jsonl")).read_text())
    kept, counts = rows(), record["counts"]
    assert counts["asked"] == 6 == counts["kept"] + counts["not_ended"] + counts["empty"] and counts["kept"] >= 3
    assert len(kept) == counts["kept"] and all(row["messages"][-1]["role"] == "assistant" for row in kept)
    assert any("<tool_call>" in row["messages"][-1]["content"] for row in kept)  # as the model wrote it
    assert all("<|im_end|>" not in row["messages"][-1]["content"] for row in kept)
    assert record["file"]["sha256"] == digest_file(Path("out.jsonl"))
    assert record["answered_as"] == ["transformers"] and not Path("out.jsonl.unfinished").exists()
    [line] = [line for line in done.stdout.splitlines() if "tools-traces" in line]
    Path("r.yaml").write_text(
        RECIPE.replace("SOURCES", f"{TOOLS}, {line.strip().removeprefix('- ').partition('  #')[0]}")
    )
    locked = make_lock(load_and_plan("r.yaml", SMALL).loaded)["sources"]["calibration.mix.tools-traces"]
    assert record["file"]["sha256"] in locked["files"].values()
    again = command(*ASKING, "--source", "tools", "--json")
    assert again.json()["counts"] == counts


def test_a_killed_run_goes_on_to_equal_bytes_and_a_finished_one_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    request = asked("whole.jsonl", temperature=0.8, seed=3)
    whole = made(request)
    append, calls = answer_journal.AnswerJournal.append, []

    def dying(self: answer_journal.AnswerJournal, batch: Any) -> None:
        append(self, batch)
        calls.append(len(batch))
        if len(calls) == 1:
            raise KeyboardInterrupt

    again = asked("again.jsonl", temperature=0.8, seed=3)
    with monkeypatch.context() as dies:
        dies.setattr(answer_journal.AnswerJournal, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            made(again)
    with Path("again.jsonl.unfinished").open("ab") as stream:
        stream.write(b"torn by a power cut")
    with pytest.raises(
        RecipeError, match=r"again.jsonl.unfinished: an unfinished run with other settings.*\(sampling\)"
    ):
        made(asked("again.jsonl", temperature=0.7, seed=3))
    made(again)
    assert Path("again.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    monkeypatch.setattr(traces, "_answering", None)
    assert made(request) == whole
    with pytest.raises(RecipeError, match="it holds other traces"):
        made(asked("whole.jsonl", temperature=0.8, seed=4))
    Path("mine.jsonl").write_text("{}")
    with pytest.raises(RecipeError, match="reapkit traces did not write it"):
        made(asked("mine.jsonl"))


# ---------------------------------------------------------------------------------------------- on a server


class Fake(ThreadingHTTPServer):
    """Speaks as much of OpenAI's protocol as is asked; `answer` gives status and choice for a request's body."""

    daemon_threads = True
    answer: Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
    asked: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "base"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        status, choice = self.server.answer(body)
        self._send(status, {"choices": [choice]})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def said(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Every third prompt, by its length, is not ended."""
    length = len(body["prompt"])
    return 200, {"text": f"answer {length}<|im_end|>", "finish_reason": "length" if length % 3 == 0 else "stop"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(answering, "PAUSE_SECONDS", 0.0)
    fake = Fake(("127.0.0.1", 0), Handler)
    fake.answer, fake.asked = said, []
    thread = threading.Thread(target=fake.serve_forever, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()


def url(server: Fake) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_a_server_gets_the_same_tokens_and_only_what_ended_is_kept(server: Fake) -> None:
    record = made(asked(prompts=40, server=url(server), max_new_tokens=32, temperature=0.5))
    lengths = [len(body["prompt"]) for body in server.asked]
    ended = [length for length in lengths if length % 3]
    assert 0 < len(ended) < len(lengths) == 40 == record["counts"]["asked"]
    assert record["counts"] == {"asked": 40, "kept": len(ended), "not_ended": 40 - len(ended), "empty": 0}
    assert sorted(row["messages"][-1]["content"] for row in rows()) == sorted(f"answer {length}" for length in ended)
    assert record["answered_as"] == ["base"] and record["answered_by"]["server"] == url(server)
    body = server.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("base", 32, 0.5)
    assert body["skip_special_tokens"] is False and len({each["seed"] for each in server.asked}) == 40


def test_a_server_that_stops_answering_loses_nothing(server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "SERVED_TOGETHER", 4)
    made(asked("whole.jsonl", 12, url(server), max_new_tokens=32))
    server.answer = lambda body: (503, {}) if len(server.asked) > 18 else said(body)
    failed = command(
        "traces",
        "r.yaml",
        "--prompts",
        12,
        "--max-new-tokens",
        32,
        "--server",
        url(server),
        "-o",
        "a.jsonl",
        *SETTINGS,
        "--json",
    )
    assert failed.code == StageFailed.exit_code == failed.json()["exit"]
    assert "stopped answering (status 503" in failed.json()["error"] and "run the same command again" in failed.stderr
    before, server.answer = len(server.asked), said
    made(asked("a.jsonl", 12, url(server), max_new_tokens=32))
    assert len(server.asked) - before == 8  # the first batch was kept
    assert Path("a.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()


def test_what_cannot_be_asked_is_said(server: Fake) -> None:
    with pytest.raises(UnusableError, match=r"--server http://127.0.0.1:1: .*/v1/models does not answer"):
        made(asked(server="http://127.0.0.1:1"))
    other = Asked(Sampling(16), 2, Path("b.jsonl"), server=url(server), served_as="tuned")
    with pytest.raises(UnusableError, match="it serves base, not 'tuned'"):
        made(other)
    server.answer = lambda body: (400, {"error": "prompt must be text"})
    with pytest.raises(UnusableError, match=r"status 400.*It must take token ids"):
        made(asked("c.jsonl", 2, url(server)))
    server.answer = lambda body: (200, {"text": "on and on", "finish_reason": "length"})
    with pytest.raises(UnusableError, match="none of 2 answers ended within 16 tokens"):
        made(asked("d.jsonl", 2, url(server), max_new_tokens=16))
    with pytest.raises(RecipeError, match=r"--source: found 'code'\. Choose one of tools"):
        made(Asked(Sampling(16), 2, Path("e.jsonl"), source="code"))


def test_an_error_waits_for_no_other_answer(server: Fake) -> None:
    first, over = threading.Lock(), threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if first.acquire(blocking=False):
            return 400, {"error": "no"}
        over.wait(30)
        return said(body)

    server.answer = answer
    begin = time.monotonic()
    try:
        with pytest.raises(UnusableError, match=r"status 400"):
            made(asked(prompts=4, server=url(server)))
        assert time.monotonic() - begin < 15
    finally:
        over.set()


def test_a_full_disk_loses_nothing(server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "SERVED_TOGETHER", 4)
    append = answer_journal.AnswerJournal.append

    def full(self: answer_journal.AnswerJournal, batch: Any) -> None:
        if self.batches:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        append(self, batch)

    with monkeypatch.context() as fills:
        fills.setattr(answer_journal.AnswerJournal, "append", full)
        with pytest.raises(
            StageFailed, match=r"a.jsonl.unfinished: No space left on device.*It goes on where it stopped"
        ):
            made(asked("a.jsonl", 8, url(server)))
    before = len(server.asked)
    assert made(asked("a.jsonl", 8, url(server)))["counts"]["asked"] == 8 and len(server.asked) - before == 4


def test_a_run_that_dies_before_the_file_is_there_goes_on(server: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record is there first: what it made is not taken for somebody else's."""
    with monkeypatch.context() as dies:
        dies.setattr(traces, "write_bytes", lambda path, content: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(asked("a.jsonl", 4, url(server)))
    before = len(server.asked)
    record = made(asked("a.jsonl", 4, url(server)))
    assert len(server.asked) == before and record["file"]["sha256"] == digest_file(Path("a.jsonl"))


def test_rows_that_give_no_prompt_are_told(server: Fake, home: Path) -> None:
    asks = [{"messages": [{"role": "user", "content": f"why is {number} so"}]} for number in range(4)]
    asks[1]["messages"][0]["role"] = "usr"
    write_lines(home / "d.jsonl", [*asks, {"messages": [{"role": "assistant", "content": "good day"}]}])
    Path("r.yaml").write_text(RECIPE.replace("SOURCES", "{name: d, source: d.jsonl}"))
    done = command("traces", "r.yaml", "--server", url(server), *(part for each in SMALL for part in ("--set", each)))
    assert done.code == 0, done.stderr
    assert "of 3 prompts" in done.stdout
    assert "Rows without a prompt: 1 cannot be rendered, 1 no prompt." in done.stdout
    said = " ".join(done.stderr.split())
    assert "source 'd': 1 row left out that cannot be rendered. The first: d.jsonl:2: " in said and "'usr'" in said


def test_a_thought_that_the_template_opens_is_part_of_the_answer(server: Fake, home: Path) -> None:
    (home / "think.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    (home / "d.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "why is it so"}, {"role": "assistant", "content": "so"}]})
        + "\n"
        + json.dumps({"messages": [{"role": "assistant", "content": "good day to you"}]})
        + "\n"
    )
    Path("r.yaml").write_text(
        RECIPE.replace("SOURCES", "{name: d, source: d.jsonl}").replace(
            "samples: 4", "samples: 4, chat_template: think.jinja"
        )
    )
    server.answer = lambda body: (200, {"text": "because</think>it is", "finish_reason": "stop"})
    record = made(asked(server=url(server)))
    assert record["skipped"] == {"no prompt": 1}
    assert rows() == [
        {
            "messages": [
                {"role": "user", "content": "why is it so"},
                {"role": "assistant", "content": "<think>\nbecause</think>it is"},
            ]
        }
    ]
