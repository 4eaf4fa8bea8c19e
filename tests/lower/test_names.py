"""Names of the emitted code: what is unlike in the model stays unlike, and nothing of the model hides what the code needs."""

from __future__ import annotations

from autopar.lower.declare import unlike


def test_names_that_differ_in_their_dots_alone_get_attributes_of_their_own() -> None:
    assert unlike(["a.b_c", "a_b.c", "q.weight"]) == {"a.b_c": "a_b_c", "a_b.c": "a_b_c_2", "q.weight": "q_weight"}
    assert unlike(["a.b", "a.b_2", "a_b"]) == {"a.b": "a_b", "a.b_2": "a_b_2", "a_b": "a_b_3"}


def test_no_tensor_is_called_as_what_an_emitted_module_has() -> None:
    assert unlike(["count", "tp", "type", "in"]) == {"count": "count_2", "tp": "tp_2", "type": "type_2", "in": "in_2"}


def test_names_that_python_cannot_spell_are_spelled_otherwise() -> None:
    found = unlike(["0.weight", "scales.x-y", "scales.x_y"])
    assert found == {"0.weight": "p_0_weight", "scales.x-y": "scales_x_y", "scales.x_y": "scales_x_y_2"}
