"""An example batch for a model: what its forward takes, and labels, in the sizes asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autopar.errors import SpecError
from autopar.models.decoder import Decoder
from autopar.models.load import ModelSource, origin
from autopar.spec.model import DecoderSpec

IGNORED = -100
MASKED_SHARE = 0.15  # of the tokens a masked language model predicts (Devlin et al. 2019, section 3.1)


def example_batch(
    model: nn.Module, sequences: int, length: int, *, source: ModelSource | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs and labels by the names of the model's forward, on the CPU, equal for equal ``seed``.

    Language models: input_ids and labels (sequences, length); encoder-decoders: decoder_input_ids too; image
    classifiers: pixel_values (sequences, channels, height, width) and labels (sequences,). ``source``: where the
    model was built from; where that is a Python function, its `example_batch(sequences, length)` makes the batch.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    function = _users(source)
    if function is not None:
        return _checked(function(sequences, length), str(source))
    if isinstance(model, Decoder):
        _fits(length, model.spec.max_length, model.spec.positions == "learned")
        return _language(draw(model.spec.vocab, sequences, length))
    if _is_huggingface(model):
        return _huggingface(model, sequences, length, draw)
    raise SpecError(
        f"model: no example batch is known for a {type(model).__name__}; give its builder's module a function "
        "example_batch(sequences, length) that returns a dict of tensors"
    )


def _users(source: ModelSource | None) -> Callable[[int, int], Any] | None:
    """The `example_batch` beside a Python builder."""
    if source is None or isinstance(source, DecoderSpec):
        return None
    name = origin(source).python
    if name is None:
        return None
    from autopar.models.python import batch_function

    return batch_function(name)


def _checked(batch: Any, name: str) -> dict[str, Tensor]:
    if isinstance(batch, dict) and batch and all(isinstance(v, Tensor) for v in batch.values()):
        return batch
    raise SpecError(f"model: example_batch of {name} must return a dict of tensors, not a {type(batch).__name__}")


def _is_huggingface(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(model, "main_input_name")


def _language(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "labels": ids.clone()}


def _huggingface(model: Any, sequences: int, length: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    config, kind = model.config, type(model).__name__
    if model.main_input_name == "pixel_values":
        side = config.image_size if isinstance(getattr(config, "image_size", None), (list, tuple)) else None
        height, width = side or (getattr(config, "image_size", None) or 224,) * 2
        levels = draw(256, sequences, config.num_channels, height, width)
        return {"pixel_values": (levels / 127.5 - 1).to(model.dtype), "labels": draw(config.num_labels, sequences)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if model.main_input_name != "input_ids" or getattr(text, "vocab_size", None) is None:
        raise SpecError(f"model: no example batch is known for {kind}, whose main input is {model.main_input_name!r}")
    _fits(length, getattr(text, "max_position_embeddings", None), _has_position_table(model))
    ids = draw(text.vocab_size, sequences, length)
    if config.is_encoder_decoder:
        return _encoder_decoder(ids, draw(text.vocab_size, sequences, length), config)
    if kind.endswith("ForMaskedLM"):
        kept = draw(1000, sequences, length) < 1000 * MASKED_SHARE
        kept[:, 0] = True  # at least one label a sequence
        return {"input_ids": ids, "labels": ids.masked_fill(~kept, IGNORED)}
    if kind.endswith("ForSequenceClassification"):
        return {"input_ids": ids, "labels": draw(config.num_labels, sequences)}
    return _language(ids)


def _encoder_decoder(ids: Tensor, labels: Tensor, config: Any) -> dict[str, Tensor]:
    """The decoder reads its labels shifted right by one, behind the start token."""
    known = (getattr(config, key, None) for key in ("decoder_start_token_id", "pad_token_id"))
    start = next((token for token in known if token is not None), 0)
    shifted = torch.cat((torch.full_like(labels[:, :1], start), labels[:, :-1]), dim=1)
    return {"input_ids": ids, "decoder_input_ids": shifted, "labels": labels}


def _has_position_table(model: nn.Module) -> bool:
    names = ("wpe", "position_embeddings", "embed_positions")
    return any(isinstance(m, nn.Embedding) and n.rpartition(".")[2] in names for n, m in model.named_modules())


def _fits(length: int, limit: int | None, table: bool) -> None:
    if table and limit is not None and length > limit:
        raise SpecError(f"batch.length: {length} tokens do not fit the model's table of {limit} positions")
