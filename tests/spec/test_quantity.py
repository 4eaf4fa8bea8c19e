"""Quantities in specs become SI numbers, and wrong ones say what would be right."""

import pytest

from autopar.spec import quantity


@pytest.mark.parametrize(
    ("read", "text", "number"),
    [
        (quantity.bytes_, "80 GiB", 80 * 2**30),
        (quantity.bytes_, "141GB", 141 * 10**9),
        (quantity.bytes_, 1024, 1024),
        (quantity.bandwidth, "3.35 TB/s", 3.35e12),
        (quantity.bandwidth, "400 Gbit/s", 50e9),
        (quantity.bandwidth, 9e11, 9e11),
        (quantity.seconds, "3 us", 3e-6),
        (quantity.seconds, "1.5ms", 1.5e-3),
        (quantity.seconds, 0, 0.0),
        (quantity.flops, "989e12", 989e12),
        (quantity.flops, "989 TFLOP/s", 989e12),
    ],
)
def test_a_quantity_is_read_in_si_units(read, text, number):
    assert read(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (quantity.bytes_, "80 GiX", "unit 'GiX'"),
        (quantity.bytes_, "-80 GiB", "must be positive"),
        (quantity.bytes_, "0 GiB", "must be positive"),
        (quantity.bytes_, "lots", "such as '80 GiB'"),
        (quantity.bytes_, True, "such as '80 GiB'"),
        (quantity.bandwidth, "80 GiB", "unit 'GiB'"),
        (quantity.bandwidth, float("nan"), "must be a finite number"),
        (quantity.seconds, "3 GB", "unit 'GB'"),
        (quantity.seconds, "1e999 s", "must be a finite number"),
    ],
)
def test_a_wrong_quantity_names_what_is_wrong(read, text, message):
    with pytest.raises(ValueError, match=message):
        read(text)


def test_numbers_are_shown_with_a_unit_that_fits():
    assert quantity.show_bytes(80 * 2**30) == "80.0 GiB"
    assert quantity.show_bytes(12) == "12 B"
    assert quantity.show_seconds(0.0123) == "12.3 ms"
    assert quantity.show_seconds(0) == "0 s"
