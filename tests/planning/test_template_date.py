"""The date that chat templates see: fixed by the first run of a store, shown by the plan, pinned by the lock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reapkit.calibration import clock
from reapkit.core.artifact_store import Store
from reapkit.pipeline.planned import load_and_plan
from reapkit.planning import template_date
from tests.support.command import command
from tests.support.words import CHATML, write_lines

TODAY = "{{ '<|system|> ' + strftime_now('%d %b %Y') + ' <|im_end|> ' }}" + CHATML


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with a template of its own that reads the clock."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"how many are {n}"},
                {"role": "assistant", "content": f"{n} are {n}"},
            ]
        }
        for n in range(12)
    ]
    write_lines(tmp_path / "data.jsonl", rows)
    Path("clock.jinja").write_text(TODAY)
    Path("plain.jinja").write_text(CHATML)
    Path("r.yaml").write_text(
        "version: 1\nname: mine\nmodel: {source: 'builtin:demo'}\n"
        "calibration: {samples: 8, max_length: 128, chat_template: clock.jinja, mix: [{name: d, source: data.jsonl}]}\n"
        "prune: {ratio: 0.5}\nquantize: {group_size: 64}\nevaluate: {packs: {samples: 2, lengths: [128]}}\n"
    )
    return tmp_path


def on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (clock, template_date):
        monkeypatch.setattr(module, "today", lambda: day)


def key(*overrides: str) -> str:
    return str(load_and_plan("r.yaml", overrides).stage("calibrate").key)


def tokens(run: str) -> bytes:
    return Path(run, "calibration", "tokens.safetensors").read_bytes()


def test_the_same_recipe_goes_on_with_the_date_of_the_stores_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2025-03-03", monkeypatch)
    before, planned = key(), command("plan", "r.yaml", "--json").json()
    assert planned["date"] == "2025-03-03" and "the first run keeps its day" in "".join(planned["notes"])
    assert not Path("runs").exists()  # a plan fixes nothing
    assert command("apply", "r.yaml", "--until", "calibrate").code == 0
    on("2025-03-04", monkeypatch)
    assert key() == before
    assert command("plan", "r.yaml", "--json").json()["stages"][0]["state"] == "hit"
    assert "they see 2025-03-03, which the store keeps" in command("plan", "r.yaml").stdout.replace("\n", " ")
    first = tokens("runs/mine")
    again = ("--set", "output.directory=runs/again", "--set", "calibration.samples=7")
    assert command("apply", "r.yaml", "--until", "calibrate", *again).code == 0
    assert json.loads(Path("runs/again/calibration/calibration.json").read_text())["date"] == "2025-03-03"
    assert Path("runs/.gitignore").is_file()
    elsewhere = ("--set", "runtime.store=other/store", "--set", "output.directory=other/run")
    assert command("apply", "r.yaml", "--until", "calibrate", *elsewhere).code == 0
    assert tokens("other/run") != first


def test_two_dates_are_two_keys_and_without_clock_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2025-03-03", monkeypatch)
    assert key("calibration.date='2025-03-03'") == key() != key("calibration.date='2025-03-04'")
    plain = "calibration.chat_template=plain.jinja"
    assert key(plain) == key(plain, "calibration.date='2025-03-04'")
    assert load_and_plan("r.yaml", (plain,)).identities.date is None
    demo, dated = (load_and_plan("demo", each).stage("calibrate") for each in ((), ("calibration.date='2025-03-04'",)))
    assert demo.key == dated.key is not None and "date" not in demo.spec


def test_the_lock_pins_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2025-03-03", monkeypatch)
    assert command("lock", "r.yaml", "--json").json()["date"] == "2025-03-03"
    locked = key()
    on("2025-03-04", monkeypatch)
    assert key() != locked
    shown = command("apply", "r.yaml", "--locked", "--dry-run", "--json").json()
    assert (shown["date"], shown["stages"][0]["key"]) == ("2025-03-03", locked)


def test_of_two_first_runs_one_fixes_the_date(monkeypatch: pytest.MonkeyPatch) -> None:
    on("2025-03-03", monkeypatch)
    late = load_and_plan("r.yaml", ("runtime.store=store",))
    assert template_date.keep_date(Store("store"), "2025-03-02") == "2025-03-02"
    assert template_date.keep_date(Store("store"), "2025-03-03") == "2025-03-02"
    kept = late.date_kept()
    assert kept.identities.date == kept.calibration.date == "2025-03-02"
    assert kept.stage("calibrate").key == key("calibration.date='2025-03-02'")


def test_a_date_that_cannot_be_read_is_an_error() -> None:
    Path("runs/.store").mkdir(parents=True)
    Path("runs/.store/date.json").write_text("{}")
    done = command("plan", "r.yaml")
    assert done.code == 3 and "it names no date" in done.stderr and "calibration.date" in done.stderr
    for wrong in ("2025-3-3", "yesterday", "2025-02-30"):
        done = command("plan", "r.yaml", "--set", f"calibration.date={wrong}")
        assert done.code == 2 and "must be a date as YYYY-MM-DD" in done.stderr
