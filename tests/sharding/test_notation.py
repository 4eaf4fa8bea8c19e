"""The notation: what is read, what it expands to, and what is refused."""

from __future__ import annotations

import pytest

from autopar.sharding.notation import NotationError, addends, expand, parse


def texts(*args: object, **kwargs: object) -> list[str]:
    return [str(s) for s in expand(*args, **kwargs)]  # type: ignore[arg-type]


def test_a_linear_is_split_by_rows_of_the_batch_by_columns_and_by_its_sum():
    assert texts("b m k+, n k+ -> b m n", [(2, 4, 6), (8, 6)], [(2, 4, 8)], 2) == [
        "R,R->R",
        "S(0),R->S(0)",
        "S(1),R->S(1)",
        "S(2),S(1)->P",
        "R,S(0)->S(2)",
    ]


def test_a_letter_that_the_degree_does_not_divide_is_no_option():
    assert texts("a b -> a b", [(9, 4)], [(9, 4)], 2) == ["R->R", "S(1)->S(1)"]


def test_a_marked_letter_and_a_dim_of_length_one_are_never_split():
    assert texts("a! b, 1 b -> a! b", [(4, 3), (1, 3)], [(4, 3)], 2) == ["R,R->R"]


def test_the_first_letter_of_a_product_is_contiguous_and_a_later_one_comes_in_pieces():
    assert texts("b (three h d) -> b three h d", [(5, 24)], [(5, 3, 4, 2)], 4) == ["R->R", "S(1|8,8,8)->S(2)"]


def test_letters_of_a_product_in_front_of_length_one_leave_the_plain_split():
    assert texts("(a h) -> a h", [(4,)], [(1, 4)], 2) == ["R->R", "S(0)->S(1)"]


def test_a_star_ties_the_parts_of_a_concatenation_together():
    assert texts("c* -> c, c, c", [(16,)], [(8,), (4,), (4,)], 2) == ["R->R,R,R", "S(0|8,4,4)->S(0),S(0),S(0)"]
    assert texts("a c, a c -> a c*", [(3, 8), (3, 4)], [(3, 12)], 4) == ["R,R->R", "S(1),S(1)->S(1|8,4)"]
    assert texts("c* -> c, c", [(7,)], [(4,), (3,)], 2) == ["R->R,R"]


def test_a_slice_is_one_part_of_a_concatenation_of_given_lengths():
    assert texts("[x=4 c z=2] -> c", [(14,)], [(8,)], 2) == ["R->R", "S(0|4,8,2)->S(0)"]


def test_partial_operands_of_one_tag_go_together_and_of_several_tags_apart():
    both, shapes = [(3,), (3,)], [(3,)]
    assert texts("a ~, a ~ -> a ~", both, shapes, 2) == ["R,R->R", "P,P->P"]
    assert texts("a ~1, a ~2 -> a ~", both, shapes, 2) == ["R,R->R", "P,R->P", "R,P->P"]


def test_a_pattern_cuts_a_letter_in_pieces_wherever_it_stands():
    found = texts("m k+, n k+ -> m n", [(3, 5), (12, 5)], [(3, 12)], 2, {"n": {(8, 4), (9, 3), (8, 8)}})
    assert found == ["R,R->R", "R,S(0)->S(1)", "R,S(0|8,4)->S(1|8,4)"]


def test_a_pattern_inside_a_product_is_scaled_and_repeated():
    found = texts("(a h d) -> a h d", [(24,)], [(2, 6, 2)], 2, {"h": {(4, 2)}})
    assert "S(0|8,4,8,4)->S(1|4,2)" in found


def test_an_addend_is_shared_out_only_where_the_output_is_a_partial_sum():
    text, shapes = "k+, n k+, n / -> n", ([(4,), (6, 4), (6,)], [(6,)])
    shares = {str(s): addends(text, s) for s in expand(text, *shapes, 2)}
    assert shares == {"R,R,R->R": (), "S(0),S(1),R->P": (2,), "R,S(0),S(0)->S(0)": ()}


def test_a_tensor_without_dims_is_a_dot_and_nothing_at_all_is_no_operand():
    assert texts("a+ -> .", [(4,)], [()], 2) == ["R->R", "S(0)->P"]
    assert texts(" -> a b", [], [(4, 3)], 2) == ["->R", "->S(0)"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a b", "exactly one '->'"),
        ("a -> b", "'a' is missing in an output: mark it"),
        ("a -> a, a b", "'b' is missing in an output"),
        ("a+ -> a", "summed over"),
        ("a+, a! -> .", "marked both"),
        ("a ~ -> a", "every output must"),
        ("a -> a ~", "no operand does"),
        ("a ~1 -> a ~2", "no operand with that tag"),
        ("(a b -> a b", "'(' is not closed"),
        ("a) -> a", "closes nothing"),
        ("() -> .", "an empty group"),
        ("((a) b) -> a b", "do not nest"),
        ("a* -> b", "no 'a' on the other side"),
        ("a* -> a*", "one side only"),
        ("a a -> a", "stands twice"),
        ("a $ -> a", "cannot read '$'"),
        ("a ~ b -> a b", "a comma must follow"),
        ("a, , b -> a b", "an operand is missing"),
        ("a . -> a", "'.' stands alone"),
    ],
)
def test_what_is_no_sentence_is_refused_with_the_reason(text: str, why: str):
    with pytest.raises(NotationError) as error:
        parse(text)
    assert why in str(error.value)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "why"),
    [
        ("a -> a", [(3,)], [(4,)], "'a' is 3 and 4"),
        ("a b -> a b", [(3,)], [(3, 4)], "2 dims written for a tensor of shape (3,)"),
        ("a -> a", [(3,), (3,)], [(3,)], "2 operands and 1 outputs"),
        ("1 a -> a", [(2, 3)], [(3,)], "'1' stands for a dim of length 2"),
        ("(a b) -> a b", [(7,)], [(2, 3)], "makes 6, the dim has 7"),
        ("(a! b!) -> .", [(6,)], [()], "not determined"),
    ],
)
def test_what_does_not_fit_the_shapes_is_refused(text: str, inputs: list, outputs: list, why: str):
    with pytest.raises(NotationError) as error:
        expand(text, inputs, outputs, 2)
    assert why in str(error.value)
