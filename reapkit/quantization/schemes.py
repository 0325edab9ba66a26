"""Weight-only quantization schemes as data, and what each would do to a checkpoint, from its headers alone. Torch-free.

Quantized are the matrices of the decoder layers: attention, dense and shared MLPs, every routed expert. Never
quantized, found by what they are and not by one name: everything outside the decoder layers (embeddings, head, vision
and audio towers), multi-token-prediction blocks, routers, gates with a single output, indexers, vectors and
convolutions.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd

from reapkit.checkpoint.architecture import text_config
from reapkit.checkpoint.checkpoint import Checkpoint
from reapkit.checkpoint.expert_layout import LAYER, Kind, Layout, read_layout
from reapkit.core.dtypes import BITS, FLOATS
from reapkit.core.errors import Problem, RecipeError
from reapkit.core.safetensors_header import TensorInfo
from reapkit.recipe.schema import QuantizeSpec

INDEXER = re.compile(r"(?:^|[._])indexer(?:[._]|$)")
FP8_METHODS = ("fp8",)


@dataclass(frozen=True)
class Scheme:
    """How a scheme stores one matrix [rows, columns]; the names are compressed-tensors' presets.

    `group`: columns that share a scale (None: one scale per row); `rows_per_scale` > 1 for blocks. `fixed`: the group
    is part of the format. `scale_bits` None: as the weights. `constant_bits`: per matrix. `experts_reload`: whether
    transformers 5.17 reads routed experts in this format; engines that keep one module per expert (vLLM) read all of
    them.
    """

    name: str
    bits: int
    group: int | None
    scale_bits: int | None
    fixed: bool
    constant_bits: int = 0
    rows_per_scale: int = 1
    kind: str = "int"
    experts_reload: bool = True

    def nbytes(self, rows: int, columns: int, group_size: int, weight_bits: int = 16) -> int:
        """Bytes of one quantized matrix: packed weights, scales (as wide as the source's weights unless the format
        says) and the rest."""
        group = (self.group if self.fixed else group_size) or columns
        words = -(-columns * self.bits // 32) * 32 if self.kind == "int" else columns * self.bits
        scales = -(-rows // self.rows_per_scale) * -(-columns // group)
        return (rows * words + scales * (self.scale_bits or weight_bits) + self.constant_bits) // 8


_SHAPE = 2 * 64  # pack-quantized stores `weight_shape`, two int64
SCHEMES: Mapping[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        *(Scheme(f"W{bits}A16", bits, 128, None, fixed=False, constant_bits=_SHAPE) for bits in range(2, 9)),
        Scheme("FP8_DYNAMIC", 8, None, None, fixed=True, kind="float"),
        Scheme("FP8_BLOCK", 8, 128, None, fixed=True, rows_per_scale=128, kind="float", experts_reload=False),
        Scheme("MXFP4A16", 4, 32, 8, fixed=True, kind="float"),
        Scheme("MXFP8A16", 8, 32, 8, fixed=True, kind="float", experts_reload=False),
        Scheme("NVFP4A16", 4, 16, 8, fixed=True, constant_bits=32, kind="float", experts_reload=False),
    )
}
ASYMMETRIC = ("W4A16_ASYM",)
QUANTIZE_ACTIVATIONS = re.compile(r"^(?:W\dA[48]|W4AFP8|W8A8|INT8|FP8|NVFP4|MXFP4|MXFP8)$")
METHOD_SCHEMES: Mapping[str, Mapping[str, str]] = {
    "awq": {
        name: "awq scales weights for integer schemes" for name, scheme in SCHEMES.items() if scheme.kind == "float"
    },
    "autoround": {
        name: "autoround tunes integer rounding" for name, scheme in SCHEMES.items() if scheme.kind == "float"
    },
}
"""method -> the schemes it cannot do, and why."""


@dataclass(frozen=True)
class Matrix:
    """A tensor that will be quantized: `count` matrices [rows, columns] (a stack of experts counts each projection)."""

    tensor: TensorInfo
    count: int
    rows: int
    columns: int
    layer: int
    routed: bool

    @property
    def module(self) -> str:
        return self.tensor.name.removesuffix(".weight")


@dataclass(frozen=True)
class Targets:
    """What a quantization touches: matrices by tensor name, and the modules left alone (every 2-D weight that is not in
    it) by reason."""

    matrices: Mapping[str, Matrix]
    left: Mapping[str, str]

    @property
    def has_stacked_experts(self) -> bool:
        """Whether experts are stored as one stacked tensor, which quantized formats cannot hold."""
        return any(len(matrix.tensor.shape) == 3 for matrix in self.matrices.values())


def expert_prefixes(matrix: Matrix) -> list[str]:
    """The names under which a stack of experts is written: one module per expert and projection, as engines with such
    modules spell it.

    Expert by expert, gate before up; w1 and w3 where the source speaks mixtral's dialect (`input_linear`,
    `output_linear`).
    """
    mixtral = "input_linear" in matrix.module or "output_linear" in matrix.module
    site = re.sub(r"\.(?:experts\.)?[^.]+$", "", matrix.module)
    if "down" in matrix.module or "output_linear" in matrix.module:
        projections = ("w2",) if mixtral else ("down_proj",)
    elif matrix.count == matrix.tensor.shape[0]:
        projections = ("up_proj",)
    else:
        projections = ("w1", "w3") if mixtral else ("gate_proj", "up_proj")
    return [
        f"{site}.experts.{expert}.{projection}"
        for expert in range(matrix.tensor.shape[0])
        for projection in projections
    ]


def scheme_of(spec: QuantizeSpec) -> Scheme:
    """The scheme that `quantize.scheme` names. Raises RecipeError listing the known ones."""
    if problem := _scheme_problem(spec):
        raise RecipeError([problem])
    return SCHEMES[str(spec.scheme).upper()]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module name is one of the patterns: names as they are, `re:` patterns matched from the start."""
    return any(re.match(pattern[3:], name) if pattern.startswith("re:") else pattern == name for pattern in patterns)


def targets(checkpoint: Checkpoint, spec: QuantizeSpec, layout: Layout | None = None) -> Targets:
    """Decides for every matrix of the checkpoint whether it is quantized, and says why not where it is not."""
    layout = layout or read_layout(checkpoint)
    routed = {name for layer in layout.layers.values() for names in layer.parts.values() for name in names.values()}
    decide = _decider(checkpoint, spec, layout)
    matrices: dict[str, Matrix] = {}
    left: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        decided = decide(tensor)
        if isinstance(decided, Matrix):
            matrices[name] = replace(decided, routed=True) if name in routed else decided
        elif decided is not None:
            left[name.removesuffix(".weight")] = decided
    return Targets(matrices, left)


def _decider(checkpoint: Checkpoint, spec: QuantizeSpec, layout: Layout) -> Callable[[TensorInfo], Matrix | str | None]:
    """What becomes of a tensor: a matrix that is quantized, the reason why not, or None for what is no matrix at
    all."""
    stacked = {name: index for index, layer in layout.layers.items() for name in layer.stacked}
    decoder = _decoder(layout)

    def decide(tensor: TensorInfo) -> Matrix | str | None:
        name = tensor.name
        if name in stacked and len(tensor.shape) == 3:
            return _left_by_user(name, spec) or _stacked_experts(tensor, stacked[name], checkpoint)
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype in (*FLOATS, "F8_E4M3"):
            match = LAYER.match(name)
            return (
                _why_left(name, tensor, stacked, layout, decoder)
                or _left_by_user(name, spec)
                or Matrix(tensor, 1, *tensor.shape, layer=int(match["index"]) if match else -1, routed=False)
            )
        return None

    return decide


def _decided_kinds(checkpoint: Checkpoint, spec: QuantizeSpec, layout: Layout) -> Iterator[tuple[Kind, Matrix | None]]:
    """Every tensor of the checkpoint, those that differ in their expert only together, and the matrix it is quantized
    as, if it is.

    Patterns of the user may tell experts apart; then each comes by itself.
    """
    decide = (
        _decider(checkpoint, spec, layout) if spec.scheme is not None and spec.recipe is None else lambda tensor: None
    )
    for kind in layout.kinds:
        each = (
            (kind,)
            if not spec.ignore
            else (replace(kind, tensor=checkpoint.tensors[name], names=(name,)) for name in kind.names)
        )
        for one in each:
            decided = decide(one.tensor)
            yield one, decided if isinstance(decided, Matrix) else None


def quantized_widths(checkpoint: Checkpoint, spec: QuantizeSpec) -> dict[int, list[str]]:
    """Input width -> the modules that have it, over everything that would be quantized."""
    widths: dict[int, list[str]] = defaultdict(list)
    for matrix in targets(checkpoint, spec).matrices.values():
        widths[matrix.columns].append(matrix.module)
    return dict(sorted(widths.items()))


def quantized_bytes(checkpoint: Checkpoint, spec: QuantizeSpec, kept: Mapping[int, int] | None = None) -> int:
    """Bytes of all tensors after quantization, where MoE layer `l` holds `kept[l]` experts (those it omits stay whole).

    Multi-token-prediction blocks that route stay only where `kept` names them, as in `layout.pruned_sizes`; without
    `kept` all stay. A raw llm-compressor recipe is not predicted: the bytes as they are.
    """
    layout = read_layout(checkpoint)
    kept = (
        {index: layer.num_experts for index, layer in {**layout.layers, **layout.mtp}.items()} if kept is None else kept
    )
    dropped = frozenset() if all(index in kept for index in layout.mtp) else layout.mtp_tensors
    dequantized = is_fp8(checkpoint.config)
    total = Fraction(0)
    for kind, matrix in _decided_kinds(checkpoint, spec, layout):
        tensor = kind.tensor
        if tensor.name in dropped or (dequantized and tensor.name.endswith("_scale_inv")):
            continue
        if matrix is not None:
            weight_bits = 16 if dequantized else BITS[tensor.dtype]
            nbytes = matrix.count * scheme_of(spec).nbytes(matrix.rows, matrix.columns, spec.group_size, weight_bits)
        else:
            nbytes = tensor.numel * 2 if dequantized and tensor.dtype == "F8_E4M3" else tensor.nbytes
        total += kind.count * nbytes * kept_share(kind, kept)
    return round(total)


def matrices_by_layer(
    checkpoint: Checkpoint, spec: QuantizeSpec, kept: Mapping[int, int]
) -> dict[int, list[tuple[Matrix, int]]]:
    """Decoder layer -> (a matrix that is quantized, how many of its shape stay), where MoE layer `l` keeps `kept[l]`
    experts.

    A raw llm-compressor recipe is not predicted: every matrix that could be quantized counts.
    """
    found: dict[int, list[tuple[Matrix, int]]] = defaultdict(list)
    possible = (
        spec if spec.recipe is None else spec.model_copy(update={"recipe": None, "scheme": spec.scheme or "W4A16"})
    )
    for kind, matrix in _decided_kinds(checkpoint, possible, read_layout(checkpoint)):
        if matrix is not None:
            found[matrix.layer].append((matrix, round(kind.count * matrix.count * kept_share(kind, kept))))
    return dict(found)


def check_quantize(checkpoint: Checkpoint, spec: QuantizeSpec) -> list[Problem]:
    """Everything that contradicts between `quantize:` and the checkpoint, as problems of the recipe."""
    if spec.scheme is None or spec.recipe is not None:
        return []
    if problem := _scheme_problem(spec):
        return [problem]
    scheme = scheme_of(spec)
    problems = _method_problems(spec, scheme) + _source_problems(checkpoint)
    if not problems or is_fp8(checkpoint.config):
        problems += _group_problems(checkpoint, spec, scheme)
    return problems


def is_fp8(config: Mapping) -> bool:
    """Whether the checkpoint holds block-scaled FP8 weights, which are dequantized before they are quantized again."""
    return (config.get("quantization_config") or {}).get("quant_method") in FP8_METHODS


def quantized_already(config: Mapping) -> str | None:
    """The quantization method of the checkpoint, if it has one."""
    found = config.get("quantization_config") or text_config(config).get("quantization_config")
    return str(found.get("quant_method", "unknown")) if isinstance(found, Mapping) else None


def _scheme_problem(spec: QuantizeSpec) -> Problem | None:
    name = str(spec.scheme).upper()
    if name in SCHEMES:
        return None
    allowed = ", ".join(SCHEMES)
    if name in ASYMMETRIC:
        return Problem(
            "quantize.scheme",
            f"{spec.scheme} stores zero points, which transformers loses when it loads experts. Choose a "
            f"symmetric scheme: {allowed}.",
        )
    if QUANTIZE_ACTIVATIONS.match(name):
        return Problem(
            "quantize.scheme",
            f"{spec.scheme} quantizes activations too, and reapkit quantizes weights only. Choose one of {allowed}.",
        )
    near = difflib.get_close_matches(name, SCHEMES, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return Problem(
        "quantize.scheme", f"'{spec.scheme}' is no known scheme.{hint} Allowed: {allowed}, or null for none."
    )


def _method_problems(spec: QuantizeSpec, scheme: Scheme) -> list[Problem]:
    problems = []
    if reason := METHOD_SCHEMES.get(spec.method, {}).get(scheme.name):
        problems.append(
            Problem("quantize.method", f"{spec.method} cannot do {scheme.name}: {reason}. Choose rtn or gptq.")
        )
    if scheme.fixed and "group_size" in spec.model_fields_set and spec.group_size != scheme.group:
        has = f"always shares a scale by {scheme.group}" if scheme.group else "has one scale per row"
        problems.append(
            Problem(
                "quantize.group_size",
                f"{spec.group_size}, but {scheme.name} {has}. Remove group_size, or choose W4A16.",
            )
        )
    return problems


def _source_problems(checkpoint: Checkpoint) -> list[Problem]:
    method = quantized_already(checkpoint.config)
    if method is None or method in FP8_METHODS:
        return []
    return [
        Problem(
            "quantize.scheme",
            f"the checkpoint is quantized already ({method}), and reapkit dequantizes block FP8 only. Convert it "
            "to bf16 first (transformers: from_pretrained(..., dequantize), save_pretrained), or set scheme: "
            "null and keep it as it is.",
        )
    ]


def _group_problems(checkpoint: Checkpoint, spec: QuantizeSpec, scheme: Scheme) -> list[Problem]:
    group = scheme.group if scheme.fixed else spec.group_size
    if group is None or scheme.rows_per_scale > 1:
        return []
    if not any(
        matrix and matrix.columns % group for _, matrix in _decided_kinds(checkpoint, spec, read_layout(checkpoint))
    ):
        return []
    widths = quantized_widths(checkpoint, spec)
    misfits = {width: modules for width, modules in widths.items() if width % group}
    where = "; ".join(f"{width} ({len(modules)} matrices, such as {modules[0]})" for width, modules in misfits.items())
    if scheme.fixed:
        return [
            Problem(
                "quantize.scheme",
                f"{scheme.name} shares a scale by {group} input columns, which does not divide {where}. Add "
                "these modules to quantize.ignore, or choose FP8_DYNAMIC.",
            )
        ]
    common = gcd(*widths)
    allowed = [size for size in (256, 128, 64, 32, 16) if common % size == 0]
    choice = f"Choose {', '.join(map(str, allowed))}" if allowed else f"Choose a divisor of {common}"
    return [
        Problem(
            "quantize.group_size",
            f"{group} does not divide the input width {where}. {choice}, or add these modules to quantize.ignore.",
        )
    ]


def _left_by_user(name: str, spec: QuantizeSpec) -> str | None:
    return "the recipe ignores it" if matches(name.removesuffix(".weight"), spec.ignore) else None


def _decoder(layout: Layout) -> str:
    """The prefix of the decoder layers' names, such as `model.layers.`."""
    name = next(iter(next(iter(layout.layers.values())).names))
    return LAYER.match(name)["stack"]  # read_layout accepts experts in numbered layers only


def _why_left(name: str, tensor: TensorInfo, stacked: Mapping[str, int], layout: Layout, decoder: str) -> str | None:
    if name in layout.mtp_tensors:
        return "multi-token prediction"
    if not name.startswith(decoder) or not LAYER.match(name):
        return "outside the decoder layers"
    if name in stacked:
        return "router"
    if tensor.shape[0] == 1:
        return "a gate with one output"
    if INDEXER.search(name):
        return "indexer"
    return None


def _stacked_experts(tensor: TensorInfo, layer: int, checkpoint: Checkpoint) -> Matrix:
    """The stack as its projections: into the hidden width and out of it, whichever way round the file stores them."""
    experts, first, second = tensor.shape
    hidden = text_config(checkpoint.config).get("hidden_size")
    down = "down" in tensor.name or "output_linear" in tensor.name
    inputs_first = first != second and (second if down else first) == hidden
    rows, columns = (second, first) if inputs_first else (first, second)
    if down:
        return Matrix(tensor, experts, rows, columns, layer, routed=True)
    parts = 2 if "gate_up" in tensor.name or "input_linear" in tensor.name else 1
    return Matrix(tensor, experts * parts, rows // parts, columns, layer, routed=True)


def kept_share(kind: Kind, kept: Mapping[int, int]) -> Fraction:
    """The share of a kind's numbers that stay when its layer keeps `kept` experts; all of what has no expert axis."""
    if kind.layer is None:
        return Fraction(1)
    removed = kind.layer.num_experts - kept.get(kind.layer.index, kind.layer.num_experts)
    return 1 - Fraction(removed, kind.experts)
