"""Sampled text: the same seed gives the same text with any draft and tree or none, and its
distribution is the target's.
"""

from __future__ import annotations

import random

import pytest
import torch
from distributions import (
    FALSE_ALARM,
    FULL,
    chi_square_tail,
    enumerated,
    sample_counts,
    small_model,
    top_k,
    top_p,
)
from lossless_checks import SHAPES, first_difference, prompt_batch, sampled_difference, speculator
from tiny_models import VOCAB
from transformers import AutoModelForCausalLM

from treespec import BestFirstTree, TreeSpeculator
from treespec.demo import load_prompts

WARPINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.9},
]

def named(warping: dict) -> str:
    return ",".join(f"{name}={value}" for name, value in warping.items())


@pytest.mark.parametrize("source", ["draft", "ngram", "merged", "garbage"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_source_on_llama(shape, source):
    spec = speculator("llama", shape, source)
    for seed, warping in enumerate(
        ({"temperature": 0.7, "top_k": 0}, {"temperature": 1.0, "top_k": 12, "top_p": 0.9})
    ):
        assert sampled_difference(spec, "llama", 4, 64, seed=seed, **warping) is None
    if source in ("draft", "merged") and shape != "auto":
        assert spec.stats.tokens_per_round > 1.2, "trees were accepted"


@pytest.mark.parametrize("warping", WARPINGS, ids=named)
def test_every_warping_on_every_model_type(kind, warping):
    spec = speculator(kind, "best_first", "merged")
    assert (
        sampled_difference(
            spec, kind, 1, 64, seed=11, top_k=warping.get("top_k", 0), **_rest(warping)
        )
        is None
    )


def _rest(warping: dict) -> dict:
    return {name: value for name, value in warping.items() if name != "top_k"}


@pytest.mark.parametrize(
    ("kind", "shape", "source"),
    [
        ("gpt_neox", "chain", "draft"),
        ("gpt2", "adaptive", "merged"),
        ("qwen3", "fixed", "draft"),
        ("gemma2", "auto", "merged"),
    ],
)
def test_ragged_batches_of_other_model_types(kind, shape, source):
    assert (
        sampled_difference(
            speculator(kind, shape, source), kind, 4, 64, seed=5, temperature=1.0, top_k=0
        )
        is None
    )


def test_the_bundled_pair(demo_pair):
    target, draft, tokenizer = demo_pair
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    plain = TreeSpeculator(target, None)
    specs = [
        TreeSpeculator(target, [draft, "ngram"], tree=SHAPES["best_first"]),
        TreeSpeculator(target, draft),
    ]
    for temperature in (0.7, 1.0):
        options = {
            "do_sample": True,
            "temperature": temperature,
            "top_k": 0,
            "seed": 3,
            "max_new_tokens": 48,
        }
        expected = plain.generate(ids, **options)
        assert all(
            first_difference(spec.generate(ids, **options), expected) is None for spec in specs
        )


def test_the_other_rule_gives_the_same_text():
    """A draft that does not know the noise proposes other trees, not another text."""
    spec = speculator("llama", "best_first", "draft", sampling="target_only")
    assert sampled_difference(spec, "llama", 4, 64, seed=0, temperature=0.7, top_k=0) is None


def test_drafts_that_know_the_noise_are_accepted_more_often():
    kept = {}
    for rule in ("coupled", "target_only"):
        spec = speculator("llama", "best_first", "draft", sampling=rule)
        assert sampled_difference(spec, "llama", 4, 64, seed=1, temperature=1.0, top_k=0) is None
        kept[rule] = spec.stats.tokens_per_round
    assert kept["coupled"] > 1.2 * kept["target_only"]


# --- what the noise is keyed on ------------------------------------------------------------------

SAMPLE = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 40}


def test_a_row_of_a_batch_does_not_depend_on_its_companions():
    """Noise belongs to (seed, row, position): the first row alone reads as it does in a batch,
    padded or not.
    """
    ids, mask = prompt_batch(4)
    spec = speculator("llama", "best_first", "merged")
    together = spec.generate(ids, mask, seed=2, **SAMPLE)
    assert first_difference(spec.generate(ids[:1], seed=2, **SAMPLE), together[:1]) is None
    pair = spec.generate(ids[:2], mask[:2], seed=2, **SAMPLE)
    assert first_difference(pair, together[:2]) is None
    wider = torch.cat([torch.zeros(4, 3, dtype=torch.long), ids], dim=1)
    wider_mask = torch.cat([torch.zeros(4, 3, dtype=torch.long), mask], dim=1)
    assert (
        first_difference(spec.generate(wider, wider_mask, seed=2, **SAMPLE)[:, 3:], together)
        is None
    )


def test_rows_in_another_order():
    ids, mask = (tensor.flip(0) for tensor in prompt_batch(4))
    expected = speculator("llama", "chain", "none").generate(ids, mask, seed=2, **SAMPLE)
    found = speculator("llama", "best_first", "draft").generate(ids, mask, seed=2, **SAMPLE)
    assert first_difference(found, expected) is None


def test_equal_prompts_get_different_texts():
    ids, _ = prompt_batch(1)
    texts = speculator("llama", "best_first", "draft").generate(ids.repeat(6, 1), seed=2, **SAMPLE)
    assert len({tuple(text.tolist()) for text in texts}) == 6


def test_rows_that_finish_at_different_times():
    """A finished row leaves the batch and another takes its place, which keeps its own noise."""
    ids, mask = prompt_batch(4)
    options = {
        **SAMPLE,
        "seed": 7,
        "eos_token_id": list(range(1, 9)),
        "pad_token_id": 0,
        "max_new_tokens": 80,
    }
    expected = speculator("llama", "chain", "none").generate(ids, mask, **options)
    lengths = [int((row[ids.shape[1] :] != 0).sum()) for row in expected]
    assert len(set(lengths)) == 4 and lengths == sorted(lengths), (
        "the last row takes others' places"
    )
    found = speculator("llama", "best_first", "merged").generate(ids, mask, **options)
    assert first_difference(found, expected) is None
    # and it is the text of a call in which no row ends, up to its first end
    endless = speculator("llama", "best_first", "draft").generate(
        ids, mask, **{**options, "eos_token_id": None}
    )
    for row, text in zip(found.tolist(), endless.tolist()):
        kept = [k for k in range(ids.shape[1], len(text)) if text[k] in options["eos_token_id"]]
        end = kept[0] + 1 if kept else len(text)
        assert row[:end] == text[:end] and not any(row[end:])


# --- many prompts and seeds ----------------------------------------------------------------------

SOURCES = ("draft", "ngram", "merged", "garbage", "draft_and_garbage")


@pytest.mark.parametrize("part", range(5))
def test_five_hundred_prompts_and_seeds(part):
    """Every call has its own prompts, seed, warping, shape, source and order of rows."""
    chance = random.Random(part)
    drawn = torch.Generator().manual_seed(part)
    plain = speculator("llama", "chain", "none")
    specs = [speculator("llama", shape, source) for shape in SHAPES for source in SOURCES]
    rounds = accepted = 0
    for spec in chance.sample(specs, 20):
        lengths = [chance.randint(3, 60) for _ in range(5)]
        ids = torch.randint(1, VOCAB, (5, max(lengths)), generator=drawn)
        mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
        options = {
            "top_k": 0,
            **chance.choice(WARPINGS),
            "do_sample": True,
            "seed": chance.randrange(1 << 62),
            "max_new_tokens": chance.randint(8, 32),
        }
        order = torch.tensor(chance.sample(range(5), 5))
        for rows in (torch.arange(5), order):
            expected = plain.generate(ids[rows], mask[rows].long(), **options)
            found = spec.generate(ids[rows], mask[rows].long(), **options)
            assert first_difference(found, expected) is None, (spec.shape, options, rows)
        rounds += spec.stats.rounds
        accepted += sum(row.accepted for row in spec.stats.per_row)
    assert accepted > rounds


@pytest.mark.skipif(not FULL, reason="takes minutes; TREESPEC_FULL=1 runs it")
@pytest.mark.parametrize("shape", SHAPES)
def test_five_hundred_prompts_and_seeds_of_real_text(demo_pair, shape):
    target, draft, tokenizer = demo_pair
    texts = [tokenizer(p["prompt"]).input_ids[-48:] for p in load_prompts("dev")]
    ids = torch.tensor([text for text in texts if len(text) == 48])
    plain = TreeSpeculator(target, None)
    spec = TreeSpeculator(target, [draft, "ngram"], SHAPES[shape])
    count = 0
    for seed in range(9):
        for rows in torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed)).split(
            10
        ):
            options = {"do_sample": True, "seed": seed, "max_new_tokens": 32, "top_k": 0}
            options["temperature"] = (0.3, 0.7, 1.0)[seed % 3]
            expected = plain.generate(ids[rows], **options)
            assert first_difference(spec.generate(ids[rows], **options), expected) is None
            count += len(rows)
    assert count >= 500


# --- seeds ---------------------------------------------------------------------------------------


def test_seeds_repeat_and_differ():
    ids, _ = prompt_batch(1)
    spec = speculator("llama", "best_first", "draft")
    texts = [spec.generate(ids, seed=seed, **SAMPLE) for seed in (0, 0, 1, 2**62)]
    assert first_difference(texts[0], texts[1]) is None
    assert len({tuple(text[0].tolist()) for text in texts}) == 3


def test_an_integer_seed_leaves_the_global_generator_alone():
    ids, _ = prompt_batch(1)
    before = torch.get_rng_state()
    speculator("llama", "best_first", "draft").generate(ids, seed=7, **SAMPLE)
    assert torch.equal(before, torch.get_rng_state())


def test_a_generator_is_repeatable_and_moves_on():
    ids, _ = prompt_batch(1)
    spec, plain = speculator("llama", "best_first", "draft"), speculator("llama", "chain", "none")
    ours, theirs = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    first, second = (spec.generate(ids, seed=ours, **SAMPLE) for _ in range(2))
    assert first_difference(plain.generate(ids, seed=theirs, **SAMPLE), first) is None
    assert first_difference(plain.generate(ids, seed=theirs, **SAMPLE), second) is None
    assert first_difference(first, second) is not None


def test_manual_seed_makes_a_call_without_seed_repeatable():
    ids, _ = prompt_batch(1)
    texts = []
    for spec in (speculator("llama", "best_first", "draft"), speculator("llama", "chain", "none")):
        torch.manual_seed(9)
        texts += [spec.generate(ids, **SAMPLE), spec.generate(ids, **SAMPLE)]
    assert (
        first_difference(texts[0], texts[2]) is None
        and first_difference(texts[1], texts[3]) is None
    )
    assert first_difference(texts[0], texts[1]) is not None


def test_greedy_ignores_the_seed():
    ids, _ = prompt_batch(1)
    spec = speculator("llama", "best_first", "draft")
    texts = [spec.generate(ids, seed=seed, max_new_tokens=20, do_sample=False) for seed in (1, 2)]
    assert first_difference(*texts) is None


# --- distribution --------------------------------------------------------------------------------


DISTRIBUTIONS = [
    ({"temperature": 1.0}, lambda logits: logits),
    ({"temperature": 0.7}, lambda logits: logits / 0.7),
    ({"temperature": 1.3, "top_k": 4}, lambda logits: top_k(logits / 1.3, 4)),
    ({"temperature": 1.2, "top_p": 0.8}, lambda logits: top_p(logits / 1.2, 0.8)),
]


@pytest.mark.parametrize(
    ("options", "warp"),
    DISTRIBUTIONS,
    ids=lambda value: named(value) if isinstance(value, dict) else "",
)
def test_plain_sampling_has_the_targets_distribution(options, warp):
    model, prompt = small_model(), torch.tensor([[1, 4, 2]])
    probs = enumerated(model, prompt, 3, warp)
    assert probs.sum().item() == pytest.approx(1) and probs.max() < 0.5
    counts = sample_counts(
        TreeSpeculator(model, None), prompt, 3, 400, 5, **{"top_k": 0, **options}
    )
    assert counts[probs == 0].sum() == 0
    assert chi_square_tail(counts, probs) > FALSE_ALARM


def test_the_distribution_test_sees_another_temperature():
    model, prompt = small_model(), torch.tensor([[1, 4, 2]])
    counts = sample_counts(TreeSpeculator(model, None), prompt, 3, 400, 5, temperature=1.0, top_k=0)
    assert (
        chi_square_tail(counts, enumerated(model, prompt, 3, lambda logits: logits / 1.15))
        < FALSE_ALARM
    )


def test_trees_have_the_targets_distribution_too():
    model, prompt = small_model(), torch.tensor([[1, 4, 2]])
    torch.manual_seed(1)
    draft = AutoModelForCausalLM.from_config(model.config).eval()
    spec = TreeSpeculator(model, draft, tree=BestFirstTree(8, 2, 3))
    counts = sample_counts(spec, prompt, 3, 400, 3, temperature=1.0, top_k=0)
    assert (
        chi_square_tail(counts, enumerated(model, prompt, 3, lambda logits: logits)) > FALSE_ALARM
    )
    assert spec.stats.tokens_per_round > 1.2
