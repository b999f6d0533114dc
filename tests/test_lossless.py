"""Greedy text is `target.generate`'s, token for token, in float32: every shape and source, every
model type.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from lossless_checks import (
    SHAPES,
    GarbageSource,
    first_difference,
    greedy_difference,
    sources,
    speculator,
)
from tiny_models import demo_models, prompts, ragged, tiny_config, tiny_pair
from transformers import AutoModelForCausalLM

from treespec import BestFirstTree, TreeSpeculator

DEMO_OPTIONS = {"max_new_tokens": 128, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
DRAFTED = ("draft", "ngram", "merged", "garbage")

# Every model type meets every shape and every source; llama and gemma2 meet all pairs of them,
# below.
COVERING = [
    ("gpt_neox", "chain", "merged"),
    ("gpt_neox", "fixed", "draft"),
    ("gpt_neox", "adaptive", "ngram"),
    ("gpt_neox", "auto", "draft"),
    ("gpt2", "unpruned", "draft"),
    ("gpt2", "best_first", "merged"),
    ("gpt2", "fixed", "garbage"),
    ("gpt2", "auto", "ngram"),
    ("qwen3", "chain", "ngram"),
    ("qwen3", "adaptive", "merged"),
    ("qwen3", "best_first", "draft_and_garbage"),
    ("qwen3", "auto", "merged"),
]


@pytest.mark.parametrize("source", DRAFTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_source_on_llama(shape, source):
    spec = speculator("llama", shape, source)
    for batch in (1, 4):
        assert greedy_difference(spec, "llama", batch) is None
        if source in ("draft", "merged") and shape != "auto":
            assert spec.stats.tokens_per_round > 1.5, (
                "trees were accepted, so their rows were committed"
            )


@pytest.mark.parametrize("source", DRAFTED)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_source_on_gemma2(shape, source):
    """A sliding window of 12 tokens on every other layer, and both softcaps."""
    assert greedy_difference(speculator("gemma2", shape, source), "gemma2", 4) is None


@pytest.mark.parametrize(("name", "shape", "source"), COVERING)
def test_every_model_type(name, shape, source):
    spec = speculator(name, shape, source)
    for batch in (1, 4):
        assert greedy_difference(spec, name, batch) is None


def test_no_draft_is_plain_decoding(kind):
    spec = speculator(kind, "best_first", "none")
    for batch in (1, 4):
        assert greedy_difference(spec, kind, batch) is None
        assert spec.stats.tokens_per_round == 1.0 and spec.stats.drafted_nodes == 0


def test_gemma2_alone_past_its_window():
    assert greedy_difference(speculator("gemma2", "best_first", "merged"), "gemma2", 1) is None


@functools.cache
def demo_text(batch: int):
    """Prompts for the bundled pair, left-padded, and the target's own continuation."""
    target, _, tokenizer = demo_models()
    texts = [
        "Once upon a time there was a little girl who",
        "def add(a, b):",
        "Question: Ann has three apples and",
        "Summary: the river, the river and the river again",
    ][:batch]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, target.generate(ids, attention_mask=mask, **DEMO_OPTIONS)


@pytest.mark.parametrize(
    ("shape", "source", "batch"),
    [
        ("chain", "draft", 1),
        ("fixed", "merged", 4),
        ("unpruned", "garbage", 1),
        ("adaptive", "ngram", 1),
        ("best_first", "draft", 1),
        ("auto", "draft", 4),
    ],
)
def test_the_bundled_pair(demo_pair, shape, source, batch):
    target, draft, _ = demo_pair
    ids, mask, expected = demo_text(batch)
    spec = TreeSpeculator(
        target, sources(source, draft, target.config.vocab_size), tree=SHAPES[shape]
    )
    assert first_difference(spec.generate(ids, mask, **DEMO_OPTIONS), expected) is None


def test_the_two_sources_of_one_tree_both_bring_tokens(monkeypatch):
    spec = speculator("llama", "best_first", "merged")
    kept = {True: 0, False: 0}

    def count(outcome):
        for row, path in enumerate(outcome.paths):
            for node in path[1:]:
                kept[outcome.tree.lookup is not None and bool(outcome.tree.lookup[row, node])] += 1

    monkeypatch.setattr(spec._policy, "observe", count)
    assert greedy_difference(spec, "llama", 4) is None
    assert kept[True] > 5 and kept[False] > 5
    assert kept[True] + kept[False] == sum(
        k * times for k, times in spec.stats.accept_lengths.items()
    )


def test_one_speculator_over_calls_of_many_sizes():
    """Buffers and recordings are reused or made anew as batch and lengths change."""
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, [draft, "ngram"], tree=BestFirstTree(16, 4, 4))
    for batch, length, new in [(1, 9, 20), (3, 40, 30), (1, 300, 12), (2, 5, 33), (1, 9, 20)]:
        ids, mask = (
            (prompts(1, length, seed=length), None)
            if batch == 1
            else ragged(batch, length, seed=length)
        )
        expected = target.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        assert first_difference(spec.generate(ids, mask, max_new_tokens=new), expected) is None


def test_several_custom_sources_are_merged():
    target, draft = tiny_pair("llama")
    parts = [GarbageSource(120, seed=1), draft, GarbageSource(120, seed=2), "ngram"]
    assert (
        greedy_difference(TreeSpeculator(target, parts, tree=BestFirstTree(24, 4, 4)), "llama", 4)
        is None
    )


def test_a_draft_with_a_wider_padded_vocabulary():
    """Vocabularies padded to different multiples: tokens that only the draft knows are never
    proposed.
    """
    models = []
    for vocab_size in (32000, 32064):
        torch.manual_seed(0)
        config = tiny_config("llama", 1)
        config.vocab_size, config.hidden_size, config.intermediate_size = vocab_size, 16, 16
        config.head_dim = 4
        models.append(AutoModelForCausalLM.from_config(config).eval())
    target, draft = models
    with torch.no_grad():
        # the draft likes nothing better than the tokens that the target does not have
        draft.lm_head.weight[32000:] = 40 * draft.lm_head.weight[:64]
        draft.lm_head.weight[32000:32032] *= -1
    ids = prompts(1, 6, vocab_size=32000)
    spec = TreeSpeculator(target, draft, tree=BestFirstTree(12, 3, 3))
    expected = target.generate(ids, max_new_tokens=8, do_sample=False)
    assert first_difference(spec.generate(ids, max_new_tokens=8), expected) is None
    options = {"max_new_tokens": 8, "do_sample": True, "seed": 1}
    plain = TreeSpeculator(target, None)
    assert first_difference(spec.generate(ids, **options), plain.generate(ids, **options)) is None


@pytest.mark.skipif(not os.environ.get("TREESPEC_FULL"), reason="minutes long: set TREESPEC_FULL=1")
@pytest.mark.parametrize("source", DRAFTED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "qwen3", "gemma2", "demo"])
def test_the_whole_cross(demo_pair, name, shape, source):
    """Every shape and source on every model, alone and in a ragged batch."""
    for batch in (1, 4):
        if name == "demo":
            test_the_bundled_pair(demo_pair, shape, source, batch)
        else:
            assert greedy_difference(speculator(name, shape, source), name, batch) is None
