"""A causal LM made ready for trees: checked once, then called on nodes of a tree with rows of its
own cache."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, PreTrainedModel

from treespec import graphs, hf, packing
from treespec.cache import TreeCache
from treespec.capture import Recorder, RecordingRefused, compile_recording, write_recording
from treespec.fusing import fuse
from treespec.graphs import CapturedForward
from treespec.kernels import ops
from treespec.packing import PackedWeights, copy_bytes, pack_linears
from treespec.rotary import NAME as ROTARY_NAME
from treespec.rotary import FusedRotary, Rotary, WatchedRotary, rotary_modules, taken_over
from treespec.shapes import MAX_NODES
from treespec.steps import Steps
from treespec.transfer import on_device

# Largest share by which a tree's logits may differ from a sequence's at attachment, in units of the
# logits' spread.
_PROBE_TOLERANCE = {torch.float32: 0.01, torch.float64: 0.01}
_PROBE_TOLERANCE_16BIT = 0.25
# A recorded forward may differ from the eager one by rounding alone (prepacked weights add up in
# another order).
_REPLAY_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_REPLAY_TOLERANCE_16BIT = 0.05
# In 16 bits rounding adds up over many layers. More is taken for it if the same calls, neither
# fused nor prepacked, give the eager forward's very logits.
_ROUNDING_16BIT, _THE_SAME = 0.25, 1e-3
_MOST_NODES_OF_A_RECORDING = 64
# A recording costs about as much as it saves in this many calls, before any was made.
_CALLS_THAT_PAY = 12
PREFILL_CHUNK = 256
_RECURRENT_WORDS = ("mamba", "rwkv", "recurrent", "ssm", "linear_attention", "conv")


class TreeModel:
    """A model, its cache rows, and its recorded forwards.

    Args:
        model: a decoder-only causal LM of transformers.
        role: "target" or "draft"; names the argument in errors.
        record: record forwards on a CPU (docs/design/002-recorded-forwards.md).
        graphs: capture forwards on a GPU (docs/design/007-captured-forwards.md).
        attention: "triton", "torch", or "auto" for Triton on a GPU where it can run.

    Raises:
        TypeError: if `model` is no transformers model.
        NotImplementedError: if its type cannot verify a tree; the message says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        role: str,
        record: bool = True,
        attention: str = "auto",
        graphs: bool = False,
    ) -> None:
        self.model = model
        self.role = role
        self.config = model.config.get_text_config(decoder=True)
        self.name = getattr(self.config, "model_type", type(model).__name__)
        self._check_kind()
        self.vocab_size = int(self.config.vocab_size)
        self.position_limit = _position_limit(self.config)
        self._attention = attention
        self.kernel, self.attention_reason = _attention_path(self.device, attention)
        self.rotary: Rotary | None = None
        self.rotary_reason = "left to the model; only the Triton path takes it over"
        self.cache: TreeCache | None = None
        self._records, self._captures = record, graphs
        self._graph_pool: tuple[int, int] | None = None
        # what is done between forwards, and what has forwards of this model in it: in 16 bits a
        # near tie of a draft's may fall either way
        captures = self.on_graphs and self.kernel
        self.steps, self.grown = Steps(captures), Steps(captures, agreeing=0.5)
        self.recording_reason = self._recording_obstacle()
        self._recordings: dict[tuple, _Recording] = {}
        self.rounds_ahead: float | None = None
        self.start_round()
        # of recordings of one node, and of more
        self._worth = _Worth(), _Worth()
        self._calls = 0
        self._packed: PackedWeights | None = None
        self._weights = _WeightMarks()
        if packing.available():
            self._packed = PackedWeights.of(model, _packing_budget(model))
            self._packed.keep_for(self._weights.of(model, sampled=self.recording_reason is None))
        self._weights_seen: tuple = ()
        self._prefix: tuple[torch.Tensor, list[torch.Tensor]] | None = None
        self._keeps_logits = hf.forward_accepts(model, "logits_to_keep")
        self.training_modules = [module for module in model.modules() if module.training]
        self._probe()

    @property
    def implementation(self) -> str:
        """What the ops of a round run on, as their `implementation` argument."""
        if self.kernel:
            return "triton"
        return "auto" if self.device.type == "cuda" and self._attention != "torch" else "torch"

    @property
    def on_graphs(self) -> bool:
        """Whether what is recorded of forwards are CUDA graphs."""
        return self._captures and graphs.runs_on(self.device)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters())

    def _check_kind(self) -> None:
        label = f"{self.role} ({self.name})"
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise NotImplementedError(
                f"{label} is an encoder-decoder model; trees need a decoder-only causal LM"
            )
        if self.model.get_output_embeddings() is None or not hasattr(self.model, "generate"):
            raise TypeError(
                f"{self.role} must be a causal LM with a language-model head; got "
                f"{type(self.model).__name__}"
            )
        kinds = [
            self.name.lower(),
            *(str(k) for k in getattr(self.config, "layer_types", None) or []),
        ]
        if getattr(self.model, "_is_stateful", False) or any(
            w in k for w in _RECURRENT_WORDS for k in kinds
        ):
            raise NotImplementedError(
                f"{label} keeps a recurrent or convolutional state, which the branches of a tree "
                "would share; "
                "use target.generate for it"
            )
        if not hf.forward_accepts(self.model, "position_ids"):
            raise NotImplementedError(
                f"{label} takes no position_ids, so siblings of a tree cannot share a position"
            )

    def _recording_obstacle(self) -> str | None:
        if self.on_graphs:
            if not self.kernel:
                return f"graphs need the Triton kernels: {self.attention_reason}"
            if len({weight.device for weight in self.model.parameters()}) > 1:
                return "the model is on several devices"
        elif self.device.type != "cpu":
            return f"recorded forwards are for CPUs; this model is on {self.device}"
        elif not self._records:
            return "turned off by capture=False"
        if any(m._forward_hooks or m._forward_pre_hooks for m in self.model.modules()):
            return "the model has forward hooks, which a recording would skip"
        if any(type(m).__module__.partition(".")[0] == "peft" for m in self.model.modules()):
            return "the model has adapters, whose scales a recording would not see change"
        return None

    def _probe(self) -> None:
        """Learns the layers' shapes and proves, on a small tree, that this model verifies trees."""
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(self.vocab_size, (1, 4), generator=generator)
        nodes = torch.randint(self.vocab_size, (1, 5), generator=generator)
        # root with two branches: 0 -> 1 -> 3 and 0 -> 2 -> 4
        branches = [[0, 1, 3], [0, 2, 4]]
        sequences = torch.cat([torch.cat([prompt, nodes[:, b]], dim=1) for b in branches]).to(
            self.device
        )
        positions = torch.arange(7, device=self.device).expand(2, -1)
        with torch.inference_mode(), hf.evaluation_mode(self.training_modules):
            past = DynamicCache(config=self.config)
            try:
                expected = self.model(
                    input_ids=sequences,
                    position_ids=positions,
                    past_key_values=past,
                    use_cache=True,
                ).logits
                self._specs, self._layer_rows = hf.layer_specs(past)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"{self.role} ({self.name}) cannot verify a tree: it keeps {error}"
                ) from None
            self._placeholders = past.layers
            if not self._specs or past.get_seq_length() != 7:
                raise NotImplementedError(
                    f"{self.role} ({self.name}) does not fill transformers' key-value cache"
                )
            worst = {}
            for route in ("interface", "masks"):
                try:
                    self._set_route(route)
                    logits = self._probe_tree(prompt, nodes)
                except Exception as failure:
                    worst[route] = f"{type(failure).__name__}: {failure}"
                    continue
                difference = max(
                    _spread_error(logits[0, b], expected[k, 4:]) for k, b in enumerate(branches)
                )
                if difference <= _PROBE_TOLERANCE.get(self.dtype, _PROBE_TOLERANCE_16BIT):
                    if self.kernel:
                        self._fuse_rotary(lambda: self._probe_tree(prompt, nodes))
                    self.cache = None
                    return
                worst[route] = f"logits differ by {difference:.2g} of their spread"
        reasons = "; ".join(f"{route}: {reason}" for route, reason in worst.items())
        raise NotImplementedError(
            f"{self.role} ({self.name}) cannot verify a tree ({reasons}). Its text would differ, "
            "so it is refused"
        )

    def _set_route(self, route: str) -> None:
        self.route = route
        self._configs = hf.attention_configs(self.model) if route == "interface" else []
        if route == "interface" and not self._configs:
            raise NotImplementedError("its attention implementation cannot be switched")
        if route == "masks":
            # the kernel would be asked nothing, and would need no mask
            self.kernel = False
            self.steps, self.grown = Steps(), Steps()
            window = getattr(self.config, "sliding_window", None) or getattr(
                self.config, "window_size", None
            )
            if window is not None:
                self.position_limit = min(self.position_limit or window, window)
            self.recording_reason = self.recording_reason or "its attention cannot be replaced"

    def _fuse_rotary(self, probe: Callable[[], torch.Tensor]) -> None:
        """Takes the model's rotary function over, if a forward in which it is watched and one
        without it agree."""
        self._rotary_modules = rotary_modules(self.model)
        # neither what is watched nor what waits for the cache can be replayed
        recording, self.recording_reason = self.recording_reason, "the rotary kernel is in use"
        try:
            self.rotary_reason = self._watch_and_fuse(probe)
        except Exception as failure:
            self.rotary, self.rotary_reason = None, f"{type(failure).__name__}: {failure}"
        if self.rotary is None or self.on_graphs:
            self.recording_reason = recording

    def _watch_and_fuse(self, probe: Callable[[], torch.Tensor]) -> str:
        """Sets `rotary` or leaves it None; returns why."""
        if not self._rotary_modules:
            return f"no {ROTARY_NAME} in its modules"
        self.rotary = watched = WatchedRotary()
        expected = probe().clone()
        self.rotary = None
        if watched.obstacle is not None or watched.interleaved is None:
            return watched.obstacle or "its layers do not call a rotary function"
        fused = self.rotary = FusedRotary(watched.interleaved)
        difference = _spread_error(probe()[0], expected[0])
        if difference > _PROBE_TOLERANCE.get(self.dtype, _PROBE_TOLERANCE_16BIT):
            self.rotary = None
            return f"logits differ by {difference:.2g} of their spread"
        pairs = "neighbouring columns" if fused.interleaved else "halves"
        return f"agrees with the model's own; pairs of {pairs}"

    def _probe_tree(self, prompt: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        self.allocate(1, 16)
        self.forward_chain(prompt.to(self.device))
        self.cache.commit([list(range(prompt.shape[1]))])
        parents = [0, 0, 0, 1, 2]
        depths = torch.tensor([[0, 1, 1, 2, 2]], device=self.device)
        visible = torch.eye(5, dtype=torch.bool, device=self.device)
        for node in range(1, 5):
            visible[node] |= visible[parents[node]]
        calls = hf.attention_calls()
        logits = self.forward(nodes.to(self.device), 4 + depths, visible[None])
        if self.route == "interface" and hf.attention_calls() - calls < len(self._specs):
            raise NotImplementedError("its layers do not call the attention interface")
        return logits

    def allocate(self, batch: int, capacity: int) -> None:
        """Makes room for `batch` sequences of `capacity` rows, or reuses what is there."""
        if self.cache is not None and self.cache.batch == batch and self.cache.capacity >= capacity:
            self.cache.reset()
        else:
            self.cache = None
            if self.on_graphs:
                # they know the rows by address
                self._forget_recordings()
                capacity = graphs.roomy(capacity)
            self.cache = TreeCache(self._specs, batch, capacity, self.implementation)
        self._facade = hf.cache_facade(
            self.cache, self._layer_rows, self._placeholders, whole=self.route == "interface"
        )

    def begin(self) -> None:
        """Called before every generation: notices changed weights, hooks and training mode."""
        self.training_modules = [module for module in self.model.modules() if module.training]
        self.rounds_ahead = None
        weights = self._weights.of(self.model, sampled=self.recording_reason is None)
        obstacle = (
            self._recording_obstacle() if self.recording_reason is None else self.recording_reason
        )
        if weights != self._weights_seen or obstacle != self.recording_reason:
            self._forget_recordings()
        if weights != self._weights_seen:
            self._prefix = None
        if self._packed is not None:
            self._packed.keep_for(weights)
        self._weights_seen, self.recording_reason = weights, obstacle

    def _forget_recordings(self) -> None:
        self._recordings.clear()
        self.grown.forget()
        # the memory of graphs that are gone cannot be shared again
        self._graph_pool = None

    def release(self) -> None:
        """Gives back the buffers, the recordings and the prepacked weights."""
        self.cache = self._facade = self._prefix = None
        self._forget_recordings()
        self.steps.forget()
        if self._packed is not None:
            self._packed.forget()

    def start_round(self) -> None:
        """From here on the times of the forwards of a round are summed up.

        `recording_ms` is what recording and checking took, once and for all; `compile_ms`, as a
        part of it, what compiling kernels took, which Triton keeps on disk. `unrecorded_ms` is
        what forwards that are not recorded took longer than they will when they are. `settled` is
        False if that is not known.
        """
        self.recording_ms = self.unrecorded_ms = self.compile_ms = 0.0
        self.settled = True
        self.steps.start_round()
        self.grown.start_round()

    def drop_row(self, row: int) -> None:
        self.cache.drop_row(row)

    @torch.inference_mode()
    def keep_prefix(self, ids: torch.Tensor) -> None:
        """Forwards `[1, W]` ids once and keeps their rows for sequences that begin with them."""
        self.begin()
        self.allocate(1, ids.shape[1])
        self._prefix = None
        self.ingest(ids, [ids.shape[1]])
        self._prefix = (ids[0].clone(), self.cache.copy_rows(0, ids.shape[1]))

    def _reuse_prefix(self, tokens: torch.Tensor, lens: list[int]) -> None:
        if self._prefix is None:
            return
        ids, rows = self._prefix
        for row, have in enumerate(self.cache.prefix_lens):
            if have == 0 and lens[row] >= len(ids) and torch.equal(tokens[row, : len(ids)], ids):
                self.cache.paste_rows(row, rows)

    def ingest(self, tokens: torch.Tensor, lens: list[int]) -> None:
        """Brings the committed rows of every sequence up to `lens[b]`, in chunks, without logits.

        Args:
            tokens: int64 `[B, S]`.
            lens: rows each sequence shall have; those that have them are left alone.
        """
        self._reuse_prefix(tokens, lens)
        prefix_lens = self.cache.prefix_lens
        while (missing := [max(0, upto - have) for upto, have in zip(lens, prefix_lens)]) and max(
            missing
        ) > 0:
            width = min(max(missing), PREFILL_CHUNK)
            start = on_device(prefix_lens, tokens.device).unsqueeze(1)
            index = (start + torch.arange(width, device=tokens.device)).clamp_max_(
                tokens.shape[1] - 1
            )
            self.forward_chain(tokens.gather(1, index))
            self.cache.commit([list(range(min(width, count))) for count in missing])

    def forward_chain(self, tokens: torch.Tensor, last_only: bool = True) -> torch.Tensor:
        """Forwards `[B, N]` tokens that follow each prefix one after another; logits of the last
        one (or of all)."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        prefix = on_device(self.cache.prefix_lens, tokens.device)
        positions = prefix[:, None] + steps
        if self.position_limit:
            positions = positions.clamp_max(self.position_limit - 1)
        assert self.cache is not None
        call = hf.Forward(self.cache, tokens.shape[1], 0, None, positions, positions)
        keep = {"logits_to_keep": 1} if last_only and self._keeps_logits else {}
        with hf.forward_scope(call):
            return self._eager(tokens, positions, **keep)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        offset: int = 0,
        node_positions: torch.Tensor | None = None,
        prefix_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Forwards one batch of tree nodes; within a step that is being captured, as part of its
        graph.

        Args:
            tokens: int64 `[B, N]`.
            positions: int64 `[B, N]`.
            visible: bool `[B, N, offset + N]`; the node rows each token sees, itself among them.
            offset: node rows forwarded before these, past the prefix.
            node_positions: int64 `[B, offset + N]`, positions of all node rows; needed when
                `offset` > 0.
            prefix_lens: int64 `[B]`, the cache's committed rows, if they are on the device already.

        Returns:
            Logits `[B, N, V]`; their storage may be reused by the next forward.
        """
        num_nodes, inside = tokens.shape[1], graphs.is_inside()
        if inside and self.recording_reason is not None:
            raise RecordingRefused(self.recording_reason)
        assert self.cache is not None
        last = max(self.cache.prefix_lens) + offset + num_nodes
        # a graph outlives the lengths of now
        if self.position_limit and (inside or last > self.position_limit):
            positions = positions.clamp_max(self.position_limit - 1)
        call = (graphs.GraphForward if inside else hf.Forward)(
            self.cache,
            num_nodes,
            offset,
            visible,
            positions,
            positions if node_positions is None else node_positions,
            self.kernel,
            self.rotary,
            prefix_lens,
        )
        if call.num_slots > self.cache.capacity:
            raise RuntimeError(
                f"{self.role}: {call.num_slots} rows needed, {self.cache.capacity} allocated"
            )
        with hf.forward_scope(call):
            most = MAX_NODES if self.on_graphs else _MOST_NODES_OF_A_RECORDING
            if inside or self.recording_reason is not None or num_nodes > most:
                return self._eager(tokens, positions)
            return self._recorded_call(tokens, positions)

    def _eager(self, tokens: torch.Tensor, positions: torch.Tensor, **kwargs) -> torch.Tensor:
        """The model's own forward, its linear layers in a type that the device multiplies."""
        with packing.wide_linears(self.dtype, self.device, tokens.numel()):
            return self._call(tokens, positions, **kwargs)

    def _call(self, tokens: torch.Tensor, positions: torch.Tensor, **kwargs) -> torch.Tensor:
        if self.route == "masks":
            kwargs["attention_mask"] = hf.dense_mask(self.dtype)
        with contextlib.ExitStack() as stack:
            stack.enter_context(hf.attention_switched(self._configs, hf.ATTENTION_NAME))
            stack.enter_context(hf.evaluation_mode(self.training_modules))
            if (rotary := hf.current_rotary()) is not None:
                stack.enter_context(taken_over(self._rotary_modules, rotary))
            return self.model(
                input_ids=tokens,
                position_ids=positions,
                past_key_values=self._facade,
                use_cache=True,
                return_dict=True,
                **kwargs,
            ).logits

    def _recorded_call(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        call = hf.current_forward()
        # a graph's shapes are all fixed, those of a recording's attention are not
        key = (*tokens.shape, call.offset if self.on_graphs else call.sees_everything)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._recordings[key] = _Recording()
        self._calls += 1
        recording.calls += 1
        if recording.refused:
            return self._eager(tokens, positions)
        if recording.replay is not None and not recording.checks_left:
            return recording.replay(tokens, positions)
        worth = self._worth[tokens.numel() > 1]
        if recording.replay is None and not self._pays(recording, worth.calls_that_pay):
            if worth.saving_ms is None:
                self.settled = False
            else:
                self.unrecorded_ms += worth.saving_ms
            return self._eager(tokens, positions)
        return self._record_or_check(recording, worth, tokens, positions)

    def _pays(self, recording: _Recording, calls_that_pay: float) -> bool:
        """Whether a shape is called often enough, by its share of the calls so far, to be worth
        recording."""
        if self.rounds_ahead is None:
            return True
        share = recording.calls / (self._calls + 2)
        return recording.calls + share * self.rounds_ahead >= calls_that_pay

    def _record_or_check(
        self,
        recording: _Recording,
        worth: _Worth,
        tokens: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """The first calls of a shape: record it, then hold the replay against the eager forward
        before trusting it."""
        started = self._clock()
        try:
            recorded = recording.replay is None
            if recorded:
                expected = self._record(recording, tokens, positions)
            else:
                expected = self._eager(tokens, positions).clone()
            assert recording.replay is not None
            eager_done = self._clock()
            replayed = recording.replay(tokens, positions)
            replay_done = self._clock()
            error = _spread_error(replayed, expected)
            if not self._is_rounding(error, recording, tokens, positions):
                raise RecordingRefused(
                    f"its replay differs from the eager forward by {error:.2g} of the logits' "
                    "spread"
                )
            recording.checks_left -= 1
        except RecordingRefused as reason:
            recording.refused, recording.replay, recording.unchanged = True, None, None
            self.recording_reason = f"recording was refused: {reason}"
            self.settled = False
            return self._call(tokens, positions)
        replay_ms = 1e3 * (replay_done - eager_done)
        spent_ms = 1e3 * (self._clock() - started) - replay_ms
        self.recording_ms += spent_ms
        recording.spent_ms += spent_ms
        if not recorded:
            worth.note(recording.spent_ms, 1e3 * (eager_done - started) - replay_ms)
        if not recording.checks_left:
            recording.unchanged = None
        return expected

    def _is_rounding(
        self, error: float, recording: _Recording, tokens: torch.Tensor, positions: torch.Tensor
    ) -> bool:
        """Whether a replay that is so far from the eager forward differs by rounding alone."""
        if error <= _REPLAY_TOLERANCE.get(self.dtype, _REPLAY_TOLERANCE_16BIT):
            return True
        if recording.unchanged is None or not error <= _ROUNDING_16BIT:
            return False
        unchanged = recording.unchanged()(tokens, positions)
        return _spread_error(unchanged, self._call(tokens, positions)) <= _THE_SAME

    def _record(
        self, recording: _Recording, tokens: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Records the forward under way; returns its logits."""
        if self.on_graphs:
            started = self._clock()
            expected = self._eager(tokens, positions).clone()
            first_ms = 1e3 * (self._clock() - started)
            if self._graph_pool is None:
                self._graph_pool = graphs.new_pool()
            call, pool = hf.current_forward(), self._graph_pool
            # until this has gone well: nor can that of a broken one
            self._graph_pool = None
            recording.replay = captured = CapturedForward(call, tokens, self._eager, pool)
            self._graph_pool = pool
            self.compile_ms += max(first_ms - captured.eager_ms, 0.0)
            return expected
        with Recorder() as recorder:
            expected = self._call(tokens, positions)
        steps = fuse(recorder.steps)
        if self._packed is not None:
            steps = pack_linears(steps, self._packed)
        recording.replay = compile_recording(steps, [tokens, positions], expected)
        if self.dtype not in _REPLAY_TOLERANCE:
            recording.unchanged = write_recording(recorder.steps, [tokens, positions], expected)
        return expected

    def _clock(self) -> float:
        """Seconds, when the device is done with what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Recording:
    """A replay, how far it is trusted, and what recording and checking it took."""

    def __init__(self) -> None:
        self.replay: Callable[..., torch.Tensor] | None = None
        # makes a replay of the calls as they were recorded, for checks of 16-bit models
        self.unchanged: Callable[[], Callable[..., torch.Tensor]] | None = None
        self.refused = False
        self.checks_left = 2
        self.calls = 0
        self.spent_ms = 0.0


class _Worth:
    """What recordings of like shapes were worth.

    `saving_ms` is what a forward takes longer than its replay; None before any was replayed.
    `calls_that_pay` is how many calls make up for a recording.
    """

    def __init__(self) -> None:
        self.saving_ms: float | None = None
        self.calls_that_pay = float(_CALLS_THAT_PAY)

    def note(self, spent_ms: float, saving_ms: float) -> None:
        """A recording took `spent_ms` so far, and its replay was faster by `saving_ms`."""
        known = saving_ms if self.saving_ms is None else self.saving_ms
        self.saving_ms = max(known + 0.5 * (saving_ms - known), 0.0)
        most = 2.0 * _CALLS_THAT_PAY
        self.calls_that_pay = min(spent_ms / self.saving_ms, most) if self.saving_ms else most


def _spread_error(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square difference, worst row, in units of the spread of the expected logits."""
    expected = expected.float()
    difference = (logits.float() - expected).flatten(0, -2)
    spread = expected.flatten(0, -2).std(-1).clamp_min(1e-6)
    return float((difference.square().mean(-1).sqrt() / spread).max())


def _attention_path(device: torch.device, attention: str) -> tuple[bool, str]:
    """Whether the Triton kernel attends, and why or why not.

    Raises:
        ValueError: if Triton was asked for and cannot run.
    """
    if attention == "torch":
        return False, "asked for"
    runs, reason = ops.triton_status(device)
    if attention == "triton":
        if not runs:
            raise ValueError(f'attention="triton" cannot run here: {reason}; use "auto" or "torch"')
        return True, "asked for"
    # the interpreter can run kernels on a CPU, but only for tests
    return runs and device.type == "cuda", reason


class _WeightMarks:
    """What changes when a model's weights do: their identities, addresses and versions, and a few
    entries of each.

    Writes through `.data` leave the version alone, so entries spread over every weight are looked
    at; a write that misses all of them goes unnoticed, and needs `TreeSpeculator.reset`.
    """

    def __init__(self) -> None:
        self._places: tuple = ()
        self._entries: list[torch.Tensor] = []

    def of(self, model: torch.nn.Module, sampled: bool) -> tuple:
        """The marks; equal as long as nothing has changed.

        Args:
            model: the model.
            sampled: look at entries too.
        """
        weights = [*model.parameters(), *model.buffers()]
        places = tuple((id(weight), weight.data_ptr()) for weight in weights)
        if places != self._places:
            self._places = places
            self._entries = [_entries(w.detach()) for w in weights if w.device.type == "cpu"]
        versions = tuple(0 if weight.is_inference() else weight._version for weight in weights)
        told = b""
        if sampled and self._entries:
            told = torch.cat(self._entries).view(torch.uint8).numpy().tobytes()
        return places, versions, told


def _entries(weight: torch.Tensor) -> torch.Tensor:
    """A view of about 61 entries of a weight, of one of its rows if it is not contiguous."""
    row = weight.view(-1) if weight.is_contiguous() else weight[(0,) * (weight.dim() - 1)]
    return row[:: max(1, row.numel() // 61)]


def _position_limit(config) -> int | None:
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _packing_budget(model: PreTrainedModel) -> int:
    """Bytes that prepacked copies of the weights may take: all of a small model, nothing of one
    whose copies are above 4 GiB."""
    size = copy_bytes(model.parameters())
    return size if size <= 4 << 30 else 0
