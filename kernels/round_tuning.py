"""Tile sizes and warps of the small kernels of a round: pure functions of static shapes, testable
without a GPU.

The values are reasoned, not measured: a thread takes 16 bytes of 16-bit logits a load, and a grid
has about four programs a multiprocessor before its loops start.
"""

from __future__ import annotations

from dataclasses import dataclass

# A Hopper part; smaller parts get a few more waves, nothing else.
TARGET_PROGRAMS = 528


@dataclass(frozen=True)
class ScanConfig:
    """How a pass over the vocabulary is cut up.

    Attributes:
        block: elements, or Philox counters, of one tile; a multiple of 256 where counters are
            meant.
        num_warps: warps of one program.
        num_splits: parts a row is cut into, each a program.
    """

    block: int
    num_warps: int
    num_splits: int = 1


def next_power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def noise_config(vocab_size: int) -> ScanConfig:
    """Noise alone: a tile of counters writes four times as many tokens."""
    return ScanConfig(block=min(1024, next_power_of_two(max(vocab_size // 4, 256))), num_warps=4)


def choice_config(num_rows: int, vocab_size: int) -> ScanConfig:
    """The argmax of each of ``num_rows`` rows of logits; a tile of counters reads four tokens
    each.
    """
    block = min(1024, next_power_of_two(max(vocab_size // 4, 256)))
    tiles = -(-vocab_size // (4 * block))
    num_splits = max(1, min(tiles, TARGET_PROGRAMS // max(num_rows, 1), 64))
    return ScanConfig(block=block, num_warps=4, num_splits=num_splits)


def children_config(vocab_size: int) -> ScanConfig:
    """The best tokens of a part of a row; a tile of counters reads four tokens each, and they stay
    in registers while the best are taken out.
    """
    block = min(1024, next_power_of_two(max(vocab_size // 4, 256)))
    return ScanConfig(block=block, num_warps=4)


def row_config(vocab_size: int) -> ScanConfig:
    """One program that goes over a whole row, more than once."""
    block = min(4096, next_power_of_two(max(vocab_size, 256)))
    return ScanConfig(block=block, num_warps=8 if block >= 2048 else 4)


def tree_warps(num_nodes: int) -> int:
    """Warps of a program that holds one value a node."""
    return 1 if num_nodes <= 64 else 4
