"""Recorded forwards: a model's forward as a straight line of ATen calls, replayed without its
Python modules.

On a CPU most of a small forward is Python: module calls, keyword plumbing, shape arithmetic. A
`Recorder` notes every ATen call of one eager forward; `compile_recording` writes them out as one
flat Python function over the same parameters and buffers. Work that depends on more than its tensor
arguments (cache writes, attention over a growing prefix) goes through `opaque`, which the recording
calls again instead of what it called inside. What a replay may not do (read a tensor's value on the
host, outputs of unknown shape) ends the recording with `RecordingRefused`, and the eager forward
stays in use. See docs/design/002-recorded-forwards.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

# The same ATen kernels through bindings that parse their arguments faster than OpOverload.__call__.
_FAST_BINDINGS: dict[Any, Callable] = {
    _aten.add.Tensor: torch.add,
    _aten.addmm.default: torch.addmm,
    _aten.chunk.default: torch.chunk,
    _aten.bmm.default: torch.bmm,
    _aten.cat.default: torch.cat,
    _aten.cos.default: torch.cos,
    _aten.embedding.default: lambda weight, ids, *_: F.embedding(ids, weight),
    _aten.div.Tensor: torch.div,
    _aten.gelu.default: F.gelu,
    _aten.layer_norm.default: torch.layer_norm,
    _aten.linear.default: F.linear,
    _aten.mean.dim: torch.mean,
    _aten.mm.default: torch.mm,
    _aten.mul.Tensor: torch.mul,
    _aten.neg.default: torch.neg,
    _aten.pow.Tensor_Scalar: torch.pow,
    _aten.relu.default: torch.relu,
    _aten.reshape.default: torch.Tensor.reshape,
    _aten.rsqrt.default: torch.rsqrt,
    _aten.silu.default: F.silu,
    _aten.sin.default: torch.sin,
    _aten.split.Tensor: torch.split,
    _aten.sub.Tensor: torch.sub,
    _aten.tanh.default: torch.tanh,
    _aten.to.dtype: torch.Tensor.to,
    _aten.t.default: torch.t,
    _aten.transpose.int: torch.transpose,
    _aten.unsqueeze.default: torch.unsqueeze,
    _aten.view.default: torch.Tensor.view,
    _aten._unsafe_view.default: torch.Tensor.view,
}
_REFUSED_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

# A recorded call: function, arguments, keywords, result.
Step = tuple[Callable, tuple, dict, Any]

_active: Recorder | None = None


class RecordingRefused(RuntimeError):
    """A forward did something that a replay could not repeat; the message names it."""


def opaque(function: Callable, *args: Any) -> Any:
    """Calls `function(*args)`; while recording, as one step whose inside is not recorded."""
    if _active is None:
        return function(*args)
    return _active.record_opaque(function, args)


class Recorder(TorchDispatchMode):
    """Notes every ATen call made inside `with Recorder() as recorder:`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._inside_opaque = False

    def __enter__(self) -> Recorder:
        global _active
        if _active is not None:
            raise RecordingRefused("another recording is under way")
        _active = self
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        global _active
        _active = None
        super().__exit__(*exc_info)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._inside_opaque and _REFUSED_TAGS & set(func.tags):
            raise RecordingRefused(f"{func} reads a tensor's value on the host")
        out = func(*args, **kwargs)
        if not self._inside_opaque:
            self.steps.append((func, args, kwargs, out))
        return out

    def record_opaque(self, function: Callable, args: tuple) -> Any:
        if self._inside_opaque:
            return function(*args)
        self._inside_opaque = True
        try:
            out = function(*args)
        finally:
            self._inside_opaque = False
        self.steps.append((function, args, {}, out))
        return out


class _Writer:
    """Turns steps into Python source: tensors become names, everything else literals or
    constants."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        self.names = {id(tensor): f"i{k}" for k, tensor in enumerate(inputs)}
        self.keep_alive: list[Any] = list(inputs)
        self.namespace: dict[str, Any] = {}
        self.used: list[str] = []
        self._functions: dict[Any, str] = {}

    def function(self, func: Any) -> str:
        func = _FAST_BINDINGS.get(func, func)
        if func not in self._functions:
            name = f"f{len(self._functions)}"
            self._functions[func] = name
            self.namespace[name] = func
        return self._functions[func]

    def constant(self, value: Any) -> str:
        name = f"c{len(self.namespace)}"
        self.namespace[name] = value
        self.keep_alive.append(value)
        return name

    def operand(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            if id(value) not in self.names:
                self.names[id(value)] = self.constant(value)
            self.used.append(self.names[id(value)])
            return self.names[id(value)]
        if isinstance(value, list):
            return "[" + ", ".join(map(self.operand, value)) + "]"
        if isinstance(value, tuple):
            return "(" + "".join(self.operand(item) + ", " for item in value) + ")"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self.constant(value)

    def knows(self, out: Any) -> bool:
        """Whether a step's result is a tensor that already has a name, because the call changed
        nothing."""
        return isinstance(out, torch.Tensor) and id(out) in self.names

    def result(self, out: Any, step: int) -> list[str]:
        """Names of a step's results; `_` for what is no new tensor."""
        names = []
        for k, tensor in enumerate(out if isinstance(out, (list, tuple)) else [out]):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.names:
                self.names[id(tensor)] = f"v{step}_{k}"
                self.keep_alive.append(tensor)
                names.append(f"v{step}_{k}")
            else:
                names.append("_")
        return names


def compile_recording(
    steps: list[Step], inputs: list[torch.Tensor], output: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """One function of `inputs` that makes the recorded calls again and returns what became of
    `output`.

    Raises:
        RecordingRefused: if `output` is not the result of a recorded call.
    """
    return write_recording(steps, inputs, output)()


def write_recording(
    steps: list[Step], inputs: list[torch.Tensor], output: torch.Tensor
) -> Callable[[], Callable[..., torch.Tensor]]:
    """What makes the function of `compile_recording` when it is called; of the recorded tensors it
    keeps only the constants."""
    writer = _Writer(inputs)
    lines: list[tuple[str, list[str], list[str]]] = []
    for k, step in enumerate(steps):
        func, args, kwargs, out = _quicker(step)
        if writer.knows(out) and is_pure(func):
            continue
        writer.used = []
        operands = [writer.operand(arg) for arg in args]
        operands += [f"{name}={writer.operand(value)}" for name, value in kwargs.items()]
        used = writer.used
        results = writer.result(out, k)
        left = ", ".join(results) + (", " if isinstance(out, (list, tuple)) else "")
        lines.append((f"{left} = {writer.function(func)}({', '.join(operands)})", used, results))
    if id(output) not in writer.names:
        raise RecordingRefused("the logits are not the result of a recorded call")
    returned = writer.names[id(output)]

    last_use = {name: k for k, (_, used, results) in enumerate(lines) for name in used + results}
    source = [f"def replay({', '.join(f'i{k}' for k in range(len(inputs)))}):"]
    for k, (line, used, results) in enumerate(lines):
        dead = [
            name
            for name in dict.fromkeys(used + results)
            if name.startswith("v") and last_use[name] == k and name != returned
        ]
        source.append(f"    {line}" + (f"; del {', '.join(dead)}" if dead else ""))
    source.append(f"    return {returned}")
    text, namespace = "\n".join(source), writer.namespace

    def compiled() -> Callable[..., torch.Tensor]:
        exec(compile(text, "<recorded forward>", "exec"), namespace)
        return namespace["replay"]

    return compiled


def is_pure(func: Callable) -> bool:
    """Whether a recorded call is one of ATen that changes none of its arguments."""
    return isinstance(func, torch._ops.OpOverload) and not func._schema.is_mutable


def _quicker(step: Step) -> Step:
    """The same result by a call that costs less to make."""
    func, args, kwargs, out = step
    if func is _aten.slice.Tensor and not kwargs and (len(args) < 5 or args[4] == 1):
        dim, start = (args[1] if len(args) > 1 else 0), (args[2] if len(args) > 2 else 0) or 0
        start = start + args[0].shape[dim] if start < 0 else start
        return torch.narrow, (args[0], dim, start, out.shape[dim]), {}, out
    if func is _aten.pow.Tensor_Scalar and args[1] == 2:
        return torch.mul, (args[0], args[0]), {}, out
    return step
