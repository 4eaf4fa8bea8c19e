"""Every rule against the oracle, the oracle against wrong rules, and how rules are found."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import fx

from autopar.sharding import oracle, rules
from autopar.sharding import rule as rule_module
from autopar.sharding.example import Example, example, integers, tensor, truths
from autopar.sharding.notation import NotationError, expand
from autopar.sharding.placement import P, R, S
from autopar.sharding.rule import Rule, addends, is_unsplit, local_args, sentence_of, strategies
from autopar.sharding.rule import rules as all_rules
from autopar.sharding.strategy import Strategy

aten = torch.ops.aten
DISTINCT: list[Rule] = list({id(r): r for r in all_rules().values()}.values())


def name(found: Rule) -> str:
    return f"{Path(found.file).stem}.{found.text.__name__}"


@pytest.mark.parametrize("found", DISTINCT, ids=name)
def test_every_strategy_of_every_example_is_right(found: Rule):
    assert found.examples, f"{name(found)} has no examples"
    wrong = [w for e in found.examples for degree in (2, 3) for w in oracle.check(e, degree)]
    assert wrong == []


@pytest.mark.parametrize("found", DISTINCT, ids=name)
def test_every_rule_gives_some_freedom_or_says_it_gives_none(found: Rule):
    free = [e for e in found.examples for d in (2, 3) if len(strategies(e.node, d)) > 1]
    assert free or found.text.__name__ == "whole"


def wrong_by(text: str, made: Example, degree: int = 2) -> list[str]:
    """What the oracle says of a rule's text that is not the operator's own."""
    node, specs = made.made
    shapes = [s.shape for s in specs], [tuple(node.meta["val"].shape)]
    return [w for s in expand(text, *shapes, degree) for w in oracle.prove(made, s, degree)]


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("a b -> a b", example(aten.softmax.int, tensor(3, 4), -1)),
        ("a b -> a b", example(aten.cumsum.default, tensor(4, 3), 0)),
        ("a! b! ~1, a! b! ~1 -> a! b! ~", example(aten.mul.Tensor, tensor(3, 4), tensor(3, 4))),
        ("a! ~ -> a! ~", example(aten.exp.default, tensor(3))),
        ("a! ~ -> a! ~", example(aten.add.Tensor, tensor(3), 1.0)),
        ("a! ~ -> a! ~", example(aten.to.dtype, tensor(3), torch.int64)),
        ("a! b+ -> a!", example(aten.mean.dim, tensor(3, 4), [1])),
        ("a! b+ -> a!", example(aten.amax.default, tensor(3, 4), [1])),
        ("a b -> b a", example(aten.neg.default, tensor(4, 4))),
        ("a! b, b, b -> a! b", example(aten.layer_norm.default, tensor(3, 4), [4], tensor(4), tensor(4))),
        ("a b -> a b", example(aten.squeeze.dim, tensor(2, 3), 0)),
        ("v+ e!, i! -> i! e!", example(aten.embedding.default, tensor(4, 3), integers(5, high=4))),
        ("a+ b! , a+ -> .", example(aten.cross_entropy_loss.default, tensor(4, 3), integers(4, high=3), None, 1)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_oracle_catches_a_wrong_rule(text: str, made: Example):
    assert wrong_by(text, made) != []


def test_the_oracle_catches_a_wrong_gradient_where_the_value_is_right(monkeypatch: pytest.MonkeyPatch):
    """The weight of a norm whose rows are split: its gradient is partial, and not whole on every device."""
    made = example(aten.rms_norm.default, tensor(4, 3), [3], tensor(3))
    rows = Strategy((S(0), R), (S(0),))
    assert oracle.prove(made, rows, 2) == []
    monkeypatch.setattr(oracle, "grad_placement", lambda q, replicated: q)
    assert any("gradient of operand 1" in w for w in oracle.prove(made, rows, 2))


def test_the_oracle_catches_a_bias_that_every_device_adds_in_full(monkeypatch: pytest.MonkeyPatch):
    made = example(aten.linear.default, tensor(3, 4), tensor(5, 4), tensor(5))
    assert oracle.check(made, 2) == []
    monkeypatch.setattr(oracle, "addends", lambda node, strategy: ())
    assert oracle.check(made, 2) != []


def test_sizes_of_a_view_become_local():
    node = example(aten.view.default, tensor(2, 4, 24), [2, 4, 3, 4, 2]).node
    split = next(s for s in strategies(node, 2) if str(s) == "S(2|8,8,8)->S(3)")
    assert local_args(node, split, 2)[0][1] == [2, 4, 3, 2, 2]


def test_sizes_of_a_split_bounds_of_a_slice_and_groups_of_a_norm_become_local():
    split = example(aten.split_with_sizes.default, tensor(24, 5), [12, 8, 4]).node
    assert local_args(split, strategies(split, 4)[-2], 4)[0][1] == [3, 2, 1]
    cut = example(aten.slice.Tensor, tensor(3, 12), 1, -4, 2**63 - 1).node
    assert str(strategies(cut, 2)[1]) == "S(1|8,4)->S(1)"
    assert local_args(cut, strategies(cut, 2)[1], 2)[0][2:] == (4, 6)
    norm = example(aten.group_norm.default, tensor(3, 12, 5), 6, tensor(12), tensor(12)).node
    assert local_args(norm, strategies(norm, 2)[1], 2)[0][1] == 3


def test_operands_stay_nodes_and_arguments_without_sizes_stay_as_they_are():
    node = example(aten.linear.default, tensor(4, 6), tensor(8, 6), tensor(8)).node
    for strategy in strategies(node, 2):
        assert local_args(node, strategy, 2) == (node.args, {})


def test_the_bias_of_a_row_split_linear_is_shared_out():
    node = example(aten.linear.default, tensor(4, 6), tensor(8, 6), tensor(8)).node
    assert [addends(node, s) for s in strategies(node, 2) if s.outputs == (P,)][0] == (2,)
    assert addends(node, strategies(node, 2)[0]) == ()


def test_the_vocabulary_may_be_split_in_embedding_and_loss():
    table = example(aten.embedding.default, tensor(12, 6), integers(2, 3, high=12)).node
    assert Strategy((S(0), R), (P,), "vocab_embedding") in strategies(table, 2)
    loss = example(aten.cross_entropy_loss.default, tensor(5, 12), integers(5, high=12), None, 2).node
    assert Strategy((S(1), R), (R,), "vocab_cross_entropy") in strategies(loss, 2)
    assert not any(s.special for s in strategies(loss, 5))


def test_the_dim_looked_up_in_may_be_split_where_one_index_reads_it():
    experts = example(aten.index.Tensor, tensor(4, 6, 5), [integers(9, high=4)]).node
    assert Strategy((S(0), R), (P,), "split_lookup") in strategies(experts, 2)
    assert not any(s.special for s in strategies(experts, 3))
    two = example(aten.index.Tensor, tensor(4, 6), [integers(8, high=4), integers(8, high=6)]).node
    assert not any(s.special for s in strategies(two, 2))
    broadcasting = example(aten.take_along_dim.default, tensor(4, 6), integers(1, 3, high=6), 1).node
    assert not any(s.special for s in strategies(broadcasting, 2))


def test_a_partial_truth_does_not_exist():
    node = example(aten.sum.default, truths(4, 6)).node
    assert all(P not in s.inputs for s in strategies(node, 2))
    assert any(P in s.outputs for s in strategies(node, 2))


def test_an_operator_without_a_rule_is_replicated_and_says_so():
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta.update(val=torch.empty(4, 4, device="meta"), kind="input")
    unknown = graph.call_function(aten.linalg_det.default, (x,))
    unknown.meta["val"] = torch.empty((), device="meta")
    assert is_unsplit(unknown) and strategies(unknown, 2) == [Strategy((R,), (R,))]
    assert not is_unsplit(x)


def test_parameters_may_live_split_and_inputs_are_whole():
    graph = fx.Graph()
    for kind, count in (("parameter", 2), ("buffer", 1), ("constant", 1), ("input", 1)):
        node = graph.placeholder(kind)
        node.meta.update(val=torch.empty(4, 3, device="meta"), kind=kind)
        assert len(strategies(node, 2)) == count
        assert str(strategies(node, 2)[0]) == "->R"


def test_equal_calls_share_their_strategies_and_true_is_not_one():
    first = example(aten.amax.default, tensor(4, 6), [1], True).node
    again = example(aten.amax.default, tensor(4, 6), [1], True).node
    assert strategies(first, 2) is strategies(again, 2)
    assert sentence_of(example(aten.amax.default, tensor(4, 6), [1], False).node) != sentence_of(first)


def test_two_rules_for_one_operator_are_refused_naming_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    second = tmp_path / "again.py"
    second.write_text(
        "import torch\nfrom autopar.sharding.rule import rule\n"
        "@rule(torch.ops.aten.linear.default, examples=[])\ndef again(node):\n    return 'a -> a'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotationError) as error:
        importlib.import_module("again")
    sys.modules.pop("again", None)
    assert "aten.linear.default" in str(error.value)
    assert str(second) in str(error.value) and str(Path(rules.__path__[0]) / "linear.py") in str(error.value)


def test_an_operator_registered_elsewhere_has_its_rule_by_name(monkeypatch: pytest.MonkeyPatch):
    @torch.library.custom_op("sharding_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_fake(torch.empty_like)
    monkeypatch.setattr(rule_module, "_BY_TARGET", dict(all_rules()))
    monkeypatch.setattr(rule_module, "rules", lambda: rule_module._BY_TARGET)
    made = example(torch.ops.sharding_test.double.default, tensor(4, 3))
    assert is_unsplit(made.node)
    rule_module.rule("sharding_test::double", examples=[made])(lambda node: "a b ~ -> a b ~")
    rule_module.clear()
    assert [str(s) for s in strategies(made.node, 2)] == ["R->R", "S(0)->S(0)", "P->P"]
    rule_module.find.cache_clear()


def test_memory_that_is_changed_in_place_stays_whole():
    """A shard of it, or a moved copy, would miss the change; `canonicalize` makes what it can functional before."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    for node in (x, y):
        node.meta.update(val=torch.empty(4, 3, device="meta"), kind="input")
    for inplace, plain in ((aten.add_.Tensor, aten.add.Tensor), (aten.div_.Tensor, aten.div.Tensor)):
        pair = [graph.call_function(t, (x, y)) for t in (inplace, plain)]
        for node in pair:
            node.meta["val"] = x.meta["val"]
        assert strategies(pair[0], 2) == [Strategy((R, R), (R,))]
        assert len(strategies(pair[1], 2)) > 1
    base = graph.call_function(aten.new_empty.default, (x, [4, 3]))
    part = graph.call_function(aten.slice.Tensor, (base, 1, 0, 2))
    for node, shape in ((base, (4, 3)), (part, (4, 2))):
        node.meta["val"] = torch.empty(shape, device="meta")
    write = graph.call_function(aten.fill_.Scalar, (part, 1.0))
    write.meta["val"] = part.meta["val"]
    assert all(s.replicated for node in (base, part, write) for s in strategies(node, 2))
