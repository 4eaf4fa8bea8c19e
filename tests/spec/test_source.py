"""Spec files: every message says where; nothing in a file can run code or exhaust the machine."""

from pathlib import Path

import pytest

from autopar.errors import SpecError
from autopar.spec.source import MAX_VALUES, Source, parse, read, value


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("989e12", 989e12), ("-1E3", -1000.0), (".5", 0.5), ("1_000", 1000), ("0x10", 16), ("017", 17)],
)
def test_numbers_are_read_as_people_write_them(text, number):
    assert value(text, "x") == number
    assert type(value(text, "x")) is type(number)


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2024-01-01", "1.2.3", "80 GiB", "e5"])
def test_text_stays_text_where_yaml_1_1_would_guess(text):
    assert value(text, "x") == text


def test_json_is_read_too():
    assert parse('{"a": [1, 2.5, null, true, "1e-4"]}', "x").data == {"a": [1, 2.5, None, True, "1e-4"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [\n  c: :\n", "job.yaml:3"),
        ("a:\n\tb: 1\n", "job.yaml:2: not valid YAML: a tab"),
        ("a: 1\nb: 2\na: 3\n", "job.yaml:3: the key 'a' stands here twice"),
        ("a: {b: 1, b: 2}\n", "job.yaml:1: the key 'b' stands here twice"),
        ("a: !!python/object/apply:os.system ['true']\n", "job.yaml:1: the tag '!!python/object/apply:os.system'"),
        ("a: !thing 3\n", "the tag '!thing' is not allowed"),
        ("\x00\x01", "the character '\\x00' is not allowed"),
        ("a: 1\n---\nb: 2\n", "one document is expected"),
        ("[1, 2]: 3\n", "a key must be a word"),
        ("a: *b\n", "job.yaml:1"),
        ("a: &a [*a]\n", "job.yaml"),
        ("a: &a\n  <<: *a\n", "job.yaml"),
        ("[" * 3000, "nested too deeply"),
        ("a: !!int many\n", "'many' cannot be read as int"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(text, message):
    with pytest.raises(SpecError) as error:
        parse(text, "job.yaml")
    assert message in str(error.value)
    assert len(str(error.value)) < 300


def test_aliases_are_unfolded_only_up_to_a_bound():
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(SpecError, match=f"more than {MAX_VALUES:,} values; are aliases nested"):
        parse("\n".join(levels), "job.yaml")
    assert parse("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n", "x").data["c"] == {"x": 1, "y": 2}


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(SpecError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(SpecError, match="no such file"):
        read(tmp_path / "none.yaml")
    with pytest.raises(SpecError, match="not a regular file"):
        read(Path("/dev/zero"))
    binary = tmp_path / "model.safetensors"
    binary.write_bytes(b"abc\xff\xfe")
    with pytest.raises(SpecError, match="byte 3 is no character"):
        read(binary)
    large = tmp_path / "large.yaml"
    large.write_text("a" * 5_000_000)
    with pytest.raises(SpecError, match="too many for a spec"):
        read(large)


def test_every_value_knows_its_line():
    source = parse("a:\n  b: 1\n  c:\n  - x\n  - y\n", "f")
    assert source.where(("a", "b")) == "f:2"
    assert source.where(("a", "c", 1)) == "f:5"
    assert source.where(("a", "missing")) == "f:1"
    assert source.sub("a").where(("b",)) == "f:2"
    source.put("a", Source({"b": 3}, "g", {("b",): "g:7"}))
    assert source.where(("a", "b")) == "g:7"
