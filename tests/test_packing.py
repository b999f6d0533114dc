"""Packed weights: the same products, in the copies that suit this CPU, and only where faster."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from lossless_checks import first_difference, prompt_batch
from tiny_models import tiny_pair
from torch import nn

from treespec import BestFirstTree, TreeSpeculator, model, packing
from treespec.capture import Recorder, compile_recording
from treespec.packing import PackedWeights, WideLinears, pack_linears

SHAPE = BestFirstTree(max_nodes=16, depth=4, width=4)

pytestmark = pytest.mark.skipif(
    not packing.available(), reason="this build of torch cannot prepack weights"
)


@pytest.fixture
def always_faster(monkeypatch):
    """Packed products win every timing, and have lost none before."""
    monkeypatch.setattr(PackedWeights, "_of_models", weakref.WeakKeyDictionary())
    monkeypatch.setattr(PackedWeights, "_is_faster", lambda self, groups: True)


@pytest.fixture
def without_16_bits(monkeypatch):
    """A CPU that multiplies float32 only, as many do."""
    monkeypatch.setattr(packing, "_multiplies", lambda dtype: False)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Layers:
    """Three layers of one input, and one with a bias of what they give."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        draw = generator()
        self.weights = [torch.randn(n, 16, generator=draw).to(dtype) for n in (8, 24, 8)]
        self.bias = torch.randn(6, generator=draw).to(dtype)
        self.last = torch.randn(6, 8, generator=draw).to(dtype)
        self.inputs = [torch.randn(1, 5, 16, generator=draw).to(dtype) for _ in range(2)]

    def __call__(self, x):
        a, b, c = (F.linear(x, weight) for weight in self.weights)
        return F.linear(a * b[..., :8] + c, self.last, self.bias)


def replay_of(layers: Layers, packed: PackedWeights):
    """A recording of the layers with packed weights, and how many calls it makes."""
    x = layers.inputs[0]
    with Recorder() as recorder:
        out = layers(x)
    steps = pack_linears(recorder.steps, packed)
    return compile_recording(steps, [x], out), len(steps), len(recorder.steps)


@torch.inference_mode()
def test_packed_linears_are_the_linears(always_faster):
    layers, packed = Layers(), PackedWeights(1 << 20)
    replay, calls, recorded = replay_of(layers, packed)
    assert calls < recorded, "layers of one input became one"
    assert packed.bytes == 4 * (40 * 16 + 6 * 8)
    for x in layers.inputs:
        assert torch.allclose(replay(x), layers(x), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_types_that_a_cpu_cannot_multiply_are_packed_in_float32(
    always_faster, without_16_bits, dtype
):
    """Not further from exact products of the same numbers than torch's own linear layers are."""
    layers, packed = Layers(dtype), PackedWeights(1 << 20)
    replay, *_ = replay_of(layers, packed)
    assert packed.bytes == 4 * (40 * 16 + 6 * 8)
    exact = Layers()
    for name in ("weights", "inputs"):
        setattr(exact, name, [tensor.double() for tensor in getattr(layers, name)])
    exact.bias, exact.last = layers.bias.double(), layers.last.double()
    for x in layers.inputs:
        found = replay(x)
        assert found.dtype == dtype
        error, usual = ((y - exact(x.double())).abs().max() for y in (found, layers(x)))
        assert error <= 2 * usual + 1e-6


@torch.inference_mode()
def test_slower_products_are_left_as_they_were(monkeypatch):
    seconds = iter([1.0, 1.5] * 1000)  # apart, packed, apart, packed, ...
    monkeypatch.setattr(packing, "_seconds", lambda call: next(seconds))
    packed = PackedWeights(1 << 20)
    _, calls, recorded = replay_of(Layers(), packed)
    assert calls == recorded and packed.bytes == 0


@torch.inference_mode()
def test_both_ways_are_timed_once_a_shape(monkeypatch):
    timed = []
    monkeypatch.setattr(packing, "_seconds", lambda call: timed.append(call()) or 1.0)
    packed = PackedWeights(1 << 20)
    replay_of(Layers(), packed)
    count = len(timed)
    assert count > 0
    replay_of(Layers(), packed)
    assert len(timed) == count


@torch.inference_mode()
def test_what_cannot_be_packed_is_not(monkeypatch):
    def refuse(*_):
        raise RuntimeError("this CPU lacks an instruction")

    monkeypatch.setattr(packing, "_pack", refuse)
    layers, packed = Layers(), PackedWeights(1 << 20)
    replay, *_ = replay_of(layers, packed)
    assert packed.bytes == 0
    assert torch.equal(replay(layers.inputs[1]), layers(layers.inputs[1]))


# --- on whole models -----------------------------------------------------------------------------


def assert_lossless(spec: TreeSpeculator) -> None:
    ids, _ = prompt_batch(1)
    options = {"max_new_tokens": 40, "do_sample": False}
    expected = spec.target.generate(ids, **options)
    assert first_difference(spec.generate(ids, **options), expected) is None


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_packing_budget_is_kept(always_faster, monkeypatch, share):
    target = copy.deepcopy(tiny_pair("llama")[0])
    linears = [m.weight for m in target.modules() if isinstance(m, nn.Linear)]
    size = sum(w.numel() * w.element_size() for w in linears)
    budget = int(share * size)
    monkeypatch.setattr(model, "_packing_budget", lambda _: budget)
    spec = TreeSpeculator(target, "ngram", tree=SHAPE)
    assert_lossless(spec)
    assert any(r.replay is not None for r in spec._target._recordings.values())
    assert spec._target._packed.bytes <= budget
    assert (spec._target._packed.bytes == size) == (share == 1.0)
    assert (spec._target._packed.bytes == 0) == (share == 0.0)


def test_speculators_of_one_model_share_its_packed_weights(always_faster):
    target = copy.deepcopy(tiny_pair("llama")[0])
    first, second = (TreeSpeculator(target, "ngram", tree=SHAPE) for _ in range(2))
    assert_lossless(first)
    size = first._target._packed.bytes
    assert_lossless(second)
    assert size > 0 and second._target._packed is first._target._packed
    assert second._target._packed.bytes == size


def test_a_speculator_made_after_a_change_of_weights_packs_them_anew(always_faster):
    target = copy.deepcopy(tiny_pair("llama")[0])
    assert_lossless(TreeSpeculator(target, "ngram", tree=SHAPE))
    with torch.no_grad():
        for weight in target.parameters():
            weight.mul_(0.5)
    spec = TreeSpeculator(target, "ngram", tree=SHAPE)
    assert_lossless(spec)
    assert spec._target.recording_reason is None
    assert any(r.replay is not None for r in spec._target._recordings.values())


def test_packed_weights_go_with_their_model(always_faster):
    target = copy.deepcopy(tiny_pair("llama")[0])
    assert_lossless(TreeSpeculator(target, "ngram", tree=SHAPE))
    packed = weakref.ref(PackedWeights.of(target, 0))
    del target
    gc.collect()
    assert packed() is None


def test_reset_gives_the_packed_weights_back(always_faster):
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    assert_lossless(spec)
    assert spec._target._packed.bytes > 0
    spec.reset()
    assert (
        spec._target._packed.bytes == 0
        and spec._target.cache is None
        and not spec._target._recordings
    )
    assert_lossless(spec)


def test_large_models_are_not_packed():
    class Large:
        @staticmethod
        def parameters():
            return [torch.empty(3 << 30, device="meta"), torch.empty(2 << 30, device="meta")]

    assert model._packing_budget(Large()) == 0
    assert model._packing_budget(tiny_pair("llama")[0]) > 0


def test_the_budget_counts_copies_not_weights(without_16_bits):
    narrow = [torch.empty(100, 10, dtype=torch.bfloat16)]
    assert packing.copy_bytes(narrow) == 4 * 1000


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_recorded_through_the_attention_interface(monkeypatch, native):
    """Whether or not this CPU multiplies bfloat16, and whether it says so or not."""
    monkeypatch.setattr(packing, "_multiplies", lambda dtype: native)
    target = copy.deepcopy(tiny_pair("llama")[0]).bfloat16()
    spec = TreeSpeculator(target, "ngram", tree=SHAPE)
    assert spec._target.route == "interface"
    ids, _ = prompt_batch(1)
    options = {"max_new_tokens": 40, "do_sample": False}
    plain = TreeSpeculator(target, None)
    assert spec.generate(ids, **options).shape == plain.generate(ids, **options).shape
    assert spec._target.recording_reason is None
    assert any(r.replay is not None for r in spec._target._recordings.values())


# --- prefill -------------------------------------------------------------------------------------


@torch.inference_mode()
def test_wide_linears_multiply_in_float32(without_16_bits):
    layers = Layers(torch.bfloat16)
    x = layers.inputs[0]
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "linear" in str(func) or "mm" in str(func):
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Watch(), WideLinears():
        found = layers(x)
    assert set(seen) == {torch.float32}
    assert found.dtype == torch.bfloat16
    usual = layers(x)
    assert (found - usual).abs().max() <= 0.02 * usual.abs().max()


@pytest.mark.parametrize("native", [True, False])
def test_forwards_are_wide_only_where_the_cpu_asks_for_it(monkeypatch, native):
    monkeypatch.setattr(packing, "_multiplies", lambda dtype: native)
    target = copy.deepcopy(tiny_pair("llama")[0]).bfloat16()
    spec = TreeSpeculator(target, None)
    entered = []
    made = WideLinears
    monkeypatch.setattr(packing, "WideLinears", lambda: entered.append(1) or made())
    ids, _ = prompt_batch(1)
    spec.generate(ids, max_new_tokens=2, do_sample=False)
    assert bool(entered) != native
