"""What is measured against the base equals a plain forward's numbers, for masks and for directories."""

import math

import pytest
import torch

from reapkit.calibration.tokens import batches
from reapkit.core.errors import StageFailed, UnusableError
from reapkit.evaluation import head, outputs
from reapkit.evaluation.outputs import BaseOutputs, Pack, base_hidden, compare, describe_base, describe_hidden, measure
from reapkit.model.masking import masked
from tests.support import tiny
from tests.support.held_out import held_out

BATCH = 48
KEEP = {0: range(0, 16, 2), 1: range(8), 2: range(4, 12)}


@pytest.fixture(scope="module")
def model():
    return tiny.build("qwen3_moe").requires_grad_(False)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    return Pack.part(held_out(tmp_path_factory.mktemp("pack")), "decide", 24)


@pytest.fixture(scope="module")
def base(model, pack):
    return BaseOutputs.of(model, pack, base_hidden(model, pack, batch_tokens=BATCH))


@pytest.fixture(scope="module")
def own(model, pack, base):
    return describe_hidden(model, pack, base.hidden)


def plain_log_probabilities(model, pack):
    """Row by row, whole logits of an ordinary forward: log p `[n, vocabulary]`, reference `[n]`, source names `[n]`."""
    log_p, reference, source = [], [], []
    for row in pack.rows:
        read = pack.tokens.row(row)
        logits = model(read.input_ids.unsqueeze(0), use_cache=False).logits[0].double().log_softmax(-1)
        for t in range(len(read.input_ids) - 1):
            if read.signal[t]:
                log_p.append(logits[t])
                reference.append(int(read.input_ids[t + 1]))
                source.append(pack.tokens.sources[pack.tokens.row_source[row]])
    return torch.stack(log_p), torch.tensor(reference), source


@torch.no_grad()
def test_a_masked_candidate_equals_plain_forwards(model, pack, base, own):
    with masked(model, KEEP):
        candidate = measure(model, pack, base, batch_tokens=BATCH)
        log_q, _, _ = plain_log_probabilities(model, pack)
    log_p, reference, source = plain_log_probabilities(model, pack)
    at = torch.arange(len(reference))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.equal(base.reference, reference)
    assert torch.allclose(candidate.kl.double(), kl, rtol=1e-3, atol=1e-6)
    found = compare(own, candidate, pack)
    for group in ("all", "code", "prose", "french"):
        inside = torch.tensor([name != "french" if group == "all" else name == group for name in source])
        nll, base_nll = (-each[at, reference][inside].mean().item() for each in (log_q, log_p))
        assert found[group]["perplexity"]["value"] == pytest.approx(math.exp(nll), rel=1e-5)
        assert found[group]["perplexity_ratio"]["value"] == pytest.approx(math.exp(nll - base_nll), rel=1e-5)
        assert found[group]["kl_mean"]["value"] == pytest.approx(kl[inside].mean().item(), rel=1e-4)
        same = (log_p.argmax(-1) == log_q.argmax(-1))[inside].double().mean().item()
        assert found[group]["top1_agreement"]["value"] == pytest.approx(same)
        assert describe_base(own, pack)[group]["perplexity"]["value"] == pytest.approx(math.exp(base_nll), rel=1e-5)
    low, high = found["all"]["kl_mean"]["interval"]
    assert low < found["all"]["kl_mean"]["value"] < high


def test_base_against_itself_is_exactly_zero(model, pack, base, own):
    for found in (measure(model, pack, base, batch_tokens=BATCH), _all_kept(model, pack, base)):
        assert found.kl.abs().max() == 0
        same = compare(own, found, pack)["all"]
        assert same["perplexity_ratio"] == {"value": 1.0, "interval": [1.0, 1.0]}
        assert same["top1_agreement"]["value"] == 1.0 and same["js_distance"]["value"] == 0.0


def _all_kept(model, pack, base):
    with masked(model, {layer: range(16) for layer in range(3)}):
        return measure(model, pack, base, batch_tokens=BATCH)


def test_chunks_do_not_change_the_numbers(model, pack, base, monkeypatch):
    whole = measure(model, pack, base, batch_tokens=BATCH)
    monkeypatch.setattr(head, "LOGIT_BYTES", 5 * 4 * 256)
    assert head.chunk_positions(model) == 5
    chunked = measure(model, pack, base, batch_tokens=BATCH)
    assert torch.allclose(whole.nll, chunked.nll, atol=1e-5) and chunked.kl.max() < 1e-6


def test_hidden_states_on_disk_equal_those_in_memory_and_a_killed_run_goes_on(model, pack, base, tmp_path, monkeypatch):
    seen = []
    real = outputs.batches

    def killed_after_two(*args):
        for number, batch in enumerate(real(*args)):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(outputs, "batches", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        base_hidden(model, pack, batch_tokens=BATCH, work_directory=tmp_path)
    monkeypatch.setattr(outputs, "batches", real)
    monkeypatch.setattr(outputs, "hidden_states", lambda *args: seen.append(args[1].shape) or head.hidden_states(*args))
    again = base_hidden(model, pack, batch_tokens=BATCH, work_directory=tmp_path)
    total = len(list(batches(pack.tokens, pack.rows, BATCH)))
    assert len(seen) - 1 == total - 2  # one token tells width and dtype
    assert torch.equal(again, base.hidden)
    seen.clear()
    base_hidden(model, pack, batch_tokens=BATCH, work_directory=tmp_path)
    assert len(seen) == 1


def test_another_models_head_is_not_taken_for_the_bases(model, pack, base):
    other = tiny.build("qwen3_moe").requires_grad_(False)
    other.get_output_embeddings().weight.mul_(1.5)
    own = other.get_output_embeddings()
    found = measure(other, pack, base, batch_tokens=BATCH)
    assert other.get_output_embeddings() is own
    log_q, _, _ = plain_log_probabilities(other, pack)
    log_p, _, _ = plain_log_probabilities(model, pack)
    assert torch.allclose(found.kl.double(), (log_p.exp() * (log_p - log_q)).sum(-1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("model_type", ["gemma4_text", "granitemoe", "gpt_oss", "phimoe", "nemotron_h", "qwen3_vl_moe"])
def test_logits_of_kept_hidden_states_are_the_models_own(model_type):
    """Softcapping, scaled logits, biased heads, other decoder names, text inside a multimodal model."""
    model, ids = tiny.build(model_type), torch.arange(3, 19)
    with torch.no_grad():
        head.check_head(model, ids)
        own = model(input_ids=ids[None], use_cache=False).logits[0].float()
        made = head.logits(model, head.hidden_states(model, ids[None])[0])
    assert made.dtype == torch.float32 and made.shape == (16, own.shape[-1])
    assert torch.allclose(made, own, rtol=0, atol=1e-4 * max(1.0, own.abs().max().item()))


def test_a_head_that_reads_more_than_hidden_states_is_refused(model, monkeypatch):
    monkeypatch.setattr(head, "head_logits", lambda model, hidden: torch.zeros(len(hidden), 256))
    with pytest.raises(
        UnusableError, match="Qwen3MoeForCausalLM: its logits cannot be made from its final hidden states"
    ):
        head.check_head(model, torch.arange(3, 19))


def test_a_pack_without_measured_positions_is_refused(model, tmp_path):
    silent = held_out(tmp_path, lengths=(1, 1, 1))
    with pytest.raises(UnusableError, match="pack of 24 tokens measures no position: its 3 rows"):
        base_hidden(model, Pack.part(silent, "decide", 24), batch_tokens=BATCH)


def test_logits_that_are_not_finite_are_no_measurement(pack, base):
    broken = tiny.build("qwen3_moe").requires_grad_(False)
    broken.model.norm.weight[0] = float("nan")
    with pytest.raises(
        StageFailed, match=f"evaluate: {pack.num_positions} of {pack.num_positions} measured positions have logits"
    ):
        measure(broken, pack, base, batch_tokens=BATCH)
