"""Train five small MoE models on a CPU for the comparison of criteria: other seeds, top-k, expert counts, routers than
the demo's.

    python examples/criteria/train_models.py --output runs/criteria-models       # 5 to 8 minutes a model on one CPU
    core python examples/criteria/train_models.py --output runs/criteria-models --only sigmoid

They share the packaged demo model's corpus, tokenizer, optimizers and schedule (examples/demo_model), and differ where
a pruning criterion could care. The same versions of Python, torch and the CPU's kernels give the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from reapkit.checkpoint.locate import MODEL_DIRECTORY

sys.path.insert(0, str(Path(__file__).parents[1] / "demo_model"))
from build_corpus import build_corpus
from train import Settings, balance_loss, batches, experts_in_order, held_out_losses, optimizers, rate, tokenized
from train_tokenizer import CONTEXT, DOMAINS

BIAS_STEP = 0.003
"""How far a step moves the correction bias of a sigmoid router towards even loads (DeepSeek-V3's balancing without a
loss)."""


@dataclass(frozen=True)
class Variant:
    """One model: what differs from the others."""

    config: str
    seed: int
    experts: int = 32
    top_k: int = 2
    width: int = 48
    extra: tuple[tuple[str, object], ...] = ()


VARIANTS = {
    "softmax-a": Variant("Qwen3MoeConfig", seed=1, extra=(("norm_topk_prob", True),)),
    "softmax-b": Variant("Qwen3MoeConfig", seed=2, extra=(("norm_topk_prob", True),)),
    "top-4-of-64": Variant("Qwen3MoeConfig", seed=3, experts=64, top_k=4, width=32, extra=(("norm_topk_prob", True),)),
    "shared-expert": Variant(
        "Qwen2MoeConfig", seed=4, extra=(("shared_expert_intermediate_size", 96), ("norm_topk_prob", False))
    ),
    "sigmoid": Variant(
        "Glm4MoeConfig",
        seed=5,
        extra=(
            ("n_routed_experts", 32),
            ("n_shared_experts", 1),
            ("first_k_dense_replace", 1),
            ("n_group", 1),
            ("topk_group", 1),
            ("norm_topk_prob", True),
            ("routed_scaling_factor", 1.0),
            ("use_qk_norm", True),
            ("partial_rotary_factor", 0.5),
        ),
    ),
}
HIDDEN, LAYERS, HEAD = 96, 4, 32


def new_model(vocabulary: int, variant: Variant) -> PreTrainedModel:
    """An untrained model whose matrices start at a width-independent scale."""
    torch.manual_seed(variant.seed)
    count = {} if "n_routed_experts" in dict(variant.extra) else {"num_experts": variant.experts}
    config = getattr(transformers, variant.config)(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD, num_key_value_heads=1, head_dim=HEAD, num_experts_per_tok=variant.top_k,
        moe_intermediate_size=variant.width, max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **count, **dict(variant.extra))  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    ALL_EXPERTS_FUNCTIONS.register("experts_in_order", experts_in_order)
    model.set_experts_implementation("experts_in_order")
    residual = 1 / math.sqrt(2 * LAYERS)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
        elif "_proj" in name and parameter.dim() > 1:
            scale = residual if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(parameter, std=scale / math.sqrt(parameter.shape[-1]))
        if name.endswith("gate_up_proj"):
            parameter.halves = 2
    return model


def muon_friendly(model: PreTrainedModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """The demo's optimizers; a projection's bias is a vector, which Muon cannot move, so it stays at zero."""
    for name, parameter in model.named_parameters():
        if "_proj" in name and parameter.dim() == 1:
            parameter.requires_grad_(False)
    return optimizers(model, settings)


class Loads:
    """Counts what each sigmoid router chose, and moves its correction bias towards even loads after each step."""

    def __init__(self, model: PreTrainedModel):
        self.routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.chosen: dict[torch.nn.Module, torch.Tensor] = {}
        for router in self.routers:
            router.register_forward_hook(self._note)

    def _note(self, router: torch.nn.Module, _: tuple, output: tuple[torch.Tensor, ...]) -> None:
        self.chosen[router] = torch.bincount(output[2].reshape(-1), minlength=len(router.weight)).float()

    @torch.no_grad()
    def even_out(self, share: float) -> None:
        for router in self.routers:
            counts = self.chosen[router]
            router.e_score_correction_bias += share * BIAS_STEP * torch.sign(counts.mean() - counts)


def train_step(model: PreTrainedModel, tokens: torch.Tensor, settings: Settings, has_bias: bool) -> float:
    """Accumulates gradients for one batch; returns cross entropy in nats per token."""
    output = model.model(tokens, use_cache=False, **({} if has_bias else {"output_router_logits": True}))
    logits = model.lm_head(output.last_hidden_state[:, :-1])
    loss = cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    if not has_bias:
        top_k = model.config.num_experts_per_tok
        loss = cross_entropy + settings.balance * top_k * balance_loss(output.router_logits, top_k)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return cross_entropy.item()


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: Path, settings: Settings
) -> dict[str, float]:
    """Runs all steps, prints a line now and then, and returns the held-out losses."""
    domains = {name: tokenized(_rows(corpus / f"{name}.jsonl", settings.seed), tokenizer) for name in DOMAINS}
    moved_by, loads = muon_friendly(model, settings), Loads(model)
    full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in moved_by]
    began = time.monotonic()
    for step, tokens in enumerate(islice(batches(domains, settings), settings.steps)):
        share = rate(step, settings)
        for optimizer, rates in zip(moved_by, full_rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * share
        loss = train_step(model, tokens, settings, bool(loads.routers))
        for optimizer in moved_by:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loads.even_out(share)
        if step % 50 == 49:
            print(
                json.dumps(
                    {"step": step + 1, "minutes": round((time.monotonic() - began) / 60, 1), "loss": round(loss, 3)}
                ),
                flush=True,
            )
    return held_out_losses(model, tokenizer)


def _rows(path: Path, seed: int) -> Iterator[dict]:
    """The corpus in an order of its own for every seed."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    Random(f"{path.stem}:{seed}").shuffle(rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a folder per model, and `corpus`")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=700, help="the schedule is by steps, so it is reproducible")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = arguments.output / "corpus"
    if not (corpus / f"{DOMAINS[-1]}.jsonl").exists():
        build_corpus(corpus)
    for name in arguments.only:
        variant, tokenizer = VARIANTS[name], AutoTokenizer.from_pretrained(MODEL_DIRECTORY)
        settings = replace(Settings(), steps=arguments.steps, seed=variant.seed)
        model = new_model(len(tokenizer), variant)
        losses = train(model, tokenizer, corpus, settings)
        folder = arguments.output / name
        model.set_experts_implementation(None)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        facts = {
            "held_out": losses,
            "steps": settings.steps,
            "seed": variant.seed,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        print(json.dumps({"model": name, **facts}), flush=True)


if __name__ == "__main__":
    main()
