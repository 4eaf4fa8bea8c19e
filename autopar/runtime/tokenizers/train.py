"""A tokenizer trained from text, through `tokenizers` or `sentencepiece`."""

from __future__ import annotations

import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.spec.data import NewTokenizer

UNKNOWN = {"bpe": "<unk>", "wordpiece": "[UNK]"}  # the others fall back to bytes
LONGEST = 100_000  # bytes of a piece of text that SentencePiece learns from; it leaves longer ones out by itself


def suffix(new: NewTokenizer) -> str:
    """How the file of such a tokenizer ends."""
    return ".model" if new.train.startswith("sentencepiece") else ".json"


Texts = Callable[[], Iterator[str]]


def train(new: NewTokenizer, texts: Texts, target: Path) -> None:
    """Learn from what ``texts()`` gives, every time the same, and write ``target`` and, beside it, which token ends a document.

    Raises AutoparError where the text is too little for the vocabulary, or a library is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = (
            _sentencepiece(new, texts)
            if suffix(new) == ".model"
            else _unigram(new, texts)
            if new.train == "unigram"
            else _fast(new, texts)
        )
    except ImportError as error:
        message = f"data.tokenizer: training needs the package {error.name}; pip install 'autopar[hf]' brings it"
        raise AutoparError(message) from None
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(made)
    if suffix(new) == ".json":
        target.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": new.end}))
    os.replace(partial, target)


def _special(new: NewTokenizer) -> list[str]:
    unknown = [UNKNOWN[new.train]] if new.train in UNKNOWN else []
    return list(dict.fromkeys([*unknown, new.end, *new.special]))


def _fast(new: NewTokenizer, texts: Texts) -> bytes:
    from tokenizers import normalizers

    inner = _continuations(new, texts()) if new.train == "wordpiece" else []
    model, trainer = {"bpe": _bpe, "byte_bpe": _byte_bpe, "wordpiece": _wordpiece}[new.train](new, inner)
    if new.lowercase:
        model.normalizer = normalizers.Lowercase()
    model.train_from_iterator(texts(), trainer)
    if model.get_vocab_size() > new.vocab:
        held = model.get_vocab_size()
        raise AutoparError(f"data.tokenizer: vocab: {new.vocab} is less than the {held} characters and special tokens")
    made = json.loads(model.to_str())
    made["added_tokens"] = [token for token in made["added_tokens"] if token["content"] not in set(inner)]
    return json.dumps(made, ensure_ascii=False).encode()


def _continuations(new: NewTokenizer, texts: Iterator[str]) -> list[str]:
    """``##x`` for the characters inside words.

    The trainer of `tokenizers` numbers them in the order of a hash map, another one in every process, which decides
    between merges that are equally frequent; given as special tokens they have an order.
    """
    found = {c for text in texts for c in (text.lower() if new.lowercase else text)}
    return [f"##{c}" for c in sorted(found) if c.isalnum() or unicodedata.category(c)[0] == "M"]


def _bpe(new: NewTokenizer, inner: list[str]) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token=UNKNOWN["bpe"]))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.BpeTrainer(vocab_size=new.vocab, special_tokens=_special(new), show_progress=False)  # type: ignore[call-arg]


def _byte_bpe(new: NewTokenizer, inner: list[str]) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(
        vocab_size=new.vocab, special_tokens=_special(new), initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]


def _wordpiece(new: NewTokenizer, inner: list[str]) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token=UNKNOWN["wordpiece"]))  # type: ignore[call-arg]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(
        vocab_size=new.vocab, special_tokens=[*_special(new), *inner], show_progress=False
    )


def _unigram(new: NewTokenizer, texts: Texts) -> bytes:
    """SentencePiece's vocabulary and scores as a tokenizer.json: the trainer of `tokenizers` sums in the order of a hash
    map, so that it never makes the same vocabulary twice."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer, decoders, models, normalizers

    learned = SentencePieceProcessor(model_proto=_sentencepiece(new, texts))
    scored = [(learned.id_to_piece(i), learned.get_score(i)) for i in range(learned.vocab_size())]
    made = Tokenizer(models.Unigram(scored, learned.unk_id(), byte_fallback=True))
    lower = [normalizers.NFKC(), normalizers.Lowercase()] if new.lowercase else []
    made.normalizer = normalizers.Sequence([*lower, normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    blanks = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(blanks)
    made.add_special_tokens([new.end, *new.special])
    return made.to_str().encode()


def _sentencepiece(new: NewTokenizer, texts: Texts) -> bytes:
    import sentencepiece

    made = io.BytesIO()
    lines = (line for text in texts() for line in text.splitlines(keepends=False) if line.strip())
    options: dict[str, Any] = {"byte_fallback": True, "character_coverage": 0.9995, "minloglevel": 2}
    options |= {"normalization_rule_name": "nmt_nfkc_cf"} if new.lowercase else {"normalization_rule_name": "identity"}
    options |= {
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "max_sentence_length": LONGEST,
        "eos_piece": new.end,
    }
    write: Callable[..., None] = sentencepiece.SentencePieceTrainer.train
    try:
        write(
            sentence_iterator=lines,
            model_writer=made,
            vocab_size=new.vocab,
            model_type=new.train.removeprefix("sentencepiece_"),
            user_defined_symbols=list(new.special),
            **options,
        )
    except RuntimeError as error:
        raise AutoparError(f"data.tokenizer: SentencePiece cannot learn {new.vocab} tokens: {error}") from None
    return made.getvalue()
