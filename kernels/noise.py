"""Philox4x32-10 words and the Gumbel noise made of them, on the host (docs/kernels/philox.md).

One definition serves the kernels, the PyTorch paths and the tests. The key is the 64-bit seed, low
word first. The counter is ``(c, position, row, stream)``; token ``t`` takes ``c = (t // 1024) * 256
+ t % 256`` and output word ``(t // 256) % 4``, so the noise of a token does not depend on the size
of the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)

# The fourth counter word: 0 is the noise shared by target and draft. The rejection rules need draws
# that no other round and
# no other purpose has seen, so theirs is ``4 * position of the root + purpose``.
SHARED_STREAM = 0
DRAFT_STREAM = 1
ACCEPT_STREAM = 2
RESIDUAL_STREAM = 3


def philox_words(counter, seed) -> list[np.ndarray]:
    """The four output words of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy
    as
    1, 2, 3").

    Args:
        counter: four arrays or ints that broadcast together, each in [0, 2^32).
        seed: a non-negative int or array below 2^64 that broadcasts with them; its low 32 bits are
            the first key word.

    Returns:
        Four uint64 arrays of the broadcast shape, each value below 2^32.
    """
    words = [np.asarray(word, np.uint64) for word in counter]
    seed = np.asarray(seed, np.uint64)
    shape = np.broadcast_shapes(*(word.shape for word in words), seed.shape)
    # Words 0 and 2 are multiplied, words 1 and 3 are not: two pairs take half as many operations.
    multiplied, added, mixed = (np.empty((2, *shape), np.uint64) for _ in range(3))
    multiplied[0], added[0], multiplied[1], added[1] = words
    per_pair = (2, *(1,) * len(shape))
    key = np.stack([seed & _LOW, seed >> _SHIFT])
    key = key.reshape(2, *(1,) * (len(shape) - seed.ndim), *seed.shape)
    multipliers, weyl = _MULTIPLIERS.reshape(per_pair), _WEYL.reshape(per_pair)
    for _ in range(10):
        multiplied *= multipliers
        # Each pair takes the other's product.
        np.right_shift(multiplied[::-1], _SHIFT, out=mixed)
        mixed ^= added
        mixed ^= key
        np.bitwise_and(multiplied[::-1], _LOW, out=added)
        multiplied, mixed = mixed, multiplied
        key = (key + weyl) & _LOW
    return [multiplied[0], added[0], multiplied[1], added[1]]


def uniform(words: np.ndarray) -> np.ndarray:
    """Uniform float32 in (0, 1): ``word * 2^-32 + 2^-33`` in float32, at most ``1 - 2^-24``."""
    values = words.astype(np.float32)
    values *= np.float32(2.0**-32)
    values += np.float32(2.0**-33)
    return np.minimum(values, np.float32(1 - 2.0**-24), out=values)


def token_words(seed, positions, rows, streams, vocab_size: int) -> np.ndarray:
    """The Philox word of every token.

    Args:
        seed: uint64 array or int, broadcasting with ``positions``.
        positions: int array [...], in [0, 2^32).
        rows: int array broadcasting with ``positions``.
        streams: int array broadcasting with ``positions``.
        vocab_size: the number of tokens V.

    Returns:
        uint32 [..., V].
    """
    shape = np.shape(positions)
    # A vocabulary below 256 tokens uses the first counters only.
    blocks, width = -(-vocab_size // 1024), min(256, vocab_size)
    columns = [
        np.broadcast_to(np.asarray(x, np.uint64), shape)[..., None]
        for x in (positions, rows, streams, seed)
    ]
    counts = np.arange(blocks * width, dtype=np.uint64)
    words = philox_words((counts, *columns[:3]), columns[3])
    tiles = np.empty((*shape, blocks, 4, width), np.uint32)
    for index, word in enumerate(words):
        tiles[..., index, :] = word.reshape(*shape, blocks, width)
    return tiles.reshape(*shape, blocks * 4 * width)[..., :vocab_size]


def gumbel_of_words(words: np.ndarray) -> torch.Tensor:
    """Gumbel float32 of Philox words: ``-log(-log1p(-v))``, v uniform.

    log1p is made of log by Kahan's correction, ``log(w) * v / (1 - w)`` with ``w = 1 - v`` rounded,
    so that every device with a good log agrees. A log of PyTorch is within 1 ulp; NumPy's is not.
    """
    v = uniform(words)
    w = np.float32(1) - v
    exponential = -torch.log(torch.from_numpy(w)).numpy() * v
    with np.errstate(invalid="ignore"):
        exponential /= np.float32(1) - w
    tiny = w == 1
    if tiny.any():
        exponential[tiny] = v[tiny]
    return torch.from_numpy(exponential).log_().neg_()
