"""Trees for the tests of the small kernels: named shapes, and a hypothesis strategy for ragged
batches.
"""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FAST = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
# Triton's interpreter takes about 10 ms a program.
INTERPRETED = settings(FAST, max_examples=12)


def chain(size: int) -> list[int]:
    return list(range(-1, size - 1))


def star(size: int) -> list[int]:
    return [-1] + [0] * (size - 1)


def binary(size: int) -> list[int]:
    return [-1] + [(node - 1) // 2 for node in range(1, size)]


SHAPES = {
    "root_only": chain(1),
    "chain_33": chain(33),
    "star_31": star(31),
    "binary_63": binary(63),
    "binary_65": binary(65),
    "binary_256": binary(256),
    "chain_256": chain(256),
}


@st.composite
def batches(draw, max_nodes: int = 12, max_batch: int = 3, vocab_size: int = 4):
    """tokens [B, N], parents [B, N], num_nodes [B]: any tree, duplicate siblings and empty rows
    included, with rubbish past ``num_nodes``.
    """
    batch, capacity = draw(st.integers(1, max_batch)), draw(st.integers(1, max_nodes))
    counts = draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    parents = [
        [-1]
        + [draw(st.integers(0, node - 1)) if node < count else 10**6 for node in range(1, capacity)]
        for count in counts
    ]
    token = st.integers(0, vocab_size - 1)
    tokens = [[draw(token) if node < count else -7 for node in range(capacity)] for count in counts]
    return torch.tensor(tokens), torch.tensor(parents), torch.tensor(counts)


def same(got, wanted) -> None:
    """Every tensor of two results is equal, dtype included."""
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0)
