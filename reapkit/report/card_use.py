"""The part of a model card that says how to serve the directory, and how to make it again."""

from __future__ import annotations

from reapkit.core.formatting import listed
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
    target = facts.recipe.output.push_to_hub or "path/to/this/directory"
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
        _served(facts, which),
    ]
    blocks = ["## Use it", escaped("\n".join(f"- {note}" for note in notes))]
    if not ragged:
        blocks.append(fenced("bash", f"vllm serve {target}{' --trust-remote-code' if trust else ''}"))
    if reload:
        code = ", trust_remote_code=True" if trust else ""
        lines = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{target}", dtype="auto", device_map="auto"{code})\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{target}")'
        )
        blocks.append(fenced("python", lines))
    return "\n\n".join(blocks)


def recipe(facts: RunFacts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return (
        f"## Recipe\n\n{fenced('bash', facts.command)}\n\n<details><summary>The recipe with every default written"
        f" out</summary>\n\n{fenced('yaml', facts.recipe_yaml)}\n\n</details>"
        + (f"\n\nMade with {escaped(versions)}." if versions else "")
    )
