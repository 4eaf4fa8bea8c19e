"""A tokenizer trained from text, through `tokenizers` or `sentencepiece`."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.spec.data import NewTokenizer

UNKNOWN = {"bpe": "<unk>", "wordpiece": "[UNK]", "unigram": "<unk>"}  # byte_bpe knows every byte
LONGEST = 100_000  # bytes of a piece of text that SentencePiece learns from; it leaves longer ones out by itself


def suffix(new: NewTokenizer) -> str:
    """How the file of such a tokenizer ends."""
    return ".model" if new.train.startswith("sentencepiece") else ".json"


def train(new: NewTokenizer, texts: Iterator[str], target: Path) -> None:
    """Learn from ``texts`` and write ``target`` (its end-of-document token in ``tokenizer_config.json`` beside it).

    Raises AutoparError where the text is too little for the vocabulary, or a library is missing.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        made = _sentencepiece(new, texts) if suffix(new) == ".model" else _fast(new, texts)
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


def _fast(new: NewTokenizer, texts: Iterator[str]) -> bytes:
    from tokenizers import normalizers

    model, trainer = {"bpe": _bpe, "byte_bpe": _byte_bpe, "wordpiece": _wordpiece, "unigram": _unigram}[new.train](new)
    if new.lowercase:
        model.normalizer = normalizers.Lowercase()
    model.train_from_iterator(texts, trainer)
    if model.get_vocab_size() > new.vocab:
        held = model.get_vocab_size()
        raise AutoparError(f"data.tokenizer: vocab: {new.vocab} is less than the {held} characters and special tokens")
    return model.to_str().encode()


def _bpe(new: NewTokenizer) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(unk_token=UNKNOWN["bpe"]))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.BpeTrainer(vocab_size=new.vocab, special_tokens=_special(new), show_progress=False)  # type: ignore[call-arg]


def _byte_bpe(new: NewTokenizer) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return made, trainers.BpeTrainer(
        vocab_size=new.vocab, special_tokens=_special(new), initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]


def _wordpiece(new: NewTokenizer) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token=UNKNOWN["wordpiece"]))  # type: ignore[call-arg]
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return made, trainers.WordPieceTrainer(vocab_size=new.vocab, special_tokens=_special(new), show_progress=False)


def _unigram(new: NewTokenizer) -> tuple[Any, Any]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special, unknown = _special(new), UNKNOWN["unigram"]
    return made, trainers.UnigramTrainer(
        vocab_size=new.vocab, special_tokens=special, unk_token=unknown, show_progress=False
    )


def _sentencepiece(new: NewTokenizer, texts: Iterator[str]) -> bytes:
    import sentencepiece

    made = io.BytesIO()
    lines = (line for text in texts for line in text.splitlines(keepends=False) if line.strip())
    options: dict[str, Any] = {"byte_fallback": True, "character_coverage": 0.9995, "minloglevel": 2}
    options |= {"normalization_rule_name": "nmt_nfkc_cf"} if new.lowercase else {"normalization_rule_name": "identity"}
    options |= {"remove_extra_whitespaces": False, "max_sentence_length": LONGEST, "eos_piece": new.end}
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
