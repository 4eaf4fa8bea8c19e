"""Data: packed text in one order under every plan, a cache written whole, clear words on what does not fit."""

from __future__ import annotations

import json

import pytest
import torch
from handmade import LENGTH, plan_of, write

from autopar.errors import AutoparError
from autopar.plan.plan import MeshShape
from autopar.runtime import corpus
from autopar.runtime.data import Packed, Random, batches_of
from autopar.runtime.examples import files_of
from autopar.runtime.folder import BuildFolder
from autopar.runtime.tokenizers import tokenizer_of
from autopar.runtime.world import World
from autopar.spec.job import Data

ALONE = World(MeshShape(), torch.device("cpu"))


def folder_of(path, text=("{folder}/*.txt",), plan=None, tokenizer="bytes", **manifest):
    write(
        path,
        plan or plan_of(),
        job=json.dumps({"data": {"text": [t.format(folder=path) for t in text], "tokenizer": tokenizer}}),
    )
    found = json.loads((path / "manifest.json").read_text())
    found["inputs"] = {k: v | manifest for k, v in found["inputs"].items()}
    (path / "manifest.json").write_text(json.dumps(found))
    return path


def test_text_is_packed_and_every_pass_sees_each_sequence_once(tmp_path):
    folder = folder_of(tmp_path / "b")
    (folder / "one.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    (folder / "two.txt").write_text("ABCDEFGHIJKLM")
    batches = batches_of(BuildFolder.read(folder), ALONE, seed=1)
    assert isinstance(batches, Packed)
    stream = b"abcdefghijklmnopqrstuvwxyz\0ABCDEFGHIJKLM\0"
    whole = {stream[i : i + LENGTH] for i in range(0, len(stream) - LENGTH + 1, LENGTH)}
    rows = [bytes(row.tolist()) for step in range(4) for row in batches.batch(step)["input_ids"]]
    assert set(rows[: len(whole)]) == whole == set(rows[len(whole) : 2 * len(whole)])
    assert rows[: len(whole)] != rows[len(whole) : 2 * len(whole)], "the second pass has the order of the first"
    batch = batches.batch(0)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_the_global_batches_are_the_same_under_every_plan(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(777))
    found = []
    for i, plan in enumerate([plan_of(microbatches=4), plan_of(dp=4, microbatches=1), plan_of(dp=2, tp=2, pp=1)]):
        folder = folder_of(tmp_path / f"b{i}", plan=plan)
        (folder / "one.txt").write_text(text)
        batches = batches_of(BuildFolder.read(folder), ALONE, seed=1)
        found.append(torch.stack([batches.batch(s)["input_ids"] for s in range(5)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_another_seed_is_another_order(tmp_path):
    folder = folder_of(tmp_path / "b")
    (folder / "one.txt").write_text("".join(chr(97 + i % 26) for i in range(777)))
    read = BuildFolder.read(folder)
    one, two = (batches_of(read, ALONE, seed=s).batch(0)["input_ids"] for s in (1, 2))
    assert not torch.equal(one, two)


def test_the_cache_is_used_again_until_the_text_changes(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "b")
    (folder / "one.txt").write_text("x" * 100)
    read = BuildFolder.read(folder)
    calls = []
    monkeypatch.setattr(corpus, "tokenizer_of", lambda name: calls.append(name) or tokenizer_of(name))
    batches_of(read, ALONE, 0)
    batches_of(read, ALONE, 0)
    assert len(calls) == 1
    (folder / "one.txt").write_text("y" * 101)
    assert batches_of(read, ALONE, 0).batch(0)["input_ids"][0, 0] == ord("y")
    assert len(calls) == 2
    assert not list((folder / "data").glob("*.partial"))


def test_a_tokenizer_file_is_used(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    folder = folder_of(tmp_path / "b", tokenizer=str(tmp_path / "tokenizer.json"))
    (folder / "one.txt").write_text("a b c a zzz")
    assert batches_of(BuildFolder.read(folder), ALONE, 0).batch(0)["input_ids"][0].tolist() == [1, 2, 3, 1, 0]


def test_without_text_the_batches_are_random_and_repeatable(tmp_path):
    folder = folder_of(tmp_path / "b", text=(), high=7)
    batches = batches_of(BuildFolder.read(folder), ALONE, seed=2)
    assert isinstance(batches, Random)
    assert torch.equal(batches.batch(3)["labels"], batches.batch(3)["labels"])
    drawn = torch.cat([batches.batch(s)["input_ids"].flatten() for s in range(20)])
    assert drawn.min() == 0 and drawn.max() == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ["nothing*.txt"]}, "'nothing\\*.txt' matches no file"),
        ({"tokenizer": "nowhere.json"}, "no such file or folder 'nowhere.json'"),
        ({"high": 100}, "makes token 120; the model's vocabulary ends at 99"),
        ({"content": "abc"}, "4 tokens are less than one sequence of 5"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_clear_words(tmp_path, change, message):
    content = change.pop("content", "x" * 50)
    (tmp_path / "here.txt").write_text(content)
    folder = folder_of(tmp_path / "b", **{"text": [str(tmp_path / "*.txt")], **change})
    with pytest.raises(AutoparError, match=message):
        batches_of(BuildFolder.read(folder), ALONE, 0)


def test_text_cannot_fill_a_program_that_takes_images(tmp_path):
    folder = folder_of(tmp_path / "b")
    (folder / "one.txt").write_text("x" * 50)
    found = json.loads((folder / "manifest.json").read_text())
    found["inputs"]["pixels"] = {"shape": [2, 3, 4, 4], "dtype": "float32"}
    (folder / "manifest.json").write_text(json.dumps(found))
    with pytest.raises(AutoparError, match="program takes input_ids, labels, pixels"):
        batches_of(BuildFolder.read(folder), ALONE, 0)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "bad.json").write_text("{]")
    with pytest.raises(AutoparError, match=r"bad\.json' cannot be read as a tokenizer"):
        tokenizer_of(str(tmp_path / "bad.json"))
    assert files_of(Data(), tmp_path) == []


def test_broken_lines_are_told_when_training_begins(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 25 + json.dumps({"text": "x" * 50}) + "\n")
    told = batches_of(
        BuildFolder.read(folder_of(tmp_path / "b", text=[str(tmp_path / "a.jsonl")])), ALONE, 0
    ).describe()
    assert "51 tokens of text in 1 documents" in told and "25 broken lines:" in told and "and 5 more" in told
    assert f"{tmp_path}/a.jsonl:1: not JSON" in told and "a.jsonl:21" not in told
