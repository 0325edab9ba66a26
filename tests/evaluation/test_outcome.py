"""Nothing calls a result passed that breaks the limits, whoever judged it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from reapkit.evaluation.gates import UNION, Gate
from reapkit.evaluation.outcome import outcome

GATES = [asdict(Gate("kl_mean", max=0.05)), asdict(Gate("loop_share_delta", max=0.0, required=False))]


def evaluated(verdict: str) -> dict[str, Any]:
    return {"verdict": verdict, "gates": GATES}


def verified(low: float | None = None, high: float | None = None, *, verdict: str = "not judged") -> dict[str, Any]:
    """verify.json of a run that ended with a pruned model, or (given an interval of its KL) a quantized one."""
    found: dict[str, Any] = {"base": {}, "pruned": {}}
    if low is not None and high is not None:
        kl = {"value": (low + high) / 2, "interval": [low, high]}
        found["quantized"] = {"512": {UNION: {"rows": 9, "kl_mean": kl}}}
    return {"verdict": verdict, "metrics": found}


@pytest.mark.parametrize(
    ("evaluation", "verification", "tone", "word", "headline"),
    [
        (None, None, "info", "not judged", "Not judged by gates"),
        ("reject", None, "bad", "reject", "Rejected by its gates"),
        ("undecided", None, "warn", "undecided", "Undecided"),
        ("pass", None, "good", "pass", "Passed its gates"),
        ("pass", verified(), "good", "pass", "Passed its gates"),
        ("pass", verified(0.01, 0.02), "good", "pass", "Passed its gates"),
        (
            "pass",
            verified(0.3, 0.4),
            "warn",
            "pass as a mask; quantized breaks the limits",
            "Pruning passed; quantized, it breaks the same limits",
        ),
        (
            "pass",
            verified(0.03, 0.07),
            "warn",
            "pass as a mask; quantized may break the limits",
            "Pruning passed; quantized, it may break the same limits",
        ),
        (
            "reject",
            verified(0.3, 0.4),
            "warn",
            "reject as a mask; quantized breaks the limits",
            "Pruning was rejected; quantized, it breaks the same limits",
        ),
        ("pass", verified(0.3, 0.4, verdict="pass"), "good", "pass", "Passed its gates"),
        ("pass", verified(0.3, 0.4, verdict="reject"), "bad", "reject", "Rejected by its gates"),
        ("pass", verified(0.3, 0.4, verdict="undecided"), "warn", "undecided", "Undecided"),
    ],
)
def test_headlines(evaluation, verification, tone: str, word: str, headline: str) -> None:
    found = outcome(evaluation and evaluated(evaluation), verification)
    assert (found.tone, found.word, found.headline) == (tone, word, headline)


def test_what_was_judged_by_which_gates_is_said() -> None:
    found = outcome(evaluated("pass"), verified(0.3, 0.4))
    assert found.warning == (
        "evaluate.gates judged the pruning alone, as a mask: pass. The quantized model was not judged and breaks the"
        " same limits:\n"
        "  kl_mean 0.35 [0.3, 0.4] (all, 512 tokens), limit ≤ 0.05: reject\n"
        "To have it judged: --set evaluate.gates_quantized=size-first, or limits of your own."
    )
    assert outcome(evaluated("pass"), verified(0.01, 0.02)).sentence == (
        "evaluate.gates judged the pruning alone, as a mask: pass. The quantized model was not judged and keeps the"
        " same limits."
    )
    judged = outcome(evaluated("pass"), verified(0.3, 0.4, verdict="reject"))
    assert judged.warning is None and judged.sentence == (
        "The final model is rejected by evaluate.gates_quantized; the pruning, judged as a mask by"
        " evaluate.gates: pass."
    )


def texts(low: float, high: float) -> dict[str, Any]:
    return {
        "generation": {"all": {"rows": 64, "loop_share_delta": {"value": (low + high) / 2, "interval": [low, high]}}}
    }


@pytest.mark.parametrize(("low", "high", "breaks"), [(0.02, 0.08, True), (-0.02, 0.03, False), (-0.05, -0.01, False)])
def test_the_final_model_breaks_limits_on_text_too(low: float, high: float, breaks: bool) -> None:
    verification = verified(0.01, 0.02) | {"continuations": texts(low, high)}
    found = outcome(evaluated("pass"), verification)
    assert ("breaks the same limits" in found.sentence) == breaks
    if breaks:
        assert [result.gate.metric for result in found.breaking] == ["loop_share_delta"]
