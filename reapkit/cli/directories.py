"""Commands for finished directories: merge, verify, serve-check, import, gc."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from reapkit.cli.app import Json, app, out
from reapkit.core.atomic_files import making
from reapkit.core.errors import RecipeError, UnusableError
from reapkit.core.formatting import plural
from reapkit.report.inspection.render import table

if TYPE_CHECKING:
    from reapkit.core.artifact_store import Store


@app.command()
def merge(
    observations: Annotated[
        list[str], typer.Argument(metavar="OBSERVATION...", help="Observations of one model, from any machines.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write the merged observation to.")
    ],
    as_json: Json = False,
) -> None:
    """Add up observations of one model, from other data or other machines, into one observation.

    Example: reapkit merge monday/observation tuesday/observation -o both
    """
    from functools import reduce
    from operator import add

    from reapkit.core.as_written import require_as_written
    from reapkit.observation.observation import Observation

    if output.exists():
        raise RecipeError(f"{output}: the directory exists already. Choose another with -o.")
    for directory in observations:
        require_as_written(Path(directory))
    merged = reduce(add, (Observation.load(Path(directory)) for directory in observations))
    with making(output) as directory:
        merged.save(directory)
    facts = {"directory": str(output), "tokens": int(merged.tokens.sum()), "sources": list(merged.sources)}
    print(
        json.dumps(facts)
        if as_json
        else f"{output}: {len(observations)} observations, {facts['tokens']:,} tokens of {', '.join(merged.sources)}"
    )


@app.command()
def verify(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A model directory that prune or quantize wrote, a run, or an artifact."),
    ],
    as_json: Json = False,
) -> None:
    """Check a written model against the record inside it: sha256 of every file, index, names, shapes, expert counts. Of
    a run, and of an artifact in the store, all files.

    A model is checked wherever it was copied to. Exits with 0 if everything matches, else with 3.

    Example: reapkit verify runs/demo/pruned
    """
    from reapkit.cli.progress_bars import make_progress
    from reapkit.report.inspection.written import check_written

    found = check_written(directory, make_progress())
    passed = all(finding.passed for findings in found.values() for finding in findings)
    if as_json:
        print(
            json.dumps(
                {
                    "passed": passed,
                    "directories": {
                        str(place): [vars(finding) for finding in findings] for place, findings in found.items()
                    },
                }
            )
        )
    else:
        for place, findings in found.items():
            rows = [(finding.name, "holds" if finding.passed else "FAILS", finding.detail) for finding in findings]
            out().print(table(str(place), ("checked", "", "found"), rows, left=("", "found")))
        if not passed:
            print("The directory differs from what was written. Copy it again, or write it again.", file=sys.stderr)
    raise typer.Exit(0 if passed else UnusableError.exit_code)


@app.command(name="serve-check")
def serve_check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, as prune or quantize wrote it.")],
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", metavar="DIR", help=("The model that DIR was made from; it is served and compared, too.")
        ),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="Number of prompts.")] = 4,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", min=1, help="Greedy tokens after each prompt.")
    ] = 16,
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            "--vllm-python", metavar="PATH", help="A Python that has vLLM; default: REAPKIT_VLLM_PYTHON, else this one."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option("--dtype", metavar="DTYPE", help=("Dtype in both engines: auto, float32, bfloat16 or float16.")),
    ] = "auto",
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="Device of transformers: cpu, cuda:0 or auto.")
    ] = "cpu",
    tensor_parallel: Annotated[
        int,
        typer.Option("--tensor-parallel", metavar="N", min=1, help="Number of GPUs over which vLLM spreads the model."),
    ] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the Python code of the model directory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Generate greedily with transformers and with vLLM, and compare token by token.

    Where vLLM has no kernel for a quantized directory, its own weight loaders check names, shapes and packing instead.
    Ends with 0 where all is equal, 4 where something differs (and says whether it is a near-tie), 3 where an engine
    refuses the directory.

    Example: reapkit serve-check runs/demo/pruned --base Qwen3-30B-A3B --vllm-python ~/vllm/bin/python
    """
    dtypes = ("auto", "float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise RecipeError(f"--dtype: found {dtype!r}. Allowed: {', '.join(dtypes)}.")
    from reapkit.cli.app import quiet_libraries

    quiet_libraries()
    from reapkit.evaluation.serving.serve_check import serve_check as check

    found = check(
        directory,
        base,
        prompts=prompts,
        new_tokens=new_tokens,
        vllm=vllm_python,
        dtype=dtype,
        device=device,
        tensor_parallel=tensor_parallel,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps({**found.to_json(), "exit_code": found.exit_code}))
    else:
        engines = " and ".join(f"{name} {version}" for name, version in found.engines.items())
        print(f"{engines}: {found.prompts} prompts, {found.new_tokens} greedy tokens each")
        print(
            "\n".join([*(f"{one.directory}: {one.outcome}: {one.detail}" for one in found.comparisons), *found.notes])
        )
    raise typer.Exit(found.exit_code)


@app.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A llm-compressor REAP report (.json) or a Cerebras observer state (.pt)."),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Directory to write the selection or observation to.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help=("Directory of the model before pruning, for facts that the file lacks.")),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn another tool's measurements or decision into an observation or a selection. No code in the file is
    run.

    Example: reapkit import observations.pt -o observation
    """
    from reapkit.checkpoint.checkpoint import Checkpoint
    from reapkit.selection.foreign_formats import read_foreign
    from reapkit.selection.selection import Selection

    if output.exists():
        raise RecipeError(f"{output}: the directory exists already. Choose another with -o.")
    found = read_foreign(file, None if model is None else Checkpoint.open(model).architecture)
    with making(output) as directory:
        found.save(directory)
    if isinstance(found, Selection):
        facts = {
            "directory": str(output),
            "kind": "selection",
            "layers": len(found.layers),
            "dropped": sum(len(layer.drop) for layer in found.layers.values()),
        }
        text = f"selection of {facts['layers']} layers, {facts['dropped']} experts dropped"
    else:
        facts = {
            "directory": str(output),
            "kind": "observation",
            "layers": len(found.layers),
            "experts": found.num_experts,
            "tokens": int(found.tokens.sum()),
            "statistics": list(found.statistics),
        }
        text = (
            f"observation of {facts['layers']} layers and {facts['tokens']:,} tokens with"
            f" {', '.join(facts['statistics'])}"
        )
    print(json.dumps(facts) if as_json else f"{output}: {text}")


@app.command()
def gc(
    store: Annotated[
        Path, typer.Option("--store", metavar="DIR", help="The artifact store (runtime.store in your recipes).")
    ] = Path("runs/.store"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also remove unfinished work that no process is working on.")
    ] = False,
    damaged: Annotated[
        bool, typer.Option("--damaged", help="Also remove damaged artifacts, which runs set aside.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Remove nothing. Read every artifact in full, and set damaged ones aside (with --dry-run: only name"
            " them); the next run makes them again. Ends with 3 where one is damaged.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Remove the artifacts of a store that no run uses. Artifacts in progress, resumable and damaged ones are kept.

    Example: reapkit gc --dry-run
    """
    from reapkit.core.artifact_store import Store
    from reapkit.core.formatting import human_bytes
    from reapkit.core.garbage_collection import collect

    if check:
        _check_store(Store(store), dry_run, as_json, refused={"--unfinished": unfinished, "--damaged": damaged})
    found = collect(Store(store), unfinished=unfinished, damaged=damaged, dry_run=dry_run)
    if as_json:
        print(
            json.dumps(
                {
                    "store": str(store),
                    "dry_run": dry_run,
                    "bytes": found.nbytes,
                    "removed": [vars(each) for each in found.removed],
                    "kept": found.kept,
                }
            )
        )
        return
    if found.removed:
        rows = [(each.artifact, human_bytes(each.nbytes)) for each in found.removed]
        out().print(table("Would be removed" if dry_run else "Removed", ("artifact", "frees"), rows))
    many = plural(len(found.removed), "artifact")
    print(
        f"{many}, {human_bytes(found.nbytes)} {'would be freed' if dry_run else 'freed'}; kept: {_counted(found.kept)}"
    )


def _counted(names: Mapping[str, Sequence[str]]) -> str:
    """`2 (a run uses it), 1 (in progress)`."""
    return ", ".join(f"{len(each)} ({reason})" for reason, each in names.items()) or "none"


def _check_store(store: Store, dry_run: bool, as_json: bool, refused: Mapping[str, bool]) -> NoReturn:
    from reapkit.cli.progress_bars import make_progress
    from reapkit.core.formatting import human_bytes
    from reapkit.core.store_check import check_store
    from reapkit.pruning.manifest import sealed_shards

    if given := [name for name, is_given in refused.items() if is_given]:
        raise RecipeError(f"--check: removes nothing, and so goes without {given[0]}. Give one of the two.")
    found = check_store(store, sealed_shards, dry_run=dry_run, progress=make_progress())
    if as_json:
        facts = asdict(found)
        print(json.dumps({"store": str(store.root), "dry_run": dry_run, "bytes": facts.pop("nbytes"), **facts}))
    else:
        if found.damaged:
            title = "Damaged" if dry_run else "Damaged and set aside; the next run that needs them makes them again"
            rows = [(each.artifact, each.damage) for each in found.damaged]
            out().print(table(title, ("artifact", "found"), rows, left=("found",), whole=("artifact",)))
        print(
            f"{plural(found.sound, 'artifact')}, {human_bytes(found.nbytes)} as written; {len(found.damaged)} damaged;"
            f" not read: {_counted(found.not_read)}"
        )
    raise typer.Exit(UnusableError.exit_code if found.damaged else 0)
