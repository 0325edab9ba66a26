"""Train the demo model from nothing on a CPU, in less than half an hour, and write it in the hub's layout.

    python examples/demo_model/train.py

builds the corpus and the tokenizer in a working folder, trains, and writes the model folder that the package ships.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from build_corpus import build_corpus
from export import export
from muon import Muon
from train_tokenizer import CONTEXT, DOMAINS, END_OF_TEXT, TURN_END, train_tokenizer
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from reapkit.calibration.builtin.generators import generate

EVALUATION_SEED = 1


@dataclass(frozen=True)
class Settings:
    """What decides the result, given one version of Python's standard library, of torch and of the CPU's kernels."""

    steps: int = 1100
    sequences: tuple[tuple[str, int], ...] = (("code", 2), ("prose", 2), ("tools", 1), ("math", 1))
    """Windows of `sequence_length` tokens in one step, by domain."""
    sequence_length: int = 512
    long_every: int = 4
    """Every fourth step has half as many windows of twice the length, so that the whole context is trained."""
    muon_lr: float = 0.02
    adamw_lr: float = 3e-3
    balance: float = 0.003
    """Weight of the balance loss, one term per layer."""
    warmup_steps: int = 40
    flat_share: float = 0.3
    """Share of the steps before the learning rate begins to fall linearly."""
    seed: int = 0
    threads: int = 1


class Windows:
    """Consecutive windows over a domain's tokens; each begins where a row begins."""

    def __init__(self, tokens: torch.Tensor, starts: torch.Tensor) -> None:
        self._tokens, self._starts, self._at = tokens, starts, 0

    def take(self, length: int) -> torch.Tensor:
        """The next `[length]` tokens, from the first again when all are used up."""
        if self._at + length > len(self._tokens):
            self._at = 0
        window = self._tokens[self._at : self._at + length]
        following = int(torch.searchsorted(self._starts, self._at + length))
        self._at = int(self._starts[following]) if following < len(self._starts) else 0
        return window


def tokenized(rows: list[dict], tokenizer: PreTrainedTokenizerFast) -> Windows:
    """Rows one behind the other, each ended by the end-of-text token; conversations through the chat template."""
    texts = [
        row["text"]
        if "text" in row
        else tokenizer.apply_chat_template(row["messages"], tools=row.get("tools"), tokenize=False)
        for row in rows
    ]
    encoded = [torch.tensor([*ids, tokenizer.eos_token_id]) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    lengths = torch.tensor([len(ids) for ids in encoded])
    return Windows(torch.cat(encoded), lengths.cumsum(0) - lengths)


def batches(domains: dict[str, Windows], settings: Settings) -> Iterator[torch.Tensor]:
    """`[sequences, length]` token batches without end, every domain with its share."""
    step = 0
    while True:
        long = step % settings.long_every == settings.long_every - 1
        length = settings.sequence_length * (2 if long else 1)
        wanted = [name for name, count in settings.sequences for _ in range(count)]
        if long:
            halves = (step // settings.long_every) % 2
            wanted = [name for name, count in settings.sequences for _ in range(count // 2)]
            wanted += [name for name, count in settings.sequences if count == 1][halves : halves + 1]
        yield torch.stack([domains[name].take(length) for name in wanted])
        step += 1


def experts_in_order(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation that is fast on one CPU core: tokens sorted by expert, one expert after another."""
    order = top_k_index.reshape(-1).argsort(stable=True)
    token = order // top_k_index.shape[-1]
    counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
    outputs = []
    for expert, inputs in enumerate(hidden_states[token].split(counts)):
        gate, up = F.linear(inputs, self.gate_up_proj[expert]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return torch.zeros_like(hidden_states).index_add(0, token, weighted)


def new_model(vocabulary: int, settings: Settings) -> Qwen3MoeForCausalLM:
    """An untrained qwen3_moe whose matrices start at a width-independent scale."""
    torch.manual_seed(settings.seed)
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=32,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=settings.balance,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    ALL_EXPERTS_FUNCTIONS.register("experts_in_order", experts_in_order)
    model.set_experts_implementation("experts_in_order")
    residual = 1 / math.sqrt(2 * config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.05)
        elif "_proj" in name:
            scale = residual if "o_proj" in name or "down_proj" in name else 1.0
            torch.nn.init.normal_(parameter, std=scale / math.sqrt(parameter.shape[-1]))
        if name.endswith("gate_up_proj"):
            parameter.halves = 2
    return model


def optimizers(model: Qwen3MoeForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for embedding, router and norms."""
    matrices = [parameter for name, parameter in model.named_parameters() if "_proj" in name]
    others = [parameter for name, parameter in model.named_parameters() if "_proj" not in name]
    groups = [
        {"params": [parameter for parameter in others if parameter.dim() > 1], "weight_decay": 0.05},
        {"params": [parameter for parameter in others if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    return [
        Muon(matrices, lr=settings.muon_lr),
        torch.optim.AdamW(groups, lr=settings.adamw_lr, betas=(0.9, 0.97), fused=True),
    ]


def rate(step: int, settings: Settings) -> float:
    """The share of the full learning rate at a step: warmup, flat, then linear to almost nothing."""
    done = step / settings.steps
    return min(1.0, (step + 1) / settings.warmup_steps) * min(1.0, (1 - done) / (1 - settings.flat_share)) + 0.005


def balance_loss(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """The Switch Transformer's balance loss, for each layer on its own, averaged; 1 when a layer is even."""
    losses = []
    for logits in router_logits:
        probabilities = logits.softmax(-1)
        chosen = probabilities.topk(top_k, -1).indices.reshape(-1)
        share = torch.bincount(chosen, minlength=logits.shape[-1]) / len(chosen)
        losses.append(logits.shape[-1] * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def train_step(model: Qwen3MoeForCausalLM, tokens: torch.Tensor, settings: Settings) -> tuple[float, float]:
    """Accumulate gradients for one batch; returns cross entropy in nats per token, and the balance loss."""
    output = model.model(tokens, use_cache=False, output_router_logits=True)
    logits = model.lm_head(output.last_hidden_state[:, :-1])
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    top_k = model.config.num_experts_per_tok
    balance = balance_loss(output.router_logits, top_k)
    (cross_entropy + settings.balance * top_k * balance).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return cross_entropy.item(), balance.item()


@torch.no_grad()
def held_out_losses(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, windows: int = 12
) -> dict[str, float]:
    """Nats per token on rows of another seed, per domain."""
    losses = {}
    for domain in DOMAINS:
        held_out = tokenized(list(islice(generate(domain, seed=EVALUATION_SEED), 120)), tokenizer)
        tokens = torch.stack([held_out.take(512) for _ in range(windows)])
        logits = model(tokens, use_cache=False).logits[:, :-1]
        losses[domain] = round(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item(), 4)
    return losses


def train(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path, settings: Settings) -> None:
    """Run all steps, and print a line now and then."""
    domains = {name: tokenized(_rows(corpus / f"{name}.jsonl"), tokenizer) for name in DOMAINS}
    moved_by = optimizers(model, settings)
    full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in moved_by]
    began = time.monotonic()
    for step, tokens in enumerate(islice(batches(domains, settings), settings.steps)):
        for optimizer, rates in zip(moved_by, full_rates, strict=True):
            for group, full in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = full * rate(step, settings)
        cross_entropy, balance = train_step(model, tokens, settings)
        for optimizer in moved_by:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 100 == 99 or step + 1 == settings.steps:
            line = {
                "step": step + 1,
                "minutes": round((time.monotonic() - began) / 60, 1),
                "loss": round(cross_entropy, 3),
            }
            print(
                json.dumps(line | {"balance": round(balance, 3), "held_out": held_out_losses(model, tokenizer)}),
                flush=True,
            )


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Corpus, tokenizer, training, export."""
    root = Path(__file__).parents[2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=root / "runs" / "demo_model_corpus", help="folder for the corpus")
    parser.add_argument("--output", type=Path, default=root / "reapkit/calibration/builtin" / "demo_model")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--threads", type=int, default=Settings.threads)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps, threads=arguments.threads)
    torch.set_num_threads(settings.threads)
    print(json.dumps(asdict(settings)))

    arguments.output.mkdir(parents=True, exist_ok=True)
    build_corpus(arguments.work)
    tokenizer = train_tokenizer(arguments.work, arguments.output)
    model = new_model(len(tokenizer), settings)
    train(model, tokenizer, arguments.work, settings)
    turn_end, end_of_text = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    export(model, arguments.output, turn_end=turn_end, end_of_text=end_of_text)


if __name__ == "__main__":
    main()
