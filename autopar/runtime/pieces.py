"""A tensor of which each rank has some rectangles, as `torch.distributed.checkpoint` wants to see it."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from autopar.runtime.parameters import Piece


class Pieces(torch.Tensor):
    """A whole tensor of which this rank has some rectangles; `torch.distributed.checkpoint` saves and fills those.

    The protocol is DCP's own (``__create_write_items__`` and so on). Rectangles with the same offset on several ranks
    are the same data: DCP writes one of them.
    """

    pieces: list[tuple[torch.Size, torch.Tensor]]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: torch.Tensor, pieces: list[Piece]) -> Pieces:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made.pieces = [(torch.Size(o), t) for o, t in pieces if t.numel()]
        return made

    def __init__(self, *args: Any):
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} on a tensor that is only in pieces here")

    def __create_write_items__(self, fqn: str, obj: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, offset),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(offset, held.size()),
                    properties=TensorProperties.create_from_tensor(held),
                    size=self.size(),
                ),
            )
            for offset, held in self.pieces
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, held.size()) for offset, held in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        return next(held for offset, held in self.pieces if offset == index.offset)
