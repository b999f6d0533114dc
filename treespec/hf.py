"""Where treespec plugs into transformers: attention, masks, cache layers, generation. No other file
touches its internals.

One attention function and one mask function are registered under the name `treespec`. A `Forward`
is what the two need to know of the forward under way; it is set around a model call and found by
them through `_current`, so it also reaches models whose layers drop extra keywords.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function

from treespec.cache import LayerSpec, TreeCache
from treespec.capture import opaque
from treespec.kernels import ops
from treespec.kernels.torch_attention import (
    biased_attention,
    pack_bias,
    packs_heads,
    visible_bias,
)
from treespec.rotary import Rotary
from treespec.shapes import MAX_NODES
from treespec.transfer import on_device
from treespec.tree import pack_bits

ATTENTION_NAME = "treespec"


class Forward:
    """One model call: which rows its tokens take, and what each of them may see.

    Args:
        cache: the model's rows.
        num_nodes: tokens of this call per sequence, N.
        offset: node rows already forwarded past the prefix; token i goes to row `prefix_lens[b] +
            offset + i`.
        visible: bool `[B, N, offset + N]`, which node rows a token sees besides the whole prefix;
            None for a causal chain.
        positions: int64 `[B, N]` positions of the tokens.
        node_positions: int64 `[B, offset + N]` positions of all node rows.
        kernel: attend with the Triton kernel where it can express the layer.
        rotary: what stands in for the model's rotary function when the kernel attends.
        prefix_lens: int64 `[B]`, the committed rows, if they are on the device already.
    """

    def __init__(
        self,
        cache: TreeCache,
        num_nodes: int,
        offset: int,
        visible: torch.Tensor | None,
        positions: torch.Tensor,
        node_positions: torch.Tensor,
        kernel: bool = False,
        rotary: Rotary | None = None,
        prefix_lens: torch.Tensor | None = None,
    ) -> None:
        self.cache = cache
        self.num_nodes = num_nodes
        self.offset = offset
        self.visible = visible
        self.positions = positions
        self.node_positions = node_positions
        self.num_slots = max(cache.prefix_lens) + offset + num_nodes
        # a chain is prefill, where nodes are many and the prefix is short
        self.kernel = kernel and visible is not None and offset + num_nodes <= MAX_NODES
        self.rotary = rotary if self.kernel else None
        self._prefix_lens = prefix_lens
        self._starts: torch.Tensor | None = None
        self._packed: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._bits: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def sees_everything(self) -> bool:
        """A single token of a single sequence: no mask is needed."""
        return self.num_nodes == 1 and self.offset == 0 and len(self.cache.prefix_lens) == 1

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Puts `[B, Hkv, N, D]` rows behind every prefix and the nodes already there."""
        if self.rotary is not None and self.rotary.write(
            self.cache, layer, keys, values, self._row_starts()
        ):
            return
        prefix_lens, num_nodes = self.cache.prefix_lens, self.num_nodes
        for rows, new in ((self.cache.keys[layer], keys), (self.cache.values[layer], values)):
            # narrow: an index is parsed anew at every call
            if len(prefix_lens) == 1:
                rows.narrow(2, prefix_lens[0] + self.offset, num_nodes).copy_(new)
                continue
            for row, prefix in enumerate(prefix_lens):
                rows[row].narrow(1, prefix + self.offset, num_nodes).copy_(new[row])

    def _row_starts(self) -> torch.Tensor:
        """int64 `[B]`, the row of the first of these tokens."""
        if self._starts is None:
            self._starts = self.prefix_lens() + self.offset
        return self._starts

    def prefix_lens(self) -> torch.Tensor:
        """int64 `[B]`, the committed rows, on the device."""
        if self._prefix_lens is None:
            self._prefix_lens = on_device(self.cache.prefix_lens, self.positions.device)
        return self._prefix_lens

    def bias(self, mask_function: Callable, dtype: torch.dtype) -> torch.Tensor | None:
        """Additive mask `[B, 1, N, num_slots]` for one of the model's mask kinds; None where
        nothing is hidden.

        `mask_function(batch, head, query, key)` is transformers' predicate; it is asked about
        *positions*, never rows, so that windows and chunks mean the same in a tree as in a
        sequence.
        """
        causal = mask_function is causal_mask_function
        if causal and (self.kernel or self.sees_everything):
            return None
        prefix_lens, device = self.cache.prefix_lens, self.positions.device
        visible = self.visible
        if visible is None:
            square = torch.ones(
                self.num_nodes, self.num_nodes, dtype=torch.bool, device=device
            ).tril_()
            visible = square.expand(len(prefix_lens), -1, -1)
        bias = visible_bias(visible, prefix_lens, self.num_slots, dtype)
        if not causal:
            rows = torch.arange(len(prefix_lens), device=device).view(-1, 1, 1, 1)
            queries = self.positions[:, None, :, None]
            seen = mask_function(rows, 0, queries, self._key_positions()[:, None, None, :])
            bias.masked_fill_(~seen, float("-inf"))
        return bias

    def _key_positions(self) -> torch.Tensor:
        keys = torch.arange(self.num_slots, device=self.positions.device).repeat(
            len(self.cache.prefix_lens), 1
        )
        for row, prefix in enumerate(self.cache.prefix_lens):
            keys[row, prefix : prefix + self.node_positions.shape[1]] = self.node_positions[row]
        return keys

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
        window: int | None = None,
    ) -> torch.Tensor:
        """One layer: `[B, Hq, N, D]` queries over the rows used so far, to `[B, N, Hq, Dv]`."""
        if self.rotary is not None:
            query = self.rotary.query(query)
        if self.kernel and (bias is None or window is not None):
            return self._attend_in_kernel(query, key, value, scale, softcap, sinks, window)
        key, value = key.narrow(2, 0, self.num_slots), value.narrow(2, 0, self.num_slots)
        q_heads, kv_heads = query.shape[1], key.shape[1]
        plain = softcap is None and sinks is None
        if bias is None:
            if plain:
                rows = query.view(1, kv_heads, q_heads // kv_heads, query.shape[-1])
                out = F.scaled_dot_product_attention(rows, key, value, scale=scale)
                return out.reshape(1, 1, q_heads, value.shape[-1])
            bias = query.new_zeros(1, 1, q_heads // kv_heads, self.num_slots)
        elif not plain or packs_heads(query, kv_heads, self.num_slots):
            bias = self._pack(bias, q_heads, kv_heads)
        return biased_attention(
            query, key, value, bias, scale=scale, softcap=softcap, sinks=sinks
        )

    def _pack(self, bias: torch.Tensor, q_heads: int, kv_heads: int) -> torch.Tensor:
        """`pack_bias`, once for all layers that share a bias."""
        name = (id(bias), q_heads // kv_heads)
        if name not in self._packed:
            # the bias is kept, lest another take its place and its number
            self._packed[name] = bias, pack_bias(bias, q_heads, kv_heads)
        return self._packed[name][1]

    def _attend_in_kernel(self, query, key, value, scale, softcap, sinks, window):
        """The Triton kernel: bits instead of a dense mask, windows by depth; see
        docs/kernels/tree_attention.md."""
        bits, prefix_lens, depths = self._kernel_inputs()
        # the kernel wants a query for every node row, also for those forwarded before
        query = F.pad(query, (0, 0, self.offset, 0)) if self.offset else query
        out = ops.tree_attention(
            query,
            key,
            value,
            bits,
            prefix_lens,
            scale=scale,
            sliding_window=window,
            depths=depths if window is not None else None,
            softcap=softcap,
            sinks=sinks,
            implementation="triton",
            check_lengths=False,
        )
        return out[:, self.offset :]

    def _kernel_inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self._bits is None:
            assert self.visible is not None
            rows = self.visible.shape[2]
            visible = torch.eye(rows, dtype=torch.bool, device=self.visible.device).repeat(
                len(self.visible), 1, 1
            )
            visible[:, self.offset :] = self.visible
            prefix_lens = self.prefix_lens()
            self._bits = (
                pack_bits(visible),
                prefix_lens,
                self.node_positions - prefix_lens[:, None],
            )
        return self._bits


_current: Forward | None = None


@contextlib.contextmanager
def forward_scope(forward: Forward) -> Iterator[None]:
    """Makes `forward` the one that attention, masks and cache layers refer to."""
    global _current
    before, _current = _current, forward
    try:
        yield
    finally:
        _current = before


def current_forward() -> Forward:
    """The forward under way."""
    assert _current is not None
    return _current


def current_rotary() -> Rotary | None:
    """What stands in for the rotary function in the forward under way."""
    return _current.rotary


_attention_calls = 0


def attention_calls() -> int:
    """How often any model has called treespec's attention function; tells whether a model calls it
    at all."""
    return _attention_calls


def dense_mask(dtype: torch.dtype) -> torch.Tensor:
    """The causal bias of the forward under way as a dense mask, for models whose attention cannot
    be replaced."""
    bias = _current.bias(causal_mask_function, dtype)
    if bias is None:
        bias = torch.zeros(
            1, 1, 1, _current.num_slots, dtype=dtype, device=_current.positions.device
        )
    return bias


# The recorded steps must find the forward under way when they are replayed, so they go through
# these functions.
def _attend(*args):
    global _attention_calls
    _attention_calls += 1
    return _current.attend(*args)


def _attend_layer(query, layer, *args):
    cache = _current.cache
    return _attend(query, cache.keys[layer], cache.values[layer], *args)


def _write(*args):
    _current.write(*args)


def _bias(*args):
    return _current.bias(*args)


def _tree_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    softcap=None,
    s_aux=None,
    sliding_window=None,
    dropout=0.0,
    **_,
):
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = _current.cache.layer_of(key)
    if layer is None:
        return opaque(
            _attend, query, key, value, attention_mask, scale, softcap, s_aux, sliding_window
        ), None
    # named by its number, a layer's rows may move without making a recording stale
    return opaque(
        _attend_layer, query, layer, attention_mask, scale, softcap, s_aux, sliding_window
    ), None


def _tree_mask(*_, mask_function=causal_mask_function, dtype=torch.float32, config=None, **__):
    return opaque(_bias, mask_function, dtype)


AttentionInterface.register(ATTENTION_NAME, _tree_attention)
AttentionMaskInterface.register(ATTENTION_NAME, _tree_mask)


class TreeCacheLayer(CacheLayerMixin):
    """One layer of a `TreeCache` as transformers sees it."""

    is_compileable = False
    is_sliding = False

    def __init__(self, cache: TreeCache, layer: int, whole: bool) -> None:
        super().__init__()
        self._cache, self._layer, self._whole = cache, layer, whole
        self.is_initialized = True

    def lazy_initialization(self, *args, **kwargs) -> None:
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        opaque(_write, self._layer, key_states, value_states)
        keys, values = self._cache.keys[self._layer], self._cache.values[self._layer]
        if self._whole:
            return keys, values
        return keys[:, :, : _current.num_slots], values[:, :, : _current.num_slots]

    def get_mask_sizes(self, query_length, *args) -> tuple[int, int]:
        return _current.num_slots, 0

    def get_seq_length(self, *args) -> int:
        return max(self._cache.prefix_lens)

    def get_max_length(self) -> int:
        return self._cache.capacity

    get_max_cache_shape = get_max_length


def cache_facade(
    cache: TreeCache, layer_rows: list[int | None], placeholders: list, whole: bool
) -> Cache:
    """transformers' view of a `TreeCache`.

    Args:
        cache: the rows.
        layer_rows: for every layer of the model its index in `cache`, or None where the layer keeps
            no rows of its own.
        placeholders: the layer objects to use where `layer_rows` is None.
        whole: layers return all rows (the attention function cuts them), rather than the used ones.
    """
    return Cache(
        layers=[
            placeholders[k] if row is None else TreeCacheLayer(cache, row, whole)
            for k, row in enumerate(layer_rows)
        ]
    )


def layer_specs(past_key_values: Cache) -> tuple[list[LayerSpec], list[int | None]]:
    """Reads the shapes of a model's layers off a cache it has just filled.

    Raises:
        NotImplementedError: if a layer keeps anything but keys and values.
    """
    specs: list[LayerSpec] = []
    layer_rows: list[int | None] = []
    for layer in past_key_values.layers:
        if not isinstance(layer, CacheLayerMixin) or type(layer).__name__.startswith(
            "LinearAttention"
        ):
            if hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states"):
                raise NotImplementedError(
                    "a recurrent or convolutional state, which siblings of a tree would share"
                )
            layer_rows.append(None)
        elif "Index" in type(layer).__name__ or "Compress" in type(layer).__name__:
            raise NotImplementedError(f"a cache layer of its own kind ({type(layer).__name__})")
        elif layer.keys is None or layer.keys.dim() != 4:
            layer_rows.append(None)
        else:
            layer_rows.append(len(specs))
            keys, values = layer.keys, layer.values
            specs.append(
                LayerSpec(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device)
            )
    return specs, layer_rows


def attention_configs(model: PreTrainedModel) -> list:
    """The configurations of a model whose attention implementation can be switched, outermost
    first."""
    configs, seen = [], set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            if module._can_set_attn_implementation():
                configs.append(module.config)
    return configs


@contextlib.contextmanager
def attention_switched(configs: list, name: str) -> Iterator[None]:
    """Runs a block under another attention implementation and puts the old one back, whatever
    happens."""
    before = [config._attn_implementation_internal for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, old in zip(configs, before):
            config._attn_implementation_internal = old


@contextlib.contextmanager
def evaluation_mode(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Switches dropout and the like off in `modules` (those found in training mode) for a block."""
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


def forward_accepts(model: PreTrainedModel, name: str) -> bool:
    """Whether a model's forward names the argument `name`."""
    return name in inspect.signature(model.forward).parameters
