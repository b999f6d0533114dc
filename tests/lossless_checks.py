"""What "lossless" means, as functions: each returns what differs, so that tests can show both
agreement and its loss.
"""

from __future__ import annotations

import functools

import torch
from tiny_models import VOCAB, prompts, ragged, tiny_pair

from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree, TreeSpeculator
from treespec.model import TreeModel
from treespec.sources import OneShotSource, Proposal
from treespec.tree import ancestor_matrix

# Largest difference of logits in float32, as a share of their spread, that rounding explains in a
# model of two layers.
ROUNDING = 2e-5

SHAPES = {
    "chain": Chain(5),
    "fixed": FixedTree(depth=4, branching=2, prune_threshold=0.05, max_nodes=32),
    "unpruned": FixedTree(
        depth=4, branching=2, prune_threshold=0.0, max_nodes=24, first_branching=1
    ),
    "best_first": BestFirstTree(max_nodes=24, depth=5, width=4),
    "adaptive": AdaptiveTree(base_depth=3, max_depth=5, max_nodes=32, window=3),
    "auto": "auto",
}


class GarbageSource(OneShotSource):
    """Random continuations, sometimes none, with holes, repetitions, and tokens that do not
    exist.
    """

    name = "garbage"

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, sequences, length):
        batch = len(sequences.lens)
        shape = (batch, 3, length)
        continuations = torch.randint(-2, self.vocab_size + 3, shape, generator=self.generator)
        continuations[:, 1, : length // 2] = continuations[:, 0, : length // 2]
        # now and then the last token again, which a text that loops does write
        continuations[:, 2] = sequences.roots()[:, None]
        return Proposal(
            continuations, torch.randint(0, 9, (batch,), generator=self.generator).tolist()
        )


class KnowsOne(OneShotSource):
    """Knows how the first text goes on, and is as sure of nonsense for all others."""

    name = "knows one"

    def __init__(self, text):
        self.text = text

    def propose(self, sequences, length):
        tokens = torch.full((len(sequences.lens), 1, length), VOCAB - 1)
        for row, have in enumerate(sequences.lens):
            if torch.equal(sequences.tokens[row, :have], self.text[:have]):
                rest = self.text[have : have + length]
                tokens[row, 0, : len(rest)] = rest
        return Proposal(tokens, [8] * len(sequences.lens))


def sources(name: str, draft, vocab_size: int):
    """The `draft=` argument that a name stands for."""
    return {
        "draft": draft,
        "ngram": "ngram",
        "merged": [draft, "ngram"],
        "garbage": GarbageSource(vocab_size),
        "draft_and_garbage": [draft, GarbageSource(vocab_size)],
        "none": None,
    }[name]


def speculator(kind: str, shape: str, source: str, **options) -> TreeSpeculator:
    """A speculator on a tiny pair, by names."""
    target, draft = tiny_pair(kind)
    return TreeSpeculator(
        target, sources(source, draft, target.config.vocab_size), tree=SHAPES[shape], **options
    )


def prompt_batch(batch: int, vocab_size: int = 120):
    """One prompt without a mask, or a ragged left-padded batch with its mask."""
    if batch == 1:
        return prompts(1, 20, seed=7, vocab_size=vocab_size), None
    return ragged(batch, vocab_size=vocab_size)


@functools.cache
def plain_greedy(kind: str, batch: int, max_new_tokens: int) -> torch.Tensor:
    """`target.generate`'s own text."""
    ids, mask = prompt_batch(batch)
    return tiny_pair(kind)[0].generate(
        ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False
    )


@functools.cache
def plain_sampled(kind: str, batch: int, max_new_tokens: int, **options) -> torch.Tensor:
    """The engine's own plain sampling."""
    ids, mask = prompt_batch(batch)
    spec = speculator(kind, "chain", "none")
    return spec.generate(ids, mask, max_new_tokens=max_new_tokens, do_sample=True, **options)


def first_difference(ids: torch.Tensor, expected: torch.Tensor) -> tuple | None:
    """Where two batches of texts part: (row, position, token, expected token), or their shapes;
    None if they do not.
    """
    if ids.shape != expected.shape:
        return tuple(ids.shape), tuple(expected.shape)
    wrong = (ids != expected).nonzero()
    if len(wrong) == 0:
        return None
    row, position = wrong[0].tolist()
    return row, position, int(ids[row, position]), int(expected[row, position])


def greedy_difference(
    spec: TreeSpeculator, kind: str, batch: int, max_new_tokens: int = 128
) -> tuple | None:
    """Where a speculator's greedy text parts from `target.generate`'s."""
    ids, mask = prompt_batch(batch)
    found = spec.generate(ids, mask, max_new_tokens=max_new_tokens, do_sample=False)
    return first_difference(found, plain_greedy(kind, batch, max_new_tokens))


def sampled_difference(
    spec: TreeSpeculator, kind: str, batch: int, max_new_tokens: int = 96, **options
) -> tuple | None:
    """Where a speculator's sampled text parts from plain decoding in the same engine with the same
    seed.
    """
    ids, mask = prompt_batch(batch)
    found = spec.generate(ids, mask, max_new_tokens=max_new_tokens, do_sample=True, **options)
    return first_difference(found, plain_sampled(kind, batch, max_new_tokens, **options))


# --- logits of nodes -----------------------------------------------------------------------------


def random_parents(num_nodes: int, bushiness: float, seed: int) -> list[int]:
    """A random tree: 0 hangs every node below the one before it, 1 below any earlier node."""
    generator = torch.Generator().manual_seed(seed)
    parents = [-1]
    for node in range(1, num_nodes):
        anywhere = float(torch.rand((), generator=generator)) < bushiness
        parents.append(int(torch.randint(node, (), generator=generator)) if anywhere else node - 1)
    return parents


def paths_from_root(parents: list[int]) -> list[list[int]]:
    """Per node the nodes from the root to it."""
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    return paths


@torch.inference_mode()
def sequential_logits(
    model, prefix: torch.Tensor, tokens: torch.Tensor, parents: list[int]
) -> torch.Tensor:
    """Float32 `[N, V]` logits of every node by a plain forward over prefix and path, one sequence
    per node.
    """
    paths = paths_from_root(parents)
    longest = max(len(path) for path in paths)
    batch = torch.zeros(len(paths), len(prefix) + longest, dtype=torch.long)
    for node, path in enumerate(paths):
        batch[node, : len(prefix)] = prefix
        batch[node, len(prefix) : len(prefix) + len(path)] = tokens[path]
    # what lies behind a path is not seen by it: attention is causal
    logits = model(batch, use_cache=False).logits
    last = torch.tensor([len(prefix) + len(path) - 1 for path in paths])
    return logits[torch.arange(len(paths)), last].float()


@torch.inference_mode()
def tree_logits_error(
    ready: TreeModel,
    prefixes: list[torch.Tensor],
    parents: list[list[int]],
    *,
    repeats: int = 1,
    seed: int = 0,
) -> float:
    """Largest difference, by their spread, between a tree's logits and its nodes' sequences'.

    Args:
        ready: the model, attached; its forwards may be recorded.
        prefixes: per row a 1-D prompt, of any lengths.
        parents: per row a tree of the same number of nodes.
        repeats: forwards of the same shape, with new tokens each; the first two of a shape are
            eager, later ones replayed.
        seed: of the tokens.
    """
    num_nodes = len(parents[0])
    lens = [len(prefix) for prefix in prefixes]
    padded = torch.zeros(len(lens), max(lens), dtype=torch.long)
    for row, prefix in enumerate(prefixes):
        padded[row, : lens[row]] = prefix
    ready.begin()
    ready.allocate(len(lens), max(lens) + max(num_nodes, 256))
    ready.ingest(padded, lens)
    visible = ancestor_matrix(torch.tensor(parents), num_nodes)
    # the depth of a node is counted here, not read off `visible`, which a fault may have changed
    depths = torch.tensor([[len(path) - 1 for path in paths_from_root(row)] for row in parents])
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(repeats):
        tokens = torch.randint(1, ready.vocab_size, (len(lens), num_nodes), generator=generator)
        positions = torch.tensor(lens)[:, None] + depths
        logits = ready.forward(tokens, positions, visible)
        for row, prefix in enumerate(prefixes):
            expected = sequential_logits(ready.model, prefix, tokens[row], parents[row])
            worst = max(worst, float((logits[row] - expected).abs().max() / expected.std()))
    return worst


@torch.inference_mode()
def commit_error(
    ready: TreeModel, prefix: torch.Tensor, parents: list[int], path: list[int], seed: int = 0
) -> float:
    """The error of the next token's logits after a path of a tree has been committed."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, ready.vocab_size, (1, len(parents)), generator=generator)
    following = torch.randint(1, ready.vocab_size, (1, 1), generator=generator)
    ready.allocate(1, len(prefix) + len(parents) + 8)
    ready.ingest(prefix[None], [len(prefix)])
    depths = torch.tensor([[len(p) - 1 for p in paths_from_root(parents)]])
    ready.forward(
        tokens, len(prefix) + depths, ancestor_matrix(torch.tensor([parents]), len(parents))
    )
    ready.cache.commit([path])
    text = torch.cat([prefix, tokens[0, path], following[0]])
    logits = ready.forward(
        following, torch.tensor([[len(text) - 1]]), torch.ones(1, 1, 1, dtype=torch.bool)
    )
    expected = ready.model(text[None], use_cache=False).logits[0, -1]
    return float((logits[0, 0] - expected).abs().max() / expected.std())
