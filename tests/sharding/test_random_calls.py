"""Rules that compute their sentence from shapes, on random shapes: whatever is offered must be right."""

from __future__ import annotations

import random

import pytest
import torch

from autopar.sharding import oracle
from autopar.sharding.example import Example, example, tensor
from autopar.sharding.rule import strategies

aten = torch.ops.aten


def factors(rng: random.Random, total: int) -> list[int]:
    """Random dims whose product is ``total``, now and then with one of length 1."""
    found = []
    while total > 1:
        found.append(rng.choice([d for d in range(1, total + 1) if total % d == 0]))
        total //= found[-1]
    if rng.random() < 0.5 or not found:
        found.insert(rng.randint(0, len(found)), 1)
    return found


def reshape(rng: random.Random) -> Example:
    total = rng.choice([12, 16, 24, 36, 48, 60, 72])
    return example(aten.reshape.default, tensor(*factors(rng, total)), factors(rng, total))


def shapes(rng: random.Random) -> tuple[list[int], list[int], list[int]]:
    """A shape and two that broadcast to it."""
    whole = [rng.choice([1, 2, 3, 4, 6, 12]) for _ in range(rng.randint(1, 4))]
    a, b = ([n if rng.random() < 0.6 else 1 for n in whole][rng.randrange(len(whole)) :] for _ in range(2))
    return whole, a, b


def pointwise(rng: random.Random) -> Example:
    _, a, b = shapes(rng)
    return example(rng.choice([aten.mul.Tensor, aten.add.Tensor, aten.div.Tensor]), tensor(*a), tensor(*b))


def matmul(rng: random.Random) -> Example:
    _, a, b = shapes(rng)
    return example(aten.matmul.default, tensor(*a, 4, 6), tensor(*b, 6, 3))


def expand(rng: random.Random) -> Example:
    _, a, _ = shapes(rng)
    sizes = [n if n > 1 else rng.choice([-1, 1, 4, 6]) for n in a]
    return example(aten.expand.default, tensor(*a), [rng.choice([2, 6]), *sizes])


def cut(rng: random.Random) -> Example:
    whole, _, _ = shapes(rng)
    dim = rng.randrange(-len(whole), len(whole))
    start = rng.randrange(whole[dim])
    end = rng.randint(start + 1, whole[dim])
    return example(aten.slice.Tensor, tensor(*whole), dim, rng.choice([start, start - whole[dim]]), end)


def repeat(rng: random.Random) -> Example:
    whole, _, _ = shapes(rng)
    times = [rng.choice([1, 2, 3]) for _ in range(len(whole) + rng.randint(0, 1))]
    return example(aten.repeat.default, tensor(*whole), times)


@pytest.mark.parametrize("make", [reshape, pointwise, matmul, expand, cut, repeat], ids=lambda f: f.__name__)
def test_whatever_is_offered_for_random_shapes_is_right(make):
    rng, offered = random.Random(0), 0
    for made in (make(rng) for _ in range(60)):
        for degree in (2, 3):
            offered += len(strategies(made.node, degree)) - 1
            assert oracle.check(made, degree) == []
    assert offered > 30
