"""A scheme is one record: its arithmetic, its name, what is refused; a new one is found wherever people look."""

from __future__ import annotations

import dataclasses
import re

import pytest

from reapkit.core.errors import RecipeError
from reapkit.evaluation.equal_bytes import next_scheme
from reapkit.pipeline.planned import plan
from reapkit.quantization.checks import check_quantize
from reapkit.quantization.engines import ENGINES, serving_table
from reapkit.quantization.schemes import SCHEMES, Scheme, scheme_of, schemes_table
from reapkit.quantization.sizes import quantized_bytes
from reapkit.recipe.loading import load
from reapkit.recipe.schema import QuantizeSpec
from reapkit.report.card import model_card
from reapkit.report.quantization_section import quantization
from reapkit.report.tables import plan_as_json
from tests.support import synthetic_report
from tests.support.paths import ROOT

NEW = Scheme("W9A16", 9, 128, None, False, "9-bit integers, as nobody asked for", experts_reload=False, suggested=True)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("W3A16", 3.125), ("W4A16", 4.125), ("W8A16", 8.125), ("NVFP4A16", 4.5), ("MXFP4A16", 4.25), ("MXFP8A16", 8.25)],
)
def test_bits_per_weight_of_a_large_matrix(name: str, bits: float) -> None:
    scheme, rows, columns = SCHEMES[name], 4096, 8192
    assert (scheme.nbytes(rows, columns, 128) * 8 - scheme.constant_bits) / (rows * columns) == bits


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("W3A61", "'W3A61' is not a known scheme. Did you mean W3A16?"),
        ("W4A16_ASYM", "stores zero points, which transformers loses"),
        ("W4A8", "quantizes activations too"),
        ("NVFP4", "quantizes activations too"),
    ],
)
def test_schemes_that_are_refused(tiny_checkpoint, scheme: str, message: str) -> None:
    spec = QuantizeSpec(scheme=scheme)
    (problem,) = check_quantize(tiny_checkpoint("qwen3_moe"), spec)
    assert problem.path == "quantize.scheme" and message in problem.message
    with pytest.raises(RecipeError, match=re.escape(message)):
        scheme_of(spec)


def test_a_scheme_is_found_in_either_case() -> None:
    assert scheme_of(QuantizeSpec(scheme="fp8_dynamic")) is SCHEMES["FP8_DYNAMIC"]


def test_the_tables_in_the_readme_are_current() -> None:
    readme = (ROOT / "README.md").read_text()
    assert serving_table() in readme, "put what reapkit.quantization.engines.serving_table() returns into README.md"
    assert schemes_table() in readme, "put what reapkit.quantization.schemes.schemes_table() returns into README.md"


def test_a_new_scheme_is_one_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, checks, advice, card, report and docs read the table and nothing else."""
    monkeypatch.setitem(SCHEMES, NEW.name, NEW)
    planned = plan(load(ROOT / "recipes/demo.yaml", ("quantize.scheme=W9A16", "quantize.method=gptq")))
    spec, [candidate] = planned.recipe.quantize, planned.candidates
    before = quantized_bytes(planned.checkpoint, spec.model_copy(update={"scheme": "W8A16"}), planned.kept(candidate))
    found = plan_as_json(planned)
    assert found["candidates"][0]["quantized_bytes"] == planned.quantized_nbytes(candidate) > before
    assert any("cannot read this model's routed experts in W9A16" in note for note in found["notes"])
    with pytest.raises(RecipeError, match=r"Did you mean W9A16\?.*NVFP4A16, W9A16, or null"):
        scheme_of(QuantizeSpec(scheme="W9A61"))
    assert next_scheme(planned.checkpoint, spec, quantized_bytes(planned.checkpoint, spec) - 1)[0] == "W9A16"
    facts = synthetic_report.facts()
    facts = dataclasses.replace(facts, quantization={**facts.quantization, "scheme": "W9A16"})
    assert "vLLM: check that your version reads this" in model_card(facts, "quantized")
    assert NEW.meaning in quantization(facts).lead
    assert f"| W9A16 | {NEW.meaning} | 9.125 |" in schemes_table()
    assert "| routed experts in FP8_BLOCK, MXFP8A16, NVFP4A16, W9A16 | no | not tried |" in serving_table()


def test_what_an_engine_is_known_to_serve_is_a_scheme() -> None:
    from reapkit.quantization.engines import SGLANG, VLLM

    assert {*SGLANG, *VLLM} <= {*SCHEMES}
    for engine in ENGINES.values():
        if engine.on_card:
            kinds = [engine.plain, engine.ragged, *(engine.support(name) for name in (*SCHEMES, "raw recipe"))]
            assert all(kind.sentence.endswith(".") for kind in kinds)
