"""Says what was judged, by which gates, and what the final directory measures against the same limits. Torch-free.

`evaluate.gates` judge the pruning, as a mask on the base model; `evaluate.gates_quantized` judge the final directory.
Where only the first were set, a quantized result may break the very limits that the pruning kept: then nothing may call
it passed. Page, card, terminal, `inspect` and `compare` take their words from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from reapkit.evaluation.gates import Gate, GateResult, judge, overall
from reapkit.evaluation.metrics.table import is_generation

Tone = Literal["good", "warn", "bad", "info"]
HEADINGS: Mapping[str, tuple[Tone, str]] = {
    "pass": ("good", "Passed its gates"),
    "reject": ("bad", "Rejected by its gates"),
    "undecided": ("warn", "Undecided"),
}


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `word`: for a cell of a table; `headline`: heads a page; `sentence`: what was judged, by which
    gates; `breaking`: the limits that the final directory does not keep although nothing judged it by them."""

    tone: Tone
    word: str
    headline: str
    sentence: str
    breaking: tuple[GateResult, ...] = ()

    @property
    def warning(self) -> str | None:
        """What a user must hear at the end; None where the verdict says it all."""
        if not self.breaking:
            return None
        lines = [self.sentence, *(f"  {result}" for result in self.breaking)]
        return "\n".join(
            [*lines, "To have it judged: --set evaluate.gates_quantized=size-first, or limits of your own."]
        )


def outcome(evaluation: Mapping[str, Any] | None, verification: Mapping[str, Any] | None) -> Outcome:
    """Of what evaluation.json and verify.json hold; either may be missing."""
    pruning = (evaluation or {}).get("verdict", "not judged")
    final = (verification or {}).get("verdict", "not judged")
    if final != "not judged":
        return _judged_final(final, pruning)
    name = _final(verification)
    if name is None or name == "pruned" or pruning not in ("pass", "undecided", "reject"):
        return _judged_mask(pruning, name)
    return _beside_the_limits(evaluation or {}, verification or {}, name, pruning)


def _final(verification: Mapping[str, Any] | None) -> str | None:
    """The final directory that was measured."""
    written = [name for name in (verification or {}).get("metrics") or {} if name != "base"]
    return written[-1] if written else None


def _judged_final(final: str, pruning: str) -> Outcome:
    said = {"pass": "passes", "reject": "is rejected by", "undecided": "is left undecided by"}
    tone, heading = HEADINGS.get(final, HEADINGS["undecided"])
    mask = f"; the pruning, judged as a mask by evaluate.gates: {pruning}" if pruning != "not judged" else ""
    sentence = f"The final model {said.get(final, 'is judged by')} evaluate.gates_quantized{mask}."
    return Outcome(tone, final, heading, sentence)


def _judged_mask(pruning: str, final: str | None) -> Outcome:
    tone, heading = HEADINGS.get(pruning, ("info", "Not judged by gates"))
    if pruning == "not judged":
        return Outcome(tone, pruning, heading, "No gates judged this run.")
    where = ", and the pruned directory is proven equal to it" if final == "pruned" else ""
    return Outcome(
        tone, pruning, heading, f"evaluate.gates judged the pruning, as a mask on the base{where}: {pruning}."
    )


def _beside_the_limits(
    evaluation: Mapping[str, Any], verification: Mapping[str, Any], name: str, pruning: str
) -> Outcome:
    """A final directory that no gates judged, beside the limits that judged the pruning."""
    texts = verification.get("continuations") if name == "quantized" else None
    written = [Gate(**gate) for gate in evaluation.get("gates", ())]
    gates = [gate for gate in written if texts or not is_generation(gate.metric)]
    results = judge(verification["metrics"][name] | ({"generation": texts["generation"]} if texts else {}), gates)
    against = overall(results)
    judged = f"evaluate.gates judged the pruning alone, as a mask: {pruning}. The {name} model was not judged"
    if against == "pass" or not gates:
        tone: Tone = "good" if pruning == "pass" else "warn"
        kept = " and keeps the same limits" if gates else ""
        return Outcome(tone, pruning, _judged_mask(pruning, None).headline, f"{judged}{kept}.")
    breaks = "breaks" if against == "reject" else "may break"
    wrong = tuple(result for result in results if result.verdict == against)
    mask = {"pass": "Pruning passed", "reject": "Pruning was rejected"}.get(pruning, "Pruning was undecided")
    heading = f"{mask}; {name}, it {breaks} the same limits"
    sentence = f"{judged} and {breaks} the same limits:"
    return Outcome("warn", f"{pruning} as a mask; {name} {breaks} the limits", heading, sentence, wrong)
