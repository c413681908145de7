"""Nucleus sampling and Dream's own decoder."""

from __future__ import annotations

import pytest
import torch

from unmask import UserError, make_decoder
from unmask.decoding.sampling import candidates
from unmask.models.head import Head


def test_nucleus_by_hand() -> None:
    """Over an even grid of noise, tokens come as often as the cut and renormalised softmax says."""
    probabilities = torch.tensor([0.05, 0.4, 0.3, 0.15, 0.1], dtype=torch.float64)
    weight = probabilities.log()[:, None]  # hidden states of one number, 1
    head = torch.nn.Linear(1, 5, bias=False, dtype=torch.float64)
    head.weight.data = weight
    count = 20_000
    noise = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    hidden = torch.ones(count, 1, dtype=torch.float64)
    for top_p, kept in ((0.5, [1, 2]), (0.39, [1]), (0.4001, [1, 2]), (0.84, [1, 2, 3]), (0.99, [0, 1, 2, 3, 4])):
        found = candidates(Head.of(head, head, -1), hidden, 1.0, noise, top_p=top_p)
        share = torch.bincount(found.tokens, minlength=5) / count
        expected = torch.zeros(5, dtype=torch.float64)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert torch.allclose(share.double(), expected, atol=1e-3), top_p
        assert torch.allclose(found.logprob, probabilities[found.tokens].log(), atol=1e-9)  # of the whole distribution
    hot = candidates(Head.of(head, head, -1), hidden, 2.0, noise, top_p=0.55).tokens
    tempered = probabilities.sqrt() / probabilities.sqrt().sum()  # 0.11, 0.31, 0.27, 0.19, 0.15 with top 1, 2
    assert (
        set(hot.tolist()) == {1, 2}
        and abs(float((hot == 1).double().mean()) - float(tempered[1] / tempered[1:3].sum())) < 1e-3
    )


def test_dreams_own_decoder() -> None:
    decoder = make_decoder("dream", max_new_tokens=24)
    assert decoder.plan.commits == (1,) * 24 and (decoder.temperature, decoder.top_p) == (0.2, 0.95)
    assert make_decoder("dream:steps=12", max_new_tokens=24).plan.steps == 12
    with pytest.raises(UserError, match="top_p of decoder 'full:top_p=0' is 0"):
        make_decoder("full:top_p=0")
