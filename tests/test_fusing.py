"""Idioms of recorded forwards in fewer calls: the same results, and only where nothing else
looks."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_pair

from treespec import fusing
from treespec.capture import Recorder, compile_recording
from treespec.model import TreeModel


def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def turned(q, k, cos, sin):
    """As transformers' models do it."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query = (q * cos) + (rotate_half(q) * sin)
    key = (k * cos) + (rotate_half(k) * sin)
    return torch.cat([query.flatten(), key.flatten()])


def inverse_root(x, eps=1e-5):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def inputs(batch=2, heads=(4, 2), nodes=5, size=8):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, h, nodes, size, generator=generator) for h in heads)
    cos, sin = (torch.randn(batch, nodes, size, generator=generator) for _ in range(2))
    return [q, k, cos, sin]


def fused_error(function, tensors) -> tuple[int, float]:
    """Calls saved, and the largest difference on other inputs than those recorded."""
    with torch.inference_mode():
        with Recorder() as recorder:
            out = function(*tensors)
        steps = fusing.fuse(recorder.steps)
        replay = compile_recording(steps, tensors, out)
        other = [x.flip(0) * 1.5 for x in tensors]
        error = float((replay(*other) - function(*other)).abs().max())
    return len(recorder.steps) - len(steps), error


def test_queries_and_keys_are_turned_together():
    saved, error = fused_error(turned, inputs())
    # 14 calls are one and the signs of the sine
    assert saved == 12 and error < 1e-5


def test_a_norms_root_is_one_call():
    saved, error = fused_error(lambda x: x * inverse_root(x), [torch.randn(3, 4, 16)])
    assert saved == 2 and error < 1e-5


def embedded(x, cos, sin):
    return x * cos + rotate_half(x) * sin


def keeps_the_swapped(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    swapped = rotate_half(q)
    query, key = q * cos + swapped * sin, embedded(k, cos, sin)
    return torch.cat([x.flatten() for x in (query, key, swapped)])


def other_angles(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query, key = embedded(q, cos, sin), embedded(k, cos * 2, sin)
    return torch.cat([query.flatten(), key.flatten()])


def used_between(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query = embedded(q, cos, sin) + 1
    return torch.cat([query.flatten(), embedded(k, cos, sin).flatten()])


def viewed(q, k, cos, sin):
    """As one does with what was transposed before."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query = embedded(q, cos, sin)
    key = embedded(k, cos, sin)
    return torch.cat([query.view(-1), key.view(-1)])


def changed_between(q, k, cos, sin):
    q, k = q.clone(), k.clone()
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    query = q * cos + rotate_half(q) * sin
    q.add_(1)
    key = k * cos + rotate_half(k) * sin
    return torch.cat([x.flatten() for x in (query, key, q)])


def other_halves(q, k, cos, sin):
    def swap(x):
        return torch.cat((-x[..., :4], x[..., 4:]), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([(x * cos + swap(x) * sin).flatten() for x in (q, k)])


def interleaved(q, k, cos, sin):
    def swap(x):
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([(x * cos + swap(x) * sin).flatten() for x in (q, k)])


@pytest.mark.parametrize(
    "function",
    [
        keeps_the_swapped,
        other_angles,
        used_between,
        viewed,
        changed_between,
        other_halves,
        interleaved,
    ],
)
def test_what_is_no_rotary_embedding_stays(function):
    tensors = inputs()
    with torch.inference_mode(), Recorder() as recorder:
        function(*tensors)
    assert not any(func is fusing._turned for func, *_ in fusing.fuse(recorder.steps))
    assert fused_error(function, tensors)[1] < 1e-5


def test_float64_stays():
    tensors = [x.double() for x in inputs()]
    with torch.inference_mode(), Recorder() as recorder:
        turned(*tensors)
        inverse_root(tensors[0].float())
    assert fusing.fuse(recorder.steps) is recorder.steps


def mean_is_kept(x):
    mean = x.pow(2).mean(-1, keepdim=True)
    return torch.rsqrt(mean + 1e-5) * mean


def other_dimension(x):
    return torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * x


def mean_of_tensors(x):
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x[..., :1].abs()) * x


@pytest.mark.parametrize("function", [mean_is_kept, other_dimension, mean_of_tensors])
def test_what_is_no_norm_stays(function):
    saved, error = fused_error(function, [torch.rand(3, 4, 16) + 0.5])
    assert saved == 0 and error < 1e-5


@pytest.mark.parametrize(
    ("kind", "turns", "roots"),
    [("llama", 2, 5), ("qwen3", 2, 9), ("gemma2", 2, 9), ("gpt_neox", 2, 0), ("gpt2", 0, 0)],
)
def test_models_are_recorded_in_fewer_calls(kind, turns, roots, monkeypatch):
    """Of two layers. That their logits are right is asked in test_tree_logits."""
    seen = []

    def watched(steps):
        seen.append(fusing.fuse(steps))
        return seen[-1]

    monkeypatch.setattr("treespec.model.fuse", watched)
    assert TreeModel(tiny_pair(kind)[0], "target").recording_reason is None
    functions = [func for func, *_ in seen[0]]
    assert functions.count(fusing._turned) == turns
    assert functions.count(fusing._inverse_root) == roots
