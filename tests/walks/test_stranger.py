"""A stranger's walk with an own model and own data, from `init` to another folder, with the exact texts.

The transcript is `stranger.txt`: commands after `$`, what they print below (standard error first), and their exit
codes. What depends on the machine is `#` in it. After a text has changed, look at the new transcript and keep it:

    python -m tests.walks.test_stranger
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from reapkit.calibration.builtin import generators
from reapkit.checkpoint.locate import MODEL_DIRECTORY
from tests.support.forked import Forks, forking

TRANSCRIPT = Path(__file__).parent / "stranger.txt"
ROWS = 96
MASKS = (
    (r"\b[0-9a-f]{12,64}\b", "#"),  # hashes
    (r"[-−+–]?\d[\d,]*(\.\d+)?(e-?\d+)?", "#"),  # numbers
    (r"#( ?(#|to|–|-|of|ms|s|min|h|%|kB|KB|MB|GB|B)\b ?)+", "# "),
    (r"^.*#/#.*\n", ""),  # progress, as often as it is told
    (r"[─━═]{3,}", "───"),
    (r"[ \t]+", " "),
    (r" $", ""),
)


def prepared(place: Path) -> Path:
    """What the stranger has: a model, and conversations in a file of another shape than ours."""
    shutil.copytree(MODEL_DIRECTORY, place / "models/mine")
    (place / "data").mkdir()
    (place / "elsewhere").mkdir()
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in row["messages"]]}
        for row in itertools.islice(generators.generate("math", seed=7), ROWS)
    ]
    (place / "data/mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def masked(text: str, place: Path) -> str:
    text = text.replace(str(place), "HERE")
    for pattern, instead in MASKS:
        text = re.sub(pattern, instead, text, flags=re.MULTILINE)
    return text.strip()


def walk(place: Path, commands: Forks) -> str:
    """The transcript of the walk below `place`."""
    said: list[str] = []

    def run(line: str, where: str = ".") -> str:
        ended = commands.run(*shlex.split(line), directory=place / where, COLUMNS="80")
        output = "\n".join(filter(None, (ended.stderr.strip(), ended.stdout.strip())))
        said.append(f"$ reapkit {line}\n{masked(output, place)}\n[exit code {ended.code}]")
        return output

    def edit(old: str, new: str) -> None:
        recipe = place / "recipes/mine.yaml"
        text = recipe.read_text()
        assert old in text, (old, text)
        recipe.write_text(text.replace(old, new))

    run("init models/mine --output recipes/mine.yaml")
    recipe = (place / "recipes/mine.yaml").read_text()
    begin, end = recipe.index("    # Weights are shares"), recipe.index("\nsaliency:")
    edit(recipe[begin:end], "    - {name: mine, source: ../data/mien.jsonl}\n")
    edit("samples: 1360 ", "samples: 40 ")
    edit("criterion: reap ", "criterion: raep ")
    run("validate recipes/mine.yaml")
    edit("mien.jsonl", "mine.jsonl")
    edit("criterion: raep ", "criterion: reap ")
    edit("packs: {", "packs: {samples: 24, ")
    edit("  gates: near", "  generation: {prompts: 4, max_new_tokens: 8}\n  throughput: null\n  gates: near")
    with (place / "recipes/mine.yaml").open("a") as file:
        file.write("\nruntime: {device: cpu}\n")
    run("validate recipes/mine.yaml")
    run("plan recipes/mine.yaml")
    rejected = run("apply recipes/mine.yaml")
    settings = re.findall(r"--set (prune\.ratio=[0-9.]+)", rejected)
    assert settings, rejected
    advised = f"--set {settings[-1]} --set quantize.scheme=W8A16"
    if "evaluate.on_undecided=warn" in run(f"apply recipes/mine.yaml {advised}"):
        advised += " --set evaluate.on_undecided=warn"
        run(f"apply recipes/mine.yaml {advised}")
    run(f"apply recipes/mine.yaml {advised}")
    run("report runs/mine")
    run("verify runs/mine")
    run("serve-check runs/mine/quantized")
    run(f"apply recipes/mine.yaml {advised} --set prune.repair=ridge --set output.directory=runs/repaired")
    run("compare runs/mine runs/repaired")
    run(f"lock recipes/mine.yaml {advised}")
    run(f"plan ../recipes/mine.yaml {advised} --set runtime.store=../runs/.store", "elsewhere")
    return "\n\n".join(said) + "\n"


@pytest.mark.long
def test_a_strangers_walk(commands: Forks) -> None:
    """Lines break where paths are long: blanks are not compared."""
    with tempfile.TemporaryDirectory() as directory:
        found = walk(prepared(Path(directory)), commands)
    assert found.split() == TRANSCRIPT.read_text().split()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, forking() as made:
        TRANSCRIPT.write_text(walk(prepared(Path(directory)), made))
    print(TRANSCRIPT, file=sys.stderr)
