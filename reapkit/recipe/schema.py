"""Defines the recipe as types: every field, its meaning and its allowed values. Imports without torch.

Each field's docstring is its description in `reapkit schema`.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from reapkit.recipe.split_expression import split_parts


def _as_fraction(value: Any) -> Any:
    """YAML gives floats; their shortest decimal text is what the user wrote (0.3 is 3/10, not 0.299999...)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise ValueError("must be a number")
    return Decimal(str(value))


Fraction = Annotated[Decimal, BeforeValidator(_as_fraction)]
"""A number kept as the decimal the user wrote, so that budgets become integers without rounding surprises."""


@dataclass(frozen=True)
class NameOf:
    """Marks a string that names a record of a later folder, such as a criterion. Which names there are is known there:
    callers of the JSON schema and of the reference page pass them in, and the plan checks them."""

    kind: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), NAME_OF: self.kind}


@dataclass(frozen=True)
class ByteCount:
    """Marks a number of bytes, which people also write as `5 GB` (10^9) or `5 GiB` (2^30)."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "anyOf": [handler(schema), {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*[kKmMgGtTpP]?[iI]?[bB]\s*$"}]
        }


@dataclass(frozen=True)
class Later:
    """Marks a field that came to the language when results existed: its default adds nothing to keys."""


@dataclass(frozen=True)
class Resolved:
    """Marks a field that enters keys through what a stage makes of it, where it matters: its value adds nothing."""


def _as_date(value: str) -> str:
    try:
        if datetime.date.fromisoformat(value).isoformat() == value:
            return value
    except ValueError:
        pass
    raise ValueError("must be a date as YYYY-MM-DD")


Date = Annotated[str, AfterValidator(_as_date), Field(json_schema_extra={"format": "date"})]
"""A day, as YYYY-MM-DD."""
LATER = Later()
RESOLVED = Resolved()
NAME_OF = "x-name-of"
CriterionName = Annotated[str, NameOf("criterion")]
SchemeName = Annotated[str, NameOf("scheme")]
Bytes = Annotated[int, ByteCount()]
DEFAULT_CRITERION = "reap"


def _by_shape(value: Any) -> str:
    """Which branch of a scalar-or-structure union a value means, so that its errors speak of that branch alone."""
    if isinstance(value, (dict, BaseModel)):
        return "(mapping)"
    return "(list)" if isinstance(value, (list, tuple)) else "(scalar)"


class Section(BaseModel):
    """A mapping of the recipe: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, strict=True, allow_inf_nan=False
    )


class ModelSpec(Section):
    """Which model is compressed."""

    source: str
    """Hub id (`org/name`), local path (relative to the recipe) or `builtin:demo`."""
    revision: str | None = None
    """Hub commit; `reapkit lock` pins it."""
    trust_remote_code: bool = False
    """Run the checkpoint's own Python code."""


# ---------------------------------------------------------------------------------------------- calibration


class TextFormat(Section):
    """Plain text in one column."""

    text: str
    """The column that holds the text."""


class PromptFormat(Section):
    """A prompt column and a completion column: one user and one assistant turn, or lists of turns."""

    prompt: str
    """The column with the user's turn."""
    completion: str
    """The column with the assistant's turn."""
    input: str | None = None
    """The column with what the prompt is about, added to the user's turn; null: `input` or `context` beside
    `instruction`."""
    system: str | None = None
    """The column with the system's turn; null: `system` or `system_prompt`, where a row has it."""
    tools: str | None = None
    """The column with the tool schemas; null: `tools` or `functions`, where a row has it."""


class MessagesFormat(Section):
    """Chat turns in one column: a list of `{role, content, tool_calls}` or the same as a JSON string."""

    messages: str
    """The column with the turns."""
    tools: str | None = None
    """The column with the tool schemas; null: `tools` or `functions`, where a row has it."""
    system: str | None = None
    """The column with the system's turn; null: `system` or `system_prompt`, where a row has it."""


class XlamFormat(Section):
    """Function calling in the manner of xlam-function-calling-60k: query, tools and answers as JSON strings."""

    xlam: Literal[True] = True
    """Marks the format."""


class TokensFormat(Section):
    """Token ids as they are: no tokenizer, no packing."""

    tokens: str = "input_ids"
    """The column with the ids."""
    assistant_mask: str | None = "assistant_mask"
    """The column with 0/1 marks of assistant tokens, if there is one."""


_FORMAT_KEYS = {
    "text": "TextFormat",
    "prompt": "PromptFormat",
    "completion": "PromptFormat",
    "messages": "MessagesFormat",
    "xlam": "XlamFormat",
    "tokens": "TokensFormat",
    "assistant_mask": "TokensFormat",
}
_FORMAT_NAMES = {
    "text": {"text": "text"},
    "messages": {"messages": "messages"},
    "xlam": {"xlam": True},
    "tokens": {"tokens": "input_ids"},
}


def _spell_out_format(value: Any) -> Any:
    return dict(_FORMAT_NAMES[value]) if isinstance(value, str) and value in _FORMAT_NAMES else value


def _format_tag(value: Any) -> str | None:
    keys = value if isinstance(value, dict) else type(value).model_fields if isinstance(value, Section) else ()
    return next((_FORMAT_KEYS[key] for key in keys if key in _FORMAT_KEYS), None)


Format = Annotated[
    Annotated[TextFormat, Tag("TextFormat")]
    | Annotated[PromptFormat, Tag("PromptFormat")]
    | Annotated[MessagesFormat, Tag("MessagesFormat")]
    | Annotated[XlamFormat, Tag("XlamFormat")]
    | Annotated[TokensFormat, Tag("TokensFormat")],
    Discriminator(
        _format_tag,
        custom_error_type="format",
        custom_error_message=(
            "not a format. Allowed: text, messages, xlam, tokens, {text: COLUMN}, "
            "{prompt: COLUMN, completion: COLUMN}, {messages: COLUMN, tools: COLUMN} or {tokens: COLUMN}"
        ),
    ),
    BeforeValidator(_spell_out_format),
]


class Spans(Section):
    """Markers around what the assistant wrote, for models whose chat template does not mark it."""

    start: str
    """Text that opens an assistant turn; scored tokens begin after it."""
    end: Annotated[
        Annotated[str, Tag("(scalar)")] | Annotated[tuple[str, ...], Tag("(list)")], Discriminator(_by_shape)
    ]
    """Text (or one of several texts) that closes the turn. The closing marker itself is scored, too."""


def _range_end(value: Any) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, str))):
        raise ValueError("must be a number, or text such as a date")
    return value


RangeEnd = Annotated[
    Any,
    BeforeValidator(_range_end),
    WithJsonSchema({"anyOf": [{"type": name} for name in ("number", "string", "null")]}),
]


class Condition(Section):
    """What a column must hold to pass a filter; all parts that are given must hold."""

    min: RangeEnd = None
    """The least value: a number, or text (dates in ISO form)."""
    max: RangeEnd = None
    """The greatest value."""
    not_: Any = Field(default=None, alias="not")
    """The value, or list of values, that the column must not hold; null: it must hold something."""
    matches: str | None = None
    """A regular expression (Python's) of which the text must hold a match."""

    @property
    def excludes(self) -> bool:
        """Whether `not` is given, null being a value too."""
        return "not_" in self.model_fields_set

    @field_validator("matches")
    @classmethod
    def _check_matches(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"which is no regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _check(self) -> Condition:
        if not self.excludes and self.min is None and self.max is None and self.matches is None:
            raise ValueError("is empty. Give at least one of min, max, not, matches")
        if isinstance(self.not_, dict):
            raise ValueError("`not` takes a value or a list of values")
        if self.min is not None and self.max is not None:
            if isinstance(self.min, str) != isinstance(self.max, str):
                raise ValueError("`min` and `max` must both be numbers, or both be text")
            if self.min > self.max:
                raise ValueError(f"`min` ({self.min}) is above `max` ({self.max}), so no row would pass")
        return self

    @model_serializer
    def _given(self) -> dict[str, Any]:
        """As written: null is a value of `not`, and what is not there asks for nothing."""
        fields = type(self).model_fields
        return {fields[name].alias or name: getattr(self, name) for name in fields if name in self.model_fields_set}


Wanted = Annotated[
    Annotated[Condition, Tag("(mapping)")] | Annotated[Any, Tag("(list)")] | Annotated[Any, Tag("(scalar)")],
    Discriminator(_by_shape),
]
"""What a column must hold: a value, one of a list of values, or a condition."""


class MixEntry(Section):
    """One source of calibration samples."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The source's name in tables, statistics and `saliency.mix`."""
    source: str
    """Hub dataset id, files of one (`hf://datasets/org/name/path`), local file, pattern or folder (relative to the
    recipe), or `builtin:code|tools|prose|math`; which files are read is in docs/datasets.md."""
    config: str | None = None
    """The dataset's configuration."""
    split: str = "train"
    """The dataset's split, a part of it (`train[:1000]`, `train[10%:20%]`) or a sum (`train+test`); of files only
    `train` and parts of it."""
    revision: str | None = None
    """The hub dataset's commit; `reapkit lock` pins it. Without it the commit of the day is read and is in the key."""
    weight: Fraction = Field(default=Decimal(1), gt=0)
    """Share of samples (or of tokens) in the mix, normalised over all entries."""
    format: Format | None = None
    """How a row becomes a sample; null: detected from the columns."""
    max_tokens: Annotated[Annotated[int, Field(ge=2)] | None, LATER] = None
    """Tokens of a sample that are used: a longer one is cut before it is packed, as `overflow` cuts (window: the last
    ones that hold an assistant span; else the first ones). null: as many as it has."""
    filter: dict[str, Wanted] | None = None
    """Keep only rows whose columns hold this: `{language: en}`, one of several (`{language: [en, de]}`), a range
    (`{stars: {min: 4, max: 5}}`), anything but (`{topic: {not: [news, null]}}`) or what a regular expression finds
    (`{topic: {matches: "^math"}}`)."""

    @field_validator("split")
    @classmethod
    def _check_split(cls, value: str) -> str:
        split_parts(value)
        return value


class CalibrationSpec(Section):
    """What the model reads while it is observed."""

    samples: int | None = Field(default=None, ge=1)
    """Dataset samples over the whole mix; or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens over the whole mix; or `samples`."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens per row."""
    packing: Literal["none", "concat", "isolated"] = "concat"
    """none: one row per sample; concat: rows are filled with samples of one source, which attend to each other;
    isolated: as concat, but the samples do not attend to each other."""
    overflow: Literal["truncate", "split", "window"] = "truncate"
    """A sample longer than a row: cut, split into rows, or the last `max_length` tokens that hold an assistant span."""
    score: Literal["all", "completion"] = "completion"
    """Which positions count: all, or those that predict an assistant token."""
    spans: Spans | None = None
    """Assistant markers, where the chat template has none; also used for `text`."""
    chat_template: str | None = None
    """Path of a Jinja template, where the model ships none or one without assistant marks."""
    seed: int = Field(default=42, ge=0)
    """Draws the samples."""
    date: Annotated[Date | None, RESOLVED] = None
    """The day (YYYY-MM-DD) that chat templates see where they read the clock; null: that of the store's first run with
    such a template, which the store and `reapkit lock` keep."""
    balance: Annotated[Literal["samples", "tokens", "scored_tokens"] | None, LATER] = None
    """What the weights are shares of: samples are drawn so that each source has its share of them, of the tokens, or of
    the scored tokens (what counts), to within one sample. null: of what the mix is measured in, `samples` or `tokens`.
    Held-out packs always have shares of samples."""
    max_dropped: Annotated[Fraction, Field(ge=0, le=1), LATER] = Decimal("0.01")
    """Share of a source's rows that may be dropped because they cannot be read or rendered; more is an error."""
    mix: tuple[MixEntry, ...] = Field(min_length=1)
    """The sources and their weights."""

    @property
    def asked(self) -> tuple[Literal["samples", "tokens"], int]:
        """What the mix is measured in, and how much of it there is over the whole mix."""
        if self.samples is not None:
            return "samples", self.samples
        assert self.tokens is not None, "either `samples` or `tokens` is given: _check"
        return "tokens", self.tokens

    @property
    def shared_out(self) -> Literal["samples", "tokens", "scored_tokens"]:
        """What the weights are shares of."""
        return self.balance or self.asked[0]

    @model_validator(mode="after")
    def _check(self) -> CalibrationSpec:
        if (self.samples is None) == (self.tokens is None):
            raise ValueError("give either `samples` or `tokens`")
        names = [entry.name for entry in self.mix]
        if doubled := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"mix names must be unique, found twice: {', '.join(doubled)}")
        if self.samples is not None and self.samples < len(names):
            raise ValueError(f"{self.samples} samples cannot cover {len(names)} sources; raise `samples`")
        return self


class ObserveSpec(Section):
    """What is collected while the calibration runs; with model and calibration the whole key of an observation."""

    eaft: bool = True
    """Collect what EAFT-REAP needs: the probability of the reference token and the entropy at every position."""
    entropy_top_k: int = Field(default=20, ge=2)
    """Logits over which the entropy is taken."""
    reroute_tokens: int = Field(default=0, ge=0)
    """Tokens on which the reroute criteria are measured in every layer, 8192 for instance; 0: not collected."""
    knockout_tokens: int = Field(default=8192, ge=0)
    """Scored tokens, in whole rows, on which a criterion of knock-outs has the absence of every expert measured; no
    other criterion does. 0: never."""
    trace_bytes: Bytes = Field(default=20_000_000_000, ge=0)
    """Size limit of the exact EAFT trace. A calibration that needs more is summed in a table of 32 x 16 cells of (p, H)
    instead."""


# ---------------------------------------------------------------------------------------------- saliency


class Quantiles(Section):
    """Where the EAFT regions begin, as quantiles in [0, 1]."""

    p_low: Fraction = Field(default=Decimal("0.15"), ge=0, le=1)
    """Reference-token probability at or below which the model is wrong."""
    h_low: Fraction = Field(default=Decimal("0.15"), ge=0, le=1)
    """Entropy at or below which it is confident."""
    h_high: Fraction = Field(default=Decimal("0.85"), ge=0, le=1)
    """Entropy at or above which it is uncertain."""


class RegionWeights(Section):
    """The weight of a position by its region."""

    good: float = 1.0
    """Everything else."""
    uncertain: float = 0.25
    """Low probability, high entropy."""
    conflict: float = -2.0
    """Low probability, low entropy: confidently wrong."""


class GoodRegion(Section):
    """A stricter good region: p ≥ q(p_high) and H ≤ q(h_mid); the rest weighs `other_weight`."""

    p_high: Fraction = Field(default=Decimal("0.5"), ge=0, le=1)
    """Quantile of the probability."""
    h_mid: Fraction = Field(default=Decimal("0.5"), ge=0, le=1)
    """Quantile of the entropy."""
    other_weight: float = 0.25
    """Weight of positions in no region."""


class EaftSpec(Section):
    """Read when `saliency.criterion` is eaft-reap."""

    quantiles: Quantiles = Quantiles()
    """Region borders."""
    thresholds: Literal["pooled", "per-source"] = "pooled"
    """Quantiles over all positions, or over each source's own."""
    weights: RegionWeights = RegionWeights()
    """Region weights."""
    good: Annotated[
        Annotated[Literal["rest"], Tag("(scalar)")] | Annotated[GoodRegion, Tag("(mapping)")], Discriminator(_by_shape)
    ] = "rest"
    """Good is everything else, or a stricter region."""


class SaliencySpec(Section):
    """How much each expert matters."""

    criterion: CriterionName = DEFAULT_CRITERION
    """What ranks the experts; or your own, as module:function."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over the positions routed to the expert."""
    prior_count: float = Field(default=0.0, ge=0)
    """λ: a mean becomes Σ / (N + λ), which shrinks experts seen rarely."""
    mix: dict[str, Fraction] | None = None
    """Post-hoc weights by source name: shares of scored tokens."""
    seed: int = 0
    """Of `random`."""
    eaft: EaftSpec = EaftSpec()
    """EAFT regions and weights."""


# ---------------------------------------------------------------------------------------------- prune


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayerRange = Annotated[str, BeforeValidator(_as_text), Field(pattern=r"^\d+(-\d*)?(, ?\d+(-\d*)?)*$")]
Layer = Annotated[int, Field(ge=0)]


class Cap(Section):
    """A limit on what a range of layers may lose."""

    layers: Annotated[
        Annotated[LayerRange, Tag("(scalar)")] | Annotated[tuple[Layer, ...], Tag("(list)")], Discriminator(_by_shape)
    ]
    """`0-3`, `60-`, `7` or a list of decoder layer indices."""
    max_ratio: Annotated[Fraction, Field(ge=0, lt=1)] | None = None
    """Largest fraction removed."""
    min_experts: int | None = Field(default=None, ge=1)
    """Fewest experts kept."""
    keep_all: bool = False
    """Remove nothing."""

    @model_validator(mode="after")
    def _check(self) -> Cap:
        if (self.max_ratio is not None) + (self.min_experts is not None) + self.keep_all != 1:
            raise ValueError("give exactly one of max_ratio, min_experts and keep_all: true")
        return self


class ProtectSpec(Section):
    """Experts that stay whatever their saliency."""

    super_experts: bool = True
    """Keep experts with massive activations."""
    core_per_layer: int = Field(default=0, ge=0)
    """Keep the top m of each layer by Σgn over good positions."""
    experts: dict[int, tuple[int, ...]] = {}
    """Experts chosen by hand: decoder layer to list of experts."""


class CandidatesSpec(Section):
    """A grid of candidates; the smallest model that passes the gates wins."""

    ratio: tuple[Fraction, ...] | None = None
    """Fractions of experts removed."""
    criterion: tuple[CriterionName, ...] | None = None
    """Saliency criteria."""
    allocation: tuple[Literal["uniform", "global"], ...] | None = None
    """Allocations."""
    experts_per_token: tuple[int, ...] | None = None
    """Top-k of the pruned model."""


class PruneSpec(Section):
    """How much is removed, and where."""

    ratio: Annotated[Fraction, Field(ge=0, lt=1)] | None = None
    """Fraction of routed experts removed per layer (rounded down)."""
    keep_ratio: Annotated[Fraction, Field(gt=0, le=1)] | None = None
    """Fraction kept; the same as ratio = 1 - keep_ratio."""
    keep_experts: int | None = Field(default=None, ge=1)
    """Experts kept per layer."""
    candidates: CandidatesSpec | None = None
    """Replaces the scalars by a grid."""
    allocation: Literal["uniform", "global"] = "uniform"
    """The same budget in every layer, or the experts of all layers ranked together."""
    layout: Literal["uniform", "ragged"] = "uniform"
    """The same number of experts in every layer, or a number per layer."""
    multiple_of: int = Field(default=1, ge=1)
    """Kept counts are divisible by this; 8 suits many kernels."""
    caps: tuple[Cap, ...] = ()
    """Limits by layer range."""
    protect: ProtectSpec = ProtectSpec()
    """Experts that are never removed."""
    experts_per_token: int | None = Field(default=None, ge=1)
    """Top-k of the pruned model; null: unchanged."""
    repair: Literal["ridge"] | None = None
    """ridge: re-fit the kept experts' output matrices in closed form so that they make up for the dropped ones."""
    mtp: Literal["auto", "observe", "drop"] = "auto"
    """What happens to multi-token-prediction blocks: observe runs them on the calibration and prunes them by their own
    saliency; drop removes them and their config field; auto observes them where transformers can load them
    (deepseek_v3, glm4_moe), else drops them with a warning."""

    @model_validator(mode="after")
    def _check(self) -> PruneSpec:
        given = [name for name in ("ratio", "keep_ratio", "keep_experts") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both set the budget; give only one")
        if not given and (self.candidates is None or self.candidates.ratio is None):
            raise ValueError(
                "the amount to remove is missing; give ratio, keep_ratio, keep_experts or candidates.ratio"
            )
        if self.allocation == "global" and self.layout != "ragged":
            raise ValueError("allocation: global gives layers different expert counts, which needs layout: ragged")
        return self


# ---------------------------------------------------------------------------------------------- evaluate


class PacksSpec(Section):
    """Held-out rows on which base and candidates are compared."""

    samples: int = Field(default=512, ge=2)
    """Samples over the whole mix, drawn from the same sources, disjoint from the calibration."""
    lengths: tuple[int, ...] = Field(default=(1024, 2048), min_length=1)
    """Row lengths in tokens."""
    confirm: Fraction = Field(default=Decimal("0.5"), ge=0, lt=1)
    """Share of the held-out rows that is reserved for the final numbers."""


class Bound(Section):
    """A bound on a metric; inclusive."""

    max: float | None = None
    """Largest value that passes."""
    min: float | None = None
    """Smallest value that passes."""


class Limit(Bound):
    """A bound on a metric over all sources, and others for single sources."""

    sources: dict[str, Bound] | None = None
    """Bounds by source name."""

    @model_validator(mode="after")
    def _check(self) -> Limit:
        if self.max is None and self.min is None and not self.sources:
            raise ValueError("give max, min or sources")
        return self


class GatesSpec(Section):
    """Limits by metric, optionally on top of a preset."""

    preset: Literal["near-lossless", "strict", "size-first"] | None = None
    """The preset that the limits below replace or extend."""
    perplexity_ratio: Limit | None = None
    """Perplexity over the base's."""
    kl_mean: Limit | None = None
    """Mean KL(base‖candidate) per position, in nats."""
    top1_agreement: Limit | None = None
    """Share of positions with the base's most likely token."""
    conflict_rate_delta: Limit | None = None
    """Change of the share of confident conflicts."""
    loop_share_delta: Limit | None = None
    """Change of the share of looping continuations."""


Gates = Annotated[
    Annotated[Literal["near-lossless", "strict", "size-first"], Tag("(scalar)")]
    | Annotated[GatesSpec, Tag("(mapping)")],
    Discriminator(_by_shape),
]


class GenerationSpec(Section):
    """Free generation, to see loops and broken tool calls."""

    prompts: int = Field(default=64, ge=1)
    """Prompts taken from the packs."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens per continuation."""


class LmEvalSpec(Section):
    """Task benchmarks through the lm-eval package."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Task names or paths of task files."""
    limit: int | None = Field(default=None, ge=1)
    """Documents per task."""


class ThroughputSpec(Section):
    """Speed and memory of base and result, by each engine that is installed."""

    prompt_tokens: int = Field(default=256, ge=1)
    """Tokens read at once."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens generated one by one."""


class EvaluateSpec(Section):
    """What the pruned model must hold against the base before anything is written."""

    packs: PacksSpec = PacksSpec()
    """Held-out rows."""
    extra_packs: tuple[MixEntry, ...] = ()
    """Sources that are not in the calibration, to measure what the pruning costs elsewhere."""
    gates: Gates = "near-lossless"
    """A preset, or limits by metric."""
    gates_quantized: Gates | None = None
    """Limits for the final directory; null: measured and reported, but not judged."""
    on_reject: Literal["stop", "warn"] = "stop"
    """What happens when a gate fails; stop: exit 5, nothing written."""
    on_undecided: Literal["stop", "warn"] = "stop"
    """What happens when an interval contains a limit, so that the verdict is undecided."""
    controls: tuple[CriterionName, ...] = ()
    """Other criteria at the same budget, for comparison."""
    generation: GenerationSpec | None = GenerationSpec()
    """Generation metrics, or null."""
    lm_eval: LmEvalSpec | None = None
    """Task benchmarks, or null."""
    throughput: ThroughputSpec | None = ThroughputSpec()
    """Prefill and decode speed and peak memory of base and result, or null."""
    equal_bytes: bool = True
    """Measure the unpruned model beside the result, quantized alone to about the same bytes."""


# ---------------------------------------------------------------------------------------------- quantize, output,
# runtime


class QuantizeSpec(Section):
    """Weight-only quantization of the pruned checkpoint."""

    scheme: SchemeName | None = "W3A16"
    """A weight-only compressed-tensors preset, or null for none."""
    method: Literal["rtn", "gptq", "awq", "autoround"] = "gptq"
    """How weights are rounded."""
    group_size: int = Field(default=128, ge=1)
    """Weights that share a scale; divides every quantized input width."""
    ignore: tuple[str, ...] = ()
    """Added to what is never quantized: module names or `re:` patterns."""
    calibrate_all_experts: bool = False
    """Run every expert on every calibration token."""
    recipe: (
        Annotated[
            Annotated[str, Tag("(scalar)")] | Annotated[dict[str, Any], Tag("(mapping)")], Discriminator(_by_shape)
        ]
        | None
    ) = None
    """A raw llm-compressor recipe instead of the fields above, inline or as a path."""


class OutputSpec(Section):
    """What is left on disk."""

    directory: str | None = None
    """The run directory; null: runs/NAME."""
    keep: tuple[Literal["pruned", "quantized"], ...] = ("pruned", "quantized")
    """Model directories kept after verification."""
    max_shard_bytes: Bytes = Field(default=5_000_000_000, ge=1_000_000)
    """Largest safetensors shard; `5 GB` is 5_000_000_000."""
    card: bool = True
    """Write the model card into the output."""
    push_to_hub: str | None = None
    """Hub repository to upload the result to."""


class RuntimeSpec(Section):
    """Where and how it runs; never changes the decision, never enters a key."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:0, …"""
    placement: Literal["auto", "resident", "streaming"] = "auto"
    """Whole model in memory, or a layer at a time."""
    batch_tokens: int = Field(default=16384, ge=1)
    """Tokens per forward."""
    offload_directory: str | None = None
    """Where hidden states are kept between layers, and the layers that wait while others are quantized."""
    checkpoint_minutes: float = Field(default=10, gt=0)
    """How often a streaming run persists what it needs to resume."""
    store: str = "runs/.store"
    """The artifact store."""


class Recipe(Section):
    """One recipe: from a checkpoint to a pruned, quantized, proven model."""

    version: Literal[1]
    """The language's version."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Names the run directory."""
    description: str = ""
    """What it is for."""
    model: ModelSpec
    """Which model."""
    calibration: CalibrationSpec
    """What it reads while observed."""
    observe: ObserveSpec = ObserveSpec()
    """What is collected."""
    saliency: SaliencySpec = SaliencySpec()
    """How experts are ranked."""
    prune: PruneSpec
    """How much is removed."""
    evaluate: EvaluateSpec = EvaluateSpec()
    """What must hold."""
    quantize: QuantizeSpec = QuantizeSpec()
    """How it is quantized."""
    output: OutputSpec = OutputSpec()
    """What is kept, and where."""
    runtime: RuntimeSpec = RuntimeSpec()
    """Where it runs."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__  # wherever they were written
