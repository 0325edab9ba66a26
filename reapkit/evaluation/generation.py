"""Generates continuations of held-out prompts, and checks whether they loop, end, and call functions as their schemas
demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from reapkit.core.measurements import load_facts, save_facts
from reapkit.core.progress import SILENT, Progress
from reapkit.evaluation.gates import UNION
from reapkit.evaluation.linear import fast_linear
from reapkit.evaluation.metrics.bootstrap import Sums, bootstrap_weights, measurements
from reapkit.evaluation.metrics.signals import distinct_n, loops
from reapkit.evaluation.outputs import Pack
from reapkit.evaluation.tool_calls import calls, offered_tools, valid_calls
from reapkit.model.causal_lm import generate, input_weight

MODES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 0}}
PLAIN_PROMPT_TOKENS = 64
"""How much of a plain text is the prompt."""


@dataclass(frozen=True)
class Prompt:
    """A sample up to its first assistant turn, and the turn itself; of a plain text its beginning and the rest."""

    source: int
    tokens: tuple[int, ...]
    reference: tuple[int, ...]


@dataclass(frozen=True)
class Continuation:
    """What a model wrote, without the end token, and whether it came to an end."""

    tokens: tuple[int, ...]
    finished: bool


Written = Mapping[str, Sequence[Continuation]]
"""Continuations of the same prompts by mode: greedy, sampled."""


def save_continuations(written: Written, directory: Path) -> None:
    """Tokens and end of every continuation, by mode."""
    found = {mode: [asdict(each) for each in continuations] for mode, continuations in written.items()}
    save_facts(found, directory)


def load_continuations(directory: Path) -> Written:
    """What `save_continuations` wrote."""
    return {
        mode: [Continuation(tuple(each["tokens"]), each["finished"]) for each in continuations]
        for mode, continuations in load_facts(directory).items()
    }


def draw_prompts(pack: Pack, count: int) -> list[Prompt]:
    """The first `count` prompts of the pack, the sources taking turns."""
    by_source: dict[int, list[Prompt]] = {}
    for row in pack.rows:
        source = int(pack.tokens.row_source[row])
        if len(by_source.setdefault(source, [])) < count:
            by_source[source] += _prompts_of_row(pack.tokens.row(row), source)
    turns = chain.from_iterable(zip_longest(*by_source.values()))
    return [prompt for prompt in turns if prompt is not None][:count]


def _prompts_of_row(row: Any, source: int) -> Iterator[Prompt]:
    for sample in row.sample.unique().tolist():
        inside = (row.sample == sample).nonzero().squeeze(1)
        ids, assistant = row.input_ids[inside].tolist(), row.assistant[inside]
        first = int(assistant.nonzero()[0]) if assistant.any() else 0
        if first > 0:
            after = (~assistant[first:]).nonzero()
            end = first + int(after[0]) if len(after) else len(ids)
        else:
            first, end = min(PLAIN_PROMPT_TOKENS, len(ids) // 2), len(ids)
        if 0 < first < end:
            yield Prompt(source, tuple(ids[:first]), tuple(ids[first:end]))


@torch.no_grad()
def write(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_tokens: int = 16384,
    seed: int = 0,
    title: str = "generate",
    progress: Progress = SILENT,
) -> Written:
    """Greedy and sampled continuations of every prompt, in the prompts' order; the same seed gives the same ones."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    written: dict[str, list[Any]] = {mode: [None] * len(prompts) for mode in MODES}
    with (
        progress.task(title, total=len(prompts) * len(MODES), unit="continuations") as task,
        torch.random.fork_rng(),
        fast_linear(model),
    ):
        torch.manual_seed(seed)
        for mode, settings in MODES.items():
            config = how(model, max_new_tokens, **settings)
            for chosen in _batched(order, prompts, max_new_tokens, batch_tokens):
                for i, each in zip(chosen, continued(model, [prompts[i].tokens for i in chosen], config), strict=True):
                    written[mode][i] = each
                task.advance(len(chosen))
    return written


def how(model: PreTrainedModel, max_new_tokens: int, **settings: Any) -> GenerationConfig:
    """How `continued` writes: until one of the model's own end tokens, in `MODES` or another way."""
    ends = _end_tokens(model)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **settings,
    )


@torch.no_grad()
def continued(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[Continuation]:
    """What the model writes behind each of the prompts, as one batch, by its own `generate`."""
    ids, attended = _left_padded(prompts, model)
    tokens = generate(model, ids, attended, generation_config=config)[:, ids.shape[1] :]
    return [_until_end(row, _end_tokens(model)) for row in tokens.tolist()]


def _batched(
    order: Sequence[int], prompts: Sequence[Prompt], max_new_tokens: int, batch_tokens: int
) -> Iterator[list[int]]:
    chosen: list[int] = []
    for i in order:  # ascending length: the newest is the longest
        if chosen and (len(chosen) + 1) * (len(prompts[i].tokens) + max_new_tokens) > batch_tokens:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def _left_padded(tokens: Sequence[Sequence[int]], model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    device, width = input_weight(model).device, max(map(len, tokens))
    ids = torch.tensor([[0] * (width - len(each)) + list(each) for each in tokens], device=device)
    attended = torch.tensor([[0] * (width - len(each)) + [1] * len(each) for each in tokens], device=device)
    return ids, attended


def _end_tokens(model: PreTrainedModel) -> list[int]:
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.get_text_config().eos_token_id
    return [] if found is None else list(found) if isinstance(found, (list, tuple)) else [found]


def _until_end(tokens: Sequence[int], ends: Sequence[int]) -> Continuation:
    end = next((i for i, token in enumerate(tokens) if token in ends), None)
    return Continuation(tuple(tokens[:end]), end is not None)


def summarize(
    base: Written,
    written: Written,
    prompts: Sequence[Prompt],
    sources: Sequence[str],
    outside: frozenset[str] = frozenset(),
    tokenizer: Any = None,
) -> dict[str, dict[str, Any]]:
    """Per group (`all` and each source) shares over prompts, with paired intervals and the difference from the base.

    loop_share, loop_share_delta, unfinished_share, unfinished_share_delta (both modes together), greedy_loop_share,
    sampled_loop_share, distinct_4; with a tokenizer, where prompts offer functions and the reference calls one:
    tool_prompts, tool_call_validity and tool_call_validity_delta (both modes together), greedy_tool_call_validity,
    sampled_tool_call_validity.
    """
    source = torch.tensor([prompt.source for prompt in prompts])
    counted = torch.tensor([sources[prompt.source] not in outside for prompt in prompts])
    members = {UNION: counted} | {name: source == i for i, name in enumerate(sources)}
    per_prompt = _per_prompt(base, written)
    tools = _tool_sums(base, written, prompts, tokenizer) if tokenizer is not None else None
    result = {}
    for group, chosen in members.items():
        if not chosen.any():
            continue
        weights = bootstrap_weights(source[chosen])
        own = {name: values[chosen] for name, values in per_prompt.items()}
        result[group] = {"rows": int(chosen.sum())} | measurements(own, _shares, weights)
        if tools is not None and (calling := chosen & (tools["n"] > 0)).any():
            own = {name: values[calling] for name, values in tools.items()}
            result[group] |= {"tool_prompts": int(calling.sum())} | measurements(
                own, _validity, bootstrap_weights(source[calling])
            )
    return result


def _per_prompt(base: Written, written: Written) -> dict[str, Tensor]:
    def of(found: Written, mode: str, what: Callable[[Continuation], float]) -> Tensor:
        return torch.tensor([float(what(each)) for each in found[mode]], dtype=torch.float64)

    def of_both(found: Written, what: Callable[[Continuation], float]) -> Tensor:
        return torch.stack([of(found, mode, what) for mode in MODES]).sum(0)

    sums: dict[str, Tensor] = {}
    for name, what in (
        ("loops", lambda each: loops(each.tokens)),
        ("unfinished", lambda each: not each.finished),
        ("distinct", lambda each: distinct_n(each.tokens)),
    ):
        sums[name] = of_both(written, what)
        sums[f"base_{name}"] = of_both(base, what)
    for mode in MODES:
        sums[f"{mode}_loops"] = of(written, mode, lambda each: loops(each.tokens))
    return sums | {"n": torch.ones_like(sums["loops"])}


def _shares(s: Sums) -> dict[str, Tensor]:
    n, both = s["n"], s["n"] * len(MODES)
    return {
        "loop_share": s["loops"] / both,
        "loop_share_delta": (s["loops"] - s["base_loops"]) / both,
        "unfinished_share": s["unfinished"] / both,
        "unfinished_share_delta": (s["unfinished"] - s["base_unfinished"]) / both,
        "greedy_loop_share": s["greedy_loops"] / n,
        "sampled_loop_share": s["sampled_loops"] / n,
        "distinct_4": s["distinct"] / both,
    }


def _tool_sums(base: Written, written: Written, prompts: Sequence[Prompt], tokenizer: Any) -> dict[str, Tensor]:
    """Per prompt whether it asks for a call (n), and which of its continuations are nothing but valid calls."""
    offered = [offered_tools(tokenizer.decode(prompt.tokens)) for prompt in prompts]
    asks = [
        bool(tools) and bool(calls(tokenizer.decode(prompt.reference)))
        for tools, prompt in zip(offered, prompts, strict=True)
    ]

    def valid(found: Sequence[Continuation]) -> Tensor:
        return torch.tensor(
            [
                float(ask and valid_calls(tokenizer.decode(each.tokens), tools))
                for ask, tools, each in zip(asks, offered, found, strict=True)
            ],
            dtype=torch.float64,
        )

    return {
        "n": torch.tensor(asks, dtype=torch.float64),
        **{f"valid_{mode}": valid(written[mode]) for mode in MODES},
        **{f"base_valid_{mode}": valid(base[mode]) for mode in MODES},
    }


def _validity(s: Sums) -> dict[str, Tensor]:
    own, of_base = (
        sum(s[f"{prefix}valid_{mode}"] for mode in MODES) / (s["n"] * len(MODES)) for prefix in ("", "base_")
    )
    return {
        "tool_call_validity": own,
        "tool_call_validity_delta": own - of_base,
        **{f"{mode}_tool_call_validity": s[f"valid_{mode}"] / s["n"] for mode in MODES},
    }


def examples(
    base: Written,
    written: Written,
    prompts: Sequence[Prompt],
    sources: Sequence[str],
    tokenizer: Any,
    characters: int = 600,
) -> list[dict[str, str]]:
    """One prompt of each source with what the base and the candidate wrote greedily, for a reader's own eyes."""
    first = {prompt.source: i for i, prompt in reversed(list(enumerate(prompts)))}
    return [
        {
            "source": sources[source],
            "prompt": tokenizer.decode(prompts[i].tokens)[-characters:],
            "base": tokenizer.decode(base["greedy"][i].tokens)[:characters],
            "candidate": tokenizer.decode(written["greedy"][i].tokens)[:characters],
        }
        for source, i in sorted(first.items())
    ]
