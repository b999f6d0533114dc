"""Lookup in the history, and the merge of what it finds: PyTorch and Triton against the reference,
the reference by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tree_cases import FAST, INTERPRETED, same
from treespec.kernels import ops, reference

ALL = pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])


def match(implementation, history, lens=None, **options):
    tokens = torch.tensor([history])
    settings = {"max_ngram": 3, "num_matches": 2, "length": 3} | options
    lens = torch.tensor([len(history) if lens is None else lens])
    if implementation == "reference":
        got = reference.match_ngrams(tokens, lens, **settings)
    else:
        got = ops.match_ngrams(tokens, lens, **settings, implementation=implementation)
    return got[0][0].tolist(), got[1].item()


@ALL
class TestByHand:
    def test_the_latest_place_of_the_longest_match_comes_first(self, implementation):
        history = [1, 2, 3, 7, 9, 1, 2, 3, 8, 2, 3, 5, 1, 2, 3]
        assert match(implementation, history) == ([[8, 2, 3], [7, 9, 1]], 3)

    def test_shorter_matches_fill_up_when_asked(self, implementation):
        history = [1, 2, 3, 7, 9, 2, 3, 8, 3, 5, 1, 2, 3]
        assert match(implementation, history) == ([[7, 9, 2], [-1, -1, -1]], 3)
        assert match(implementation, history, num_matches=3, min_ngram=2) == (
            [[7, 9, 2], [8, 3, 5], [-1, -1, -1]], 3)  # fmt: skip
        assert match(implementation, history, num_matches=3, min_ngram=1)[0][2] == [5, 1, 2]

    def test_a_continuation_ends_with_the_history(self, implementation):
        assert match(implementation, [4, 4, 4]) == ([[4, -1, -1], [-1, -1, -1]], 2)
        assert match(implementation, [4, 4, 4, 4], max_ngram=1) == ([[4, -1, -1], [4, 4, -1]], 1)

    def test_no_match(self, implementation):
        nothing = [[-1] * 3] * 2
        assert match(implementation, [1, 2, 3]) == (nothing, 0)
        assert match(implementation, [1]) == (nothing, 0)
        assert match(implementation, [1, 1, 1], lens=0) == (nothing, 0)
        assert match(implementation, [5, 9, 6, 9], min_ngram=2) == (nothing, 0)

    def test_what_lies_past_the_history_is_not_matched(self, implementation):
        assert match(implementation, [5, 6, 5, 7, 5, 7], lens=3) == ([[6, 5, -1], [-1, -1, -1]], 1)


@st.composite
def histories(draw, most=30):
    batch, capacity = draw(st.integers(1, 3)), draw(st.integers(1, most))
    token = st.integers(0, 2)
    tokens = [[draw(token) for _ in range(capacity)] for _ in range(batch)]
    lens = draw(st.lists(st.integers(0, capacity), min_size=batch, max_size=batch))
    max_ngram = draw(st.integers(1, 5))
    options = {
        "max_ngram": max_ngram,
        "num_matches": draw(st.integers(1, 5)),
        "length": draw(st.integers(1, 5)),
        "min_ngram": draw(st.one_of(st.none(), st.integers(1, max_ngram))),
    }
    return torch.tensor(tokens), torch.tensor(lens), options


@FAST
@given(histories())
def test_torch_is_the_reference(case):
    tokens, lens, options = case
    same(ops.match_ngrams(tokens, lens, **options), reference.match_ngrams(tokens, lens, **options))


@INTERPRETED
@given(histories())
def test_triton_is_the_reference(case):
    tokens, lens, options = case
    got = ops.match_ngrams(tokens, lens, **options, implementation="triton")
    same(got, reference.match_ngrams(tokens, lens, **options))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_history_of_several_parts(implementation):
    """Places in different parts of 700 tokens, in a view with a stride, and rows of different
    lengths.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 6, (3, 1400), generator=generator, dtype=torch.int32)[:, ::2]
    lens = torch.tensor([700, 511, 2], dtype=torch.int32)
    options = {"max_ngram": 4, "num_matches": 8, "length": 10, "min_ngram": 2}
    got = ops.match_ngrams(tokens, lens, **options, implementation=implementation)
    same(got, reference.match_ngrams(tokens, lens, **options))
    assert got[1].tolist()[:2] == [4, 4]


@pytest.mark.parametrize("change, message", [
    ({"lens": torch.tensor([5])}, r"lens must lie in 0\.\.4, the columns of tokens; got 5"),
    ({"lens": torch.tensor([-1])}, "lens must lie in"),
    ({"lens": torch.tensor([1, 1])}, r"lens must be .*\[B\] = \[1\]"),
    ({"tokens": torch.zeros(1, 4)}, "tokens must be int32 or int64"),
    ({"max_ngram": 0}, "max_ngram must be a positive int; got 0"),
    ({"num_matches": 0}, "num_matches must be a positive int"),
    ({"length": -1}, "length must be a positive int"),
    ({"min_ngram": 3}, r"min_ngram must be None or lie in 1\.\.max_ngram \(2\); got 3"),
])  # fmt: skip
def test_errors(change, message):
    inputs = {
        "tokens": torch.tensor([[1, 2, 1, 2]]),
        "lens": torch.tensor([4]),
        "max_ngram": 2,
        "num_matches": 1,
        "length": 2,
    }
    with pytest.raises(ValueError, match=message):
        ops.match_ngrams(**{**inputs, **change})


def merge(implementation, continuations):
    if implementation == "reference":
        return reference.merge_continuations(continuations)
    return ops.merge_continuations(continuations, implementation=implementation)


@ALL
def test_a_trie_by_hand(implementation):
    """The second shares two tokens with the first, the third begins anew and has a hole, the fourth
    repeats the second, the fifth is empty; weights 0.4, 0.25, 0.2, 0.15 of 1.
    """
    lines = [[5, 6, 7], [5, 6, 8], [9, -1, 4], [5, 6, 8], [-1, -1, -1]]
    parents, fresh, share = (x[0] for x in merge(implementation, torch.tensor([lines])))
    assert parents.tolist() == [[-1, 0, 1], [-1, -1, 1], [-1, -1, -1], [-1] * 3, [-1] * 3]
    assert fresh.int().tolist() == [[1, 1, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    wanted = [[0.8, 0.8, 0.4], [0.8, 0.8, 0.4], [0.2, 0, 0], [0.8, 0.8, 0.4], [0, 0, 0]]
    torch.testing.assert_close(share, torch.tensor(wanted))
    assert parents.dtype == torch.int64 and fresh.dtype == torch.bool


@ALL
def test_weights_are_of_the_continuations_there_are(implementation):
    _, fresh, share = merge(implementation, torch.tensor([[[-1, 3], [4, 4]], [[-1, 1], [-1, 1]]]))
    assert share.tolist() == [[[0, 0], [1, 1]], [[0, 0], [0, 0]]]
    assert fresh.int().tolist() == [[[0, 0], [1, 1]], [[0, 0], [0, 0]]]


@st.composite
def sets_of_continuations(draw):
    batch, num, length = (draw(st.integers(1, most)) for most in (3, 7, 5))
    token = st.sampled_from([0, 0, 0, 1, 1, 2, -1])
    count = batch * num * length
    values = torch.tensor(draw(st.lists(token, min_size=count, max_size=count)))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    return values.view(batch, num, length).to(dtype)


def same_trie(got, wanted) -> None:
    same(got[:2], wanted[:2])
    torch.testing.assert_close(got[2], wanted[2], rtol=1e-6, atol=0)


@FAST
@given(sets_of_continuations())
def test_torch_trie_is_the_reference(continuations):
    same_trie(ops.merge_continuations(continuations), reference.merge_continuations(continuations))


@INTERPRETED
@given(sets_of_continuations())
def test_triton_trie_is_the_reference(continuations):
    same_trie(merge("triton", continuations), reference.merge_continuations(continuations))


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_most_continuations(implementation):
    generator = torch.Generator().manual_seed(5)
    continuations = torch.randint(-1, 9, (1, 64, 4), generator=generator)
    same_trie(merge(implementation, continuations), reference.merge_continuations(continuations))


@pytest.mark.parametrize("continuations, message", [
    (torch.zeros(2, 3).long(), r"continuations must be .*\[B, M, L\]"),
    (torch.zeros(1, 2, 3), "continuations must be int32 or int64"),
    (torch.zeros(1, 65, 3).long(), r"continuations must hold 1 to 64 of a row .*got 65"),
    (torch.zeros(1, 0, 3).long(), "continuations must hold 1 to 64 of a row"),
])  # fmt: skip
def test_trie_errors(continuations, message):
    with pytest.raises(ValueError, match=message):
        ops.merge_continuations(continuations)
