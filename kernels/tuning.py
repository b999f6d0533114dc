"""Tile sizes, warps, stages and split counts of tree attention: one pure table, testable without a
GPU.

``tree_attention_config`` is a function of static shapes and the chip alone, so a captured CUDA
graph keeps its choice. How to add a chip: docs/kernels/tree_attention.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What the table needs to know of a GPU; rates are used only for modelled times.

    Attributes:
        num_sms: Multiprocessors, when the device itself is not asked.
        shared_bytes: Shared memory one block may use.
        sm_shared_bytes: Shared memory of a multiprocessor.
        max_warps: Warps resident on a multiprocessor.
        bandwidth_gbs: Memory bandwidth in GB/s, from the vendor's data sheet (sm_90: a measured
            copy).
        tensor_tflops: Dense 16-bit tensor-core rate in TFLOP/s with float32 sums, likewise.
        clock_ghz: Boost clock in GHz.
        name: The part the rates belong to.
    """

    num_sms: int
    shared_bytes: int
    sm_shared_bytes: int
    max_warps: int
    bandwidth_gbs: float
    tensor_tflops: float
    clock_ghz: float
    name: str


_KIB = 1024
CHIPS: dict[int, Chip] = {
    80: Chip(108, 163 * _KIB, 164 * _KIB, 64, 2039.0, 312.0, 1.41, "A100 80GB SXM"),
    86: Chip(84, 99 * _KIB, 100 * _KIB, 48, 768.0, 154.8, 1.80, "RTX A6000"),
    89: Chip(128, 99 * _KIB, 100 * _KIB, 48, 1008.0, 165.2, 2.52, "RTX 4090"),
    90: Chip(132, 227 * _KIB, 228 * _KIB, 64, 4300.0, 790.0, 1.98, "H200 SXM"),
    100: Chip(148, 227 * _KIB, 228 * _KIB, 64, 8000.0, 2250.0, 1.97, "B200"),
    120: Chip(170, 99 * _KIB, 100 * _KIB, 48, 1792.0, 209.5, 2.41, "RTX 5090"),
}


@dataclass(frozen=True)
class TreeAttentionConfig:
    """How one call of tree attention is cut up.

    Attributes:
        block_rows: Packed query rows (node x group member) of one program.
        block_slots: Cache rows of one tile.
        num_warps: Warps of one program.
        num_stages: Tiles in flight in the prefix loop, at least 2: with 1, Triton 3.6 made kernels
            for sm_90 that gave wrong results in blocks of 64 rows.
        num_splits: Upper bound on the parts the cache is cut into; the device clamps it to the
            tiles there are.
        min_tiles: Tiles a part should hold at least.
    """

    block_rows: int
    block_slots: int
    num_warps: int
    num_stages: int
    num_splits: int
    min_tiles: int = 2

    def __post_init__(self) -> None:
        if self.num_stages < 2:
            raise ValueError(f"num_stages must be at least 2; got {self.num_stages}")


def chip_for(capability: int) -> tuple[int, Chip]:
    """The table's entry for a compute capability (90 for 9.0): the same, else the nearest lower
    one."""
    known = max((entry for entry in CHIPS if entry <= capability), default=min(CHIPS))
    return known, CHIPS[known]


def split_head_dim(head_dim: int, block_rows: int) -> tuple[int, int]:
    """One or two powers of two that hold a head dimension: 80 is 64 + 16 in large row blocks, 128 +
    0 in small ones.

    Two pieces save products and shared memory. A second piece no wider than a small row block would
    make Triton lay all warps along the rows and do every product four times, so small blocks take
    one piece, whose padding is masked and costs no traffic. A piece is 0 or at least 16, the least
    a tensor-core operand may be.
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    main = whole // 2
    rest = max(16, 1 << max(head_dim - main - 1, 0).bit_length())
    if (
        whole == head_dim
        or whole == 16
        or main + rest >= whole
        or (block_rows < 64 and rest <= block_rows)
    ):
        return whole, 0
    return main, rest


# (block_rows, largest padded head dimension) -> (block_slots, num_warps, num_stages), 16-bit
# inputs. First by family of chips: "small" has 99 KiB of shared memory a block, "ampere" is sm_80,
# "hopper" sm_90, "blackwell" sm_100.
_TILES: dict[str, dict[tuple[int, int], tuple[int, int, int]]] = {
    "small": {
        (16, 64): (64, 4, 3),
        (16, 128): (64, 4, 2),
        (16, 256): (32, 4, 2),
        (32, 64): (64, 4, 3),
        (32, 128): (64, 4, 2),
        (32, 256): (32, 4, 2),
        (64, 64): (64, 4, 3),
        (64, 128): (64, 4, 2),
        (64, 256): (32, 8, 2),
    },
    "ampere": {
        (16, 64): (64, 4, 4),
        (16, 128): (64, 4, 3),
        (16, 256): (64, 4, 2),
        (32, 64): (64, 4, 4),
        (32, 128): (64, 4, 3),
        (32, 256): (64, 4, 2),
        (64, 64): (64, 4, 3),
        (64, 128): (64, 4, 3),
        (64, 256): (32, 8, 2),
    },
    "hopper": {
        (16, 64): (64, 4, 4),
        (16, 128): (64, 4, 3),
        (16, 256): (64, 4, 2),
        (32, 64): (64, 4, 4),
        (32, 128): (64, 4, 3),
        (32, 256): (64, 4, 2),
        (64, 64): (128, 4, 3),
        (64, 128): (64, 4, 3),
        (64, 256): (32, 8, 3),
        (128, 64): (128, 8, 3),
        (128, 128): (64, 8, 3),
        (128, 256): (32, 8, 3),
    },
}
_TILES["blackwell"] = {
    **_TILES["hopper"],
    (64, 64): (64, 4, 3),
    (64, 256): (32, 8, 2),
    (128, 64): (64, 8, 3),
}
# float32 products run outside the tensor cores, exactly; largest padded head dimension -> the same
# triple, any chip.
_FLOAT32_TILES = {64: (32, 4, 2), 128: (32, 8, 2), 256: (16, 8, 2)}
_FAMILIES = {80: "ampere", 86: "small", 89: "small", 90: "hopper", 100: "blackwell", 120: "small"}
_MAX_SPLITS = 128


def tree_attention_config(
    capability: int,
    *,
    batch: int,
    q_heads: int,
    kv_heads: int,
    num_nodes: int,
    num_slots: int,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
    reshaped: bool = False,
    num_sms: int | None = None,
) -> TreeAttentionConfig:
    """The configuration of one call, from static shapes only.

    Args:
        capability: Compute capability times ten, such as 90.
        batch: Sequences B.
        q_heads: Query heads Hq.
        kv_heads: Key and value heads Hkv.
        num_nodes: Tree nodes N, the root included.
        num_slots: Cache rows S (capacity, not length).
        head_dim: Head dimension D.
        value_dim: Value dimension Dv.
        element_bytes: Bytes of an input element, 2 or 4.
        reshaped: Whether scores go through a window, a softcap or ALiBi, which take registers.
        num_sms: Multiprocessors of the device; the chip's own number when None.
    """
    known, chip = chip_for(capability)
    family = _FAMILIES[known]
    rows = num_nodes * (q_heads // kv_heads)
    width = max(head_dim, value_dim)
    bucket = 64 if width <= 64 else 128 if width <= 128 else 256
    if element_bytes == 4:
        block_rows, (block_slots, num_warps, num_stages) = 16, _FLOAT32_TILES[bucket]
    else:
        sizes = sorted({size for size, _ in _TILES[family]})
        block_rows = next((size for size in sizes if rows <= size), sizes[-1])
        block_slots, num_warps, num_stages = _TILES[family][block_rows, bucket]
        if reshaped and (block_rows >= 64 or bucket == 256):
            block_slots = max(32, block_slots // 2)
    # Small row blocks leave room for two programs on a multiprocessor; large ones hide latency
    # inside one.
    slots_for_programs = (num_sms or chip.num_sms) * (2 if block_rows <= 32 else 1)
    programs = batch * kv_heads * -(-rows // block_rows)
    tiles = -(-num_slots // block_slots)
    num_splits = max(1, min(slots_for_programs // programs, tiles // 2, _MAX_SPLITS))
    return TreeAttentionConfig(block_rows, block_slots, num_warps, num_stages, num_splits)


@dataclass(frozen=True)
class Cost:
    """Bytes moved and floating-point operations of a call, the least any implementation needs."""

    bytes: int
    flops: int

    def floor_us(self, chip: Chip) -> float:
        """The least time on a chip in microseconds: the slower of memory and tensor cores."""
        return max(self.bytes / chip.bandwidth_gbs / 1e3, self.flops / chip.tensor_tflops / 1e6)


def tree_attention_cost(
    *,
    batch: int,
    q_heads: int,
    kv_heads: int,
    num_nodes: int,
    prefix_len: int,
    head_dim: int,
    value_dim: int,
    element_bytes: int,
) -> Cost:
    """Bytes and flops of tree attention: every key, value and query once, every result once, dense
    products."""
    rows = prefix_len + num_nodes
    cache = batch * rows * kv_heads * (head_dim + value_dim) * element_bytes
    queries = batch * num_nodes * q_heads * (head_dim + value_dim) * element_bytes
    masks = batch * num_nodes * -(-num_nodes // 32) * 4
    flops = 2 * batch * num_nodes * rows * q_heads * (head_dim + value_dim)
    return Cost(cache + queries + masks, flops)
