"""Random rounds through the engine, each held against a slow, obvious implementation: every node's
logits from the whole text before it, without a cache; every score and draft probability from the
draft likewise; the verdict of the written-out reference.

Everything is float64, so that no rounding excuses a difference.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM
from treespec.kernels import reference

from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree, TreeSpeculator
from treespec.cache import TreeCache
from treespec.engine import Engine
from treespec.model import TreeModel
from treespec.sampling import REJECTION_RULES, RULES
from treespec.tree import Growth

ROUNDS = 2000
VOCAB = 24
WARPINGS = (
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.4, "top_k": 9},
    {"temperature": 1.1, "top_p": 0.85},
    {"temperature": 0.9, "top_k": 15, "top_p": 0.9, "min_p": 0.02},
)


def model(seed: int):
    torch.manual_seed(seed)
    config = tiny_config("llama", 1)
    config.vocab_size, config.hidden_size, config.intermediate_size = VOCAB, 32, 32
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.fixture(scope="module")
def pair():
    target, draft = model(0), model(1)
    with torch.no_grad():
        # a draft that agrees now and then
        for ours, theirs in zip(draft.parameters(), target.parameters()):
            ours.mul_(0.15).add_(0.85 * theirs)
    return target, draft


def shape_of(chance: random.Random):
    return chance.choice(
        [
            Chain(chance.randint(1, 5)),
            FixedTree(chance.randint(1, 4), 2, chance.choice([0.0, 0.02]), 20),
            BestFirstTree(chance.randint(2, 20), chance.randint(1, 5), chance.randint(1, 4)),
            AdaptiveTree(2, 4, 2, 3, max_nodes=16),
            "auto",
        ]
    )


class Net:
    """Watches the rounds of an engine and answers each of them the slow way."""

    def __init__(self, target, draft, spec, warping: dict | None) -> None:
        self.target, self.draft, self.spec, self.warping = target, draft, spec, warping
        self.counts: Counter[str] = Counter()

    def check(self, engine: Engine, request, tree, logits, verdicts) -> None:
        for row, verdict in enumerate(verdicts):
            text = engine._tokens[row, : engine._lens[row]]
            count = int(tree.num_nodes[row])
            parents = tree.parents[row, :count].tolist()
            tokens = tree.tokens[row, :count].tolist()
            paths = self._paths(parents, tokens)
            self._well_formed(text, parents, tokens)
            slow = self._logits(self.target, text, paths)
            torch.testing.assert_close(logits[row, :count], slow, atol=1e-9, rtol=1e-9)
            self._draft_probs(tree, row, text, paths, parents)
            expected = self._expected(engine, request, tree, row, slow)
            self._same(verdict, expected, tokens)

    def _paths(self, parents: list[int], tokens: list[int]) -> list[list[int]]:
        paths: list[list[int]] = []
        for parent, token in zip(parents, tokens):
            paths.append([] if parent < 0 else [*paths[parent], token])
        return paths

    def _well_formed(self, text, parents: list[int], tokens: list[int]) -> None:
        assert tokens[0] == int(text[-1]) and parents[0] == -1
        assert all(0 <= parent < node for node, parent in enumerate(parents) if node)
        edges = list(zip(parents, tokens))
        assert len(set(edges)) == len(edges), "siblings carry different tokens"

    @torch.no_grad()
    def _logits(self, model, text, paths: list[list[int]]) -> torch.Tensor:
        """One text after another; those of one length together."""
        logits = torch.empty(len(paths), VOCAB, dtype=torch.float64)
        for depth in {len(path) for path in paths}:
            nodes = [node for node, path in enumerate(paths) if len(path) == depth]
            texts = torch.stack(
                [torch.cat([text, torch.tensor(paths[node], dtype=torch.long)]) for node in nodes]
            )
            logits[nodes] = model(texts, use_cache=False).logits[:, -1]
        return logits

    def _draft_probs(self, tree, row: int, text, paths, parents: list[int]) -> None:
        """Children of a node were drawn from what the draft says there."""
        if tree.draft_probs is None:
            return
        inner = sorted(set(parents[1:]))
        if not inner:
            return
        scores = self._logits(self.draft, text, [paths[node] for node in inner])
        scores = scores / self.warping["temperature"]
        if "top_k" in self.warping:
            kth = scores.topk(self.warping["top_k"]).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -torch.inf)
        if "min_p" in self.warping:
            probs = scores.softmax(-1)
            scores = scores.masked_fill(
                probs < self.warping["min_p"] * probs.amax(-1, keepdim=True), -torch.inf
            )
        probs = scores.softmax(-1).float()
        torch.testing.assert_close(tree.draft_probs[row, inner], probs, atol=1e-5, rtol=1e-4)
        self.counts["drawn nodes"] += len(inner)

    def _expected(self, engine, request, tree, row: int, slow) -> tuple[list[int], int]:
        """Path and bonus token of the written-out reference on the slow logits."""
        count = len(slow)
        trees = (
            slow[None],
            tree.tokens[row : row + 1, :count],
            tree.parents[row : row + 1, :count],
            torch.tensor([count]),
        )
        if self.warping is None:
            verdict = reference.verify_greedy(*trees)
        else:
            drawn = tree.draft_probs is not None
            rule = self.spec.sampling if drawn else "coupled"
            verdict = reference.verify_sampled(
                *trees,
                positions=engine._lens[row] - 1 + tree.depths[row : row + 1, :count],
                draft_probs=tree.draft_probs[row : row + 1, :count] if drawn else None,
                rule=rule,
                seed=request.picker.noise.seed,
                rows=torch.tensor([engine._active[row].index]),
                **self.warping,
            )
        path = [node for node in verdict.path[0].tolist() if node >= 0]
        return path, int(verdict.bonus_token[0])

    def _same(self, verdict, expected: tuple[list[int], int], tokens: list[int]) -> None:
        path, bonus = expected
        carried = [*(tokens[node] for node in path[1:]), bonus]
        # a row may end before its path does
        kept = len(verdict.tokens)
        assert verdict.tokens == carried[:kept] and verdict.path == path[:kept]
        assert kept == len(carried) or verdict.ended or len(verdict.tokens) < len(carried)
        self.counts["rounds"] += 1
        self.counts["accepted"] += kept - 1


def run_some(pair, seed: int, wanted: int) -> Counter:
    """Calls of random kinds, until `wanted` rounds were checked."""
    chance = random.Random(seed)
    target, draft = pair
    counts: Counter[str] = Counter()
    while counts["rounds"] < wanted:
        rule = chance.choice(RULES)
        sources = [draft] if rule in REJECTION_RULES else [draft, "ngram", [draft, "ngram"]]
        spec = TreeSpeculator(target, chance.choice(sources), shape_of(chance), sampling=rule)
        warping = chance.choice(WARPINGS) if chance.random() < 0.8 else None
        net = Net(target, draft, spec, warping)
        decide = spec._engine._decide

        def checked(request, tree, logits, budgets, decide=decide, net=net, spec=spec):
            verdicts = decide(request, tree, logits, budgets)
            net.check(spec._engine, request, tree, logits, verdicts)
            return verdicts

        spec._engine._decide = checked
        batch, width = chance.randint(1, 3), chance.randint(2, 30)
        ids = torch.tensor([[chance.randrange(VOCAB) for _ in range(width)] for _ in range(batch)])
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, : chance.randrange(width)] = 0
        options = {"do_sample": True, "top_k": 0, **warping} if warping else {"do_sample": False}
        spec.generate(
            ids,
            mask,
            max_new_tokens=chance.randint(1, 24),
            eos_token_id=chance.sample(range(VOCAB), chance.randint(0, 2)) or None,
            pad_token_id=0,
            seed=chance.randrange(1 << 40),
            **options,
        )
        counts += net.counts
        counts[rule if warping else "greedy"] += 1
    return counts


@pytest.mark.parametrize("part", range(5))
def test_every_round_is_answered_the_slow_way_too(pair, part):
    counts = run_some(pair, part, ROUNDS // 5)
    assert counts["rounds"] >= ROUNDS // 5
    assert counts["accepted"] > counts["rounds"] / 3 and counts["drawn nodes"] > 50


def leaking_mask(monkeypatch):
    """One node sees a node that is no ancestor of it."""
    sound = TreeModel.forward

    def leaking(self, tokens, positions, visible, *rest, **keywords):
        if visible.shape[1] > 3:
            visible = visible.clone()
            visible[:, 3, 1] = True
        return sound(self, tokens, positions, visible, *rest, **keywords)

    monkeypatch.setattr(TreeModel, "forward", leaking)


def first_rows_kept(monkeypatch):
    """The cache keeps the first rows of the tree, whatever the path."""
    sound = TreeCache.commit

    def first(self, paths):
        sound(self, [list(range(len(path))) for path in paths])

    monkeypatch.setattr(TreeCache, "commit", first)


def rolled_draft_probs(monkeypatch):
    """A node is verified against what its neighbour's children were drawn from."""
    sound = Growth.select

    def rolled(self, *args):
        tree = sound(self, *args)
        if tree.draft_probs is not None:
            tree.draft_probs = tree.draft_probs.roll(1, dims=1)
        return tree

    monkeypatch.setattr(Growth, "select", rolled)


@pytest.mark.parametrize("fault", [leaking_mask, first_rows_kept, rolled_draft_probs])
def test_the_net_sees_faults(pair, fault, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        run_some(pair, 0, 150)
