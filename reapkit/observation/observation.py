"""The observation: per-source statistics of every routed expert, which can be added up and from which any pruning can
be decided."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy import ndarray
from safetensors.numpy import save_file

from reapkit.core.artifact_store import link_or_copy
from reapkit.core.atomic_files import replacing, write_text
from reapkit.core.errors import UnusableError
from reapkit.core.mapped_safetensors import as_arrays, map_tensors
from reapkit.observation.eaft_table import EaftTable
from reapkit.observation.knockouts import FACTS as KNOCKOUT_FACTS
from reapkit.observation.knockouts import Knockouts
from reapkit.observation.recorded_facts import read_facts

RELATIVE = "relative_sq_sum"
SUMS = ("count", "gate_sum", "norm_sum", "gate_norm_sum", "gate_norm_sq_sum", RELATIVE)
MAXIMA = (
    "norm_max",
    "gate_norm_max",
    "activation_max",
    "norm_max_scored",
    "gate_norm_max_scored",
    "activation_max_scored",
)
SNAPSHOTS = ("count", "gate_norm_sum")
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class Trace:
    """The exact EAFT material: every position with a signal, in row order, and what each of its slots contributed.

    `source` int16 [T] (index into `Observation.sources`), `p` float32 [T] (full-vocabulary probability of the reference
    token), `h` float32 [T] (entropy of the softmax over the top-k logits / ln k), and per layer `routed(layer)` =
    (`expert` int16 [T, top_k], `gate_norm` float32 [T, top_k]), read when asked for; expert -1 where a
    multi-token-prediction block did not run.
    """

    source: ndarray
    p: ndarray
    h: ndarray
    routed: Callable[[int], tuple[ndarray, ndarray]]
    file: Path | None = None

    def __post_init__(self) -> None:
        as_arrays(self, "source", "p", "h")

    @classmethod
    def load(cls, file: Path) -> Trace:
        tensors = map_tensors(file)

        def routed(layer: int) -> tuple[ndarray, ndarray]:
            return tensors[f"expert.{layer}"], tensors[f"gate_norm.{layer}"]

        return cls(tensors["source"], tensors["p"], tensors["h"], routed, file)

    def save(self, file: Path, layers: tuple[int, ...]) -> None:
        """Writes the trace to `file`; one that is a file already is linked or copied, for it may be larger than
        memory."""
        if self.file is not None:
            if not file.exists() or not file.samefile(self.file):
                link_or_copy(self.file, file)
            return
        tensors = {"source": self.source, "p": self.p, "h": self.h}
        for layer in layers:
            tensors[f"expert.{layer}"], tensors[f"gate_norm.{layer}"] = self.routed(layer)
        _save(tensors, file)

    def __len__(self) -> int:
        return len(self.p)

    def then(self, other: Trace, other_source: ndarray) -> Trace:
        """This trace followed by `other`, whose source s becomes `other_source[s]`, int64 [S]."""

        def routed(layer: int) -> tuple[ndarray, ndarray]:
            (expert, gate_norm), (other_expert, other_gate_norm) = self.routed(layer), other.routed(layer)
            return np.concatenate((expert, other_expert)), np.concatenate((gate_norm, other_gate_norm))

        source = other_source.astype(np.int16)[other.source]
        return Trace(
            np.concatenate([self.source, source]),
            np.concatenate([self.p, other.p]),
            np.concatenate([self.h, other.h]),
            routed,
        )


def _save(tensors: Mapping[str, ndarray], file: Path) -> None:
    with replacing(file) as partial:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial)


@dataclass(frozen=True, eq=False)
class Reroute:
    """What removal costs on a sample of tokens once they are re-routed (see reroute), by layer.

    Paths are those of each source, of all sources with equal weights, and of the mix by its scored tokens: S + 2 in
    this order. Multi-token-prediction blocks have none (order -1, 0 elsewhere). `tokens` int64 [S]: sampled of each
    source. `order` int64 [L, S + 2, E]: experts as the backward greedy path removes them, -1 beyond the last that can
    go. `error` float64 [L, S + 2, E]: mean ‖y(A) − y(all)‖² / ‖r‖² once each is gone. `single` float64 [L, S, E]: the
    same summed over a source's tokens after removing one expert alone.
    """

    tokens: ndarray
    order: ndarray
    error: ndarray
    single: ndarray

    def __post_init__(self) -> None:
        as_arrays(self, "tokens", "order", "error", "single")

    @property
    def measured(self) -> ndarray:
        """Which layers have paths, bool [L]."""
        return cast(ndarray, (self.order >= 0).any((-2, -1)))


class Columns(dict[str, ndarray]):
    """Statistics by name; one that was not measured, as in an observation made by another tool, says so when it is
    asked for."""

    def __missing__(self, name: str) -> ndarray:
        raise UnusableError(
            f"this observation has no {name}; the tool that made the observation, or the version of reapkit, did not"
            " measure it. Choose a criterion that does not need it, or observe with this version of reapkit."
        )


@dataclass(frozen=True, eq=False)
class Observation:
    """Statistics of L MoE layers, S sources of the mix and E experts over the scored positions; two of the same model
    add up.

    `layers`: decoder indices; numbers behind the decoder's are multi-token-prediction blocks, which run at all
    positions but the first few of a row. `tokens`, `scored_tokens`: int64 [S], positions that are not padding, and
    those that are scored. `statistics`: float64 [L, S, E] each, by the names of SUMS: N, Σg, Σn, Σgn, Σ(gn)²,
    Σ(gn/‖r‖)², with g the gate weight as the model hands it to its experts, n the L2 norm of the expert's output before
    the gate, and r the residual stream behind the layer, its output (of a multi-token-prediction block, the output of
    its decoder layer). One that was not measured is left out.
    `maxima`: float32 [L, S, E] each, by the names of MAXIMA: over every position that is not padding, and (`…_scored`)
    over the scored ones. `coactivation`: int64 [L, S, E, E], positions routed to both. `snapshots`: float64 [4, L, S,
    E], `count` and `gate_norm_sum` after 1/16, 1/8, 1/4 and 1/2 of the rows. `eaft`: the trace, or a table. `reroute`:
    removal paths, which do not add up: a sum of two observations has none. `knockout`: what a stage of its own measured
    on the same calibration; it is no part of the observation's files, and of no sum.
    """

    model_type: str
    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    sources: tuple[str, ...]
    tokens: ndarray
    scored_tokens: ndarray
    statistics: Mapping[str, ndarray]
    maxima: Mapping[str, ndarray]
    coactivation: ndarray | None
    snapshots: Mapping[str, ndarray]
    eaft: Trace | EaftTable | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    reroute: Reroute | None = None
    knockout: Knockouts | None = None

    def __post_init__(self) -> None:
        as_arrays(self, "tokens", "scored_tokens", *(() if self.coactivation is None else ("coactivation",)))
        for name in ("statistics", "maxima", "snapshots"):
            columns = Columns((column, np.asarray(values)) for column, values in getattr(self, name).items())
            object.__setattr__(self, name, columns)

    def save(self, directory: Path) -> None:
        """Writes observation.safetensors, observation.json and, where there is a trace, trace.safetensors: equal
        inputs, equal bytes.
        """
        directory.mkdir(parents=True, exist_ok=True)
        if isinstance(self.eaft, Trace):
            self.eaft.save(directory / "trace.safetensors", self.layers)
        _save(self._tensors(), directory / "observation.safetensors")
        facts = {
            "format": FORMAT_VERSION,
            "model_type": self.model_type,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "sources": list(self.sources),
            "tokens": self.tokens.tolist(),
            "scored_tokens": self.scored_tokens.tolist(),
            "eaft": isinstance(self.eaft, Trace),
            "meta": dict(self.meta),
        }
        text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_text(directory / "observation.json", text)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """With the knock-outs of the same run, where they lie beside it in `knockout`.

        Raises UnusableError where the directory holds no observation this version can read.
        """
        directory = Path(directory)
        try:
            facts = read_facts(directory)
        except (OSError, ValueError) as error:
            raise UnusableError(
                f"{directory}: observation.json cannot be read ({error}). Give an observation's directory."
            ) from None
        if facts.get("format") != FORMAT_VERSION:
            raise UnusableError(
                f"{directory}: found observation format {facts.get('format')}, but this version of reapkit reads"
                f" format {FORMAT_VERSION}. Observe again, or use the version of reapkit that wrote it."
            )
        tensors = map_tensors(directory / "observation.safetensors")
        trace = Trace.load(directory / "trace.safetensors") if facts["eaft"] else EaftTable.from_tensors(tensors)
        observation = cls(
            model_type=facts["model_type"],
            layers=tuple(facts["layers"]),
            num_experts=facts["num_experts"],
            num_experts_per_tok=facts["num_experts_per_tok"],
            sources=tuple(facts["sources"]),
            tokens=tensors["tokens"],
            scored_tokens=tensors["scored_tokens"],
            statistics={name: tensors[name] for name in SUMS if name in tensors},
            maxima={name: tensors[name] for name in MAXIMA if name in tensors},
            coactivation=tensors.get("coactivation"),
            snapshots={name: tensors[f"snapshots.{name}"] for name in SNAPSHOTS if f"snapshots.{name}" in tensors},
            eaft=trace,
            reroute=_reroute(tensors),
            meta=facts["meta"],
        )
        beside = directory.parent / "knockout"
        return observation.with_knockouts(beside) if (beside / KNOCKOUT_FACTS).is_file() else observation

    def with_knockouts(self, directory: Path) -> Self:
        """The same with the knock-outs that `directory` holds. Raises UnusableError where they cannot be read, or were
        measured on sources that the observation does not have."""
        return replace(self, knockout=Knockouts.load(directory).of_sources(self.sources))

    def _tensors(self) -> dict[str, ndarray]:
        tensors = {"tokens": self.tokens, "scored_tokens": self.scored_tokens, **self.statistics, **self.maxima}
        tensors |= {f"snapshots.{name}": tensor for name, tensor in self.snapshots.items()}
        if isinstance(self.eaft, EaftTable):
            tensors |= self.eaft.tensors()
        if self.reroute is not None:
            tensors |= {f"reroute.{name}": tensor for name, tensor in vars(self.reroute).items()}
        return tensors if self.coactivation is None else tensors | {"coactivation": self.coactivation}

    def __add__(self, other: Observation) -> Observation:
        """Both together: sources of the same name are summed, others stand side by side. Snapshots are summed stage by
        stage.

        Raises UnusableError where the two are not of the same model.
        """
        mine, theirs = self._identity(), other._identity()
        if differing := [name for name in mine if mine[name] != theirs[name]]:
            name = differing[0]
            if differing == ["layers"] and min(self.layers, other.layers, key=len) == tuple(
                sorted(set(self.layers) & set(other.layers))
            ):
                raise UnusableError(
                    "one observation has multi-token-prediction layers that the other lacks:"
                    f" {', '.join(map(str, sorted(set(self.layers) ^ set(other.layers))))}. Observe both with the same"
                    " prune.mtp."
                )
            raise UnusableError(
                f"observations of different models cannot be added: {name} is {mine[name]} here and {theirs[name]} "
                "there. Merge observations of one checkpoint only."
            )
        sources = tuple(dict.fromkeys(self.sources + other.sources))
        a, b = self.with_sources(sources), other.with_sources(sources)
        coactivation = None if a.coactivation is None or b.coactivation is None else a.coactivation + b.coactivation
        trace = None
        if isinstance(self.eaft, EaftTable) or isinstance(other.eaft, EaftTable):
            if self.eaft is not None and other.eaft is not None:
                raise UnusableError(
                    "EAFT tables of p and H cannot be added, since every table has its own edges. Observe with a"
                    " larger observe.trace_bytes, or with observe.eaft: false."
                )
        elif self.eaft is not None and other.eaft is not None:
            trace = self.eaft.then(other.eaft, np.array([sources.index(name) for name in other.sources]))
        return replace(
            a,
            tokens=a.tokens + b.tokens,
            scored_tokens=a.scored_tokens + b.scored_tokens,
            statistics={name: a.statistics[name] + b.statistics[name] for name in _in_both(a.statistics, b.statistics)},
            maxima={name: np.maximum(a.maxima[name], b.maxima[name]) for name in _in_both(a.maxima, b.maxima)},
            coactivation=coactivation,
            snapshots={name: a.snapshots[name] + b.snapshots[name] for name in _in_both(a.snapshots, b.snapshots)},
            eaft=trace,
            reroute=None,
            knockout=None,
        )

    def with_sources(self, sources: tuple[str, ...]) -> Observation:
        """The same statistics with one slice per name of `sources` (zeros for a source not observed); the trace is left
        out."""

        places = [sources.index(name) for name in self.sources]

        def spread(values: ndarray, axis: int) -> ndarray:
            wide = np.zeros((*values.shape[:axis], len(sources), *values.shape[axis + 1 :]), values.dtype)
            wide[(slice(None),) * axis + (places,)] = values
            return wide

        return replace(
            self,
            sources=sources,
            tokens=spread(self.tokens, 0),
            scored_tokens=spread(self.scored_tokens, 0),
            statistics={name: spread(tensor, 1) for name, tensor in self.statistics.items()},
            maxima={name: spread(tensor, 1) for name, tensor in self.maxima.items()},
            coactivation=None if self.coactivation is None else spread(self.coactivation, 1),
            snapshots={name: spread(tensor, 2) for name, tensor in self.snapshots.items()},
            eaft=None,
            reroute=None,
            knockout=None,
        )

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.meta.get("model"),
            "model_type": self.model_type,
            "layers": self.layers,
            "num_experts": self.num_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "entropy_top_k": self.meta.get("entropy_top_k"),
        }


def _in_both(mine: Mapping[str, ndarray], theirs: Mapping[str, ndarray]) -> list[str]:
    """Columns that both observations have: another tool, or an older version, measured fewer."""
    return [name for name in mine if name in theirs]


def _reroute(tensors: Mapping[str, ndarray]) -> Reroute | None:
    if "reroute.order" not in tensors:
        return None
    return Reroute(**{name: tensors[f"reroute.{name}"] for name in Reroute.__dataclass_fields__})
