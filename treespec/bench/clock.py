"""A clock that real generations advance by given costs: decisions are real, times *simulated*."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable

from treespec import TreeSpeculator

# Of taking in a token of a prompt, as a share of a level.
_INGEST_SHARE = 0.02


class VirtualClock:
    """Stands in for the `time` module of the engine and its laps.

    Args:
        noise: standard deviation of the logarithm of a charged time.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.ms, self._noise, self._generator = 0.0, noise, random.Random(0)

    def perf_counter(self) -> float:
        """Seconds."""
        return self.ms / 1e3

    def charge(self, owner: object, name: str, cost: Callable[..., float]) -> None:
        """Every call of the method also advances the clock, by `cost(*arguments)` ms."""
        method = getattr(owner, name)

        @functools.wraps(method)
        def charged(*arguments, **keywords):
            noise = math.exp(self._generator.gauss(0.0, self._noise)) if self._noise else 1.0
            self.ms += cost(*arguments) * noise
            return method(*arguments, **keywords)

        setattr(owner, name, charged)

    def charge_rounds(
        self,
        spec: TreeSpeculator,
        verify_ms: Callable[[int], float],
        commit_ms: Callable[[int], float],
        level_ms: float,
        prefill_ms: float,
        miss_ms: float,
    ) -> None:
        """Charges the rounds of a speculator.

        Args:
            spec: recording depends on counts alone, so `capture=False` saves time.
            verify_ms: of a verification, by all its nodes.
            commit_ms: of what comes after it, by the nodes of a row.
            level_ms: of a level of the draft.
            prefill_ms: of the target's taking in of a prompt.
            miss_ms: of asking a lookup.
        """
        self.charge(spec._target, "forward", lambda tokens, *_: verify_ms(tokens.numel()))
        self.charge(spec._target, "ingest", lambda *_: prefill_ms)
        self.charge(
            spec._engine, "_commit", lambda _, tree, *__: commit_ms(tree.tokens.shape[1])
        )
        if (model := spec._model) is not None:

            def ingest_ms(_, lens: list[int]) -> float:
                missing = max(n - have for n, have in zip(lens, model.cache.prefix_lens))
                return _INGEST_SHARE * level_ms * missing

            self.charge(model, "forward", lambda *_: level_ms)
            self.charge(model, "ingest", ingest_ms)
        for source in spec._engine.lookups:
            self.charge(source, "propose", lambda *_: miss_ms)
