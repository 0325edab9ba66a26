"""Whole preparations: rows token by token, exact budgets, equal bytes, resumption, held-out packs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from reapkit.calibration import draw_samples, encoder, token_journal
from reapkit.calibration.prepare import prepare, prepare_packs
from reapkit.calibration.row_readers import Generated
from reapkit.calibration.sources import PACK_START
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.hashing import digest_file
from reapkit.core.progress import Progress
from reapkit.recipe.schema import CalibrationSpec, EvaluateSpec
from tests.support.damage import append, delete, flip_unseen, truncate
from tests.support.heard import Heard
from tests.support.paths import ROOT
from tests.support.words import CHATML, all_shown, spec, word_tokenizer, write_lines

LETTERS = list("abcdefghijklmnopqrstuvwxyz")


def sequence(name: str, length: int) -> str:
    """`a1 a2 a3 ...`, so that every token says where it comes from."""
    return " ".join(f"{name}{number}" for number in range(1, length + 1))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a tokenizer that knows `a1` to `z40`, in which the recipe lies."""
    word_tokenizer(tmp_path / "tokenizer", [sequence(letter, 40) for letter in LETTERS], CHATML)
    return tmp_path


@lru_cache(maxsize=1)
def _chat_texts() -> list[str]:
    rows = Generated("tools", 0).read([*range(64), *range(PACK_START, PACK_START + 64)])
    return [turn["content"] for row in rows for turn in row["messages"]]


def made(home: Path, calibration: CalibrationSpec, out: str = "out") -> tuple[CalibrationTokens, list[str]]:
    prepare(calibration, home / "tokenizer", home, home / out)
    tokens = CalibrationTokens.load(home / out)
    return tokens, all_shown(tokens, _tokenizer(home))


@lru_cache(maxsize=1)
def _tokenizer(home: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(home / "tokenizer")


def source(home: Path, name: str, texts: list[str], **fields: object) -> dict:
    write_lines(home / f"{name}.jsonl", [{"text": text} for text in texts])
    return {"name": name, "source": f"{name}.jsonl", **fields}


def test_rows_of_every_packing(home: Path) -> None:
    """Three samples of 5, 3 and 4 tokens; the walk of this file and seed tries them in the order b, a, c."""
    entry = source(home, "data", [sequence("a", 5), sequence("b", 3), sequence("c", 4)])

    def rows(**fields: object) -> list[str]:
        tokens, words = made(home, spec(entry, samples=3, **fields), "-".join(map(str, fields.values())))
        assert tokens.summary["sources"][0]["indices"] == [1, 0, 2]
        return words

    a, b, c = "[a1] [a2] [a3] [a4] [a5]", "[b1] [b2] [b3]", "[c1] [c2] [c3] [c4]"
    assert rows(packing="none", max_length=8) == [b, a, c]
    assert rows(packing="isolated", max_length=8) == [f"{b} | {a}", c]
    assert rows(packing="concat", max_length=8) == [f"{b} <eos> | [a1] [a2] [a3] [a4]", f"[a5] <eos> | {c} <eos>"]
    assert rows(packing="none", max_length=4, overflow="truncate") == [b, "[a1] [a2] [a3] [a4]", c]
    assert rows(packing="none", max_length=4, overflow="split") == [b, "[a1] [a2] [a3] [a4]", "[a5]", c]
    assert rows(packing="none", max_length=4, overflow="window") == [b, "[a2] [a3] [a4] [a5]", c]
    assert rows(packing="isolated", max_length=4, overflow="split") == [b, "[a1] [a2] [a3] [a4]", "[a5]", c]
    assert rows(packing="isolated", max_length=5, overflow="truncate") == [b, a, c]
    assert rows(packing="isolated", max_length=7, overflow="window") == [b, a, c]
    assert rows(packing="concat", max_length=4, overflow="truncate") == [
        f"{b} <eos>",
        "[a1] [a2] [a3] [a4]",
        "<eos> | [c1] [c2] [c3]",
        "[c4] <eos>",
    ]
    assert rows(packing="concat", max_length=4, overflow="split") == [
        f"{b} <eos>",
        "[a1] [a2] [a3] [a4]",
        "[a5] <eos> | [c1] [c2]",
        "[c3] [c4] <eos>",
    ]
    assert rows(packing="concat", max_length=4, overflow="window") == [
        f"{b} <eos>",
        "[a2] [a3] [a4] [a5]",
        "<eos> | [c1] [c2] [c3]",
        "[c4] <eos>",
    ]


def test_window_ends_with_the_last_answer(home: Path) -> None:
    write_lines(
        home / "chat.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": sequence("a", 9)},
                    {"role": "assistant", "content": sequence("b", 2)},
                    {"role": "user", "content": sequence("c", 9)},
                ]
            }
        ],
    )
    _, rows = made(
        home, spec({"name": "chat", "source": "chat.jsonl"}, packing="none", max_length=6, overflow="window")
    )
    assert rows == ["<|im_end|> <|im_start|> <unk> [b1] [b2] [<|im_end|>]"]


def test_no_prediction_across_samples(home: Path) -> None:
    tokens, rows = made(
        home,
        spec(source(home, "data", [sequence("a", 5), sequence("b", 3)]), samples=2, packing="isolated", max_length=8),
    )
    assert rows == ["[b1] [b2] [b3] | [a1] [a2] [a3] [a4] [a5]"]
    assert (
        tokens.row(0).scored.tolist()
        == tokens.row(0).signal.tolist()
        == [True, True, False, True, True, True, True, False]
    )


class TestBudget:
    def test_samples_are_exact_and_rows_interleave(self, home: Path) -> None:
        mix = [
            source(home, name, [sequence(name, number) for number in range(3, 40)], weight=weight)
            for name, weight in (("a", 0.51), ("b", 0.24), ("c", 0.24))
        ]
        tokens, _ = made(home, spec(*mix, samples=50, packing="none", max_length=64))
        assert [source["samples"] for source in tokens.summary["sources"]] == [26, 12, 12]
        assert [source["asked"] for source in tokens.summary["sources"]] == [
            {"samples": 26},
            {"samples": 12},
            {"samples": 12},
        ]
        for rows in (10, 20, 30, 40):
            assert np.bincount(tokens.row_source[:rows]).tolist() == pytest.approx(
                [0.52 * rows, 0.24 * rows, 0.24 * rows], abs=1.5
            )

    @pytest.mark.parametrize("packing", ["none", "concat", "isolated"])
    @pytest.mark.parametrize("overflow", ["truncate", "split", "window"])
    def test_tokens_are_exact(self, home: Path, packing: str, overflow: str) -> None:
        mix = [
            source(home, name, [sequence(name, number) for number in range(3, 40)], weight=weight)
            for name, weight in (("a", 2), ("b", 1))
        ]
        tokens, _ = made(home, spec(*mix, tokens=301, packing=packing, overflow=overflow, max_length=16))
        assert tokens.num_tokens == tokens.summary["tokens"] == 301
        assert [source["tokens"] for source in tokens.summary["sources"]] == [201, 100]
        assert int(tokens.row_lengths.max()) <= 16

    def test_too_few_rows_name_source_and_reasons(self, home: Path) -> None:
        entry = source(home, "data", [sequence("a", 5), sequence("a", 5), "   ", "x", sequence("b", 5)])
        with pytest.raises(UnusableError) as failure:
            made(home, spec(entry, samples=3))
        assert str(failure.value).startswith("source 'data' yields 2 of 3 samples: 5 rows were read, dropped: ")
        for reason in (
            r"1 duplicate (first: data.jsonl:",
            "1 empty (first: data.jsonl:3)",
            "1 near-empty (first: data.jsonl:4)",
        ):
            assert reason in str(failure.value)

    def test_too_few_tokens(self, home: Path) -> None:
        with pytest.raises(
            UnusableError,
            match=r"source 'data' yields 12 of 100 tokens: 2 rows were read\. .* lower calibration\.tokens",
        ):
            made(home, spec(source(home, "data", [sequence("a", 5), sequence("b", 5)]), tokens=100))


class TestAccount:
    def test_numbers_per_source(self, home: Path) -> None:
        tokens, _ = made(
            home,
            spec(
                source(home, "data", [sequence("a", 5), sequence("b", 3), sequence("a", 5), sequence("c", 12)]),
                samples=3,
                max_length=8,
            ),
        )
        account = tokens.summary["sources"][0]
        # 5 + 3 + 8 of 12, each with an end token, in rows of 8: the last row of three
        assert {
            name: account[name]
            for name in (
                "samples",
                "rows",
                "tokens",
                "end_tokens",
                "samples_cut",
                "tokens_cut",
                "available_rows",
                "order",
            )
        } == {
            "samples": 3,
            "rows": 3,
            "tokens": 19,
            "end_tokens": 3,
            "samples_cut": 1,
            "tokens_cut": 4,
            "available_rows": 4,
            "order": "permutation",
        }
        assert account["lengths"] == {"min": 3, "median": 5, "mean": 6.7, "p90": 12, "max": 12}
        assert account["row_lengths"] == {"min": 3, "median": 8, "mean": 6.3, "p90": 8, "max": 8}
        assert (
            account["scored_tokens"]
            == sum(int(tokens.row(row).scored.sum()) for row in range(3))
            == tokens.summary["scored_tokens"]
        )
        assert account["signal_tokens"] == sum(int(tokens.row(row).signal.sum()) for row in range(3))
        assert account["spans"] == ["whole text"] and account["format"] == {"text": "text"}
        assert len(account["hashes"]) == len(account["indices"]) == 3

    def test_score_all_counts_every_token(self, home: Path) -> None:
        tokens, _ = made(
            home,
            spec(source(home, "data", [sequence("a", 5), sequence("c", 12)]), samples=2, max_length=8, score="all"),
        )
        assert tokens.summary["scored_tokens"] == tokens.num_tokens
        assert tokens.summary["signal_tokens"] == sum(
            int(tokens.row(row).signal.sum()) for row in range(tokens.num_rows)
        )

    def test_equal_samples_of_two_sources_are_counted(self, home: Path) -> None:
        tokens, _ = made(
            home,
            spec(
                source(home, "one", [sequence("a", 5), sequence("b", 5)]),
                source(home, "two", [sequence("b", 5), sequence("c", 5)]),
                samples=4,
            ),
        )
        assert tokens.summary["duplicates"] == {"one/two": 1}

    @pytest.mark.parametrize(
        ("printed", "hidden"),
        [
            ("", "the call of 'f' in turn 2"),
            ("{{ tool_calls_are_not_read }}", "the call of 'f' in turn 2"),
            ("{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}", "the arguments of 'f' in turn 2"),
            (
                "{% for c in m.tool_calls or [] %}{{ c.function.name ~ c.function.arguments.q }}{% endfor %}",
                "the arguments of 'f' in turn 2",
            ),
        ],
    )
    def test_calls_that_the_template_hides_refuse_the_source(self, home: Path, printed: str, hidden: str) -> None:
        """Whatever stands in its text."""
        (home / "chat.jinja").write_text(
            "{% for m in messages %}{{ m.content + ' <eos> ' }}" + printed + "{% endfor %}"
        )
        call = {
            "role": "assistant",
            "content": "a1 a2 a3",
            "tool_calls": [{"function": {"name": "f", "arguments": {"q": 1, "user": "b1"}}}],
        }
        write_lines(home / "chat.jsonl", [{"messages": [{"role": "user", "content": "f q 1 user b1"}, call]}])
        with pytest.raises(
            UnusableError, match=rf"source 'chat', chat.jsonl:1: the chat template does not show {hidden}"
        ):
            made(home, spec({"name": "chat", "source": "chat.jsonl"}, chat_template="chat.jinja"))

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("{{ m.content }}", "b1 <eos> [f] [a1] [1] [<eos>]"),
            ("{{ m.content if m.content is string else '' }}", "b1 <eos> [f] [a1] [1] [<eos>]"),
            ("{{ m.content + '' }}", "b1 <eos> [f] [a1] [1] [<eos>]"),
            ("{{ 'a2' if m.content is none else m.content }}", "b1 <eos> [a2] [f] [a1] [1] [<eos>]"),
        ],
    )
    def test_what_was_not_said_beside_calls_stays_null(self, home: Path, content: str, expected: str) -> None:
        """As empty text only where null would be printed as a word, or refused, or where calls show only then."""
        (home / "chat.jinja").write_text(
            "{% for m in messages %}" + content + "{% for c in m.tool_calls or [] %} {{ c.function.name }}"
            "{% for k, v in c.function.arguments.items() %} {{ k }} {{ v }}{% endfor %}{% endfor %}{{ ' <eos> ' }}"
            "{% endfor %}"
        )
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a1": "1"}}}],
        }
        write_lines(home / "chat.jsonl", [{"messages": [{"role": "user", "content": "b1"}, call]}])
        _, rows = made(home, spec({"name": "chat", "source": "chat.jsonl"}, chat_template="chat.jinja"))
        assert rows == [expected.replace("[f]", "[<unk>]").replace("[1]", "[<unk>]")]

    def test_calls_that_show_only_beside_empty_text(self, home: Path) -> None:
        (home / "chat.jinja").write_text(
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% for c in m.tool_calls or [] %}"
            " {{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }} {{ v }}{% endfor %}"
            "{% endfor %}{% endif %}{{ ' <eos> ' }}{% endfor %}"
        )
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "a1", "arguments": {"a2": "a3"}}}],
        }
        write_lines(home / "chat.jsonl", [{"messages": [{"role": "user", "content": "b1 b2 b3"}, call]}])
        _, rows = made(home, spec({"name": "chat", "source": "chat.jsonl"}, chat_template="chat.jinja"))
        assert rows == ["b1 b2 b3 <eos> [a1] [a2] [a3] [<eos>]"]

    def test_tools_that_the_template_hides_are_told(self, home: Path) -> None:
        (home / "chat.jinja").write_text("{% for m in messages %}{{ m.content + ' <eos> ' }}{% endfor %}")
        turns = [{"role": "user", "content": "b1 b2 b3"}, {"role": "assistant", "content": "a1 a2 a3"}]
        write_lines(home / "chat.jsonl", [{"messages": turns, "tools": [{"name": "b1", "parameters": {}}]}])
        tokens, _ = made(home, spec({"name": "chat", "source": "chat.jsonl"}, chat_template="chat.jinja"))
        assert tokens.summary["warnings"] == [
            "source 'chat': the chat template does not show the tools' schemas, which 1 samples have. Give"
            " calibration.chat_template."
        ]

    def test_what_nothing_reads_is_named_once(self, home: Path) -> None:
        turns = [{"role": "user", "content": "b1 b2 b3", "mood": "good"}, {"role": "assistant", "content": "a1 a2 a3"}]
        rows = [{"messages": turns, "score": 1, "empty": None}, {"messages": [*turns, *turns], "lang": "en"}]
        write_lines(home / "chat.jsonl", rows)
        said: list[str] = []

        class Listening(Progress):
            def say(self, text: str) -> None:
                said.append(text)

        summary = prepare(
            spec({"name": "chat", "source": "chat.jsonl"}, samples=2),
            home / "tokenizer",
            home,
            home / "out",
            Listening(),
        )
        assert summary["sources"][0]["unread"] == ["lang", "score", "turns' mood"]
        assert said == ["source 'chat': not read: lang, score, turns' mood. Name columns in `format` to read them."]

    def test_templates_that_print_arguments_as_text(self, home: Path) -> None:
        (home / "chat.jinja").write_text(
            "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ ' <call> ' +"
            " c.function.name + ' ' + c.function.arguments }}{% endfor %}{{ ' <eos> ' }}{% endfor %}"
        )
        call = {
            "role": "assistant",
            "content": "a1 a2 a3",
            "tool_calls": [{"function": {"name": "f", "arguments": {"q": 1}}}],
        }
        write_lines(home / "chat.jsonl", [{"messages": [{"role": "user", "content": "b1 b2"}, call]}])
        _, rows = made(home, spec({"name": "chat", "source": "chat.jsonl"}, chat_template="chat.jinja"))
        assert rows == ["b1 b2 <eos> [a1] [a2] [a3] [<call>] [<unk>] [<unk>] [<unk>] [<eos>]"]


class TestTokenIds:
    def test_are_used_as_they_are(self, home: Path) -> None:
        write_lines(
            home / "ids.jsonl",
            [
                {"input_ids": [20, 21, 22], "assistant_mask": [0, 1, 1]},
                {"input_ids": [30, 31, 32, 33], "assistant_mask": [0, 0, 1, 0]},
            ],
        )
        tokens, _ = made(home, spec({"name": "ids", "source": "ids.jsonl"}, samples=2, max_length=16))
        read = {tuple(tokens.row(row).input_ids.tolist()): tokens.row(row).assistant.int().tolist() for row in range(2)}
        assert read == {(20, 21, 22): [0, 1, 1], (30, 31, 32, 33): [0, 0, 1, 0]}
        assert tokens.summary["sources"][0]["spans"] == ["as given"]

    def test_need_no_tokenizer(self, tmp_path: Path) -> None:
        write_lines(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 3]}])
        prepare(spec({"name": "ids", "source": "ids.jsonl"}), tmp_path, tmp_path, tmp_path / "out")
        assert CalibrationTokens.load(tmp_path / "out").row(0).scored.tolist() == [True, True, False]

    def test_above_the_vocabulary_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"vocab_size": 50}')
        write_lines(tmp_path / "ids.jsonl", [{"input_ids": [1, 2, 50]}])
        with pytest.raises(
            UnusableError,
            match=r"source 'ids': 1 of 1 rows(.|\n)*ids\.jsonl:1: token id 50, but the model knows ids below 50\n",
        ):
            prepare(spec({"name": "ids", "source": "ids.jsonl"}), tmp_path, tmp_path, tmp_path / "out")


def test_concat_without_an_end_token_is_refused(tmp_path: Path) -> None:
    tokenizer = word_tokenizer(tmp_path / "tokenizer", ["a b c"])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_lines(tmp_path / "data.jsonl", [{"text": "a b c a b c a b"}])
    with pytest.raises(
        UnusableError, match=r"the tokenizer has no end token .* Choose `packing: none` or `isolated`\."
    ):
        prepare(spec({"name": "data", "source": "data.jsonl"}), tmp_path / "tokenizer", tmp_path, tmp_path / "out")


def big_mix(home: Path) -> CalibrationSpec:
    texts = [sequence(letter, length) for letter, length in itertools.product(LETTERS[:16], range(3, 40))]
    return spec(
        source(home, "one", texts[::2], weight=2),
        source(home, "two", texts[1::2]),
        {"name": "tools", "source": "builtin:tools"},
        samples=120,
        max_length=32,
        overflow="window",
    )


OTHER_TEXTS = [sequence(letter, length) for letter, length in itertools.product(LETTERS[16:], range(3, 12))]


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: digest_file(path) for path in directory.iterdir()}


class TestEqualBytes:
    def test_twice(self, home: Path) -> None:
        for out in ("first", "second"):
            prepare(big_mix(home), home / "tokenizer", home, home / out)
        assert files_of(home / "first") == files_of(home / "second")
        assert set(files_of(home / "first")) == {"tokens.safetensors", "calibration.json"}

    def test_in_another_process_with_other_threads(self, home: Path) -> None:
        prepare(big_mix(home), home / "tokenizer", home, home / "first")
        code = (
            "import sys; from pathlib import Path; home = Path(sys.argv[1]); sys.path[:0] = sys.argv[2:];from"
            " tests.calibration.test_prepare import big_mix, prepare; prepare(big_mix(home), home / 'tokenizer', home,"
            " home / 'second')"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(home), str(ROOT)], check=True, env={**os.environ, "RAYON_NUM_THREADS": "3"}
        )
        assert files_of(home / "first") == files_of(home / "second")

    @pytest.mark.parametrize("blocks", [1, 4, 9])
    def test_killed_and_resumed(self, home: Path, monkeypatch: pytest.MonkeyPatch, blocks: int) -> None:
        monkeypatch.setattr(draw_samples, "BLOCK", 8)
        prepare(big_mix(home), home / "tokenizer", home, home / "undisturbed")
        appended = itertools.count()

        def dying(samples: token_journal.Samples, block: list, *others: object) -> None:
            if next(appended) == blocks:
                raise KeyboardInterrupt
            token_journal.append(samples, block, *others)

        with monkeypatch.context() as dies:
            dies.setattr(draw_samples, "append", dying)
            with pytest.raises(KeyboardInterrupt):
                prepare(big_mix(home), home / "tokenizer", home, home / "killed")
        for torn in (home / "killed" / "work").iterdir():
            with (torn / "journal.jsonl").open("a") as stream:
                stream.write('{"next_position": 99, "positions": [1')
            with (torn / "input_ids.bin").open("ab") as stream:
                stream.write(b"torn!")
        encoded_positions: list[int] = []
        original = encoder.Encoder.encode

        def counting(self: encoder.Encoder, walk: object, positions: range) -> list:
            encoded_positions.extend(positions)
            return original(self, walk, positions)

        monkeypatch.setattr(encoder.Encoder, "encode", counting)
        prepare(big_mix(home), home / "tokenizer", home, home / "killed")
        assert files_of(home / "killed") == files_of(home / "undisturbed")
        assert len(encoded_positions) == 120 - 8 * blocks + (4 if blocks > 7 else 0)

    def test_kept_work_serves_another_length(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        prepare(big_mix(home), home / "tokenizer", home, home / "long", work=home / "work")
        prepare(
            big_mix(home).model_copy(update={"max_length": 16, "samples": 60}), home / "tokenizer", home, home / "fresh"
        )
        monkeypatch.setattr(encoder.Encoder, "encode", None)
        prepare(
            big_mix(home).model_copy(update={"max_length": 16, "samples": 60}),
            home / "tokenizer",
            home,
            home / "short",
            work=home / "work",
        )
        assert files_of(home / "short") == files_of(home / "fresh")


def pieces(tokens: CalibrationTokens, home: Path, overflow: str, length: int) -> list[list[str]]:
    """What rows of `length` show of each sample: texts, without the packing's end token and a split sample's rest."""
    shown = []
    for ids, _ in tokens.samples():
        words = [word for word in _tokenizer(home).convert_ids_to_tokens(ids.tolist()) if word != "<eos>"]
        starts = range(0, len(words), length) if overflow == "split" else [0]
        kept = [words[start : start + length] for start in starts]
        if overflow == "window":
            kept = [words[-length:]]
        shown.append([" ".join(part) for part in kept if part is kept[0] or len(part) == length])
    return shown


class TestPacks:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        """A folder whose tokenizer knows the words of generated chats too, so that they differ in tokens."""
        word_tokenizer(tmp_path / "tokenizer", [*(sequence(letter, 40) for letter in LETTERS), *_chat_texts()], CHATML)
        return tmp_path

    def evaluate(self, samples: int = 40, **fields: object) -> EvaluateSpec:
        return EvaluateSpec.model_validate({"packs": {"samples": samples}, **fields}, strict=False)

    def packs(
        self, home: Path, calibration: CalibrationSpec, evaluate: EvaluateSpec, length: int = 16, out: str = "packs"
    ) -> CalibrationTokens:
        prepare_packs(calibration, evaluate, length, home / "out", home / "tokenizer", home, home / out)
        return CalibrationTokens.load(home / out)

    def test_are_disjoint_and_keep_the_shares(self, home: Path) -> None:
        made(home, big_mix(home))
        packs = self.packs(home, big_mix(home), self.evaluate())
        calibrated = {
            content
            for source in CalibrationTokens.load(home / "out").summary["sources"]
            for content in source["hashes"]
        }
        assert [source["samples"] for source in packs.summary["sources"]] == [20, 10, 10]
        assert not calibrated & {content for source in packs.summary["sources"] for content in source["hashes"]}
        assert int(packs.row_lengths.max()) == 16

    def test_parts_never_share_a_row(self, home: Path) -> None:
        made(home, big_mix(home))
        packs = self.packs(home, big_mix(home), self.evaluate())
        assert packs.summary["parts"]["decide"]["samples"] == packs.summary["parts"]["confirm"]["samples"] == 20
        decide, confirm = packs.rows("decide"), packs.rows("confirm")
        assert sorted(decide + confirm) == list(range(packs.num_rows))

        def samples_of(rows: list[int]) -> set[tuple[int, int]]:
            found = set()
            for row in rows:
                first, last = np.searchsorted(packs.sample_offsets, packs.row_offsets[row : row + 2])
                found |= {(int(packs.row_source[row]), int(sample)) for sample in packs.part_sample[first:last]}
            return found

        assert not samples_of(decide) & samples_of(confirm)
        assert len(samples_of(decide)) == 20

    def test_nothing_kept_apart(self, home: Path) -> None:
        made(home, big_mix(home))
        evaluate = EvaluateSpec.model_validate({"packs": {"samples": 40, "confirm": 0}}, strict=False)
        packs = self.packs(home, big_mix(home), evaluate)
        assert (len(packs.rows("decide")), packs.rows("confirm")) == (packs.num_rows, [])

    def test_do_not_depend_on_the_size_of_the_calibration(self, home: Path) -> None:
        made(home, big_mix(home))
        first = self.packs(home, big_mix(home), self.evaluate())
        smaller = big_mix(home).model_copy(update={"samples": 40})
        made(home, smaller)
        second = self.packs(home, smaller, self.evaluate(), out="packs-of-smaller")
        assert [source["hashes"] for source in first.summary["sources"]] == [
            source["hashes"] for source in second.summary["sources"]
        ]

    def test_extra_packs_get_an_average_sources_samples(self, home: Path) -> None:
        made(home, big_mix(home))
        packs = self.packs(home, big_mix(home), self.evaluate(60, extra_packs=[source(home, "other", OTHER_TEXTS)]))
        assert packs.sources == ("one", "two", "tools", "other")
        assert [source["samples"] for source in packs.summary["sources"]] == [30, 15, 15, 20]
        assert packs.summary["extra"] == ["other"]

    def test_what_the_calibration_read_is_held_out_wherever_it_stands(self, home: Path) -> None:
        """Content counts, not place: a copy of the calibration under another name gives no row back."""
        texts = [sequence(letter, 5) for letter in LETTERS[:12]]
        calibration = spec(source(home, "data", texts[:6]), samples=3)
        tokens, _ = made(home, calibration)
        read = [texts[index] for index in tokens.summary["sources"][0]["indices"]]
        copied = source(home, "copied", [*read, *texts[6:]])
        evaluate = self.evaluate(2, extra_packs=[copied | {"weight": 1}])
        packs = self.packs(home, calibration, evaluate)
        assert packs.sources == ("data", "copied") and not {
            text for text in all_shown(packs, _tokenizer(home)) if text in read
        }
        assert not set(tokens.summary["sources"][0]["hashes"]) & {
            content for each in packs.summary["sources"] for content in each["hashes"]
        }
        with pytest.raises(
            UnusableError,
            match=r"source 'copied' yields 6 of 7 samples: 9 rows were read, dropped: 3 in the calibration",
        ):
            self.packs(
                home,
                spec(source(home, "data", [*texts[:6], *(sequence(letter, 9) for letter in LETTERS)]), samples=3),
                self.evaluate(7, extra_packs=[copied]),
                out="too-many",
            )

    @pytest.mark.parametrize("overflow", ["truncate", "window", "split"])
    @pytest.mark.parametrize("packing", ["none", "concat", "isolated"])
    @pytest.mark.parametrize("max_length", [6, 8, 12])
    def test_no_row_shows_what_another_shows(self, home: Path, overflow: str, packing: str, max_length: int) -> None:
        """Texts of which many begin, and many end, alike: they differ where rows are cut off, some only in words that
        the tokenizer does not know, and two sources hold the same."""
        beginnings, ends = LETTERS[:9], LETTERS[9:18]
        texts = [
            f"{sequence(beginning, 12)} {sequence(end, 12)}" for beginning in beginnings for end in ends if end != "p"
        ]
        texts += [f"{sequence(letter, 5)} unknown-{number}" for letter in LETTERS[18:] for number in range(9)]
        mix = [source(home, name, texts) for name in ("one", "two")]
        calibration = spec(*mix, samples=6, max_length=max_length, overflow=overflow, packing=packing)
        made(home, calibration)
        evaluate = self.evaluate(4, extra_packs=[source(home, "extra", texts)])
        evaluate = evaluate.model_copy(update={"packs": evaluate.packs.model_copy(update={"lengths": (8, 12)})})
        packs = {length: self.packs(home, calibration, evaluate, length, str(length)) for length in (8, 12)}
        calibrated = CalibrationTokens.load(home / "out")
        for length, made_packs in packs.items():
            shared = min(length, max_length)
            known = [text for each in pieces(calibrated, home, overflow, shared) for text in each]
            held_out = pieces(made_packs, home, overflow, shared)
            assert not {text for each in held_out for text in each} & set(known)
            shown = [text for each in pieces(made_packs, home, overflow, length) for text in each]
            assert len(shown) == len(set(shown)) >= 6
        numbers = [[source["indices"] for source in made_packs.summary["sources"]] for made_packs in packs.values()]
        assert numbers[0] == numbers[1], "each length holds the same samples in the same parts"

    def test_samples_that_the_cut_makes_equal_are_named(self, home: Path) -> None:
        texts = [f"{sequence(first, 8)} {sequence(letter, 5)}" for first in "abc" for letter in LETTERS[3:]]
        calibration = spec(source(home, "data", texts), samples=1, max_length=8, overflow="truncate")
        made(home, calibration)
        with pytest.raises(UnusableError) as failure:
            self.packs(home, calibration, self.evaluate(3), length=8)
        said = str(failure.value)
        assert said.startswith("source 'data' yields 2 of 3 samples: 69 rows were read, dropped: ")
        for reason in (
            "22 equal in tokens to one of the calibration (first: data.jsonl:",
            "44 equal in tokens to another held-out one (first: data.jsonl:",
            "1 in the calibration (first: data.jsonl:",
        ):
            assert reason in said
        account = self.packs(home, calibration, self.evaluate(2), length=8).summary["sources"][0]
        assert account["rows_read"] == account["samples"] + sum(each["count"] for each in account["dropped"].values())

    def test_an_endless_source_whose_samples_are_all_cut_alike_ends(self, home: Path) -> None:
        calibration = spec(
            {"name": "tools", "source": "builtin:tools"}, samples=1, max_length=2, overflow="truncate", score="all"
        )
        made(home, calibration)
        with pytest.raises(UnusableError, match=r"source 'tools' yields [01] of 2 samples: .* equal in tokens to"):
            self.packs(home, calibration, self.evaluate(2), length=2)

    def test_extra_pack_with_a_taken_name_is_refused(self, home: Path) -> None:
        made(home, big_mix(home))
        with pytest.raises(RecipeError, match=r"evaluate\.extra_packs: the name 'one' is used by another source"):
            self.packs(home, big_mix(home), self.evaluate(extra_packs=[{"name": "one", "source": "builtin:math"}]))

    def test_a_source_that_the_calibration_used_up_is_named(self, home: Path) -> None:
        calibration = spec(source(home, "data", [sequence(letter, 5) for letter in LETTERS[:12]]), samples=10)
        made(home, calibration)
        with pytest.raises(
            UnusableError,
            match=r"source 'data' yields 2 of 4 samples: 12 rows were read, dropped: 10 in the calibration .* "
            r"lower evaluate.packs.samples",
        ):
            self.packs(home, calibration, self.evaluate(4))

    def test_a_source_that_would_get_no_sample_is_named_with_how_many_are_enough(self, home: Path) -> None:
        made(home, big_mix(home))
        with pytest.raises(
            RecipeError,
            match=(
                r"evaluate.packs.samples: 2, but with 3 sources and these weights tools would get no sample."
                r" Choose at least 4."
            ),
        ):
            self.packs(home, big_mix(home), self.evaluate(2))
        assert [
            source["samples"] for source in self.packs(home, big_mix(home), self.evaluate(4)).summary["sources"]
        ] == [2, 1, 1]
        with pytest.raises(
            RecipeError,
            match=(r"calibration.samples: 1, but with 3 sources and these weights two, tools would get no sample"),
        ):
            made(home, big_mix(home).model_copy(update={"samples": 1}), "one")
        uneven = [
            source(home, name, texts, weight=weight)
            for name, texts, weight in (("much", OTHER_TEXTS[::2], 1), ("little", OTHER_TEXTS[1::2], 0.01))
        ]
        packs = self.packs(home, big_mix(home), self.evaluate(6, extra_packs=uneven), out="uneven")
        assert [source["samples"] for source in packs.summary["sources"]][3:] == [4, 1]

    def test_a_source_that_would_get_no_token_is_named_with_how_many_are_enough(self, home: Path) -> None:
        calibration = big_mix(home).model_copy(update={"samples": None, "tokens": 1})
        with pytest.raises(
            RecipeError,
            match=(
                r"^calibration\.tokens: 1, but with 3 sources and these weights two, tools would get no token\."
                r" Choose at least 4\.$"
            ),
        ):
            made(home, calibration)

    def test_summary_is_plain_json(self, home: Path) -> None:
        made(home, big_mix(home))
        self.packs(home, big_mix(home), self.evaluate())
        for name in ("out", "packs"):
            summary = json.loads((home / name / "calibration.json").read_text())
            assert str(home) not in json.dumps(summary), "a machine's paths do not belong into an artifact"


def test_journal_ahead_of_its_tokens_is_cut_back(home: Path) -> None:
    """After a power cut the journal may have reached the disk and the tokens not; zeros must not pass for them."""
    calibration = big_mix(home)
    prepare(calibration, home / "tokenizer", home, home / "undisturbed")
    prepare(calibration, home / "tokenizer", home, home / "first", work=home / "work")
    for part in (home / "work").iterdir():
        os.truncate(part / "input_ids.bin", 100)
    prepare(calibration, home / "tokenizer", home, home / "second", work=home / "work")
    assert files_of(home / "second") == files_of(home / "undisturbed")


@pytest.mark.parametrize("name", ["input_ids.bin", "assistant.bin", "journal.jsonl"])
@pytest.mark.parametrize("damage", [flip_unseen, truncate, delete, append], ids=lambda each: each.__name__)
def test_stored_samples_that_were_damaged_are_made_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Path], None]
) -> None:
    monkeypatch.setattr(draw_samples, "BLOCK", 8)
    calibration = big_mix(home)
    prepare(calibration, home / "tokenizer", home, home / "undisturbed", work=home / "work")
    for part in (home / "work").iterdir():
        damage(part / name)
    heard = Heard()
    prepare(calibration, home / "tokenizer", home, home / "second", progress=heard, work=home / "work")
    assert files_of(home / "second") == files_of(home / "undisturbed")
    said = [line for line in heard.said if "stored samples are damaged; those from " in line]
    assert len(said) == (len(list((home / "work").iterdir())) if damage is flip_unseen else len(said))


def test_samples_that_an_earlier_reapkit_stored_are_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = big_mix(home)
    prepare(calibration, home / "tokenizer", home, home / "first", work=home / "work")
    for journal in (home / "work").glob("*/journal.jsonl"):
        blocks = [json.loads(line) for line in journal.read_text().splitlines()]
        assert all(len(block.pop("sha256")) == 64 for block in blocks)
        journal.write_text("".join(json.dumps(block, separators=(",", ":")) + "\n" for block in blocks))
    monkeypatch.setattr(encoder.Encoder, "encode", None)
    prepare(calibration, home / "tokenizer", home, home / "second", work=home / "work")
    assert files_of(home / "second") == files_of(home / "first")
