"""Key and value rows of one model for a batch of sequences: a committed prefix each, then the nodes
of a tree.

Row `r` of a sequence holds the token at position `r` while `r < prefix_lens[b]`; rows after that
hold nodes in the order they were forwarded. The keys of all layers of one kind live in one tensor,
and so do their values, so committing a path moves rows of every layer at once, and views of it
never change address while the batch and the capacity stay.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from treespec.kernels import ops
from treespec.transfer import on_device


@dataclass(frozen=True)
class LayerSpec:
    """Shape of one layer's keys and values."""

    num_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device


class TreeCache:
    """Buffers of one model, allocated once for `batch` sequences of up to `capacity` rows.

    Attributes:
        keys, values: per layer a view `[B, Hkv, S, D]` of the shared storage.
        prefix_lens: committed rows of every sequence, on the host.
    """

    def __init__(
        self, specs: list[LayerSpec], batch: int, capacity: int, implementation: str = "auto"
    ) -> None:
        self.specs = specs
        self.batch = batch
        self.capacity = capacity
        self.prefix_lens = [0] * batch
        self._implementation = implementation
        # zeros: rows no sequence ever wrote are multiplied by weight 0, which must not meet a NaN
        self._storage = {
            spec: tuple(
                torch.zeros(
                    (batch, specs.count(spec), spec.num_heads, capacity, dim),
                    dtype=spec.dtype,
                    device=spec.device,
                )
                for dim in (spec.key_dim, spec.value_dim)
            )
            for spec in dict.fromkeys(specs)
        }
        self._active = batch
        self._set_views()

    def _set_views(self) -> None:
        used = dict.fromkeys(self._storage, 0)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for spec in self.specs:
            for storage, views in zip(self._storage[spec], (self.keys, self.values)):
                views.append(storage[: self._active, used[spec]])
            used[spec] += 1
        self._layers = {id(keys): layer for layer, keys in enumerate(self.keys)}

    def _tensors(self) -> Iterator[torch.Tensor]:
        """All rows, `[B, layers, H, S, D]` each."""
        return itertools.chain.from_iterable(self._storage.values())

    def layer_of(self, keys: torch.Tensor) -> int | None:
        """Which layer's view `keys` is; None for any other tensor."""
        return self._layers.get(id(keys))

    def reset(self) -> None:
        """Forgets all sequences; the buffers stay."""
        self.prefix_lens = [0] * self.batch
        if self._active != self.batch:
            self._active = self.batch
            self._set_views()

    def clear_nodes(self) -> None:
        """Zeroes all rows behind the prefixes: a NaN left there would spoil sums even with weight
        0."""
        for row, prefix in enumerate(self.prefix_lens):
            for storage in self._tensors():
                storage[row, :, :, prefix:].zero_()

    def copy_rows(self, row: int, length: int) -> list[torch.Tensor]:
        """The first `length` rows of a sequence, for `paste_rows`."""
        return [storage[row, :, :, :length].clone() for storage in self._tensors()]

    def paste_rows(self, row: int, rows: list[torch.Tensor]) -> None:
        """Begins a sequence with copied rows."""
        length = rows[0].shape[2]
        for storage, copied in zip(self._tensors(), rows):
            storage[row, :, :, :length] = copied
        self.prefix_lens[row] = length

    def drop_row(self, row: int) -> None:
        """Ends sequence `row`; the last active sequence takes its place."""
        last = self._active - 1
        if row != last:
            length = self.prefix_lens[last]
            for storage in self._tensors():
                storage[row, :, :, :length] = storage[last, :, :, :length]
        self.prefix_lens[row] = self.prefix_lens[last]
        self.prefix_lens.pop()
        self._active = last
        self._set_views()

    def commit(self, paths: list[list[int]]) -> None:
        """Keeps, for every sequence, the node rows `paths[b]` (offsets past its prefix, ascending)
        behind its prefix."""
        starts = list(self.prefix_lens)
        self.prefix_lens[:] = [start + len(path) for start, path in zip(starts, paths)]
        if all(path == list(range(len(path))) for path in paths):
            return
        # a sequence that keeps nothing leaves its first node where it is
        kept = [path or [0] for path in paths]
        longest = max(map(len, kept))
        padded = [path + [-1] * (longest - len(path)) for path in kept]
        ends = [len(path) - 1 for path in kept]
        batch = len(kept)
        for device in {spec.device for spec in self._storage}:
            layers = [
                (keys[: self._active].flatten(1, 2), values[: self._active].flatten(1, 2))
                for spec, (keys, values) in self._storage.items()
                if spec.device == device
            ]
            sent = on_device([*ends, *starts, *itertools.chain(*padded)], device)
            ops.compact_kv(
                layers,
                sent[2 * batch :].view(batch, longest),
                sent[:batch],
                sent[batch : 2 * batch],
                implementation=self._implementation,
            )
