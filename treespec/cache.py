"""Key and value rows of one model for a batch of sequences: a committed prefix each, then the nodes
of a tree.

Row `r` of a sequence holds the token at position `r` while `r < prefix_lens[b]`; rows after that
hold nodes in the order they were forwarded. All layers of one kind live in one tensor, so
committing a path moves rows of every layer at once, and views of it never change address while the
batch and the capacity stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def __init__(self, specs: list[LayerSpec], batch: int, capacity: int) -> None:
        self.specs = specs
        self.batch = batch
        self.capacity = capacity
        self.prefix_lens = [0] * batch
        kinds: dict[tuple, int] = {}
        for spec in specs:
            for dim in (spec.key_dim, spec.value_dim):
                kind = (spec.num_heads, dim, spec.dtype, spec.device)
                kinds[kind] = kinds.get(kind, 0) + 1
        # zeros: rows no sequence ever wrote are multiplied by weight 0, which must not meet a NaN
        self._storage = {
            kind: torch.zeros(
                count, batch, kind[0], capacity, kind[1], dtype=kind[2], device=kind[3]
            )
            for kind, count in kinds.items()
        }
        self._active = batch
        self._set_views()

    def _set_views(self) -> None:
        used = dict.fromkeys(self._storage, 0)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for spec in self.specs:
            for dim, views in ((spec.key_dim, self.keys), (spec.value_dim, self.values)):
                kind = (spec.num_heads, dim, spec.dtype, spec.device)
                views.append(self._storage[kind][used[kind], : self._active])
                used[kind] += 1
        self._layers = {id(keys): layer for layer, keys in enumerate(self.keys)}

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
            for storage in self._storage.values():
                storage[:, row, :, prefix:].zero_()

    def copy_rows(self, row: int, length: int) -> list[torch.Tensor]:
        """The first `length` rows of a sequence, for `paste_rows`."""
        return [storage[:, row, :, :length].clone() for storage in self._storage.values()]

    def paste_rows(self, row: int, rows: list[torch.Tensor]) -> None:
        """Begins a sequence with copied rows."""
        length = rows[0].shape[2]
        for storage, copied in zip(self._storage.values(), rows):
            storage[:, row, :, :length] = copied
        self.prefix_lens[row] = length

    def drop_row(self, row: int) -> None:
        """Ends sequence `row`; the last active sequence takes its place."""
        last = self._active - 1
        if row != last:
            length = self.prefix_lens[last]
            for storage in self._storage.values():
                storage[:, row, :, :length] = storage[:, last, :, :length]
        self.prefix_lens[row] = self.prefix_lens[last]
        self.prefix_lens.pop()
        self._active = last
        self._set_views()

    def commit(self, paths: list[list[int]]) -> None:
        """Keeps, for every sequence, the node rows `paths[b]` (offsets past its prefix, ascending)
        behind its prefix."""
        for row, path in enumerate(paths):
            start = self.prefix_lens[row]
            self.prefix_lens[row] = start + len(path)
            moved = next((k for k, node in enumerate(path) if node != k), len(path))
            if moved == len(path):
                continue
            for storage in self._storage.values():
                source = torch.tensor(path[moved:], device=storage.device) + start
                rows = storage[:, row].index_select(2, source)
                storage[:, row, :, start + moved : start + len(path)] = rows
