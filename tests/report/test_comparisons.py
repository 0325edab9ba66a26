"""What stands beside a result: the same bytes spent otherwise, speed, task benchmarks; and what the criterion
bought."""

import dataclasses

import pytest

from reapkit.report.card import model_card
from reapkit.report.comparison_sections import benchmarks, equal_bytes, speed
from reapkit.report.quality_sections import gates
from tests.support import synthetic_report as synthetic

NOTE = "The unpruned model in W2A16 (groups of 64, rounded to nearest) takes 94% of the result's bytes."


def row(model, engine="transformers", **found):
    return {
        "model": model,
        "engine": engine,
        "version": "5.17",
        "device": "cpu",
        "prompt_tokens": 256,
        "new_tokens": 32,
        "repeats": 3,
        "prefill_tokens_per_s": 2104.4,
        "decode_tokens_per_s": 33.7,
        "peak_bytes": 460_000_000,
        "idle_bytes": 370_000_000,
        "not_measured": None,
        "note": "",
        **found,
    }


LM_EVAL = {
    name: {
        "tasks": {"words": {"acc": value, "acc_stderr": 0.02, "acc,strict": value / 2, "acc_stderr,strict": 0.01}},
        "limit": 5,
        "max_new_tokens": 512,
        "lm_eval": "0.4.13",
        "output": "x",
    }
    for name, value in (("base", 0.75), ("quantized", 0.5))
}


def with_verification(**more):
    facts = synthetic.facts()
    return dataclasses.replace(facts, verification={**facts.verification, **more})


def control(loss):
    metrics = None if loss is None else {"512": synthetic.groups(loss, ("code",))}
    return {
        "scheme": loss and "W2A16",
        "method": "rtn",
        "group_size": 64,
        "bytes": 1_800_000,
        "target_bytes": 1_900_000,
        "note": NOTE,
        "metrics": metrics,
    }


@pytest.mark.parametrize(
    ("loss", "tone", "words"),
    [
        (2.0, "good", "It is further from the base than the result: mean KL 1.4000 against 0.0350."),
        (
            0.001,
            "warn",
            "It is closer to the base than the result: mean KL 0.0007 against 0.0350. Here quantizing alone is better.",
        ),
        (0.05, "info", "The two do not differ measurably on these rows: mean KL 0.0350 against 0.0350."),
    ],
)
def test_the_page_and_the_card_say_whether_pruning_was_worth_its_bytes(loss, tone, words):
    facts = with_verification(equal_bytes=control(loss))
    note, table = equal_bytes(facts).blocks
    assert (note.tone, note.text) == (tone, f"{NOTE} {words}")
    assert [cells[:2] for cells in table.rows] == [
        ("the result (quantized)", "1.9 MB"),
        ("the base in W2A16", "1.8 MB"),
    ]
    assert words in model_card(facts, "quantized") and words not in model_card(facts, "pruned")


def test_without_a_near_scheme_the_reason_is_the_whole_section():
    [note] = equal_bytes(with_verification(equal_bytes=control(None))).blocks
    assert note.text == NOTE and equal_bytes(synthetic.facts()) is None


def test_speed_shows_numbers_and_reasons():
    facts = with_verification(
        throughput=[
            row("base"),
            row("quantized", note="unpacked"),
            row("base", "vllm", idle_bytes=None),
            row("quantized", "vllm", not_measured="no kernel\nfor it"),
        ]
    )
    [table] = speed(facts).blocks
    assert table.rows[1] == (
        "quantized",
        "transformers 5.17",
        "2,104 tokens/s",
        "34 tokens/s",
        "460 MB",
        "370 MB of it before the model; unpacked",
    )
    assert table.rows[3][1:] == ("vLLM 5.17", "–", "–", "–", "not measured: no kernel")
    card = model_card(facts, "quantized")
    assert "| base | vLLM 5.17 | 2,104 tokens/s |" in card and "started no serving engine" in card
    assert "### Speed" not in model_card(facts, "pruned")
    assert speed(with_verification(throughput=[])) is None


def test_a_card_says_which_engine_really_ran_it():
    facts = with_verification(throughput=[row("base"), row("quantized"), row("quantized", "vllm", version="0.32")])
    assert "This run generated text with it in vLLM 0.32 on cpu." in model_card(facts, "quantized")


def test_benchmarks_keep_lm_evals_names_and_errors():
    facts = with_verification(lm_eval=LM_EVAL)
    section = benchmarks(facts)
    assert section.blocks[0].rows == [
        ("words", "acc", "0.750 ± 0.020", "0.500 ± 0.020"),
        ("words", "acc,strict", "0.375 ± 0.010", "0.250 ± 0.010"),
    ]
    assert "the first 5 documents of each task, at most 512 new tokens" in section.lead
    assert "| words | acc | 0.750 ± 0.020 | 0.500 ± 0.020 |" in model_card(facts, "quantized")


@pytest.mark.parametrize(
    ("interval", "tone", "words"),
    [
        ([0.1, 0.3], "good", "frequency: mean KL 0.0210 against 0.0210, 1 times as much."),
        (
            [-0.3, -0.1],
            "warn",
            (
                "frequency: mean KL 0.0210 against 0.0210: the other criterion loses less. On this model and mix, try"
                " saliency.criterion: frequency."
            ),
        ),
        ([-0.1, 0.1], "info", "frequency: mean KL 0.0210 against 0.0210: no measurable difference on these rows."),
    ],
)
def test_the_report_says_what_the_criterion_bought(interval, tone, words):
    facts = synthetic.facts()
    other = {
        **facts.evaluation["candidates"][0],
        "name": "f",
        "criterion": "frequency",
        "against": {"512": {"all": {"kl_mean_delta": {"value": 0.0, "interval": interval}}}},
    }
    found = dataclasses.replace(facts, evaluation={**facts.evaluation, "controls": [other]})
    note = next(
        block for block in gates(found).blocks if getattr(block, "title", "").startswith("reap against other criteria")
    )
    assert (note.tone, list(note.items)) == (tone, [words])
