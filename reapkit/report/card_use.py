"""The part of a model card that says how to serve the directory, and how to make it again."""

from __future__ import annotations

import json

from reapkit.core.formatting import count, gigabytes, listed
from reapkit.planning.plan import Sizes
from reapkit.quantization.engines import ENGINES
from reapkit.report.facts import RunFacts
from reapkit.report.markdown import escaped, fenced


def _served(facts: RunFacts, which: str) -> str:
    """Whether an engine really ran this directory."""
    ran = next(
        (
            row
            for row in facts.verification.get("throughput") or ()
            if (row["model"], row["engine"]) == (which, "vllm") and not row["not_measured"]
        ),
        None,
    )
    return (
        f"This run generated text with it in vLLM {ran['version']} on {ran['device']}."
        if ran
        else "This run started no serving engine on it."
    )


def serving(facts: RunFacts, sizes: Sizes, which: str, scheme: str | None) -> str:
    """How engines load the directory, what memory it takes, and code that runs as it stands where the card lies."""
    target = facts.recipe.output.push_to_hub or "."
    ragged = len(set(sizes.experts.values())) > 1
    trust = facts.recipe.model.trust_remote_code or ragged
    packages = ("transformers", "torch", *(["compressed-tensors"] if scheme else []))
    versions = [f"{name} {facts.versions[name]}" for name in packages if facts.versions.get(name)]
    made = f" (made with {listed(versions)})" if versions else ""
    reload = facts.quantization.get("experts_reload_in_transformers", True) or scheme is None
    reads = (
        f"reads it{'; `compressed-tensors` must be installed' if scheme else ''}"
        if reload
        else "does not read routed experts in this scheme"
    )
    notes = [
        f"transformers: {reads}{made}.",
        *(
            f"{engine.name}: {engine.support(scheme, ragged=ragged).sentence}"
            for engine in ENGINES.values()
            if engine.on_card
        ),
        memory_to_serve(facts, sizes),
        _served(facts, which),
    ]
    blocks = ["## Use it", escaped("\n".join(f"- {note}" for note in notes))]
    if not ragged:
        blocks.append(fenced("bash", f"vllm serve {target}{' --trust-remote-code' if trust else ''}"))
    if reload:
        blocks.append(fenced("python", _generate(facts, target, trust)))
    return "\n\n".join(blocks)


def memory_to_serve(facts: RunFacts, sizes: Sizes) -> str:
    """The weights' bytes, the cache's where the config says them, and what neither counts."""
    per_thousand = facts.model.cache_bytes and 1000 * facts.model.cache_bytes
    cache = (
        f", and {_in_gigabytes(per_thousand)} of keys and values for every 1,000 tokens that are served at a time"
        if per_thousand
        else "; the cache of keys and values comes on top"
    )
    return (
        f"Memory to serve: {_in_gigabytes(sizes.nbytes)} of weights ({count(sizes.nbytes)} bytes){cache}. An engine"
        " adds its own buffers and activations."
    )


def _in_gigabytes(nbytes: int) -> str:
    """Bytes in 10^9 with two decimals, more where there would be no digit: `15.31 GB`, `0.00127 GB`."""
    return gigabytes(nbytes, ".2f" if nbytes >= 10**8 else ".3g")


PROMPT = "Write a function that adds two numbers."


def _generate(facts: RunFacts, target: str, trust: bool) -> str:
    """Code that loads the directory and continues a prompt."""
    code = ", trust_remote_code=True" if trust else ""
    speaks = facts.model.prompts
    imported = "AutoModelForCausalLM" + ("" if speaks == "tokens" else ", AutoTokenizer")
    where = "" if facts.recipe.output.push_to_hub else "  # this directory"
    lines = [
        *(["import torch"] if speaks == "tokens" else []),
        f"from transformers import {imported}",
        "",
        f"path = {json.dumps(target, ensure_ascii=False)}{where}",
        f'model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map="auto"{code})',
    ]
    if speaks == "tokens":
        return "\n".join(
            [
                *lines,
                "inputs = torch.tensor([[1, 2, 3]], device=model.device)  # token ids: this model ships no tokenizer",
                "print(model.generate(inputs, max_new_tokens=64)[0].tolist())",
            ]
        )
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained(path{code})")
    if speaks == "chat":
        lines += [
            f'messages = [{{"role": "user", "content": "{PROMPT}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ").to(model.device)",
        ]
    else:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt").to(model.device)')
    return "\n".join(
        [
            *lines,
            "output = model.generate(**inputs, max_new_tokens=64)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


HOMEPAGE = "https://github.com/reapkit/reapkit"


def recipe(facts: RunFacts) -> str:
    """The command, the whole recipe, and what made the directory."""
    others = ", ".join(f"{name} {version}" for name, version in facts.versions.items() if name != "reapkit")
    own = facts.versions.get("reapkit", "")
    made = f"Made with [reapkit]({HOMEPAGE}){f' {own}' if own else ''}{f', {others}' if others else ''}."
    return (
        f"## Recipe\n\n{fenced('bash', facts.command)}\n\n<details><summary>The recipe with every default written"
        f" out</summary>\n\n{fenced('yaml', facts.recipe_yaml)}\n\n</details>\n\n{escaped(made)}"
    )
