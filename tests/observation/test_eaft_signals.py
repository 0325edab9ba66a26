"""p and H against their definitions in Python floats."""

import math

import pytest
import torch

from reapkit.observation import eaft_signals as room
from reapkit.observation.eaft_signals import signals, signals_of_hidden
from tests.support import tiny


@pytest.mark.parametrize("vocabulary", [12, 300])
def test_signals_by_definition(vocabulary: int):
    logits = 3 * torch.randn(7, vocabulary, generator=torch.Generator().manual_seed(0))
    reference = torch.arange(7)
    p, h = signals(logits, reference, 20)
    k = min(20, vocabulary)
    for row in range(7):
        weights = [math.exp(x) for x in logits[row].tolist()]
        top = sorted(weights, reverse=True)[:k]
        entropy = -sum(w / sum(top) * math.log(w / sum(top)) for w in top) / math.log(k)
        assert float(p[row]) == pytest.approx(weights[row] / sum(weights), rel=1e-5)
        assert float(h[row]) == pytest.approx(entropy, rel=1e-5)


def test_certainty_and_ignorance_are_the_ends():
    logits = torch.zeros(2, 50)
    logits[0, 4] = 1000.0
    p, h = signals(logits, torch.tensor([4, 4]), 20)
    assert p.tolist() == [1.0, pytest.approx(0.02)]
    assert h.tolist() == [0.0, pytest.approx(1.0)]


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch):
    model = tiny.build("qwen3_moe")
    hidden, reference = torch.randn(11, 64), torch.arange(11)
    with torch.no_grad():
        whole = signals_of_hidden(model, hidden, reference, 20)
        monkeypatch.setattr(room, "CHUNK_BYTES", 4 * 256 * 3)
        parts = signals_of_hidden(model, hidden, reference, 20)
        nothing = signals_of_hidden(model, hidden[:0], reference[:0], 20)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(whole, parts, strict=True))
    assert [len(part) for part in nothing] == [0, 0]
