"""Trees of a batch against slow, obvious ones: growing, merging lookups, pruning, caps, selection,
ancestors.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from treespec.kernels import ops

from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree
from treespec.engine import Engine
from treespec.policy import AdaptivePolicy, Outcome, make_policy, running_chances
from treespec.sampling import TokenPicker
from treespec.sources import OneShotSource, Proposal, StepwiseSource
from treespec.steps import Steps
from treespec.tree import (
    NODE_SIZES,
    Growth,
    Tree,
    ancestor_matrix,
    ancestors_on_host,
    packed,
    root_only,
    round_up_nodes,
    with_read,
)

VOCAB = 9


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(("drafted", "looked_up"), [(True, True), (True, False), (False, True)])
def test_trees_are_read_as_they_are(size, drafted, looked_up):
    generator = torch.Generator().manual_seed(size)
    whole = torch.randint(-1, 10**6, (2, size), generator=generator)
    scores = torch.randn(2, size, generator=generator)
    scores[0, -1] = -math.inf
    tree = replace(
        root_only(torch.zeros(2, dtype=torch.long)),
        tokens=whole,
        num_nodes=torch.tensor([size, 1]),
        parents=whole + 3,
        scores=scores,
        draft_rows=whole + 7 if drafted else None,
        lookup=whole % 2 == 0 if looked_up else None,
    )
    told = packed(tree.num_nodes, tree.parents, tree.scores, tree.draft_rows, tree.lookup)
    read = with_read(tree, told)
    for one in fields(Tree):
        value, expected = getattr(read, one.name), getattr(tree, one.name)
        assert (value is None) == (expected is None), one.name
        assert value is None or (torch.equal(value, expected) and value.dtype == expected.dtype)

CASES = settings(max_examples=60, deadline=None, derandomize=True)

# --- slow and obvious ----------------------------------------------------------------------------


def logits_after(path: tuple[int, ...], seed: int, spread: float) -> np.ndarray:
    """Random but repeatable logits of a made-up draft after a path of tokens, the root's first."""
    return np.random.default_rng([seed, *path]).normal(size=VOCAB) * spread


def logprobs_after(path, seed, spread) -> np.ndarray:
    logits = logits_after(path, seed, spread)
    return logits - np.log(np.exp(logits).sum())


def slow_trie(continuations: list[list[int]], chances: list[float]) -> dict[tuple, float]:
    """Scores of all beginnings of continuations: their weighted share, times the chances of being
    right.
    """
    votes = [0.4, 0.25, 0.2] + [0.15] * len(continuations)
    total = sum(vote for vote, tokens in zip(votes, continuations) if tokens)
    scores: dict[tuple, float] = {}
    for vote, tokens in zip(votes, continuations):
        for length in range(1, len(tokens) + 1):
            path = tuple(tokens[:length])
            scores[path] = scores.get(path, 0.0) + vote / total
    return {path: math.log(s) + math.log(chances[len(path) - 1]) for path, s in scores.items()}


@dataclass
class Rules:
    """What a shape asks for, said once more: children of a node, whether a node is expanded, how
    many of a level.
    """

    children: object
    min_probability: object
    width: object


def rules_of(shape) -> Rules:
    if isinstance(shape, Chain):
        return Rules(lambda level, best: 1, lambda level: 0.0, lambda level: 1)
    if isinstance(shape, FixedTree):
        return Rules(
            lambda level, best: (
                shape.first_branching or shape.branching if level == 0 else shape.branching
            ),
            lambda level: shape.prune_threshold,
            lambda level: min(
                (shape.first_branching or shape.branching) * shape.branching ** (level - 1),
                shape.max_nodes,
            ),
        )
    if isinstance(shape, BestFirstTree):
        return Rules(lambda level, best: shape.width, lambda level: 0.0, lambda level: shape.width)

    def breadth(level, best):
        if best > shape.high_confidence:
            return 1
        return shape.max_branching if best < shape.low_confidence else shape.branching

    return Rules(
        breadth,
        lambda level: shape.stop_threshold if level < shape.base_depth else shape.deepen_threshold,
        lambda level: min(shape.max_branching**level, shape.max_nodes),
    )


def slow_grow(
    shape,
    root: int,
    seed: int,
    spread: float,
    depth: int,
    lookups: dict[tuple, float],
    with_model: bool,
):
    """All candidates of one row as `{path without root: score}`."""
    rules = rules_of(shape)
    scores = {(): 0.0, **lookups}
    frontier = [()] if with_model else []
    for level in range(depth):
        level_nodes = set()
        for path in frontier:
            logprobs = logprobs_after((root, *path), seed, spread)
            count = min(rules.children(level, math.exp(logprobs.max())), VOCAB)
            for token in np.argsort(-logprobs)[:count]:
                child = (*path, int(token))
                scores[child] = max(scores.get(child, -math.inf), scores[path] + logprobs[token])
                level_nodes.add(child)
        # a draft goes on below a looked-up node too, if it knows the node's parent
        level_nodes |= {
            path for path in lookups if len(path) == level + 1 and path[:-1] in frontier
        }
        likeliest = sorted(level_nodes, key=scores.get, reverse=True)[: rules.width(level + 1)]
        threshold = rules.min_probability(level + 1)
        frontier = [
            path for path in likeliest if threshold == 0 or scores[path] >= math.log(threshold)
        ]
    return scores


def best_nodes(scores: dict[tuple, float], max_nodes: int) -> dict[tuple, float]:
    """The likeliest nodes; of equals the shallower one, so that no node comes without its
    parent.
    """
    return dict(sorted(scores.items(), key=lambda item: (-item[1], len(item[0])))[:max_nodes])


def paths_of(tree, row: int) -> list[tuple]:
    """The path of tokens to every node of a row, without the root's."""
    paths = [()]
    for node in range(1, int(tree.num_nodes[row])):
        parent = int(tree.parents[row, node])
        assert 0 <= parent < node, "parents come before children"
        paths.append((*paths[parent], int(tree.tokens[row, node])))
    return paths


def check_tree(tree) -> None:
    """What every tree must be, whatever is in it."""
    batch, width = tree.tokens.shape
    assert width in NODE_SIZES and width == round_up_nodes(int(tree.num_nodes.max()))
    for row in range(batch):
        count = int(tree.num_nodes[row])
        paths = paths_of(tree, row)
        assert len(set(paths)) == count, "no two nodes carry the same text"
        assert tree.parents[row, 0] == -1 and (tree.parents[row, count:] == -1).all()
        for i, path in enumerate(paths):
            assert tree.depths[row, i] == len(path)
            for j, other in enumerate(paths):
                assert bool(tree.visible[row, i, j]) == (path[: len(other)] == other)
        assert not tree.visible[row, :count, count:].any(), "padding is seen by no node"


# --- a draft and a lookup that are made up -------------------------------------------------------


@dataclass
class MadeUpDraft(StepwiseSource):
    """Answers for the path that a node *sees*, so a wrong visibility gives wrong logits."""

    seed: int
    spread: float
    behind: list[int]
    vocab_size: int = VOCAB
    rows: list[list[int]] = field(default_factory=list)

    def root_logits(self, sequences):
        self.roots = sequences.roots().tolist()
        width = max(self.behind)
        self.rows = [[-1] * width for _ in self.behind]
        for row, behind in enumerate(self.behind):
            self.rows[row][behind - 1] = self.roots[row]
        chain = torch.ones(len(self.behind), width, dtype=torch.bool)
        for row, behind in enumerate(self.behind):
            chain[row, behind:] = False
        logits = np.stack([logits_after((root,), self.seed, self.spread) for root in self.roots])
        return torch.tensor(logits)[:, None].float(), torch.tensor(self.behind) - 1, chain, width

    def seen_path(self, row: int, visible: list[bool]) -> tuple:
        """Tokens of the rows that a node sees, from the root on."""
        return tuple(
            self.rows[row][k]
            for k, seen in enumerate(visible)
            if seen and k >= self.behind[row] - 1
        )

    def level_logits(self, tokens, depth, visible, offset):
        answers = np.zeros((*tokens.shape, VOCAB))
        for row in range(tokens.shape[0]):
            assert len(self.rows[row]) == offset
            self.rows[row] += tokens[row].tolist()
            for node in range(tokens.shape[1]):
                seen = visible[row, node].tolist()
                path = self.seen_path(row, seen)
                # a place that holds no node may see anything; a node that sees too little gets no
                # logits
                if len(path) == depth + 1 and all(seen[: self.behind[row]]):
                    answers[row, node] = logits_after(path, self.seed, self.spread)
        return torch.tensor(answers).float()

    def commit(self, paths):
        pass


@dataclass
class MadeUpLookup(OneShotSource):
    """Proposes what it is given."""

    continuations: list[list[list[int]]]

    def propose(self, sequences, length):
        num = max(len(row) for row in self.continuations)
        padded = torch.full((len(self.continuations), num, length), -1)
        for row, listed in enumerate(self.continuations):
            for k, tokens in enumerate(listed):
                padded[row, k, : len(tokens[:length])] = torch.tensor(
                    tokens[:length], dtype=torch.long
                )
        return Proposal(padded, [8 if any(row) else 0 for row in self.continuations])


GREEDY = TokenPicker([], False, 0, [0], VOCAB, torch.device("cpu"))


def sharpened(shape, spread: float) -> float:
    """The spread of the logits by which nodes are ranked: a policy may sharpen a draft's own."""
    return spread * make_policy(shape, True, False).sharpness(GREEDY)


def grow(
    shape,
    roots,
    *,
    seed=0,
    spread=2.0,
    depth=None,
    behind=None,
    continuations=None,
    with_model=True,
):
    """One round's trees by the engine, and its draft."""
    policy = make_policy(shape, with_model, continuations is not None)
    draft = MadeUpDraft(seed, spread, behind or [1] * len(roots))
    sources = ([MadeUpLookup(continuations)] if continuations is not None else []) + (
        [draft] if with_model else []
    )
    target = SimpleNamespace(vocab_size=VOCAB, device=torch.device("cpu"), steps=Steps())
    engine = Engine(target, sources, policy)
    engine._tokens = torch.tensor(roots)[:, None]
    engine._lens = [1] * len(roots)
    picker = TokenPicker([], False, 0, list(range(len(roots))), VOCAB, torch.device("cpu"))
    tree, _, _ = engine._grow(picker, [(depth or shape.depth) + 1] * len(roots))
    return tree, draft


def check_against_slow(shape, roots, seed, spread, behind, continuations, with_model=True):
    tree, draft = grow(
        shape,
        roots,
        seed=seed,
        spread=spread,
        behind=behind,
        continuations=continuations,
        with_model=with_model,
    )
    check_tree(tree)
    chances = make_policy(shape, with_model, True).lookup_chances([8], shape.depth)
    for row, root in enumerate(roots):
        lookups = {}
        if continuations is not None and any(continuations[row]):
            cut = [tokens[: shape.depth] for tokens in continuations[row]]
            lookups = slow_trie(cut, chances[0].tolist())
        everything = slow_grow(
            shape, root, seed, sharpened(shape, spread), shape.depth, lookups, with_model
        )
        expected = best_nodes(everything, shape.max_nodes)
        paths = paths_of(tree, row)
        scores = dict(zip(paths, tree.scores[row].tolist()))
        assert set(scores) == set(expected)
        assert scores == pytest.approx(expected, abs=1e-4)
        for node, path in enumerate(paths):
            drafted = -1 if tree.draft_rows is None else int(tree.draft_rows[row, node])
            if drafted >= 0:
                assert draft.rows[row][drafted] == (path[-1] if path else root)
            if tree.lookup is not None:
                assert bool(tree.lookup[row, node]) == (path in lookups)


fractions = st.sampled_from([0.0, 0.02, 0.1, 0.4])
drawn_shapes = st.one_of(
    st.builds(Chain, st.integers(1, 7)),
    st.builds(
        lambda depth, branching, prune, spare, first: FixedTree(
            depth, branching, prune, depth + spare, first
        ),
        st.integers(1, 5),
        st.integers(1, 4),
        fractions,
        st.integers(1, 40),
        st.none() | st.integers(1, 5),
    ),
    st.builds(BestFirstTree, st.integers(2, 40), st.integers(1, 6), st.integers(1, VOCAB)),
    st.builds(
        lambda base, more, stop, deepen, nodes: AdaptiveTree(
            base_depth=base,
            max_depth=base + more,
            stop_threshold=stop,
            deepen_threshold=deepen,
            max_nodes=nodes,
        ),
        st.integers(1, 4),
        st.integers(0, 3),
        st.sampled_from([0.02, 0.1]),
        st.sampled_from([0.2, 0.5]),
        st.integers(2, 64),
    ),
)
continuation = st.lists(st.integers(0, 3), max_size=6)

# --- growing -------------------------------------------------------------------------------------


@CASES
@given(
    drawn_shapes,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3),
    st.integers(0, 999),
    st.sampled_from([0.5, 2.0, 6.0]),
    st.data(),
)
def test_trees_of_a_draft_are_the_slow_ones(shape, roots, seed, spread, data):
    behind = [data.draw(st.integers(1, 4)) for _ in roots]
    check_against_slow(shape, roots, seed, spread, behind, None)


@CASES
@given(
    drawn_shapes,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3),
    st.integers(0, 999),
    st.sampled_from([0.5, 2.0, 6.0]),
    st.booleans(),
    st.data(),
)
def test_trees_of_lookups_and_a_draft_are_the_slow_ones(
    shape, roots, seed, spread, with_model, data
):
    continuations = [data.draw(st.lists(continuation, min_size=1, max_size=4)) for _ in roots]
    check_against_slow(shape, roots, seed, spread, None, continuations, with_model)


def test_a_chain_is_the_drafts_greedy_text():
    tree, _ = grow(Chain(5), [4], seed=3)
    path = (4,)
    for _ in range(5):
        path = (*path, int(logits_after(path, 3, 2.0).argmax()))
    assert tree.tokens[0, :6].tolist() == list(path)
    assert tree.parents[0, :6].tolist() == [-1, 0, 1, 2, 3, 4]


def test_first_branching_of_one_gives_the_reference_experiments_tree():
    tree, _ = grow(FixedTree(depth=4, branching=2, prune_threshold=0.0, first_branching=1), [1])
    assert torch.bincount(tree.depths[0, : int(tree.num_nodes[0])]).tolist() == [1, 1, 2, 4, 8]
    tree, _ = grow(FixedTree(depth=4, branching=2, prune_threshold=0.0), [1])
    assert torch.bincount(tree.depths[0, : int(tree.num_nodes[0])]).tolist() == [1, 2, 4, 8, 16]


def test_a_node_under_the_threshold_is_kept_but_not_expanded():
    shape = FixedTree(depth=4, branching=3, prune_threshold=0.1, max_nodes=200)
    tree, _ = grow(shape, [2], spread=1.5, seed=5)
    scores = tree.scores[0, : int(tree.num_nodes[0])].exp()
    parents = set(tree.parents[0, 1 : len(scores)].tolist())
    unlikely = {node for node in range(len(scores)) if scores[node] < 0.1}
    expanded = {
        node for node in range(len(scores)) if scores[node] >= 0.1 and tree.depths[0, node] < 4
    }
    assert unlikely and expanded - {0}
    assert not unlikely & parents
    assert parents == expanded


def test_the_cap_keeps_the_likeliest_nodes():
    everything, _ = grow(FixedTree(depth=4, branching=3, prune_threshold=0.0, max_nodes=256), [2])
    capped, _ = grow(FixedTree(depth=4, branching=3, prune_threshold=0.0, max_nodes=20), [2])
    assert int(everything.num_nodes[0]) == 1 + 3 + 9 + 27 + 81 and int(capped.num_nodes[0]) == 20
    best = everything.scores[0].sort(descending=True).values[:20]
    assert torch.allclose(capped.scores[0, :20].sort(descending=True).values, best)


def test_no_deeper_than_the_budget_allows():
    tree, _ = grow(Chain(6), [2], depth=2)
    assert int(tree.num_nodes[0]) == 3


def test_more_children_than_tokens_in_the_vocabulary():
    tree, _ = grow(BestFirstTree(max_nodes=40, depth=2, width=30), [2])
    check_tree(tree)
    assert int((tree.depths[0, : int(tree.num_nodes[0])] == 1).sum()) <= VOCAB


@CASES
@given(
    st.integers(2, VOCAB + 1),
    st.integers(1, 6),
    st.integers(0, 999),
    st.sampled_from([0.5, 2.0, 6.0]),
)
def test_levels_then_all_is_best_first_with_a_heap(max_nodes, depth, seed, spread):
    """The best of every level, then the best of all, are the nodes a heap would pop one by one."""
    shape = BestFirstTree(max_nodes, depth, VOCAB)
    tree, _ = grow(shape, [3], seed=seed, spread=spread)
    heap, popped = [(0.0, ())], []
    while heap and len(popped) < max_nodes:
        cost, path = heapq.heappop(heap)
        popped.append(path)
        if len(path) < depth:
            for token, logprob in enumerate(
                logprobs_after((3, *path), seed, sharpened(shape, spread))
            ):
                heapq.heappush(heap, (cost - logprob, (*path, token)))
    assert set(paths_of(tree, 0)) == set(popped)


# --- lookups -------------------------------------------------------------------------------------


def test_merge_of_three_continuations_by_hand():
    parents, fresh, share = ops.merge_continuations(
        torch.tensor([[[5, 6, 7], [5, 6, 8], [4, -1, -1]]])
    )
    assert fresh[0].tolist() == [[True, True, True], [False, False, True], [True, False, False]]
    # place 1 * 3 + 2 hangs below place 0 * 3 + 1
    assert parents[0, 0].tolist() == [-1, 0, 1] and parents[0, 1, 2] == 1 and parents[0, 2, 0] == -1
    total = 0.4 + 0.25 + 0.2
    assert share[0, 0].tolist() == pytest.approx([0.65 / total, 0.65 / total, 0.4 / total])
    assert share[0, 1, 2].item() == pytest.approx(0.25 / total)
    assert share[0, 2, 0].item() == pytest.approx(0.2 / total)


@CASES
@given(st.lists(st.lists(continuation, min_size=3, max_size=3), min_size=1, max_size=3))
def test_merged_continuations_are_the_slow_trie(rows):
    length = max(1, max(len(tokens) for row in rows for tokens in row))
    padded = torch.full((len(rows), 3, length), -1)
    for row, listed in enumerate(rows):
        for k, tokens in enumerate(listed):
            padded[row, k, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    growth = Growth(torch.zeros(len(rows), dtype=torch.long))
    chances = 0.5 * 0.8 ** np.arange(length)
    growth.add_lookups(padded, torch.tensor(chances, dtype=torch.float32).repeat(len(rows), 1))
    tree = growth.select(64, length)
    check_tree(tree)
    for row, listed in enumerate(rows):
        expected = {(): 0.0, **(slow_trie(listed, chances.tolist()) if any(listed) else {})}
        found = dict(zip(paths_of(tree, row), tree.scores[row].tolist()))
        assert found == pytest.approx(expected, abs=1e-5)


def test_a_continuation_that_proved_right_so_far_is_a_longer_match():
    chances = running_chances([0.0, 0.5, 0.8, 0.9], [0, 1, 2, 7], 4)
    assert chances[0].tolist() == [0.0] * 4, "nothing was found"
    assert chances[1].tolist() == pytest.approx([0.5, 0.4, 0.36, 0.324])
    assert chances[2].tolist() == pytest.approx([0.8, 0.72, 0.648, 0.5832])
    assert chances[3].tolist() == pytest.approx([0.9**k for k in range(1, 5)])


def test_a_node_that_both_sources_propose_appears_once_with_the_better_score():
    best = tuple(int(token) for token in np.argsort(-logprobs_after((4,), 3, 2.0))[:2])
    shape = FixedTree(depth=2, branching=2, prune_threshold=0.0, max_nodes=32)
    tree, _ = grow(shape, [4], seed=3, continuations=[[[best[1], 0]]])
    paths = paths_of(tree, 0)
    node = paths.index((best[1],))
    assert paths.count((best[1],)) == 1 and bool(tree.lookup[0, node])
    chance = make_policy(shape, True, True).lookup_chances([8], 2)[0, 0]
    assert tree.scores[0, node].item() == pytest.approx(math.log(chance), abs=1e-5)
    assert chance > math.exp(logprobs_after((4,), 3, 2.0)[best[1]])
    # and the draft went on below it
    assert sum(path[0] == best[1] for path in paths if len(path) == 2) >= 2


# --- ancestors -----------------------------------------------------------------------------------


@CASES
@given(st.lists(st.integers(0, 10**6), max_size=63), st.integers(0, 5))
def test_ancestor_matrix_is_the_slow_one(numbers, spare):
    parents = [-1, *(number % (k + 1) for k, number in enumerate(numbers))]
    ancestors = []
    for node, parent in enumerate(parents):
        ancestors.append(({node} | ancestors[parent]) if parent >= 0 else {node})
    depth = max(len(a) for a in ancestors) - 1
    matrix = ancestor_matrix(torch.tensor([parents]), depth + spare)[0]
    assert [set(row.nonzero().flatten().tolist()) for row in matrix] == ancestors
    assert np.array_equal(ancestors_on_host(np.array([parents]))[0], matrix)


@CASES
@given(st.integers(1, 3), st.integers(0, 3), st.integers(0, 3), st.integers(1, 12), st.data())
def test_a_host_selects_the_tree_that_a_device_would(batch, lines, levels, most, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))

    def randint(high, *shape):
        return torch.randint(high, shape, generator=generator)

    growth = Growth(randint(VOCAB, batch))
    if lines:
        chances = torch.rand(batch, 3, generator=generator).clamp_min_(0.05).cumprod(1)
        growth.add_lookups(randint(4, batch, lines, 3) - 1, chances)
    growth.begin_levels(16, randint(2, batch), torch.ones(batch, 2, dtype=torch.bool))
    offset = 2
    for level in range(1, levels + 1):
        missing = torch.rand(batch, growth.frontier.shape[1], 2, generator=generator)
        scores = growth.frontier_scores.unsqueeze(2) - missing
        scores[missing < 0.2] = -math.inf
        growth.expand(randint(VOCAB, *scores.shape), scores)
        growth.choose_frontier(level, 3, -2.0)
        growth.enter_rows(offset)
        offset += growth.frontier.shape[1]
    most = min(most, growth.count)
    host = growth.select(most, 8)
    chosen = ops.select_best_nodes(growth.all_scores(), growth.parents[:, : growth.count], most)
    device = growth._built(None, chosen, round_up_nodes(most), 8)
    width = host.tokens.shape[1]
    for one in fields(Tree):
        value, expected = getattr(host, one.name), getattr(device, one.name)
        if isinstance(expected, torch.Tensor) and expected.dim() > 1:
            expected = expected[:, :width, :width] if expected.dim() > 2 else expected[:, :width]
        assert (value is None) == (expected is None), one.name
        if value is not None:
            assert torch.equal(value, expected) and value.dtype == expected.dtype, one.name


def test_a_pool_without_a_free_place():
    growth = Growth(torch.tensor([3]))
    growth.add_lookups(torch.arange(7 * 73).view(1, 7, 73), torch.full((1, 73), 0.5).cumprod(1))
    assert growth.count == growth.tokens.shape[1]
    tree = growth.select(9, 73)
    assert tree.num_nodes.tolist() == [9] and tree.tokens.shape == (1, 10)
    check_tree(tree)


def test_ancestor_matrix_by_hand():
    parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, 1, 2, -1]])
    matrix = ancestor_matrix(parents, 3).int().tolist()
    assert ancestors_on_host(parents.numpy()).astype(int).tolist() == matrix
    assert matrix[0] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]
    assert matrix[1] == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_root_only():
    tree = root_only(torch.tensor([3, 5]))
    check_tree(tree)
    assert tree.tokens.tolist() == [[3], [5]] and tree.num_nodes.tolist() == [1, 1]


# --- adaptive rules ------------------------------------------------------------------------------


def adaptive(**fields) -> AdaptivePolicy:
    return make_policy(AdaptiveTree(**fields), True, False)


def accepted(*lengths: int) -> Outcome:
    """A round of which only the accept lengths matter."""
    others = dict.fromkeys([f.name for f in fields(Outcome)])
    return Outcome(**{**others, "paths": [list(range(k + 1)) for k in lengths]})


def test_breadth_by_confidence():
    probabilities = torch.tensor([[[0.95, 0.03, 0.02], [0.6, 0.3, 0.1], [0.39, 0.31, 0.3]]])
    policy = adaptive()
    assert policy.children(2) == 3
    assert policy.breadth(probabilities.log()).tolist() == [[1, 2, 3]]


def test_depth_by_path_probability():
    policy = adaptive()
    assert [math.exp(policy.frontier(depth)[1]) for depth in range(1, 5)] == pytest.approx(
        [0.1] * 4
    )
    assert [math.exp(policy.frontier(depth)[1]) for depth in range(5, 8)] == pytest.approx(
        [0.5] * 3
    )
    assert policy.max_depth == 8


def test_history_moves_base_depth_and_thresholds():
    policy = adaptive(window=4)
    for _ in range(3):
        policy.observe(accepted(5))
    assert (policy.base_depth, policy.shift) == (5, 0.0), "the window is not full"
    policy.observe(accepted(5))
    assert policy.base_depth == 6 and policy.shift == pytest.approx(-0.05)
    assert math.exp(policy.frontier(1)[1]) == pytest.approx(0.05)
    assert math.exp(policy.frontier(6)[1]) == pytest.approx(0.45)
    for _ in range(8):
        policy.observe(accepted(0))
    assert policy.base_depth == 4 and policy.shift == pytest.approx(0.05)
    assert math.exp(policy.frontier(1)[1]) == pytest.approx(0.15)


def test_history_within_tolerance_changes_nothing():
    policy = adaptive(window=2, base_depth=5)
    for _ in range(6):
        policy.observe(accepted(4, 3))
    assert (policy.base_depth, policy.shift) == (5, 0.0)


def test_history_stays_within_bounds():
    deep, shallow = adaptive(window=1), adaptive(window=1)
    for _ in range(40):
        deep.observe(accepted(8))
        shallow.observe(accepted(0))
    assert deep.base_depth == 8 and shallow.base_depth == 1
    assert 0 < math.exp(deep.frontier(1)[1]) < 1e-5 and math.exp(shallow.frontier(7)[1]) < 1


def test_a_shapes_policy_asks_exactly_its_sources():
    no_lookup, no_model = make_policy(Chain(3), True, False), make_policy(Chain(3), False, True)
    assert not no_lookup.wants_lookup() and no_lookup.wants_draft([])
    assert no_model.wants_lookup() and not no_model.wants_draft([])
    assert SimpleNamespace(**vars(no_model)).lookup_length == 3
