"""Makes a source of what the base model itself answers: prompts of a source, and those answers that it ended by
itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reapkit.checkpoint.architecture import text_config
from reapkit.core.atomic_files import write_bytes, write_json
from reapkit.core.errors import RecipeError, StageFailed, UnusableError
from reapkit.core.hashing import digest, digest_file
from reapkit.core.json_text import parse_json
from reapkit.core.progress import SILENT, Progress
from reapkit.core.refusals import refusal_in
from reapkit.evaluation.answer_journal import AnswerJournal, journal
from reapkit.evaluation.answering import Answer, Answering, Sampling, Server, in_process
from reapkit.pipeline.run import make_runs_folder
from reapkit.planning.lock import versions
from reapkit.planning.plan import Plan
from reapkit.recipe.schema import MixEntry

if TYPE_CHECKING:
    from reapkit.calibration.chat_prompts import ChatPrompt

SERVED_TOGETHER = 16
"""Prompts that a server is asked at a time."""
FORMAT = 1


@dataclass(frozen=True)
class Asked:
    """What is to be answered, and how: prompts of the mix's source `source` (None: its only one), at most `prompts` of
    them; by the server at `server` under its name `served_as`, or in this process."""

    sampling: Sampling
    prompts: int
    output: Path
    source: str | None = None
    server: str | None = None
    served_as: str | None = None


def make_traces(plan: Plan, asked: Asked, progress: Progress = SILENT) -> dict[str, Any]:
    """Writes the answers that ended, as conversations, one JSON line each, to `asked.output`, and what they are to the
    file `record_path` beside it; returns that record.

    Batches that are answered are kept in a file `….unfinished`, from which the next run goes on to the same bytes;
    where all is there already, nothing runs. Raises RecipeError for what cannot be asked, UnusableError for model,
    source and server, StageFailed where the disk refuses or the server stops: run again to go on.
    """
    entry = _entry(plan, asked.source)
    _refuse_foreign(asked.output)
    make_runs_folder(plan.store.root.parent)
    plan = plan.date_kept()
    plan = plan if asked.server else plan.downloaded()
    prompts, skipped = _drawn(plan, entry, asked, progress)
    settings = _settings(plan, entry, asked, prompts)
    if (known := _finished(asked.output, settings)) is not None:
        return known
    try:
        with journal(_beside(asked.output, ".unfinished"), settings) as kept:
            _answer_all(plan, asked, prompts, kept, progress)
            answers = [Answer(*each) for batch in kept.batches for each in batch]
            record = _write(plan, asked, settings, prompts, skipped, answers)
            kept.path.unlink()
    except Exception as error:
        if (refusal := refusal_in(error)) is None:
            raise
        raise StageFailed(f"traces: {refusal.told()} It goes on where it stopped.") from error
    return record


def record_path(output: Path) -> Path:
    """Where the record of a file of traces lies."""
    return _beside(output, ".record.json")


def _beside(output: Path, suffix: str) -> Path:
    return output.with_name(output.name + suffix)


def _entry(plan: Plan, name: str | None) -> MixEntry:
    """The mix entry whose prompts are asked. Raises RecipeError naming those that there are."""
    mix = {entry.name: entry for entry in plan.recipe.calibration.mix}
    if name is None and len(mix) == 1:
        [name] = mix
    if name not in mix:
        found = "the mix has several sources" if name is None else f"found '{name}'"
        raise RecipeError(f"--source: {found}. Choose one of {', '.join(mix)}.")
    return mix[name]


def _refuse_foreign(output: Path) -> None:
    if output.exists() and not record_path(output).exists():
        raise RecipeError(f"{output}: the file exists already, and reapkit traces did not write it. Choose another -o.")


def _drawn(
    plan: Plan, entry: MixEntry, asked: Asked, progress: Progress
) -> tuple[Sequence[ChatPrompt], Mapping[str, int]]:
    """The prompts that leave room for an answer."""
    from reapkit.calibration.chat_prompts import draw_chat_prompts
    from reapkit.calibration.inputs import Inputs

    positions = text_config(plan.checkpoint.config).get("max_position_embeddings")
    longest = positions - asked.sampling.max_new_tokens if isinstance(positions, int) else None
    if longest is not None and longest < 1:
        raise RecipeError(
            f"--max-new-tokens: {asked.sampling.max_new_tokens}, but the model has {positions} positions"
            f" (max_position_embeddings). Choose less than {positions}."
        )
    inputs = Inputs(
        plan.calibration,
        plan.checkpoint.path,
        plan.loaded.directory,
        asked.output.parent,
        plan.recipe.model.trust_remote_code,
        progress,
    )
    return draw_chat_prompts(inputs, entry, asked.prompts, longest)


def _settings(plan: Plan, entry: MixEntry, asked: Asked, prompts: Sequence[ChatPrompt]) -> dict[str, Any]:
    """Everything that decides the answers."""
    model = plan.recipe.model
    commit = plan.checkpoint.path.name if plan.checkpoint.path.parent.name == "snapshots" else model.revision
    return {
        "model": {"source": model.source, "commit": commit, "identity": plan.checkpoint.identity},
        "source": {name: getattr(entry, name) for name in ("name", "source", "config", "split", "revision")},
        "date": plan.identities.date,
        "prompts": {"count": len(prompts), "sha256": digest([prompt.name for prompt in prompts])},
        "sampling": asdict(asked.sampling),
        "answered_by": {"server": asked.server, "model": asked.served_as}
        if asked.server
        else {"batch_tokens": plan.recipe.runtime.batch_tokens},
    }


def _finished(output: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of traces that are there already. Raises RecipeError where they are others, or were changed."""
    if not output.exists():
        return None
    try:
        record = parse_json(record_path(output).read_text(encoding="utf-8"))
        if record["file"]["sha256"] == digest_file(output) and all(record[name] == settings[name] for name in settings):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise RecipeError(f"{output}: it holds other traces, or was changed since it was written. Choose another -o.")


# ---------------------------------------------------------------------------------------------- answering


def _answer_all(
    plan: Plan, asked: Asked, prompts: Sequence[ChatPrompt], kept: AnswerJournal, progress: Progress
) -> None:
    """Asks what is not answered yet, batch by batch."""
    bounds = _batches(prompts, asked, plan.recipe.runtime.batch_tokens)
    done = sum(len(batch) for batch in kept.batches)
    with progress.task("answer", total=len(prompts), unit="prompts") as task:
        task.advance(done)
        if done == len(prompts):
            return
        with _answering(plan, asked) as answer:
            ended = sum(each[1] for batch in kept.batches for each in batch)
            for start, stop in bounds[len(kept.batches) :]:
                found = answer([prompt.input_ids for prompt in prompts[start:stop]], start)
                kept.append([[each.text, each.ended, each.by] for each in found])
                ended += sum(each.ended for each in found)
                task.advance(stop - start)
                task.note(f"{ended} of {stop} ended")


def _batches(prompts: Sequence[ChatPrompt], asked: Asked, batch_tokens: int) -> list[tuple[int, int]]:
    """(first, behind the last) prompt of each batch: the same in every run."""
    bounds, start, longest = [], 0, 0
    for number, prompt in enumerate(prompts):
        longest = max(longest, len(prompt.input_ids) + asked.sampling.max_new_tokens)
        size = number + 1 - start
        if size > 1 and (size > SERVED_TOGETHER if asked.server else size * longest > batch_tokens):
            bounds.append((start, number))
            start, longest = number, len(prompt.input_ids) + asked.sampling.max_new_tokens
    return [*bounds, (start, len(prompts))]


@contextmanager
def _answering(plan: Plan, asked: Asked) -> Iterator[Answering]:
    from reapkit.model.loading import load_model, load_tokenizer

    trust = plan.recipe.model.trust_remote_code
    tokenizer = load_tokenizer(plan.checkpoint.path, trust_remote_code=trust)
    if asked.server:
        ends = [tokenizer.eos_token, *map(tokenizer.decode, _end_ids(plan.checkpoint.path))]
        with closing(Server(asked.server, asked.sampling, ends, asked.served_as)) as server:
            yield server
        return
    if plan.estimates.placement == "streaming":
        raise UnusableError(
            "traces: the model does not fit into this machine's memory, and answering a layer at a time would take"
            " days. Serve it elsewhere (vllm serve MODEL), and give its address with --server."
        )
    device = plan.recipe.runtime.device
    if device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(plan.checkpoint.path, device=device, trust_remote_code=trust)
    yield in_process(model, tokenizer, asked.sampling)


def _end_ids(directory: Path) -> list[int]:
    """The end tokens that the model's generation config names."""
    try:
        found = parse_json((directory / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [found] if isinstance(found, int) else [each for each in found or [] if isinstance(each, int)]


# ---------------------------------------------------------------------------------------------- writing


def _write(
    plan: Plan,
    asked: Asked,
    settings: Mapping[str, Any],
    prompts: Sequence[ChatPrompt],
    skipped: Mapping[str, int],
    answers: Sequence[Answer],
) -> dict[str, Any]:
    """The conversations that ended, then their record. Raises UnusableError where none did."""
    rows = [
        _row(prompt, answer)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.ended and answer.text.strip()
    ]
    if not rows:
        raise UnusableError(
            f"traces: none of {len(prompts)} answers ended within {asked.sampling.max_new_tokens} tokens. Raise"
            " --max-new-tokens, choose another --temperature, or other prompts."
        )
    content = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    ended = sum(answer.ended for answer in answers)
    record = {
        "format": FORMAT,
        "file": {"name": asked.output.name, "sha256": hashlib.sha256(content).hexdigest()},
        **settings,
        "skipped": dict(skipped),
        "answered_as": sorted({answer.by for answer in answers}),
        "counts": {
            "asked": len(prompts),
            "kept": len(rows),
            "not_ended": len(answers) - ended,
            "empty": ended - len(rows),
        },
        "versions": versions(),
    }
    write_json(record_path(asked.output), record)  # first: a file without its record would be somebody else's
    write_bytes(asked.output, content)
    return record


def _row(prompt: ChatPrompt, answer: Answer) -> dict[str, Any]:
    """The conversation; calls and thoughts stand in the answer's text as the model wrote them."""
    said = {"role": "assistant", "content": prompt.opened + answer.text}
    return {"messages": [*prompt.messages, said], **({"tools": prompt.tools} if prompt.tools else {})}
