"""Two ranks against one process: equal bytes, resumed across rank counts, and an end that every rank agrees on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reapkit.observation.job import Job
from reapkit.observation.observation import Observation
from reapkit.observation.waves import Wave, covering, plan_waves
from reapkit.recipe.schema import ObserveSpec
from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.tiny_tokens import tiny_tokens

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from reapkit.core import ranks
from reapkit.observation import resident, streamed
from reapkit.observation.job import Job, help_with

work, kill_after, kill_of = sys.argv[1], int(sys.argv[2]), sys.argv[3:]

def killing(owner, name):
    original, count = getattr(owner, name), [0]
    def counted(*args, **kwargs):
        original(*args, **kwargs)
        count[0] += 1
        if count[0] == kill_after:
            beside = [rank for rank in range(team.world) if rank != team.rank]
            others = [team.keys.get(f"who/{rank}")["pid"] for rank in beside]
            # The launcher first: what the ranks know of each other goes with it.
            for process in (os.getppid(), *others) if others else ():
                os.kill(process, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, counted)

if kill_after:
    killing(resident.Partials, "write")
    killing(streamed.WaveSums, "save")
team = ranks.join() if ranks.launched() else ranks.ALONE
if team.rank:
    for job in team.jobs():
        help_with(job, team)
    team.leave()
else:
    for fields in json.loads(Path(work, "jobs.json").read_text()):
        team.begin(fields)
        Job.of_json(fields).run(team).save(Path(fields["work"]) / "saved")
    if team.world > 1:
        team.conclude(0)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def jobs(
    tmp_path: Path,
    run: str,
    placements: tuple[str, ...] = ("resident", "streaming"),
    trace_bytes: int = 10**9,
    **changes: object,
) -> Path:
    """Jobs of a tiny model with a multi-token-prediction block on disk, shared by the runs of one test."""
    if not (tmp_path / "model").exists():
        with tiny.quiet():
            tiny.save_hub_layout(tiny.build("glm4_moe"), tmp_path / "model", mtp=1)
        tiny_tokens(tmp_path / "calibration", lengths=(24, 17, 1, 20, 9, 24, 13, 22, 24, 24, 24, 24), groups=6)
    made = []
    for placement in placements:
        work = tmp_path / run / placement
        work.mkdir(parents=True)
        fields = {"hidden_bytes": None, "checkpoint_minutes": 0.0, **changes}
        spec = ObserveSpec(reroute_tokens=40, trace_bytes=trace_bytes)
        made.append(
            Job(
                str(tmp_path / "model"),
                str(tmp_path / "calibration"),
                str(work),
                spec,
                48,
                "tiny",
                "cpu",
                placement,
                False,
                offload_directory=None,
                mtp=(3,),
                **fields,
            ).as_json()
        )
    (tmp_path / run / "jobs.json").write_text(json.dumps(made))
    return tmp_path / run


def work(directory: Path, ranks: int, kill_after: int = 0) -> int:
    launcher = TORCHRUN if ranks == 2 else ()
    script = directory / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(directory), str(kill_after)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert kill_after or done.returncode == 0, done.stderr
    return done.returncode


def saved(directory: Path) -> dict[str, bytes]:
    """The observations' bytes by placement and file."""
    files = {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.glob("*/saved/*"))}
    assert files
    return files


def test_two_ranks_give_the_bytes_of_one(tmp_path: Path) -> None:
    one, two = jobs(tmp_path, "one"), jobs(tmp_path, "two")
    for fields in json.loads((one / "jobs.json").read_text()):
        Job.of_json(fields).run().save(Path(fields["work"]) / "saved")
    work(two, 2)
    assert saved(one) == saved(two) and len(saved(one)) >= 4
    assert not [*two.rglob("*inputs*"), *two.rglob("*.part"), *two.rglob(".*.partial")]
    waves = [json.loads(file.read_text()) for file in two.glob("streaming/*/wave-*/groups.json")]
    assert sorted(waves) == [[0, 1, 2], [3, 4, 5]], "both ranks streamed"
    for placement in ("resident", "streaming"):
        paths = Observation.load(two / placement / "saved").reroute
        assert int(paths.tokens.sum()) == 40 and bool((paths.order[paths.measured, :, 0] >= 0).all()), (
            "the removal paths are among the bytes"
        )


@pytest.mark.long
@pytest.mark.parametrize("placement", ["resident", "streaming"])
@pytest.mark.parametrize("counts", [(1, 2), (2, 1), (2, 2)], ids=lambda counts: f"{counts[0]}to{counts[1]}")
def test_killed_and_resumed_with_another_number_of_ranks(
    placement: str, counts: tuple[int, int], tmp_path: Path
) -> None:
    whole, resumed = jobs(tmp_path, "whole", (placement,)), jobs(tmp_path, "resumed", (placement,))
    work(whole, 1)
    assert work(resumed, counts[0], kill_after=2) == -9
    left = {
        file: file.stat().st_mtime_ns
        for pattern in ("group-*.safetensors", "layer-0001.safetensors")
        for file in resumed.rglob(pattern)
    }
    assert left, "something was finished before the kill"
    time.sleep(3)  # what the kill left of the other rank's last write
    work(resumed, counts[1])
    assert saved(resumed) == saved(whole)
    assert all(file.stat().st_mtime_ns == when for file, when in left.items()), "what was finished is not made again"


@pytest.mark.long
def test_waves_within_a_budget_and_killed_again_and_again(tmp_path: Path) -> None:
    whole, resumed = (
        jobs(tmp_path, "whole", ("streaming",)),
        jobs(tmp_path, "resumed", ("streaming",), hidden_bytes=2 * 48 * 64 * 4),
    )
    work(whole, 1)
    for ranks, after in ((1, 3), (2, 2), (1, 2), (2, 3)):
        work(resumed, ranks, after)
        time.sleep(3)
    work(resumed, 2)
    assert saved(resumed) == saved(whole)


@pytest.mark.long
def test_eaft_material_in_cells_is_that_of_one_process_killed_or_not(tmp_path: Path) -> None:
    one, two = (jobs(tmp_path, name, trace_bytes=0) for name in ("one", "two"))
    work(one, 1)
    for after in (3, 5, 7):
        work(two, 2, after)
        time.sleep(3)
    work(two, 1)
    assert saved(one) == saved(two)


COST = dict.fromkeys(range(8), 10)


def left_by(root: Path, groups: tuple[int, ...], *, layers: int, inputs: int | None = None, done: bool = False) -> None:
    directory = Wave(groups).directory(root)
    for layer in range(layers):
        (directory / f"layer-{layer:04d}.safetensors").touch()
    if inputs is not None:
        (directory / f"inputs-{inputs:04d}").mkdir()
        (directory / f"inputs-{inputs:04d}" / "facts.json").touch()
    if done:
        (directory / "done").touch()


def test_waves_are_split_over_ranks_and_by_the_budget(tmp_path: Path) -> None:
    assert plan_waves(tmp_path, COST, 1, 4, None) == [[Wave(tuple(range(8)))]]
    assert plan_waves(tmp_path, COST, 2, 4, 20) == [[Wave((0, 1)), Wave((2, 3))], [Wave((4, 5)), Wave((6, 7))]]
    assert plan_waves(tmp_path, {0: 10, 1: 10}, 3, 4, None)[2] == [], "more ranks than groups: one has nothing to do"


def test_earlier_work_is_gone_on_from_and_never_joined(tmp_path: Path) -> None:
    left_by(tmp_path, (0, 1), layers=4, done=True)
    left_by(tmp_path, (2, 3, 4, 5), layers=3, inputs=2)
    left_by(tmp_path, (6, 7), layers=1)
    taken = f"{Wave((2, 3, 4, 5)).name}/inputs-0002"
    assert plan_waves(tmp_path, COST, 1, 4, None) == [[Wave((2, 3, 4, 5), 2, taken), Wave((6, 7))]]
    assert not (tmp_path / Wave((6, 7)).name).exists(), "sums without a place to go on from are made anew"
    assert plan_waves(tmp_path, COST, 4, 4, None) == [
        [Wave((6,))],
        [Wave((7,))],
        [Wave((2, 4), 2, taken)],
        [Wave((3, 5), 2, taken)],
    ], "by what is left to compute"
    left_by(tmp_path, (2, 3), layers=4, inputs=3)
    assert plan_waves(tmp_path, COST, 1, 4, None)[0][:2] == [
        Wave((2, 3), 3, f"{Wave((2, 3)).name}/inputs-0003"),
        Wave((4, 5), 2, taken),
    ]


def test_files_of_split_waves_cover_every_group_once(tmp_path: Path) -> None:
    left_by(tmp_path, (0, 1, 2, 3), layers=3)
    left_by(tmp_path, (0, 1), layers=4)
    with pytest.raises(FileNotFoundError, match=r"no wave left layer-0003\.safetensors of row group 2"):
        covering(tmp_path, "layer-0003.safetensors", 4)
    left_by(tmp_path, (2, 3), layers=4)
    assert [file.parent.name for file in covering(tmp_path, "layer-0002.safetensors", 4)] == [Wave((0, 1, 2, 3)).name]
    assert [file.parent.name for file in covering(tmp_path, "layer-0003.safetensors", 4)] == [
        Wave((0, 1)).name,
        Wave((2, 3)).name,
    ]


# ---------------------------------------------------------------------------------------------- the command line

COMMAND = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from reapkit.cli.main import main

out, what, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
rank = int(os.environ["RANK"])

def note(code, leave=os._exit):
    (out / f"code-{rank}").write_text(str(code))
    leave(code)

os._exit = note
if what != "nothing":
    from reapkit.observation import resident
    original, count = resident._sum_group, [0]
    def sum_group(*args):
        count[0] += 1
        (out / f"observing-{rank}").touch()
        if count[0] == 2 and what == f"kill-{rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        if count[0] == 2 and what == f"break-{rank}":
            raise MemoryError
        import time
        time.sleep(0.5)
        return original(*args)
    resident._sum_group = sum_group
try:
    main(arguments)
except SystemExit as stop:
    note(stop.code, lambda code: sys.exit(code))
"""
SMALL = ("calibration.samples=48", "calibration.max_length=256", "runtime.placement=resident", "runtime.device=cpu")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the demo's calibration and, beside it, the observation of one process."""
    root = tmp_path_factory.mktemp("prepared")
    subprocess.run(
        [sys.executable, "-m", "reapkit", "observe", "demo", *settings(root)],
        env=environment(),
        check=True,
        capture_output=True,
    )
    (observed,) = (root / "store").glob("observe-*/")
    shutil.rmtree(observed)
    return root


def settings(root: Path) -> list[str]:
    values = (*SMALL, f"runtime.store={root / 'store'}", f"output.directory={root / 'run'}")
    return [word for value in values for word in ("--set", value)]


class Started:
    """`torchrun` of the command line with two ranks, in a copy of the prepared store."""

    def __init__(
        self, prepared: Path, root: Path, what: str, command: tuple[str, ...] = ("observe", "demo"), *more: str
    ):
        self.root = root
        if not (root / "store").exists():
            shutil.copytree(prepared / "store", root / "store")
        for file in [*root.glob("code-*"), *root.glob("observing-*")]:
            file.unlink()
        (root / "command.py").write_text(COMMAND)
        self.process = subprocess.Popen(
            [sys.executable, *TORCHRUN, str(root / "command.py"), str(root), what, *command, *settings(root), *more],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 120
        while not (self.root / name).exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def end(self) -> tuple[dict[int, int], str]:
        """Exit codes by rank, and what was written to stderr."""
        _, stderr = self.process.communicate(timeout=240)
        return {rank: int(file.read_text()) for rank in (0, 1) if (file := self.root / f"code-{rank}").exists()}, stderr

    def observation(self) -> bytes:
        return (self.root / "run" / "observation" / "observation.safetensors").read_bytes()


@pytest.mark.long
def test_only_rank_0_speaks_and_the_bytes_are_those_of_one_process(prepared: Path, tmp_path: Path) -> None:
    started = Started(prepared, tmp_path, "nothing")
    codes, stderr = started.end()
    assert codes == {0: 0, 1: 0} and stderr.count("observe: running") == 1, stderr
    assert started.observation() == (prepared / "run" / "observation" / "observation.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_rank_ends_the_run_with_a_clear_word(dead: int, prepared: Path, tmp_path: Path) -> None:
    codes, stderr = Started(prepared, tmp_path, f"kill-{dead}").end()
    assert codes == {1 - dead: 4}, stderr
    assert (
        f"reapkit: rank {dead} (" in stderr
        and "stopped without an error message (killed, out of memory, or its machine failed)" in stderr
    )
    assert (
        "run the same command again to resume, with any number of ranks" in stderr
        and stderr.count("stopped without an error message") == 1
    )
    again = Started(prepared, tmp_path, "nothing")
    assert again.end()[0] == {0: 0, 1: 0}
    assert again.observation() == (prepared / "run" / "observation" / "observation.safetensors").read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_of_torchrun_is_130_everywhere(number: int, prepared: Path, tmp_path: Path) -> None:
    started = Started(prepared, tmp_path, "slowly")
    started.wait_for("observing-0")
    started.process.send_signal(number)
    codes, stderr = started.end()
    assert codes == {0: 130, 1: 130}, stderr
    assert stderr.count("Interrupted. Finished stages are kept; run the same command again to resume.") == 1
    again = Started(prepared, tmp_path, "nothing")
    assert again.end()[0] == {0: 0, 1: 0}
    assert again.observation() == (prepared / "run" / "observation" / "observation.safetensors").read_bytes()


@pytest.mark.long
def test_a_failure_on_another_rank_is_told_once_and_is_everybodys_code(prepared: Path, tmp_path: Path) -> None:
    codes, stderr = Started(prepared, tmp_path, "break-1").end()
    assert codes == {0: 4, 1: 4}, stderr
    assert stderr.count("the machine's memory does not suffice") == 1 and "reapkit: rank 1 (" in stderr, stderr
    assert "Free some memory, or lower runtime.batch_tokens, then run the same command again." in stderr


@pytest.mark.long
def test_a_wrong_recipe_is_told_once(prepared: Path, tmp_path: Path) -> None:
    codes, stderr = Started(prepared, tmp_path, "nothing", ("apply", "demo"), "--set", "prune.ratio=2").end()
    assert codes == {0: 2, 1: 2} and stderr.count("prune.ratio: found 2") + stderr.count("prune.ratio=2") == 1, stderr
