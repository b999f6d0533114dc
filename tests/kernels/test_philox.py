"""The noise: Philox words against published vectors, one definition on the host and in the kernel,
and
its statistics across tokens, positions, rows, seeds and streams.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from treespec.kernels import noise, ops, reference
from treespec.kernels.reference_acceptance import philox

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
# Known answers of Philox4x32-10 (Random123, kat_vectors).
VECTORS = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize("counter, seed, words", VECTORS)
def test_words_are_the_published_ones(counter, seed, words):
    assert philox(counter, seed) == words
    host = noise.philox_words([[part] for part in counter], seed)
    assert tuple(int(word[0]) for word in host) == words


def words_of(values: torch.Tensor) -> np.ndarray:
    """The Philox word behind each noise value, to the precision of the noise: the distribution
    function.
    """
    return np.exp(-np.exp(-values.double().numpy()))


@pytest.mark.parametrize("counter, seed, words", VECTORS)
def test_kernel_words_are_the_published_ones(counter, seed, words, device):
    from philox_words_kernel import kernel_words

    assert kernel_words(counter, seed, device) == words


def ulps(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Greatest difference in float32 units in the last place of max(|wanted|, 1): near 0 the noise
    is
    the logarithm of a number near 1, so only its absolute error can be small.
    """
    unit = np.spacing(np.maximum(np.abs(wanted.numpy()), np.float32(1)))
    return float((np.abs(got.double().numpy() - wanted.double().numpy()) / unit).max())


CASES = [(5, 1), (2**63 + 5, 7), (0, 300), (12345678901, 1030), (7, 2600)]


@BOTH
@pytest.mark.parametrize("seed, vocab_size", CASES)
def test_noise_is_the_reference_to_2_ulp(seed, vocab_size, implementation, monkeypatch, device):
    if implementation == "triton" and device.type == "cpu":
        # The interpreter takes NumPy's float32 log, which is off by up to 4 ulp; a GPU's is off by
        # 1.
        exact = np.log
        monkeypatch.setattr(
            np, "log", lambda x, **k: exact(x.astype(np.float64), **k).astype(x.dtype)
        )
    rows = torch.tensor([3, 2**32 - 1], device=device)
    positions = torch.tensor([[7, 2**31], [0, 100]], device=device)
    got = ops.gumbel_noise(seed, rows, positions, vocab_size, implementation=implementation)
    wanted = reference.gumbel_noise(seed, rows.cpu(), positions.cpu(), vocab_size)
    assert got.dtype == torch.float32 and got.shape == wanted.shape
    assert ulps(got.cpu(), wanted) <= 2


@BOTH
def test_a_seed_and_a_stream_of_each_row(implementation, device):
    seeds, streams = torch.tensor([4, 9], device=device), torch.tensor([0, 41], device=device)
    rows, positions = torch.tensor([0, 5], device=device), torch.tensor([[2], [3]], device=device)
    got = ops.gumbel_noise(
        seeds, rows, positions, 50, stream=streams, implementation=implementation
    )
    wanted = reference.gumbel_noise(seeds, rows, positions, 50, stream=streams)
    assert ulps(got.cpu(), wanted) <= 5
    other = reference.gumbel_noise(4, rows, positions, 50)
    assert ulps(got[:1].cpu(), other[:1]) <= 5 and ulps(got[1:].cpu(), other[1:]) > 1e4


@BOTH
def test_extreme_words_stay_finite(implementation, device):
    words = np.array([0, 1, 127, 128, 2**31, 2**32 - 129, 2**32 - 1], np.uint32)
    values = noise.gumbel_of_words(words)
    if implementation == "triton":
        from philox_words_kernel import kernel_gumbel

        values = kernel_gumbel(words.tolist(), device)
    v = noise.uniform(words).astype(np.float64)
    assert torch.isfinite(values).all() and v.min() > 0 and v.max() < 1
    assert ulps(values, torch.from_numpy(-np.log(-np.log1p(-v))).float()) <= 2
    # The smallest word is the rarest token's greatest chance, the greatest word its least.
    assert values[0] > 22.8 and values[-1] < -2.8


def test_noise_does_not_depend_on_the_vocabulary_or_the_batch():
    rows, positions = torch.tensor([6]), torch.tensor([[11, 12]])
    small = ops.gumbel_noise(3, rows, positions, 100)
    large = ops.gumbel_noise(3, torch.tensor([1, 6]), torch.tensor([[5, 12], [12, 11]]), 5000)
    assert torch.equal(small[0, 0], large[1, 1, :100]) and torch.equal(
        small[0, 1], large[1, 0, :100]
    )


class TestStatistics:
    """Chi-square tests on seeded noise; each fails by chance with probability 1e-6."""

    FALSE_ALARM = 1e-6
    CELLS = 16

    def p_value(self, counts: np.ndarray, expected: float) -> float:
        statistic = ((counts - expected) ** 2 / expected).sum()
        freedom = torch.tensor((counts.size - 1) / 2, dtype=torch.float64)
        return float(
            torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64))
        )

    def cells(self, values: torch.Tensor) -> np.ndarray:
        return np.minimum((words_of(values) * self.CELLS).astype(int), self.CELLS - 1).ravel()

    def pair_p_value(self, one: torch.Tensor, other: torch.Tensor) -> float:
        joint = self.cells(one) * self.CELLS + self.cells(other)
        counts = np.bincount(joint, minlength=self.CELLS**2)
        return self.p_value(counts, joint.size / self.CELLS**2)

    def noise(self, seed=1, rows=(0,), positions=tuple(range(64)), vocab_size=4096, stream=0):
        positions = torch.tensor([positions] * len(rows))
        return ops.gumbel_noise(seed, torch.tensor(rows), positions, vocab_size, stream=stream)

    def test_uniform(self):
        values = self.noise()
        counts = np.bincount(self.cells(values), minlength=self.CELLS)
        assert self.p_value(counts, values.numel() / self.CELLS) > self.FALSE_ALARM

    @pytest.mark.parametrize("shift", [1, 255, 256, 512, 768, 1024])
    def test_tokens_are_independent(self, shift):
        values = self.noise()
        assert self.pair_p_value(values[..., :-shift], values[..., shift:]) > self.FALSE_ALARM

    @pytest.mark.parametrize("shift", [1, 2, 32])
    def test_positions_are_independent(self, shift):
        values = self.noise()
        assert self.pair_p_value(values[:, :-shift], values[:, shift:]) > self.FALSE_ALARM

    @pytest.mark.parametrize("other", [{"rows": (1,)}, {"rows": (2**31,)}, {"seed": 2},
    {"seed": 1 + 2**32},
                                       {"seed": 2**63 + 1}, {"stream": 1},
                                           {"stream": 4}])  # fmt: skip
    def test_rows_seeds_and_streams_are_independent(self, other):
        assert self.pair_p_value(self.noise(), self.noise(**other)) > self.FALSE_ALARM

    def test_what_the_tests_see(self):
        """Equal noise, and noise of neighbouring words, is not taken for independent."""
        values = self.noise()
        assert self.pair_p_value(values, values + 0.01) < self.FALSE_ALARM
        smooth = torch.maximum(values[..., :-1], values[..., 1:])
        assert self.pair_p_value(smooth[..., :-1], smooth[..., 1:]) < self.FALSE_ALARM
        counts = np.bincount(self.cells(values + 0.05), minlength=self.CELLS)
        assert self.p_value(counts, values.numel() / self.CELLS) < self.FALSE_ALARM


@pytest.mark.parametrize("change, message", [
    ({"rows": torch.tensor([1, 2])}, r"rows must be .*\[B\] = \[1\]"),
    ({"positions": torch.tensor([3])}, r"positions must be .*\[B, P\]"),
    ({"positions": torch.tensor([[3.0]])}, "positions must be int32 or int64"),
    ({"vocab_size": 0}, "vocab_size must be a positive int; got 0"),
    ({"seed": -3}, "seed must be an int in .*got -3"),
    ({"seed": 1.5}, "seed must be an int in .*got 1.5"),
    ({"seed": torch.tensor([1, 2])}, r"seed must be int64 \[B\] = \[1\]"),
    ({"stream": -1}, "stream must lie in"),
    ({"stream": torch.tensor([1, 2])}, r"stream must be int64 \[B\] = \[1\]"),
])  # fmt: skip
def test_errors(change, message):
    inputs = {
        "seed": 1,
        "rows": torch.tensor([0]),
        "positions": torch.tensor([[4]]),
        "vocab_size": 9,
    }
    with pytest.raises(ValueError, match=message):
        ops.gumbel_noise(**{**inputs, **change})
