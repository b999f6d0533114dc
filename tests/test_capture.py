"""Recorded forwards: equal to eager ones, given up where they could not be, and never older than
the model's weights.
"""

from __future__ import annotations

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from lossless_checks import first_difference, prompt_batch
from tiny_models import prompts, tiny_config, tiny_pair
from torch import nn
from transformers import AutoModelForCausalLM

import treespec.model
from treespec import BestFirstTree, TreeSpeculator
from treespec.capture import Recorder, RecordingRefused, compile_recording, opaque
from treespec.model import TreeModel, _WeightMarks, _Worth

SHAPE = BestFirstTree(max_nodes=16, depth=4, width=4)


@pytest.fixture
def own_pair():
    """A pair that a test may change."""
    return tuple(copy.deepcopy(model) for model in tiny_pair("llama"))


def texts(spec: TreeSpeculator, new_tokens: int = 40):
    ids, _ = prompt_batch(1)
    expected = spec.target.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    return spec.generate(ids, max_new_tokens=new_tokens, do_sample=False), expected


def assert_lossless(spec: TreeSpeculator) -> None:
    assert first_difference(*texts(spec)) is None


def replayed(spec: TreeSpeculator) -> int:
    """Shapes of the target's forwards that are replayed by now."""
    return sum(
        r.replay is not None and r.checks_left == 0 for r in spec._target._recordings.values()
    )


# --- on whole models -----------------------------------------------------------------------------


def test_recorded_forwards_give_the_text_of_eager_ones(kind):
    target, draft = tiny_pair(kind)
    recorded, eager = (
        TreeSpeculator(target, draft, tree=SHAPE, capture=capture) for capture in ("auto", False)
    )
    for batch in (1, 4):
        ids, mask = prompt_batch(batch)
        found = [
            spec.generate(ids, mask, max_new_tokens=60, do_sample=False)
            for spec in (recorded, eager)
        ]
        assert first_difference(*found) is None
        if batch == 1:
            assert replayed(recorded) >= 1 and recorded._target.recording_reason is None
            assert replayed(eager) == 0 and "capture=False" in eager._target.recording_reason


def test_replays_make_no_module_calls(own_pair):
    """Once trusted, a forward runs without the model's Python."""
    target, draft = own_pair
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    texts(spec), texts(spec)
    calls = []
    forward = type(target).forward
    target.forward = lambda *args, **kwargs: calls.append(1) or forward(target, *args, **kwargs)
    ids, _ = prompt_batch(1)
    spec.generate(ids, max_new_tokens=40, do_sample=False)
    # prefill is not recorded
    assert len(calls) <= 2 < spec.stats.rounds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(own_pair, dtype):
    target, draft = (model.to(dtype) for model in own_pair)
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    ids, _ = prompt_batch(1)
    out = spec.generate(ids, max_new_tokens=40, do_sample=False)
    assert out.shape == (1, ids.shape[1] + 40)
    assert spec._target.recording_reason is None and replayed(spec) >= 1
    # rounding decides ties; what was written must be the best or nearly the best token of a plain
    # forward
    logits = target(out).logits[0, ids.shape[1] - 1 : -1].float()
    chosen = logits.gather(1, out[0, ids.shape[1] :, None]).squeeze(1)
    assert ((logits.amax(1) - chosen) / logits.std(1)).max() < 0.2


# --- when not to record --------------------------------------------------------------------------


def test_a_model_with_hooks_is_not_recorded(own_pair):
    target, draft = own_pair
    calls = []
    target.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    calls.clear()
    ids, _ = prompt_batch(1)
    spec.generate(ids, max_new_tokens=40, do_sample=False)
    assert len(calls) >= spec.stats.rounds and "hook" in spec._target.recording_reason
    assert_lossless(spec)


def test_a_hook_that_comes_later_is_noticed_and_changes_the_text(own_pair):
    target, draft = own_pair
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    before, expected = texts(spec)
    assert first_difference(before, expected) is None and replayed(spec)
    handle = target.model.layers[0].mlp.register_forward_hook(lambda module, args, out: -out)
    after, expected = texts(spec)
    assert first_difference(after, expected) is None and first_difference(after, before) is not None
    handle.remove()
    assert first_difference(texts(spec)[0], before) is None


class DataDependent(nn.Module):
    """An MLP that looks at a value on the host."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (2.0 if float(x.float().mean()) > 0 else 0.5)


class Moody(nn.Module):
    """An MLP whose Python state decides, which no recording can follow."""

    def __init__(self, inner: nn.Module, other: float = 3.0) -> None:
        super().__init__()
        self.inner, self.other = inner, other
        self.scale = 1.0

    def forward(self, x):
        out = self.inner(x) * self.scale
        self.scale = 1.0 if x.shape[1] > 1 else self.other
        return out


def test_a_forward_that_reads_values_is_refused_and_stays_right(own_pair):
    target, _ = own_pair
    target.model.layers[1].mlp = DataDependent(target.model.layers[1].mlp)
    # the mean of a whole tree decides here, so a tree is not a sequence; one node at a time is
    spec = TreeSpeculator(target, None)
    assert_lossless_per_token(spec)
    assert replayed(spec) == 0
    assert "recording was refused" in spec._target.recording_reason
    assert "reads a tensor's value on the host" in spec._target.recording_reason


def assert_lossless_per_token(spec: TreeSpeculator) -> None:
    ids = prompts(1, 1, seed=3)
    expected = spec.target.generate(ids, max_new_tokens=30, do_sample=False)
    assert (
        first_difference(spec.generate(ids, max_new_tokens=30, do_sample=False), expected) is None
    )


def test_a_forward_that_changes_from_call_to_call_is_refused(own_pair):
    target, _ = own_pair
    moody = Moody(target.model.layers[0].mlp)
    target.model.layers[0].mlp = moody
    spec = TreeSpeculator(target, None)
    moody.scale = 1.0
    ids = prompts(1, 1, seed=3)
    spec.generate(ids, max_new_tokens=12, do_sample=False)
    assert replayed(spec) == 0 and "differs from the eager forward" in spec._target.recording_reason


@pytest.fixture
def errors(monkeypatch) -> list[float]:
    """How far replays were from eager forwards when they were checked."""
    found, judge = [], TreeModel._is_rounding

    def noted(model, error, *args):
        found.append(error)
        return judge(model, error, *args)

    monkeypatch.setattr(TreeModel, "_is_rounding", noted)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_16_bits_is_not_refused_where_it_adds_up(own_pair, dtype, errors, monkeypatch):
    """Over many layers it may be more than a small error; so it is here, where none is small."""
    monkeypatch.setattr(treespec.model, "_REPLAY_TOLERANCE_16BIT", 0.0)
    target, draft = (model.to(dtype) for model in own_pair)
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    ids, _ = prompt_batch(1)
    spec.generate(ids, max_new_tokens=40, do_sample=False)
    assert min(errors) >= 0.0 < max(errors) < 0.05
    assert spec._target.recording_reason is None and replayed(spec) >= 1
    kept = [r for r in spec._target._recordings.values() if r.unchanged is not None]
    assert all(recording.checks_left for recording in kept)


def test_many_lively_layers_of_16_bits_are_recorded(errors):
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(tiny_config("llama", 28)).eval().to(torch.bfloat16)
    spec = TreeSpeculator(target, None)
    for seed in range(4):
        ids = prompts(1, 1, seed=seed)
        spec.generate(ids, max_new_tokens=20, do_sample=False)
        spec.reset()
    assert max(errors) > treespec.model._REPLAY_TOLERANCE_16BIT
    assert spec._target.recording_reason is None


def test_a_small_error_that_is_no_rounding_is_refused_in_16_bits(own_pair, errors):
    target = own_pair[0].to(torch.bfloat16)
    moody = Moody(target.model.layers[0].mlp, other=1.25)
    target.model.layers[0].mlp = moody
    spec = TreeSpeculator(target, None)
    moody.scale = 1.0
    spec.generate(prompts(1, 1, seed=3), max_new_tokens=12, do_sample=False)
    low, high = treespec.model._REPLAY_TOLERANCE_16BIT, treespec.model._ROUNDING_16BIT
    assert low < errors[-1] < high
    assert replayed(spec) == 0 and "differs from the eager forward" in spec._target.recording_reason


def test_more_nodes_than_are_worth_recording_run_eagerly():
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, draft, tree=BestFirstTree(128, 4, 16))
    assert_lossless(spec)
    assert max((key[1] for key in spec._target._recordings), default=0) <= 64


# --- weights -------------------------------------------------------------------------------------


def scale_in_place(target):
    with torch.no_grad():
        target.model.layers[-1].mlp.down_proj.weight.mul_(-2)


def replace_parameter(target):
    old = target.model.layers[0].self_attn.v_proj
    old.weight = nn.Parameter(-old.weight.detach())


def replace_data(target):
    weight = target.model.layers[0].self_attn.o_proj.weight
    weight.data = -weight.data.clone()


def replace_module(target):
    layer = nn.Linear(48, 120, bias=False)
    with torch.no_grad():
        layer.weight.copy_(target.lm_head.weight.flip(0))
    target.lm_head = layer


def load_other_weights(target):
    target.load_state_dict(
        {name: -w if "down_proj" in name else w for name, w in target.state_dict().items()}
    )


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize(
    "change", [scale_in_place, replace_parameter, replace_data, replace_module, load_other_weights]
)
def test_changed_weights_are_noticed(own_pair, change, role):
    target, draft = own_pair
    spec = TreeSpeculator(target, [draft, "ngram"], tree=SHAPE)
    before, expected = texts(spec)
    assert first_difference(before, expected) is None and replayed(spec) >= 1
    change(target if role == "target" else draft)
    after, expected = texts(spec)
    assert first_difference(after, expected) is None
    assert (first_difference(after, before) is None) == (role == "draft")


def test_changed_weights_make_a_kept_prefix_stale(own_pair):
    target, draft = own_pair
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    ids, _ = prompt_batch(1)
    spec.prefill(ids[:, :12])
    assert_lossless(spec)
    replace_parameter(target)
    assert_lossless(spec)


# --- the recorder itself -------------------------------------------------------------------------


def record(function, *inputs):
    with torch.inference_mode():
        with Recorder() as recorder:
            expected = function(*inputs)
        return compile_recording(recorder.steps, list(inputs), expected), expected


def test_a_recording_repeats_with_other_inputs():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def forward(x, y):
        first, second = (x @ weight.T).chunk(2, dim=-1)
        z = torch.cat([first.sin(), second * 2.5], dim=-1).unsqueeze(0)
        z = z[:, 1:, ::2].contiguous().pow(2) + y[None, 1:, :2].float()
        z += 1
        return torch.softmax(z, dim=-1)

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(5, 3, generator=generator), torch.randint(9, (5, 4), generator=generator)

    first, second = inputs(1), inputs(2)
    replay, expected = record(forward, *first)
    assert torch.equal(replay(*first), expected)
    assert torch.equal(replay(*second), forward(*second))
    assert not torch.equal(expected, forward(*second))


def test_opaque_calls_are_made_again_and_not_looked_into():
    state = {"scale": 2.0, "calls": 0}

    def scaled(x):
        state["calls"] += 1
        # inside an opaque call even a host read is allowed
        return x * state["scale"] * (1 if float(x.sum()) == float(x.sum()) else 0)

    replay, expected = record(lambda x: opaque(scaled, x + 1) - 1, torch.ones(3))
    assert expected.tolist() == [3.0] * 3
    state["scale"] = 5.0
    assert replay(torch.zeros(3)).tolist() == [4.0] * 3 and state["calls"] == 2
    assert opaque(scaled, torch.ones(1)).item() == 5.0


@pytest.mark.parametrize(
    "function", [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()]
)
def test_what_depends_on_values_is_refused(function):
    with pytest.raises(RecordingRefused, match="reads a tensor's value on the host"):
        record(function, torch.ones(3))
    # and the next recording is not disturbed
    assert record(torch.sin, torch.ones(2))[1].shape == (2,)


def test_an_output_from_elsewhere_is_refused():
    constant = torch.ones(2)
    with pytest.raises(RecordingRefused, match="not the result of a recorded call"):
        record(lambda x: (x + 1, constant)[1], torch.ones(2))


def test_recordings_do_not_nest():
    with (
        Recorder(),
        pytest.raises(RecordingRefused, match="another recording is under way"),
        Recorder(),
    ):
        pass


def test_dead_intermediates_are_let_go():
    """A replay holds no more than its live values: a chain of large ones does not pile up."""
    seen = []

    def watch(x):
        seen.append(weakref.ref(x))
        return x + 1

    def forward(x):
        for _ in range(4):
            x = opaque(watch, x * 2)
        return x

    replay, _ = record(forward, torch.ones(8))
    seen.clear()
    replay(torch.ones(8))
    assert len(seen) == 4 and all(ref() is None for ref in seen)


@pytest.fixture
def counted(monkeypatch):
    """A clock that only the target's forwards move: an eager one by 9 ms, a replay by 4 ms."""
    clock = SimpleNamespace(ms=0.0)
    monkeypatch.setattr(
        treespec.model, "time", SimpleNamespace(perf_counter=lambda: clock.ms / 1e3)
    )
    eager, compile_ = TreeModel._call, treespec.model.compile_recording

    def slow(self, *arguments, **keywords):
        clock.ms += 9.0
        return eager(self, *arguments, **keywords)

    def compiled(*arguments):
        replay = compile_(*arguments)

        def fast(*inputs):
            clock.ms += 4.0
            return replay(*inputs)

        return fast

    monkeypatch.setattr(TreeModel, "_call", slow)
    monkeypatch.setattr(treespec.model, "compile_recording", compiled)
    return clock


def test_a_round_tells_recording_and_unrecorded_forwards_from_what_stays(counted, monkeypatch):
    """Whatever state the recording of a shape is in, its forward is known to cost 4 ms in the
    end, once a shape of its kind was recorded: one node, or more."""
    monkeypatch.setattr("treespec.model._CALLS_THAT_PAY", 3)
    target, _ = tiny_pair("llama")
    model = TreeSpeculator(target, None)._target
    model.begin()
    model.allocate(1, 64)
    with torch.inference_mode():
        model.forward_chain(torch.arange(1, 9).unsqueeze(0))
    model.cache.commit([list(range(8))])
    seen = {1: [], 2: [], 3: []}
    for width in (*[1] * 6, *[2] * 4, *[3] * 5):
        model.rounds_ahead = 0.0
        model.start_round()
        before = counted.ms
        tokens, positions = torch.full((1, width), 5), torch.full((1, width), 8)
        with torch.inference_mode():
            model.forward(tokens, positions, torch.eye(width, dtype=torch.bool)[None])
        spent = counted.ms - before
        stays = spent - model.recording_ms - model.unrecorded_ms
        seen[width].append((model.settled, round(model.recording_ms), round(stays)))
    unknown, unrecorded = (False, 0, 9), (True, 0, 4)
    recording, checking, replayed = (True, 9, 4), (True, 9, 4), (True, 0, 4)
    # three calls of one node make it worth recording
    assert seen[1] == [unknown, unknown, recording, checking, replayed, replayed]
    # which tells nothing of more nodes
    assert seen[2] == [unknown, unknown, recording, checking]
    # recording and checking took 18 ms, and a call saves 5: four calls pay
    assert seen[3] == [unrecorded, unrecorded, unrecorded, recording, checking]


def test_calls_that_pay_are_what_a_recording_took_over_what_a_call_saves(monkeypatch):
    monkeypatch.setattr("treespec.model._CALLS_THAT_PAY", 12)
    worth = _Worth()
    assert (worth.calls_that_pay, worth.saving_ms) == (12.0, None)
    worth.note(64.0, 16.0)
    assert worth.calls_that_pay == 4.0
    worth.note(64.0, 8.0)
    assert worth.saving_ms == 12.0 and worth.calls_that_pay == pytest.approx(64 / 12)
    worth.note(6400.0, 12.0)
    assert worth.calls_that_pay == 24.0, "a long text pays for any"
    # one that saves nothing is still tried in a long text
    for _ in range(9):
        worth.note(64.0, -50.0)
    assert worth.saving_ms == 0.0 and worth.calls_that_pay == 24.0


@pytest.mark.parametrize("contiguous", [True, False])
def test_entries_of_a_weight_are_looked_at_where_they_are(contiguous):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            weight = torch.ones(6, 4)
            self.weight = nn.Parameter(weight if contiguous else weight.T)
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
            self.register_buffer("empty", torch.zeros(0))

    model, marks = Model(), _WeightMarks()
    before = marks.of(model, sampled=True)
    assert marks.of(model, sampled=True) == before
    model.weight.data.mul_(2.0)
    assert marks.of(model, sampled=True) != before
    assert marks.of(model, sampled=False) != before


def test_a_write_through_data_is_noticed():
    """`.data` writes leave the version alone; stale prepacked weights would write other text."""
    target, _ = tiny_pair("llama")
    target = copy.deepcopy(target)
    spec = TreeSpeculator(target, "ngram")
    ids = torch.randint(2, 100, (1, 12), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 24, "do_sample": False}
    before = spec.generate(ids, **options)
    for parameter in target.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(-0.7)
    after = spec.generate(ids, **options)
    assert torch.equal(after, target.generate(ids, **options))
    assert not torch.equal(before, after)
