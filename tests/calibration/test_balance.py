"""What the weights of a mix share out, and samples that are cut to their source's `max_tokens`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from reapkit.calibration import draw_samples, encoder
from reapkit.calibration.prepare import prepare
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.hashing import digest_file
from reapkit.recipe.schema import CalibrationSpec
from reapkit.report.inspection import calibration as inspection
from tests.support.words import CHATML, all_shown, spec, word_tokenizer, write_lines

WORDS = [f"{letter}{number}" for letter in "abc" for number in range(60)]


def chats(path: Path, letter: str, said: int, count: int) -> None:
    """Conversations with `said` words of the assistant, which the template closes with one more token."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"c{number}"},
                {"role": "assistant", "content": " ".join(f"{letter}{word}" for word in range(said))},
            ]
        }
        for number in range(count)
    ]
    write_lines(path, rows)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Two sources of chats: with 3 scored tokens a sample, and with 10."""
    word_tokenizer(tmp_path / "tokenizer", [*WORDS, "user assistant"], CHATML)
    chats(tmp_path / "short.jsonl", "a", 2, 60)
    chats(tmp_path / "long.jsonl", "b", 9, 60)
    return tmp_path


SHORT, LONG = ({"name": name, "source": f"{name}.jsonl"} for name in ("short", "long"))


def made(home: Path, calibration: CalibrationSpec, out: str = "out", work: str | None = None) -> dict[str, Any]:
    return prepare(calibration, home / "tokenizer", home, home / out, work=None if work is None else home / work)


def amounts(summary: dict[str, Any], unit: str) -> list[int]:
    return [source[unit] for source in summary["sources"]]


def test_weights_share_out_scored_tokens(home: Path) -> None:
    calibration = spec(SHORT, LONG, samples=13, packing="none", balance="scored_tokens")
    summary = made(home, calibration)
    assert amounts(summary, "samples") == [10, 3] and amounts(summary, "scored_tokens") == [30, 30]
    assert summary["balance"] == "scored_tokens" and summary["asked"] == {"samples": 13}
    assert [source["asked"] for source in summary["sources"]] == [{"scored_tokens": 30}] * 2
    by_samples = made(home, spec(SHORT, LONG, samples=13, packing="none"), "plain")
    assert amounts(by_samples, "scored_tokens") == [21, 60] and "balance" not in by_samples
    found = inspection.facts(home / "out")
    assert [source["shares"]["scored_tokens"] for source in found["sources"]] == [0.5, 0.5]
    heading = str(inspection.blocks(found, colour=False)[0])
    assert "requested 13 samples, weights sharing out scored tokens;" in heading


def test_a_source_that_would_get_nothing_is_named(home: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.tokens.*: 4, but long would get none of them"):
        made(home, spec(SHORT, LONG, tokens=4, packing="none", balance="samples"))
    assert not (home / "out" / "calibration.json").exists()


@pytest.mark.parametrize("score", ["completion", "all"])
@pytest.mark.parametrize("overflow", ["truncate", "split", "window"])
@pytest.mark.parametrize("packing", ["none", "concat", "isolated"])
def test_shares_are_exact_to_within_one_sample(home: Path, packing: str, overflow: str, score: str) -> None:
    entries = ({**SHORT, "weight": 0.3}, {**LONG, "weight": 0.7})
    fields = {"max_length": 9, "packing": packing, "overflow": overflow, "score": score}
    summary = made(home, spec(*entries, samples=40, balance="scored_tokens", **fields))
    scored, asked = amounts(summary, "scored_tokens"), [s["asked"]["scored_tokens"] for s in summary["sources"]]
    assert sum(amounts(summary, "samples")) == 40
    assert sum(asked) == sum(scored) == summary["scored_tokens"]  # counted before rows were made, as they turned out
    assert all(abs(found - wanted) <= 17 for found, wanted in zip(scored, asked, strict=True))  # tokens of a sample
    assert abs(scored[0] / 0.3 - scored[1] / 0.7) <= 17 / 0.3


def test_tokens_are_met_exactly_whatever_is_shared_out(home: Path) -> None:
    by_samples = made(home, spec(SHORT, LONG, tokens=301, packing="concat", max_length=32, balance="samples"))
    assert by_samples["tokens"] == 301 and abs(int.__sub__(*amounts(by_samples, "samples"))) <= 1
    scored = made(home, spec(SHORT, LONG, tokens=301, packing="concat", max_length=32, balance="scored_tokens"), "two")
    assert scored["tokens"] == 301 and abs(int.__sub__(*amounts(scored, "scored_tokens"))) <= 10
    tokens = made(home, spec(SHORT, LONG, samples=20, packing="none", balance="tokens"), "three")
    assert sum(amounts(tokens, "samples")) == 20 and abs(int.__sub__(*amounts(tokens, "tokens"))) <= 17


def test_a_killed_draw_goes_on_to_equal_bytes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draw_samples, "BLOCK", 4)
    calibration = spec(SHORT, LONG, samples=40, max_length=16, balance="scored_tokens")
    made(home, calibration, "whole")
    whole, calls = encoder.Encoder.encode, []

    def dying(self: encoder.Encoder, walk: Any, positions: Any) -> Any:
        calls.append(positions)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return whole(self, walk, positions)

    with monkeypatch.context() as dies:
        dies.setattr(encoder.Encoder, "encode", dying)
        with pytest.raises(KeyboardInterrupt):
            made(home, calibration, "again", "work")
    made(home, calibration, "again", "work")
    made(home, spec(SHORT, LONG, samples=50, max_length=16), "more", "work")  # leaves more samples than are wanted
    made(home, calibration, "third", "work")
    assert len({digest_file(home / out / "tokens.safetensors") for out in ("whole", "again", "third")}) == 1


def test_a_source_that_is_too_small_is_named(home: Path) -> None:
    chats(home / "few.jsonl", "a", 4, 4)
    few = {"name": "few", "source": "few.jsonl"}
    with pytest.raises(
        UnusableError, match=r"'few' yields 4 samples, too few for its share: 4 rows were.*calibration.samp"
    ):
        made(home, spec(few, LONG, samples=30, packing="none", balance="scored_tokens"))


def test_a_source_of_which_nothing_is_scored_does_not_take_all(home: Path) -> None:
    write_lines(
        home / "asked.jsonl", [{"messages": [{"role": "user", "content": f"c{n} c1 c2 c3"}]} for n in range(50)]
    )
    asked = {"name": "asked", "source": "asked.jsonl"}
    with pytest.raises(UnusableError, match=r"source 'asked': none of its .* tokens is scored"):
        made(home, spec(asked, LONG, samples=20, packing="none", balance="scored_tokens"))


def test_samples_are_cut_to_max_tokens(home: Path) -> None:
    words = " ".join(f"a{number}" for number in range(10))
    write_lines(
        home / "one.jsonl", [{"messages": [{"role": "user", "content": "c1"}, {"role": "assistant", "content": words}]}]
    )
    entry = {"name": "one", "source": "one.jsonl", "max_tokens": 8}
    tokenizer = word_tokenizer(home / "tokenizer", [*WORDS, "user assistant"], CHATML)

    def rows(**fields: Any) -> list[str]:
        summary = made(home, spec(entry, samples=1, **fields), work="work")
        [source] = summary["sources"]
        assert (source["samples_cut"], source["tokens_cut"], source["lengths"]["max"]) == (1, 9, 17)
        return all_shown(CalibrationTokens.load(home / "out"), tokenizer)

    begin = "<|im_start|> user c1 <|im_end|> <|im_start|> assistant [a0] [a1]"
    assert rows(packing="none", max_length=64) == [begin]
    assert rows(packing="none", max_length=64, overflow="window") == ["[a3] [a4] [a5] [a6] [a7] [a8] [a9] [<|im_end|>]"]
    assert rows(packing="none", max_length=5, overflow="split") == [
        "<|im_start|> user c1 <|im_end|> <|im_start|>",
        "assistant [a0] [a1]",
    ]
    assert rows(packing="concat", max_length=64) == [f"{begin} <eos>"]
