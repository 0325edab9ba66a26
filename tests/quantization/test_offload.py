"""Layers that wait on disk while others are quantized: the same bytes, less memory, and nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.offload.cache import DiskCache
from safetensors.torch import load_file

import reapkit.pipeline.stages.quantize as stage
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.recipe.schema import QuantizeSpec
from tests.support.tiny import build, save_hub_layout
from tests.support.tiny_tokens import tiny_tokens


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        pytest.param("qwen3_moe", "gptq", marks=pytest.mark.long),
        pytest.param("gpt_oss", "gptq", marks=pytest.mark.long),
        *(
            pytest.param(name, method, marks=pytest.mark.long)
            for name, method in (("mixtral", "gptq"), ("deepseek_v3", "gptq"), ("qwen3_moe", "awq"))
        ),
    ],
)
@pytest.mark.usefixtures("layer_blocks")
def test_layers_on_disk_give_the_same_bytes(tmp_path: Path, model_type: str, method: str) -> None:
    more = {"kv_lora_rank": 32, "q_lora_rank": 32} if model_type == "deepseek_v3" else {}
    source = save_hub_layout(build(model_type, dtype=torch.bfloat16, num_hidden_layers=2, **more), tmp_path / "model")
    tokens = tiny_tokens(tmp_path / "tokens", lengths=(40, 24, 40, 24), score="all")
    spec, offload = QuantizeSpec(scheme="W4A16", method=method, group_size=32), tmp_path / "offload"
    seen = []
    read = DiskCache.onload

    def onload(self, offloaded):
        seen.append(Path(self.offload_dir))
        return read(self, offloaded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskCache, "onload", onload)
        facts = {
            name: quantize_checkpoint(source, tmp_path / name, spec, calibration=tokens, offload=where)
            for name, where in (("memory", None), ("disk", offload))
        }
    memory, disk = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "disk"))
    assert set(seen) == {offload.resolve()}
    assert memory.keys() == disk.keys() and all(torch.equal(memory[name], disk[name]) for name in memory)
    assert facts["memory"] == facts["disk"]
    assert not offload.exists() and not [
        entry for entry in DiskCache.index.values() if str(offload) in str(entry["safetensors_file"])
    ]


def test_the_stage_puts_layers_where_the_recipe_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def place(offloads: bool, directory: str | None) -> Path | None:
        monkeypatch.setattr(stage, "quantize_memory", lambda plan: SimpleNamespace(offloads=offloads))
        return stage._offload(
            SimpleNamespace(
                plan=None,
                work=tmp_path / "work",
                payload=tmp_path / "store" / "quantize-0123456789ab" / "payload",
                recipe=SimpleNamespace(runtime=SimpleNamespace(offload_directory=directory)),
            )
        )

    assert place(False, str(tmp_path)) is None
    assert (
        place(True, None).parent == tmp_path / "work"
        and place(True, str(tmp_path / "fast")).parent == tmp_path / "fast"
    )


MEASURED = """
import sys
from pathlib import Path
from reapkit.calibration.tokens import CalibrationTokens
from reapkit.quantization.checkpoint import quantize_checkpoint
from reapkit.recipe.schema import QuantizeSpec
import reapkit.quantization.calibrated
work, offload = Path(sys.argv[1]), sys.argv[2] == "disk"
spec = QuantizeSpec(scheme="W4A16", method="gptq", group_size=64, ignore=("re:.*layers[.](?!0[.]).*",))
tokens = CalibrationTokens.load(work / "tokens")
quantize_checkpoint(work / "model", work / sys.argv[2], spec, calibration=tokens, batch_tokens=256,
                    max_shard_bytes=20_000_000, offload=work / "offload" if offload else None)
status = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss would count who started us
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


@pytest.mark.long
def test_layers_on_disk_take_less_memory(tmp_path: Path) -> None:
    """16 layers of 50 MB: held at once, or one to two at a time. Only the first is quantized, to keep it short."""
    model = build(
        "qwen3_moe",
        dtype=torch.bfloat16,
        hidden_size=512,
        moe_intermediate_size=512,
        num_experts=32,
        num_hidden_layers=16,
    )
    layers = sum(parameter.nbytes for parameter in model.model.layers.parameters())
    save_hub_layout(model, tmp_path / "model", max_shard_size="20MB")
    del model
    tiny_tokens(tmp_path / "tokens", lengths=(64,) * 8, score="all")
    peak = {
        name: (
            1024
            * int(
                subprocess.run(
                    [sys.executable, "-c", MEASURED, str(tmp_path), name], capture_output=True, text=True, check=True
                ).stdout
            )
        )
        for name in ("memory", "disk")
    }
    assert peak["disk"] < peak["memory"] - 0.5 * layers, (peak, layers)
