"""`sampling="without_replacement"` and `"traversal"` through `generate`: the text has the target's
distribution whatever the tree, and what does not fit is refused by name.

`TREESPEC_FULL=1` takes 200,000 samples a case.
"""

from __future__ import annotations

import pytest
import torch
from distributions import (
    FALSE_ALARM,
    FULL,
    chi_square_tail,
    enumerated,
    min_p,
    sample_counts,
    small_model,
    top_k,
    top_p,
)
from lossless_checks import prompt_batch, speculator
from tiny_models import tiny_pair
from treespec.kernels import ops

from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree, TreeSpeculator
from treespec.auto import AutoPolicy
from treespec.sampling import TokenPicker
from treespec.tree import Growth, sibling_counts

RULES = ("without_replacement", "traversal")
SHAPES = {
    "chain": Chain(3),
    "fixed": FixedTree(3, 2, 0.2),
    "best_first": BestFirstTree(8, 3, 3),
    "adaptive": AdaptiveTree(2, 3, 2, 3),
    "auto": "auto",
}
WARPINGS = {
    "temperature": ({"temperature": 0.7}, lambda logits: logits / 0.7),
    "top_k": ({"temperature": 1.3, "top_k": 3}, lambda logits: top_k(logits / 1.3, 3)),
    "top_p": ({"temperature": 1.2, "top_p": 0.8}, lambda logits: top_p(logits / 1.2, 0.8)),
    "min_p": ({"min_p": 0.3}, lambda logits: min_p(logits, 0.3)),
}
PROMPT = torch.tensor([[1, 3, 2]])
LENGTH = 4
# A thousand samples each; two calls see every fault below.
CALLS = 200 if FULL else 2


@pytest.fixture(scope="module")
def pair():
    return small_model(4), small_model(4, seed=1)


def tail(pair, rule, shape, warping=None, calls=CALLS) -> float:
    """The chance of a fit this bad."""
    options, warp = warping or ({"temperature": 1.0}, lambda logits: logits)
    spec = TreeSpeculator(*pair, tree=SHAPES[shape], sampling=rule)
    counts = sample_counts(spec, PROMPT, LENGTH, 1000, calls, **{"top_k": 0, **options})
    assert spec.stats.tokens_per_round > 1.1, "some drafts were accepted"
    probs = enumerated(pair[0], PROMPT, LENGTH, warp)
    return chi_square_tail(counts, probs) if counts[probs == 0].sum() == 0 else 0.0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_shape_keeps_the_distribution(pair, rule, shape, monkeypatch):
    # with so many rows drafts do not pay, and would not be asked
    monkeypatch.setattr(AutoPolicy, "wants_draft", lambda self, lookup_scores: True)
    assert tail(pair, rule, shape) > FALSE_ALARM


@pytest.mark.parametrize("warping", WARPINGS)
def test_every_warping_keeps_the_distribution(pair, warping):
    for rule in RULES if FULL else RULES[1:]:
        assert tail(pair, rule, "best_first", WARPINGS[warping]) > FALSE_ALARM


def draw_with(monkeypatch, noise_of) -> None:
    """Children drawn by other noise: `noise_of(picker, nodes, lens)` `[B, F or 1, V]`."""
    sound = TokenPicker.draw

    def draw(self, logits, parent_scores, counts, num_children, nodes, lens):
        children = ops.draft_children

        def other(*args, **kwargs):
            if kwargs.get("drafting") == "sampled":
                kwargs["noise"] = noise_of(self, nodes, lens)
            return children(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(ops, "draft_children", other)
            return sound(self, logits, parent_scores, counts, num_children, nodes, lens)

    monkeypatch.setattr(TokenPicker, "draw", draw)


@pytest.mark.parametrize("rule", RULES)
class TestFaultsAreSeen:
    def test_draft_probs_of_another_node(self, pair, rule, monkeypatch):
        select = Growth.select

        def rolled(self, *args):
            tree = select(self, *args)
            if tree.draft_probs is not None:
                tree.draft_probs = tree.draft_probs.roll(1, dims=1)
            return tree

        monkeypatch.setattr(Growth, "select", rolled)
        assert tail(pair, rule, "best_first") < FALSE_ALARM

    def test_likeliest_siblings_instead_of_drawn_ones(self, pair, rule, monkeypatch):
        draw_with(monkeypatch, lambda self, nodes, lens: torch.zeros(*nodes.shape, 4))
        assert tail(pair, rule, "best_first") < FALSE_ALARM

    def test_siblings_drawn_by_the_targets_noise(self, pair, rule, monkeypatch):
        draw_with(monkeypatch, lambda self, nodes, lens: self.noise.level(lens))
        assert tail(pair, rule, "chain") < FALSE_ALARM

    def test_siblings_left_out_after_the_draw(self, pair, rule, monkeypatch):
        """Those the draft finds less likely than the last are not verified."""
        select = Growth.select

        def selective(self, max_nodes, *args):
            scores = self.scores[:, : self.count]
            scores[scores < scores[:, 1:].amax(1, keepdim=True) - 0.1] = float("-inf")
            self.scores[:, 0] = 0
            return select(self, max_nodes, *args)

        monkeypatch.setattr(Growth, "select", selective)
        assert tail(pair, rule, "best_first") < FALSE_ALARM


def test_greedy_text_is_the_targets():
    target, draft = tiny_pair("llama")
    ids, mask = prompt_batch(3)
    expected = target.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    for rule in RULES:
        spec = TreeSpeculator(target, draft, BestFirstTree(16, 4, 4), sampling=rule)
        assert torch.equal(spec.generate(ids, mask, max_new_tokens=40, do_sample=False), expected)


@pytest.mark.parametrize("rule", RULES)
def test_rows_that_end_inside_an_accepted_path(rule):
    """Nothing is written after a row's end, and the rows go on without those that ended."""
    ids, mask = prompt_batch(4)
    spec = speculator("llama", "best_first", "draft", sampling=rule)
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 4, "pad_token_id": 0}
    ends = list(range(1, 9))
    texts = spec.generate(ids, mask, max_new_tokens=60, eos_token_id=ends, **options)
    lengths = set()
    for new in texts[:, ids.shape[1] :].tolist():
        length = next((k + 1 for k, token in enumerate(new) if token in ends), len(new))
        assert not any(new[length:])
        lengths.add(length)
    assert len(lengths) > 1 and spec.stats.tokens_per_round > 1.2


@pytest.mark.parametrize("rule", RULES)
def test_seeds_repeat_and_differ(rule):
    ids, _ = prompt_batch(1)
    spec = speculator("llama", "fixed", "draft", sampling=rule)
    options = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 30}
    texts = [spec.generate(ids, seed=seed, **options) for seed in (0, 0, 1)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_scores_are_those_of_the_tokens():
    target, draft = tiny_pair("llama")
    ids, _ = prompt_batch(1)
    spec = TreeSpeculator(target, draft, BestFirstTree(16, 4, 4), sampling="traversal")
    output = spec.generate(
        ids,
        do_sample=True,
        temperature=0.8,
        top_k=20,
        seed=3,
        max_new_tokens=16,
        return_dict_in_generate=True,
        output_scores=True,
    )
    logits = target(output.sequences).logits[0, ids.shape[1] - 1 : -1]
    expected = top_k(logits / 0.8, 20)
    scores = torch.cat(output.scores)
    assert torch.equal(scores.isinf(), expected.isinf())
    torch.testing.assert_close(scores, expected, atol=1e-3, rtol=1e-3)


def test_no_tree_exceeds_its_nodes_and_every_level_gets_some():
    target, draft = tiny_pair("llama")
    ids, _ = prompt_batch(1)
    for shape in (BestFirstTree(10, 5, 8), FixedTree(5, 3, 0.0, 20), Chain(5)):
        spec = TreeSpeculator(target, draft, shape, sampling="traversal")
        trees = []
        observe = spec._policy.observe
        spec._policy.observe = lambda outcome, observe=observe, trees=trees: (
            trees.append(outcome.tree),
            observe(outcome),
        )
        spec.generate(ids, do_sample=True, temperature=1.0, top_k=0, seed=1, max_new_tokens=40)
        full = [tree for tree in trees if int(tree.depths.max()) == 5]
        assert max(int(tree.num_nodes.max()) for tree in trees) <= shape.max_nodes
        assert len(full) > len(trees) / 2


def test_sibling_counts_against_a_slow_count():
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        parents = torch.randn(2, 3, generator=generator)
        parents[0, 2] = float("-inf")
        logprobs = torch.randn(2, 3, 7, generator=generator).mul(2).log_softmax(-1)
        limit = int(torch.randint(1, 9, (1,), generator=generator))
        counts = sibling_counts(parents, logprobs.topk(4).values, limit)
        for row in range(2):
            worths = []
            for node in range(3):
                probs = sorted(logprobs[row, node].exp().tolist(), reverse=True)
                for j in range(4):
                    left = 1 - sum(probs[:j])
                    worths.append((float(parents[row, node].exp()) * left, -node, -j, node))
            best = sorted(worths, reverse=True)[:limit]
            assert counts[row].tolist() == [sum(w[3] == node for w in best) for node in range(3)]


class TestRefusals:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("draft", ["ngram", "both"])
    def test_lookups(self, rule, draft):
        target, model = tiny_pair("llama")
        with pytest.raises(ValueError, match=f'sampling="{rule}" needs drafts drawn.*ngram'):
            TreeSpeculator(target, "ngram" if draft == "ngram" else [model, "ngram"], sampling=rule)

    def test_processors_that_look_at_the_text(self):
        spec = speculator("llama", "chain", "draft", sampling="traversal")
        ids, _ = prompt_batch(1)
        with pytest.raises(NotImplementedError, match="RepetitionPenaltyLogitsProcessor"):
            spec.generate(ids, do_sample=True, repetition_penalty=1.2, max_new_tokens=5)

    def test_auto_adds_no_lookup_and_says_so(self):
        target, draft = tiny_pair("llama")
        spec = TreeSpeculator(target, draft, sampling="traversal")
        assert not spec.lookup_added and "sources, merged into one tree: model" in spec.explain()
