"""Assistant spans, four ways, against tokens written down by hand: assistant tokens are in [brackets]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from reapkit.calibration.prepare import prepare
from reapkit.calibration.spans import Rendered, encode, marked_spans
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.core.errors import UnusableError
from reapkit.recipe.schema import Spans
from tests.support.words import CHATML, GLM, HARMONY, PLAIN_CHATML, QWEN, all_shown, spec, word_tokenizer, write_lines

VOCABULARY = (
    "user assistant system tool functions to commentary analysis final hello there how are you good fine thanks find"
    ' the bug it is in line two weather Rome sunny 20 degrees tools search q Rome? read file main.py open {"q": "Rome"}'
    " name of my dog Rex your is?"
)


def prepared(
    directory: Path, template: str | None, rows: list, *, bos: bool = False, **fields: object
) -> tuple[CalibrationTokens, list[str]]:
    """The rows as one source without packing, in the file's order, and each row in words."""
    directory.mkdir(exist_ok=True)
    tokenizer = word_tokenizer(directory / "tokenizer", [VOCABULARY], template, bos=bos)
    write_lines(directory / "data.jsonl", rows)
    calibration = spec(
        {"name": "chat", "source": "data.jsonl"},
        **{"samples": len(rows), "packing": "none", "max_length": 64, **fields},
    )
    summary = prepare(calibration, directory / "tokenizer", directory, directory / "out")
    tokens = CalibrationTokens.load(directory / "out")
    in_file_order = np.argsort(summary["sources"][0]["indices"])
    words = all_shown(tokens, tokenizer)
    return tokens, [words[number] for number in in_file_order]


def chat(*turns: tuple[str, str] | dict) -> dict:
    return {"messages": [turn if isinstance(turn, dict) else {"role": turn[0], "content": turn[1]} for turn in turns]}


def call(name: str, thinking: str | None = None, **arguments: str) -> dict:
    turn = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }
    return turn | ({"thinking": thinking} if thinking else {})


def way(tokens: CalibrationTokens) -> list[str]:
    return tokens.summary["sources"][0]["spans"]


class TestGeneration:
    def test_two_turns(self, tmp_path: Path) -> None:
        tokens, rows = prepared(
            tmp_path,
            CHATML,
            [chat(("user", "how are you"), ("assistant", "good thanks"), ("user", "fine"), ("assistant", "hello"))],
        )
        assert way(tokens) == ["generation"]
        assert rows == [
            "<|im_start|> user how are you <|im_end|> <|im_start|> assistant [good] [thanks] [<|im_end|>] "
            "<|im_start|> user fine <|im_end|> <|im_start|> assistant [hello] [<|im_end|>]"
        ]

    def test_scored_positions_are_those_before_assistant_tokens(self, tmp_path: Path) -> None:
        tokens, _ = prepared(tmp_path, CHATML, [chat(("user", "how are you"), ("assistant", "good thanks"))])
        row = tokens.row(0)
        assert row.scored.int().tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0]
        assert row.signal.equal(row.scored)

    def test_calls_count_and_answers_of_tools_do_not(self, tmp_path: Path) -> None:
        _, rows = prepared(
            tmp_path,
            CHATML,
            [chat(("user", "weather Rome"), call("search", q="Rome"), ("tool", "sunny"), ("assistant", "it is sunny"))],
        )
        assert rows == [
            "<|im_start|> user weather Rome <|im_end|>"
            " <|im_start|> assistant [<call>] [search] [q] [Rome] [</call>] [<|im_end|>]"
            " <|im_start|> tool sunny <|im_end|> <|im_start|> assistant [it] [is] [sunny] [<|im_end|>]"
        ]

    def test_agrees_with_transformers(self, tmp_path: Path) -> None:
        example = chat(("user", "how are you"), ("assistant", "good thanks"), ("user", "fine"), ("assistant", "hello"))
        tokens, _ = prepared(tmp_path, CHATML, [example])
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        theirs = tokenizer.apply_chat_template(example["messages"], return_assistant_tokens_mask=True, return_dict=True)
        assert tokens.row(0).input_ids.tolist() == theirs["input_ids"]
        assert tokens.row(0).assistant.int().tolist() == theirs["assistant_masks"]


class TestMarkers:
    def test_ready_made_text_without_any_template(self, tmp_path: Path) -> None:
        """In the manner of DeepSeek-V3.2, which ships no template: the text carries its own special tokens, the first
        too."""
        tokens, rows = prepared(
            tmp_path,
            None,
            [{"text": "<s> <|user|> how are you <|assistant|> good <eos> <|user|> fine <|assistant|> thanks <eos>"}],
            bos=True,
            spans={"start": "<|assistant|>", "end": "<eos>"},
        )
        assert way(tokens) == ["markers"]
        assert rows == [
            "<s> <|user|> how are you <|assistant|> [good] [<eos>] <|user|> fine <|assistant|> [thanks] [<eos>]"
        ]

    def test_win_over_the_template(self, tmp_path: Path) -> None:
        tokens, rows = prepared(
            tmp_path,
            QWEN,
            [chat(("user", "how are you"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))],
            spans={"start": "<|im_start|> assistant", "end": "<|im_end|>"},
        )
        assert way(tokens) == ["markers"]
        assert rows == [
            "<|im_start|> user how are you <|im_end|> <|im_start|> assistant [good] [<|im_end|>] "
            "<|im_start|> user fine <|im_end|> <|im_start|> assistant [<think>] [</think>] [thanks] [<|im_end|>]"
        ]

    def test_open_turn_ends_before_the_next_start_or_with_the_text(self) -> None:
        assert marked_spans("A one A two B three A four", Spans(start="A", end="B")) == [(1, 6), (7, 13), (21, 26)]
        assert marked_spans("nothing here", Spans(start="A", end="B")) == []

    def test_no_marker_in_the_source_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnusableError,
            match=r"source 'chat': none of its 3 tokens is scored; assistant tokens were sought by between the "
            r"recipe's markers. Compare calibration.spans with how the samples are rendered",
        ):
            prepared(tmp_path, None, [{"text": "how are you"}], spans={"start": "<|assistant|>", "end": "<eos>"})


class TestPrefix:
    def test_plain_chatml_gives_the_same_as_generation_marks(self, tmp_path: Path) -> None:
        """Their marks leave out nothing but the blank behind the end token, which is no token here."""
        rows = [
            chat(
                ("system", "hello"),
                ("user", "how are you"),
                ("assistant", "good thanks"),
                ("user", "fine"),
                ("assistant", "hello"),
            )
        ]
        marked, marked_rows = prepared(tmp_path / "a", CHATML, rows)
        found, found_rows = prepared(tmp_path / "b", PLAIN_CHATML, rows)
        assert (way(marked), way(found)) == (["generation"], ["prefix"])
        assert marked_rows == found_rows

    def test_glm_turns_that_part_from_the_generation_prompt(self, tmp_path: Path) -> None:
        """The generation prompt opens a thought, the finished turn closes none: the turn begins where they part."""
        tokens, rows = prepared(
            tmp_path,
            GLM,
            [chat(("user", "weather Rome"), call("search", q="Rome"), ("tool", "sunny"), ("assistant", "it is sunny"))],
        )
        assert way(tokens) == ["prefix"]
        assert rows == [
            "<s> <|user|> weather Rome <|assistant|> [</think>] [<call>] [search] [q] [Rome] [</call>] "
            "<|observation|> sunny <|assistant|> [</think>] [it] [is] [sunny]"
        ]

    def test_glm_thought_behind_the_generation_prompt(self, tmp_path: Path) -> None:
        answer = {"role": "assistant", "content": "good", "reasoning_content": "how are you"}
        _, rows = prepared(tmp_path, GLM, [chat(("user", "hello"), answer)])
        assert rows == ["<s> <|user|> hello <|assistant|> <think> [how] [are] [you] [</think>] [good]"]

    def test_harmony_channels_and_calls(self, tmp_path: Path) -> None:
        tokens, rows = prepared(
            tmp_path,
            HARMONY,
            [
                chat(
                    ("user", "weather Rome"),
                    call("search", thinking="find the weather", q="Rome"),
                    ("tool", "sunny"),
                    ("assistant", "it is sunny"),
                )
            ],
        )
        assert way(tokens) == ["prefix"]
        assert rows == [
            "<|start|> user <|message|> weather Rome <|end|> <|start|> assistant [<|channel|>] [analysis] [<|message|>]"
            " [find] [the] [weather] [<|end|>] [<|start|>] [assistant] [to] [search] [<|channel|>] [commentary]"
            ' [<|message|>] [{"q":] ["Rome"}] [<|calling|>] <|start|> functions to assistant <|channel|> commentary'
            " <|message|> sunny <|end|> <|start|> assistant [<|channel|>] [final] [<|message|>] [it] [is] [sunny]"
            " [<|return|>]"
        ]

    def test_qwen_thoughts(self, tmp_path: Path) -> None:
        answer = {"role": "assistant", "content": "good", "reasoning_content": "how are you"}
        _, rows = prepared(
            tmp_path, QWEN, [chat(("user", "hello"), answer), chat(("user", "hello"), ("assistant", "fine"))]
        )
        assert rows == [
            (
                "<|im_start|> user hello <|im_end|> <|im_start|> assistant [<think>] [how] [are] [you] [</think>]"
                " [good] [<|im_end|>]"
            ),
            "<|im_start|> user hello <|im_end|> <|im_start|> assistant [<think>] [</think>] [fine] [<|im_end|>]",
        ]

    def test_many_calls_in_a_row(self, tmp_path: Path) -> None:
        """Agentic data: the tool turns between are context, every assistant turn counts."""
        _, rows = prepared(
            tmp_path,
            PLAIN_CHATML,
            [
                chat(
                    ("user", "find the bug"),
                    call("search", q="bug"),
                    ("tool", "line two"),
                    call("read", q="file"),
                    ("tool", "main.py"),
                    ("assistant", "it is in line two"),
                )
            ],
        )
        assert rows == [
            "<|im_start|> user find the bug <|im_end|>"
            " <|im_start|> assistant [<call>] [search] [q] [bug] [</call>] [<|im_end|>]"
            " <|im_start|> tool line two <|im_end|>"
            " <|im_start|> assistant [<call>] [read] [q] [file] [</call>] [<|im_end|>] "
            "<|im_start|> tool main.py <|im_end|> <|im_start|> assistant [it] [is] [in] [line] [two] [<|im_end|>]"
        ]


class TestShown:
    """Templates that render earlier turns otherwise than last ones."""

    def test_glm_drops_earlier_thoughts(self, tmp_path: Path) -> None:
        answer = {"role": "assistant", "content": "good", "reasoning_content": "how are you"}
        tokens, rows = prepared(
            tmp_path, GLM, [chat(("user", "hello"), answer, ("user", "fine"), ("assistant", "thanks"))]
        )
        assert way(tokens) == ["shown"]
        assert rows == [
            "<s> <|user|> hello <|assistant|> [</think>] [good] <|user|> fine <|assistant|> [</think>] [thanks]"
        ]
        assert tokens.summary["sources"][0]["thoughts_left_out"] == 1

    def test_harmony_ends_the_last_turn_otherwise(self, tmp_path: Path) -> None:
        tokens, rows = prepared(
            tmp_path,
            HARMONY,
            [chat(("user", "hello"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))],
        )
        assert way(tokens) == ["shown"]
        assert rows == [
            "<|start|> user <|message|> hello <|end|> <|start|> assistant [<|channel|>] [final] [<|message|>] [good]"
            " [<|end|>] <|start|> user <|message|> fine <|end|> <|start|> assistant [<|channel|>] [final] [<|message|>]"
            " [thanks] [<|return|>]"
        ]

    def test_qwen_with_two_user_turns(self, tmp_path: Path) -> None:
        tokens, rows = prepared(
            tmp_path, QWEN, [chat(("user", "hello"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))]
        )
        assert way(tokens) == ["shown"]
        assert rows == [
            "<|im_start|> user hello <|im_end|> <|im_start|> assistant [good] [<|im_end|>] <|im_start|> user fine"
            " <|im_end|> <|im_start|> assistant [<think>] [</think>] [thanks] [<|im_end|>]"
        ]

    def test_thoughts_within_the_content(self, tmp_path: Path) -> None:
        """Published templates take the thought out of the content of earlier turns."""
        template = QWEN.replace("m.content +", "(m.content.split('</think>')[-1] if not loop.last else m.content) +")
        thought = ("assistant", "<think> how are you </think> good")
        tokens, rows = prepared(
            tmp_path, template, [chat(("user", "hello"), thought, ("user", "fine"), ("assistant", "thanks"))]
        )
        assert way(tokens) == ["shown"]
        assert rows[0].startswith(
            "<|im_start|> user hello <|im_end|> <|im_start|> assistant [good] [<|im_end|>] <|im_start|> user"
        )
        assert tokens.summary["sources"][0]["thoughts_left_out"] == 1

    def test_turns_that_end_with_the_text_alone(self, tmp_path: Path) -> None:
        """The last turn ends with <eos>, earlier ones with nothing: the next turn's header is nobody's answer."""
        template = (
            "{%- for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' ' }}{% if loop.last %}{{ eos_token }}"
            "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
        )
        tokens, rows = prepared(
            tmp_path,
            template,
            [chat(("user", "hello"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))],
        )
        assert way(tokens) == ["shown"]
        assert rows == ["<|user|> hello <|assistant|> [good] <|user|> fine <|assistant|> [thanks] [<eos>]"]

    @pytest.mark.parametrize("template", [PLAIN_CHATML, GLM, HARMONY, QWEN])
    def test_the_assistant_speaks_first(self, tmp_path: Path, template: str) -> None:
        """Neither the first token nor tools nor the header are the assistant's."""
        turns = [("assistant", "hello there"), ("user", "how are you"), ("assistant", "fine")]
        tokens, rows = prepared(
            tmp_path, template, [chat(*turns) | {"tools": [{"type": "function", "function": {"name": "search"}}]}]
        )
        assert way(tokens) == ["shown"]
        expected = {
            PLAIN_CHATML: "<|im_start|> assistant [hello] [there] [<|im_end|>] <|im_start|> user how are you <|im_end|>"
            " <|im_start|> assistant [fine] [<|im_end|>]",
            GLM: "<s> <|system|> tools search <|assistant|> [</think>] [hello] [there] <|user|> how are you"
            " <|assistant|> [</think>] [fine]",
            HARMONY: "<|start|> assistant [<|channel|>] [final] [<|message|>] [hello] [there] [<|end|>] <|start|> user"
            " <|message|> how are you <|end|> <|start|> assistant [<|channel|>] [final] [<|message|>] [fine]"
            " [<|return|>]",
            QWEN: "<|im_start|> assistant [hello] [there] [<|im_end|>] <|im_start|> user how are you <|im_end|>"
            " <|im_start|> assistant [<think>] [</think>] [fine] [<|im_end|>]",
        }[template]
        assert rows[0].endswith(expected)

    def test_the_same_words_in_other_turns_are_not_mistaken(self, tmp_path: Path) -> None:
        _, rows = prepared(
            tmp_path,
            QWEN,
            [chat(("user", "good"), ("assistant", "good"), ("user", "good good"), ("assistant", "good"))],
        )
        assert rows == [
            "<|im_start|> user good <|im_end|> <|im_start|> assistant [good] [<|im_end|>] <|im_start|> user good good"
            " <|im_end|> <|im_start|> assistant [<think>] [</think>] [good] [<|im_end|>]"
        ]

    @pytest.mark.parametrize("template", [PLAIN_CHATML, GLM, HARMONY])
    def test_finds_what_prefixes_find(self, template: str, tmp_path: Path) -> None:
        import random

        from reapkit.calibration.renderer import Renderer, _Chat, prefix_spans
        from reapkit.calibration.shown_turns import shown_turns
        from reapkit.calibration.template_process import TemplateProcess

        tokenizer = word_tokenizer(tmp_path, [VOCABULARY], template)
        renderer = Renderer(spec({"name": "x", "source": "y.jsonl"}), tokenizer, None, TemplateProcess())
        rendering = _Chat(renderer._apply, template, None, False)
        draw, compared = random.Random(tmp_path.name), 0
        for _ in range(60):
            turns: list[dict] = [{"role": "user", "content": draw.choice(["hello", "fine", "good good"])}]
            for _ in range(draw.randint(1, 4)):
                turns.append(
                    draw.choice(
                        [call("search", q=draw.choice(["Rome", "bug"])), *chat(("assistant", "good"))["messages"]]
                    )
                )
                turns.append(
                    {
                        "role": "tool" if turns[-1].get("tool_calls") else "user",
                        "content": draw.choice(["fine", "good"]),
                    }
                )
            turns.append({"role": "assistant", "content": draw.choice(["thanks", "good"])})
            whole = rendering.text(turns)
            nested = prefix_spans(turns, whole, rendering.text)
            if nested is None:
                continue
            compared += 1
            found = shown_turns(turns, whole, rendering.text, tuple(tokenizer.get_added_vocab()))
            assert [whole[a:b] for a, b in found.spans] == [whole[a:b] for a, b in nested]
        assert compared > 5

    def test_a_template_that_was_stopped_is_not_taken_for_one_that_refuses(self) -> None:
        from reapkit.calibration.shown_turns import shown_turns
        from reapkit.calibration.template_process import TemplateStopped

        turns = chat(("user", "hello"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))["messages"]
        for last in range(1, 5):
            rendered: list[int] = []

            def render(
                given: list[dict], prompt: bool = False, rendered: list[int] = rendered, last: int = last
            ) -> str:
                rendered.append(len(given))
                if len(rendered) > last:
                    raise TemplateStopped("rendering was stopped")
                return "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in given) + "<assistant>" * prompt

            with pytest.raises(TemplateStopped):
                shown_turns(turns, render(turns), render, ("<end>", "<user>", "<assistant>"))

    def test_every_conversation_is_rendered_once(self) -> None:
        """The whole with marks, a prompt with and without its header, a user alone, and one for each earlier answer."""
        from reapkit.calibration.shown_turns import shown_turns

        asked = [("user", "hello"), ("assistant", "good")] * 3
        rendered = []

        def render(given: list[dict], prompt: bool = False) -> str:
            rendered.append((len(given), prompt))
            return "".join(f"<{turn['role']}>{turn['content']}<end>" for turn in given) + "<assistant>" * prompt

        turns = chat(*asked)["messages"]
        found = shown_turns(turns, render(turns), render, ("<end>", "<user>", "<assistant>"))
        assert len(found.spans) == 3 and len(rendered) == 1 + 1 + 2 + 1 + 2

    def test_a_template_that_changes_what_is_said_is_refused(self, tmp_path: Path) -> None:
        template = QWEN.replace("m.content +", "(m.content.lstrip('g') if not loop.last else m.content) +")
        with pytest.raises(UnusableError, match=r"(?s)1 of 1 rows cannot be used.*changes what is said"):
            prepared(
                tmp_path,
                template,
                [chat(("user", "hello"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))],
            )


class TestOwnTemplate:
    def test_replaces_a_missing_one(self, tmp_path: Path) -> None:
        (tmp_path / "chat.jinja").write_text(CHATML)
        tokens, rows = prepared(
            tmp_path, None, [chat(("user", "hello"), ("assistant", "good"))], chat_template="chat.jinja"
        )
        assert way(tokens) == ["generation"]
        assert rows == ["<|im_start|> user hello <|im_end|> <|im_start|> assistant [good] [<|im_end|>]"]

    def test_replaces_one_that_rewrites(self, tmp_path: Path) -> None:
        (tmp_path / "chat.jinja").write_text(PLAIN_CHATML)
        tokens, rows = prepared(
            tmp_path,
            QWEN,
            [chat(("user", "hello"), ("assistant", "good"), ("user", "fine"), ("assistant", "thanks"))],
            chat_template="chat.jinja",
        )
        assert way(tokens) == ["prefix"]
        assert rows == [
            "<|im_start|> user hello <|im_end|> <|im_start|> assistant [good] [<|im_end|>] "
            "<|im_start|> user fine <|im_end|> <|im_start|> assistant [thanks] [<|im_end|>]"
        ]

    def test_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnusableError, match=r"calibration.chat_template: .*chat.jinja cannot be read \(FileNotFoundError\)"
        ):
            prepared(tmp_path, None, [chat(("user", "hello"), ("assistant", "good"))], chat_template="chat.jinja")

    def test_missing_altogether(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnusableError,
            match=r"source 'chat', data\.jsonl:1: the model ships no chat template\. Give calibration\.chat_template",
        ):
            prepared(tmp_path, None, [chat(("user", "hello"), ("assistant", "good"))])


class TestText:
    def test_counts_throughout_apart_from_the_tokenizers_own_tokens(self, tmp_path: Path) -> None:
        tokens, rows = prepared(tmp_path, None, [{"text": "how are you"}], bos=True)
        assert way(tokens) == ["whole text"]
        assert rows == ["<s> [how] [are] [you]"]
        assert tokens.row(0).scored.tolist() == [True, True, True, False]

    def test_score_all(self, tmp_path: Path) -> None:
        tokens, _ = prepared(tmp_path, PLAIN_CHATML, [chat(("user", "hello"), ("assistant", "good"))], score="all")
        row = tokens.row(0)
        assert row.scored.all()
        assert row.signal.tolist() == [True] * (len(row.signal) - 1) + [False]
        assert way(tokens) == ["none"]


class TestWhatIsScored:
    def test_nothing_scored_names_the_source(self, tmp_path: Path) -> None:
        with pytest.raises(
            UnusableError,
            match="source 'chat': none of its 5 tokens is scored; assistant tokens were sought by prefix rendering",
        ):
            prepared(tmp_path, PLAIN_CHATML, [chat(("user", "hello there"))])
        assert not (tmp_path / "out" / "calibration.json").exists()

    def test_cut_away_answers_name_the_window(self, tmp_path: Path) -> None:
        with pytest.raises(UnusableError, match=r"1 samples were cut; try calibration\.overflow: window"):
            prepared(tmp_path, PLAIN_CHATML, [chat(("user", "hello " * 20), ("assistant", "good"))], max_length=8)

    def test_less_than_a_twentieth_warns_with_numbers(self, tmp_path: Path) -> None:
        tokens, _ = prepared(tmp_path, PLAIN_CHATML, [chat(("user", "hello " * 50), ("assistant", "good"))])
        assert tokens.summary["warnings"] == [
            "source 'chat': 2 of 57 tokens are scored (3.5%); the rest is context and says nothing about experts. "
            "Check the source's assistant turns, or choose calibration.score: all."
        ]

    def test_example_shows_the_scored_stretches(self, tmp_path: Path) -> None:
        tokens, _ = prepared(tmp_path, PLAIN_CHATML, [chat(("user", "hello"), ("assistant", "good"))])
        assert tokens.summary["sources"][0]["example"] == [
            ["<|im_start|> user hello <|im_end|> <|im_start|> assistant", False],
            ["good <|im_end|>", True],
        ]


class TestTokenizers:
    def test_without_offsets_stretches_are_encoded_one_by_one(self, tmp_path: Path) -> None:
        class Slow:
            is_fast = False

            def encode(self, text: str, add_special_tokens: bool) -> list[int]:
                return [1] * add_special_tokens + [len(word) for word in text.split()]

        ((ids, marks),) = encode([Rendered("a bb <x>ccc dddd</x> e", [(8, 16)], "markers", True)], Slow())
        assert (ids.tolist(), marks.tolist()) == ([1, 1, 2, 3, 3, 4, 4, 1], [0, 0, 0, 0, 1, 1, 0, 0])

    def test_a_character_of_several_tokens_counts_whole(self, tmp_path: Path) -> None:
        """Byte-level tokenizers split an emoji into up to four tokens; none of them may be lost at the span's end."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(
            models.BPE({letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
        )
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        text = "ab🙂cd"
        ((ids, marks),) = encode(
            [Rendered(text, [(1, 3)], "markers", False)], PreTrainedTokenizerFast(tokenizer_object=backend)
        )
        assert len(ids) == 8
        assert marks.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
