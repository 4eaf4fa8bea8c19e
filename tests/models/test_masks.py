"""Who sees whom: documents apart, prefixes whole, windows, and all of them as a reader would write them out."""

from __future__ import annotations

import pytest
import torch

from autopar.models.decoder import Decoder
from autopar.models.masks import Seen
from autopar.spec.model import resolve

SIZES = dict(layers=2, hidden=48, heads=6, vocab=61, max_length=64)
KINDS = {
    "llama": dict(family="llama", kv_heads=2, ffn=80),
    "gpt": dict(family="gpt"),
    "alibi": dict(family="bloom"),
    "chatglm": dict(family="chatglm"),
}


def model_of(kind: str, **fields) -> Decoder:
    torch.manual_seed(0)
    return Decoder(resolve({**SIZES, **KINDS[kind], **fields})).double()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_compute_what_each_computes_alone(kind):
    model = model_of(kind)
    first, second = torch.randint(0, 61, (1, 5)), torch.randint(0, 61, (1, 7))
    ids = torch.cat((first, second), 1)
    documents = torch.tensor([[0] * 5 + [1] * 7])
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]
    got = model(ids, position_ids=positions, document_ids=documents)
    torch.testing.assert_close(got, torch.cat((model(first), model(second)), 1), rtol=0, atol=1e-12)


def test_a_prefix_sees_all_of_itself_and_nothing_after_it():
    model = model_of("llama")
    ids = torch.randint(0, 61, (2, 9))
    prefix = torch.tensor([4, 0])
    before = model(ids, prefix_length=prefix)
    torch.testing.assert_close(before[1], model(ids[1:])[0])  # an empty prefix is causal
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 61
    after = model(changed, prefix_length=prefix)
    assert not torch.allclose(before[0, 0], after[0, 0]) and torch.equal(before[1, :3], after[1, :3])
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 61
    assert torch.equal(model(changed, prefix_length=prefix)[0, :6], before[0, :6])


def test_every_rule_together_is_what_a_double_loop_says():
    length, window = 8, 3
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 6, 6]])
    prefix, padding = torch.tensor([2, 5]), torch.ones(2, length, dtype=torch.long)
    padding[1, 7] = 0
    seen = Seen(padding, documents, prefix).boolean(torch.zeros(2, length, 4), window)
    for b in range(2):
        for q in range(length):
            for k in range(length):
                causal = q - window < k <= q
                wanted = (causal or k < prefix[b]) and documents[b, q] == documents[b, k] and bool(padding[b, k])
                assert bool(seen.expand(2, 1, length, length)[b, 0, q, k]) == bool(wanted), (b, q, k)


def test_windows_reach_as_far_as_the_pattern_lets_them():
    """A token changes what is computed at most (window − 1) places further in each layer that has a window."""
    ids = torch.randint(0, 61, (1, 12))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 1) % 61
    for pattern, reach in (((True,), 4), ((True, False), 11)):
        model = model_of("llama", window=3, window_pattern=pattern)
        differs = (model(ids) != model(changed)).any(-1)[0]
        assert differs.nonzero().max().item() == reach
