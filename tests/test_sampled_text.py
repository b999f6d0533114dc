"""Sampled text: the same seed gives the same text with any draft and tree or none, and its
distribution is the target's.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from lossless_checks import SHAPES, first_difference, prompt_batch, sampled_difference, speculator
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from treespec import BestFirstTree, TreeSpeculator

WARPINGS = [
    {"temperature": 0.7},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 12},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.9},
]
# A distribution test that holds is called wrong once in so many runs; seeds are fixed, so it holds
# always or never.
FALSE_ALARM = 1e-4


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


def small_model(vocab_size: int = 6):
    torch.manual_seed(0)
    config = tiny_config("llama", 1)
    config.vocab_size = vocab_size
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        # flatter, so that many continuations are likely enough to be counted
        model.lm_head.weight.mul_(0.5)
    return model


@torch.inference_mode()
def enumerated(model, prompt: torch.Tensor, length: int, warp) -> torch.Tensor:
    """float64 `[V ** length]`, the probability of every continuation."""
    vocab_size = model.config.vocab_size
    texts = torch.tensor(list(itertools.product(range(vocab_size), repeat=length)))
    logits = model(torch.cat([prompt.expand(len(texts), -1), texts], dim=1)).logits[
        :, prompt.shape[1] - 1 : -1
    ]
    probs = warp(logits.double().flatten(0, 1)).softmax(-1).view_as(logits)
    return probs.gather(2, texts[..., None]).squeeze(2).prod(1)


def chi_square_tail(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """The chance of counts at least as far from their expectations; outcomes expected under 5 times
    count as one.
    """
    expected = probs * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 1e-9:
        counts, expected = counts[:-1], expected[:-1]
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(
        torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2)
    )


def top_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    """The likeliest tokens whose probability together reaches `share`."""
    values, order = logits.sort(descending=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    return logits.masked_fill((before >= share).gather(-1, order.argsort(-1)), -torch.inf)


def top_k(logits: torch.Tensor, count: int) -> torch.Tensor:
    return logits.masked_fill(logits < logits.topk(count).values[..., -1:], -torch.inf)


DISTRIBUTIONS = [
    ({"temperature": 1.0}, lambda logits: logits),
    ({"temperature": 0.7}, lambda logits: logits / 0.7),
    ({"temperature": 1.3, "top_k": 4}, lambda logits: top_k(logits / 1.3, 4)),
    ({"temperature": 1.2, "top_p": 0.8}, lambda logits: top_p(logits / 1.2, 0.8)),
]


def sample_counts(spec, prompt, length: int, rows: int, calls: int, **options) -> torch.Tensor:
    """How often every continuation was written, over many rows of several calls."""
    vocab_size = spec.target.config.vocab_size
    places = vocab_size ** torch.arange(length - 1, -1, -1)
    counts = torch.zeros(vocab_size**length, dtype=torch.long)
    for seed in range(calls):
        texts = spec.generate(
            prompt.repeat(rows, 1), do_sample=True, max_new_tokens=length, seed=seed, **options
        )
        counts += torch.bincount(
            (texts[:, prompt.shape[1] :] * places).sum(1), minlength=len(counts)
        )
    return counts


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
