"""Whether sampled text has the target's distribution: every continuation of a small vocabulary,
enumerated, against counts.
"""

from __future__ import annotations

import itertools
import os

import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

# A distribution test that holds is called wrong once in so many runs; seeds are fixed, so it holds
# always or never.
FALSE_ALARM = 1e-4
FULL = bool(os.environ.get("TREESPEC_FULL"))


def small_model(vocab_size: int = 6, seed: int = 0):
    torch.manual_seed(seed)
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


def min_p(logits: torch.Tensor, share: float) -> torch.Tensor:
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < share * probs.amax(-1, keepdim=True), -torch.inf)


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
