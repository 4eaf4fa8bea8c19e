"""Models that treat one layer apart, share, tie or leak: folded where that is right, else not, and always equal."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from equality import assert_equal_to_eager, tokens, unfolded
from toys import (
    VOCAB,
    Appending,
    Detached,
    Dictionary,
    Dropped,
    Every,
    FifthAlone,
    FourthLayer,
    FrozenBelow,
    Hooked,
    Keyword,
    LastOfFour,
    NamedAlone,
    Nothing,
    Odd,
    OtherClosure,
    OtherConstant,
    OtherFunction,
    PrivateFlag,
    Reversed,
    SharedChild,
    SharedLayer,
    Skips,
    Stack,
    Stashing,
    Structured,
    TiedInside,
    TiedLayers,
    Tupled,
    Twice,
)

from autopar.ir.rewrite import rewrite
from autopar.ir.trace import trace

MODELS: dict[str, tuple[Any, int, str]] = {  # how to make one, distinct blocks, what its history must tell
    "plain": (Stack, 1, ""),
    "skips": (Skips, 1, ""),
    "outer loop, first of five": (partial(Every, 0), 1, ""),
    "outer loop, last of five": (partial(Every, 4), 1, ""),
    "first of four by number": (partial(Stack, FourthLayer), 2, "layers.0 reads index"),
    "last of four by number": (partial(Stack, LastOfFour), 2, "layers.0 reads index"),
    "one in the middle by number": (partial(Stack, FifthAlone), 2, "layers.0 reads index"),
    "one in the middle by name": (partial(Stack, NamedAlone), 2, "layers.0 reads label"),
    "one in the middle by a private flag": (partial(Stack, PrivateFlag), 1, ""),
    "one in the middle by its function": (partial(Stack, OtherFunction), 1, ""),
    "one in the middle by a closure": (partial(Stack, OtherClosure), 1, ""),
    "one in the middle by a constant": (partial(Stack, OtherConstant), 0, ""),
    "one in the middle not tied": (partial(Stack, TiedInside), 1, ""),
    "one in the middle with a hook": (Hooked, 1, ""),
    "two tied": (TiedLayers, 1, ""),
    "one at two places": (SharedLayer, 1, ""),
    "a child in all": (SharedChild, 1, ""),
    "each twice": (Twice, 1, ""),
    "lower ones without gradient": (FrozenBelow, 1, ""),
    "tuples": (partial(Odd, Tupled), 1, ""),
    "dictionaries": (partial(Odd, Dictionary), 1, ""),
    "objects": (partial(Odd, Structured), 0, "not folded (layers.0 returns a Result)"),
    "nothing": (partial(Odd, Nothing), 0, "not folded (layers.0 returns no tensor)"),
    "keywords": (partial(Odd, Keyword), 1, ""),
    "a list to append to": (partial(Odd, Appending), 0, "not folded (layers.0 changes a list or a dict"),
    "a tensor on itself": (partial(Odd, Stashing), 0, "not folded (layers.0 changes score of its own"),
    "functions with their own backward": (partial(Stack, Reversed), 1, ""),
    "no_grad inside": (partial(Stack, Detached), 1, ""),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_folded_where_that_is_right_and_always_equal(name: str) -> None:
    make, distinct, told = MODELS[name]
    torch.manual_seed(0)
    model, batch = make(), tokens(VOCAB)
    folded = trace(model, batch(4, 6))
    assert folded.sizes
    assert len(folded.blocks) == distinct
    assert told in "\n".join(folded.history) if told else folded.history == []
    assert unfolded(folded) == unfolded(trace(model, batch(4, 6), full=True))
    assert_equal_to_eager(rewrite(folded), model, [batch(4, 6), batch(1, 9)])


def test_dropout_stays_random_and_the_same_seed_gives_the_same_bits() -> None:
    model, batch = Stack(Dropped), tokens(VOCAB)(4, 6)
    program = rewrite(trace(model, batch))
    assert len(program.blocks) == 1
    assert_equal_to_eager(program, model, [batch], seed=3)
    module = program.module()
    assert module(**batch)[0] != module(**batch)[0]


def test_tracing_leaves_the_model_as_it_was() -> None:
    model, batch = Odd(Stashing).eval(), tokens(VOCAB)(4, 6)
    before = [(n, m, dict(vars(m))) for n, m in model.named_modules()]
    apply = vars(torch.autograd.Function)["apply"]
    trace(model, batch)
    for name, module, held in before:
        assert vars(module).keys() == held.keys(), name
        assert all(vars(module)[key] is value for key, value in held.items()), name
    assert vars(torch.autograd.Function)["apply"] is apply
