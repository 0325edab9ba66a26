"""Continuations: prompts from packs, the same by batch and by seed, and shares counted by hand."""

import copy
import json

import pytest
import torch

from reapkit.evaluation.directory import continued
from reapkit.evaluation.generation import Continuation, Prompt, draw_prompts, examples, summarize, write
from reapkit.evaluation.outputs import Pack
from reapkit.recipe.schema import GenerationSpec
from tests.support import tiny
from tests.support.held_out import held_out

LOOPING, FRESH = (5,) * 30, tuple(range(30))


@pytest.fixture(scope="module")
def model():
    return tiny.build("qwen3_moe").requires_grad_(False)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return Pack.part(held_out(tmp_path_factory.mktemp("pack")), "decide", 24)


def both(*continuations):
    return {"greedy": list(continuations), "sampled": list(continuations)}


def test_prompts_end_where_the_assistant_begins_and_sources_take_turns(pack):
    prompts = draw_prompts(pack, 6)
    assert [prompt.source for prompt in prompts] == [0, 1, 2, 0, 1, 2]
    row = pack.tokens.row(pack.rows[0])  # one token of the user's, then two of the assistant's
    assert prompts[0] == Prompt(0, tuple(row.input_ids[:1].tolist()), tuple(row.input_ids[1:3].tolist()))
    assert len(draw_prompts(pack, 10_000)) > 6


def test_a_plain_text_is_cut_into_beginning_and_rest(tmp_path):
    pack = Pack.part(held_out(tmp_path, lengths=(8, 8, 8), score="all"), "decide", 8)
    pack.tokens._assistant = pack.tokens._assistant * 0
    ids = pack.tokens.row(0).input_ids.tolist()
    assert draw_prompts(pack, 1) == [Prompt(0, tuple(ids[:4]), tuple(ids[4:]))]


@torch.no_grad()
def test_greedy_continuations_equal_a_naive_loop_whatever_the_batch(model):
    prompts = [Prompt(0, (7, 8, 9), (1,)), Prompt(0, (40, 41, 42, 43, 44, 45), (1,)), Prompt(1, (3,), (1,))]
    written = write(model, prompts, max_new_tokens=6)
    alone = write(model, prompts, max_new_tokens=6, batch_tokens=1)
    assert [each.tokens for each in alone["greedy"]] == [each.tokens for each in written["greedy"]]
    for prompt, found in zip(prompts, written["greedy"], strict=True):
        ids = list(prompt.tokens)
        while len(ids) < len(prompt.tokens) + 6 and ids[-1] != 2:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert list(found.tokens) == [token for token in ids[len(prompt.tokens) :] if token != 2]
        assert found.finished == (2 in ids[len(prompt.tokens) :])


def test_sampled_continuations_follow_the_seed_and_leave_the_generator_alone(model):
    prompts = [Prompt(0, (7, 8, 9), (1,))]
    state = torch.random.get_rng_state()
    first, again, other = (write(model, prompts, max_new_tokens=12, seed=seed)["sampled"] for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shares_count_loops_and_endings_against_the_base():
    prompts = [Prompt(0, (1,), (2,)), Prompt(0, (1,), (2,)), Prompt(1, (1,), (2,)), Prompt(2, (1,), (2,))]
    base = both(*[Continuation(FRESH, True)] * 4)
    written = {
        "greedy": [
            Continuation(LOOPING, False),
            Continuation(FRESH, True),
            Continuation(LOOPING, False),
            Continuation(LOOPING, False),
        ],
        "sampled": [Continuation(FRESH, True)] * 4,
    }
    found = summarize(base, written, prompts, ("code", "prose", "french"), frozenset({"french"}))
    assert found["all"]["rows"] == 3
    assert found["all"]["loop_share"]["value"] == found["all"]["loop_share_delta"]["value"] == pytest.approx(2 / 6)
    assert (
        found["all"]["greedy_loop_share"]["value"] == pytest.approx(2 / 3)
        and found["all"]["sampled_loop_share"]["value"] == 0
    )
    assert found["all"]["unfinished_share"]["value"] == pytest.approx(2 / 6)
    assert found["code"]["loop_share"]["value"] == pytest.approx(1 / 4)
    assert found["french"]["loop_share"] == {"value": 0.5, "interval": None}
    itself = summarize(base, base, prompts, ("code", "prose", "french"))
    assert itself["all"]["loop_share_delta"] == {"value": 0.0, "interval": [0.0, 0.0]}


class Text:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens):
        return "".join(map(chr, tokens))


def codes(text):
    return tuple(map(ord, text))


def test_tool_calls_are_judged_where_prompt_and_reference_have_them():
    tool = json.dumps(
        {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}
    )
    good, bad = (json.dumps({"name": "add", "arguments": {"a": value}}) for value in (1, "one"))
    prompts = [
        Prompt(0, codes(tool), codes(good)),
        Prompt(0, codes(tool), codes(good)),
        Prompt(0, codes(tool), codes("No need.")),
        Prompt(1, codes("Hello"), codes(good)),
    ]
    base = both(*[Continuation(codes(good), True)] * 4)
    written = {
        "greedy": [Continuation(codes(good), True), *[Continuation(codes(bad), True)] * 3],
        "sampled": [Continuation(codes(bad), True)] * 4,
    }
    found = summarize(base, written, prompts, ("tools", "prose"), tokenizer=Text())
    assert found["tools"]["tool_prompts"] == found["all"]["tool_prompts"] == 2
    validity = {name: measured["value"] for name, measured in found["tools"].items() if "validity" in name}
    assert validity == {
        "tool_call_validity": 0.25,
        "tool_call_validity_delta": -0.75,
        "greedy_tool_call_validity": 0.5,
        "sampled_tool_call_validity": 0.0,
    }
    assert "tool_prompts" not in found["prose"]
    shown = examples(base, written, prompts, ("tools", "prose"), Text())
    assert [each["source"] for each in shown] == ["tools", "prose"] and shown[1]["candidate"] == bad


class Letters:
    """Token ids as text."""

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def test_a_directory_continues_the_prompts_that_the_masks_continued(model, pack, tmp_path):
    tiny.save_hub_layout(model, tmp_path / "quantized")
    prompts, sources, spec = draw_prompts(pack, 6), pack.tokens.sources, GenerationSpec(prompts=6, max_new_tokens=4)
    own = write(model, prompts, max_new_tokens=4)
    looping = copy.deepcopy(model)
    torch.nn.init.zeros_(looping.lm_head.weight)  # says the first token again and again
    of_base = write(looping, prompts, max_new_tokens=4)
    found = continued(lambda: tmp_path / "quantized", lambda: looping, pack, spec, Letters())
    assert found["generation"] == summarize(of_base, own, prompts, sources, pack.outside, Letters())
    assert set(found["generation"]) == {"all", "code", "prose", "french"}
    assert "loop_share_delta" in found["generation"]["all"]
    for shown in found["examples"]:
        first = next(i for i, prompt in enumerate(prompts) if sources[prompt.source] == shown["source"])
        assert shown["prompt"] == Letters().decode(prompts[first].tokens)
        assert shown["text"] == Letters().decode(own["greedy"][first].tokens)
    assert len(found["examples"]) == 3
    assert continued(lambda: tmp_path / "quantized", lambda: looping, pack, spec)["examples"] == []
