"""Whole generations of the bundled pair, small enough for any machine, under pytest-benchmark.

    pytest benchmarks/bench_end_to_end.py --benchmark-json=out.json

Every method's float32 text is held against `target.generate` before its time is taken. Samples here
are not paired: compare methods with `treespec bench reference` or `treespec bench suite`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from treespec import BestFirstTree, Chain
from treespec.bench import methods, models, prompts, protocol, results

NEW_TOKENS = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = {
    "target": "demo",
    "draft": "demo",
    "sized": None,
    "dtype": "float32",
    "draft_weights": "trained",
}


@functools.cache
def pair() -> models.Pair:
    return models.load_pair(SETTINGS, DEVICE)


@functools.cache
def environment() -> dict:
    return results.environment()


@functools.cache
def task() -> methods.Task:
    return prompts.reference_tasks(pair(), "dev", 1, NEW_TOKENS)[0]


@functools.cache
def oracle() -> torch.Tensor:
    return methods.make_oracle(pair())(task())


def rows() -> dict[str, methods.Method]:
    """Fresh methods by name; nothing is built before it is run."""
    ours = [
        methods.our_method(pair(), "plain", "engine", None, None),
        methods.our_method(pair(), "linear K=4", "linear", Chain(4), "draft"),
        methods.our_method(pair(), "tree", "best-first", BestFirstTree(12, 4, 3), "draft"),
        methods.our_method(pair(), "tree", "best-first", BestFirstTree(24, 10, 8), "lookup"),
        methods.our_method(pair(), "tree", "best-first", BestFirstTree(24, 3, 4), "merged"),
        methods.our_method(pair(), "auto", "auto", "auto", "merged"),
    ]
    theirs = methods.transformers_methods(pair())
    return {method.name: method for method in [*theirs, *ours]}


NAMES = (
    "transformers plain",
    "transformers assisted (no scikit-learn)",
    "transformers prompt lookup",
    "treespec plain",
    "treespec linear K=4 (draft)",
    "treespec tree (draft)",
    "treespec tree (lookup)",
    "treespec tree (merged)",
    "treespec auto (merged)",
)


def check_then_time(method: methods.Method, benchmark) -> None:
    """Times a method whose text was found to be the oracle's; it warms up by that."""
    found = method.run(task())
    assert protocol.identical(found.ids, oracle()), f"{method.name} wrote another text"
    benchmark.extra_info.update(method.about(), environment=environment(), stats=found.stats)
    benchmark.extra_info.update(new_tokens=NEW_TOKENS, row_rounds=found.row_rounds)
    benchmark.pedantic(lambda: list(protocol.timed([method], task())), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("name", NAMES)
def test_generate(name, benchmark):
    check_then_time(rows()[name], benchmark)
