"""Lookup in the text so far: what the source finds on the host is what the op finds, while rows
grow and end."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from treespec.kernels import reference

from treespec.sources.base import Sequences
from treespec.sources.ngram import NgramSource

OPTIONS = {"max_ngram": 3, "num_matches": 2}


@st.composite
def growing_texts(draw):
    """Texts of few tokens; and how long each is when the lookup is asked, time after time."""
    rows, capacity = draw(st.integers(1, 3)), draw(st.integers(6, 24))
    texts = [[draw(st.integers(0, 2)) for _ in range(capacity)] for _ in range(rows)]
    lens = [draw(st.integers(1, 4)) for _ in range(rows)]
    times = []
    for _ in range(draw(st.integers(1, 4))):
        lens = [draw(st.integers(count, capacity)) for count in lens]
        times.append(lens)
    return torch.tensor(texts), times


def check(source: NgramSource, texts: torch.Tensor, lens: list[int], length: int) -> None:
    got = source.propose(Sequences(texts, lens), length)
    continuations, match_lengths = reference.match_ngrams(
        texts, torch.tensor(lens), **OPTIONS, length=length
    )
    assert got.match_lengths == match_lengths.tolist()
    assert got.runs_on is not bool(source._histories)
    if not source._histories:
        torch.testing.assert_close(got.continuations, continuations)
        return
    found = max(1, int((continuations >= 0).any(2).sum(1).max()))
    torch.testing.assert_close(got.continuations, run_on(continuations)[:, :found])


def run_on(continuations: torch.Tensor) -> torch.Tensor:
    """Continuations that end before their time, begun anew."""
    lines = continuations.flatten(0, 1).tolist()
    for place, line in enumerate(lines):
        known = [token for token in line if token >= 0]
        lines[place] = [known[at % len(known)] for at in range(len(line))] if known else line
    return torch.tensor(lines).view(continuations.shape)


@settings(max_examples=60, deadline=None)
@given(growing_texts(), st.integers(1, 5), st.integers(0, 2))
def test_rows_that_grow_and_end(case, length, ended):
    texts, times = case
    source = NgramSource(**OPTIONS)
    source.begin(Sequences(texts, times[0]), 64)
    assert source._histories, "tokens are on the host"
    for lens in times:
        check(source, texts, lens, length)
    last = len(texts) - 1
    if ended >= last:
        return
    source.drop_row(ended)
    texts, lens = texts[:last].clone(), [*times[-1]]
    texts[ended], lens[ended] = case[0][last], lens[last]
    check(source, texts, lens[:last], length)


def test_the_next_text_is_another():
    source = NgramSource(**OPTIONS)
    for text in ([[1, 2, 3, 1, 2]], [[2, 2, 1, 5, 2]]):
        tokens = torch.tensor(text)
        source.begin(Sequences(tokens, [5]), 64)
        check(source, tokens, [5], 3)
        source.end()


def test_a_lone_question_needs_no_beginning():
    tokens = torch.tensor([[7, 8, 9, 7, 8]])
    check(NgramSource(**OPTIONS), tokens, [5], 3)
