"""The matrices of a decoder on the CPU in one allocation with huge pages, in the order in which a step reads them.

Knows the order, not the contents of the matrices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .isa import zero_bytes
from .packing import PackedLinear
from .step import BlockWeights, DecoderWeights

_LINE_BYTES = 64


class WeightMemory:
    """Takes packed matrices one by one, so that their sources can be freed meanwhile: untouched memory costs nothing.

    Args:
        sizes: bytes of each matrix that will be placed, in any order.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self._memory = zero_bytes(sum(map(_rounded, sizes)))
        self._used = 0

    def place(self, matrix: PackedLinear) -> PackedLinear:
        """A copy of the matrix, behind those placed before."""
        size = matrix.data.nbytes
        place = self._memory[self._used : self._used + size].copy_(matrix.data)
        self._used += _rounded(size)
        return replace(matrix, data=place)

    def place_block(self, block: BlockWeights) -> BlockWeights:
        """A layer with copies of its matrices."""
        qkv, out = self.place(block.qkv), self.place(block.out)
        cross = block.cross
        if cross is not None:
            cross = replace(cross, q=self.place(cross.q), out=self.place(cross.out), kv=self.place(cross.kv))
        return replace(block, qkv=qkv, out=out, cross=cross, fc1=self.place(block.fc1), fc2=self.place(block.fc2))


def gathered(weights: DecoderWeights) -> DecoderWeights:
    """The same weights with copies of all matrices in one allocation."""
    memory = WeightMemory(matrix.data.nbytes for matrix in _matrices(weights))
    blocks = tuple(memory.place_block(block) for block in weights.blocks)
    return replace(weights, blocks=blocks, heads=memory.place(weights.heads))


def is_gathered(weights: DecoderWeights) -> bool:
    """Whether all matrices are in one allocation, each at the start of a cache line."""
    data = [matrix.data for matrix in _matrices(weights)]
    aligned = all(tensor.data_ptr() % _LINE_BYTES == 0 for tensor in data)
    return aligned and len({tensor.untyped_storage().data_ptr() for tensor in data}) == 1


def _matrices(weights: DecoderWeights) -> list[PackedLinear]:
    matrices = [weights.heads]
    for block in weights.blocks:
        cross = [] if block.cross is None else [block.cross.q, block.cross.out, block.cross.kv]
        matrices += [block.qkv, block.out, *cross, block.fc1, block.fc2]
    return matrices


def _rounded(num_bytes: int) -> int:
    """Rounded up to whole cache lines."""
    return -(-num_bytes // _LINE_BYTES) * _LINE_BYTES
