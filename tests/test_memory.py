"""Memory stays flat: over thousands of rounds, over calls, and after a reset nothing of a call
remains.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
import weakref

import pytest
import torch
from lossless_checks import prompt_batch
from tiny_models import prompts, tiny_pair

from treespec import BestFirstTree, Chain, TreeSpeculator
from treespec.sampling import CoupledNoise

ROUNDS = 2000
MOST_GROWTH_MB = 4.0


def resident_mb() -> float:
    """Memory of this process that is in RAM, after the allocator has given back what is free."""
    gc.collect()
    name = ctypes.util.find_library("c")
    if name is not None:
        trim = getattr(ctypes.CDLL(name), "malloc_trim", None)
        if trim is not None:
            trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")


def run_rounds(spec: TreeSpeculator, rounds: int, **options) -> None:
    """Calls of many lengths until so many rounds have been made."""
    done = k = 0
    while done < rounds:
        ids = prompts(1, 5 + k % 17, seed=k)
        spec.generate(ids, max_new_tokens=200, seed=k, **options)
        done, k = done + spec.stats.rounds, k + 1


def num_recordings(spec: TreeSpeculator) -> int:
    return sum(len(model._recordings) for model in (spec._target, spec._model) if model is not None)


@on_linux
@pytest.mark.parametrize(
    ("source", "tree", "options", "rounds"),
    [
        ("merged", BestFirstTree(8, 2, 3), {"do_sample": False}, ROUNDS),
        ("ngram", Chain(4), {"do_sample": True, "temperature": 0.9}, ROUNDS // 2),
        ("draft", "auto", {"do_sample": False}, ROUNDS // 4),
    ],
    ids=["merged", "sampled", "auto"],
)
def test_resident_memory_is_flat_over_thousands_of_rounds(source, tree, options, rounds):
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(
        target, {"merged": [draft, "ngram"], "ngram": "ngram", "draft": draft}[source], tree=tree
    )
    run_rounds(spec, 300, **options)
    before, recordings = resident_mb(), num_recordings(spec)
    run_rounds(spec, rounds, **options)
    # a shape of forward that occurs for the first time is recorded once
    allowed = MOST_GROWTH_MB + 3.0 * (num_recordings(spec) - recordings)
    assert resident_mb() - before < allowed


def count_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_no_tensors_pile_up_over_calls():
    """Counted one by one: batches that shrink, samples, streams dropped half-way, calls that
    fail.
    """
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, [draft, "ngram"], tree=BestFirstTree(16, 4, 4))
    ids, mask = prompt_batch(4)

    def calls():
        spec.generate(
            ids,
            mask,
            max_new_tokens=30,
            do_sample=True,
            seed=1,
            eos_token_id=[3, 4, 5],
            pad_token_id=0,
        )
        spec.generate(
            ids[:1],
            max_new_tokens=30,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
        stream = spec.stream(ids[:1], max_new_tokens=30, do_sample=False)
        next(stream)
        del stream
        with pytest.raises(ValueError, match="max_new_tokens"):
            spec.generate(ids, mask, max_new_tokens=5000)
        spec.generate(ids[:1], max_new_tokens=30, do_sample=False)

    for _ in range(3):
        calls()
    before = count_tensors()
    for _ in range(5):
        calls()
    assert count_tensors() <= before + 5


def test_noise_is_kept_for_a_few_positions_only():
    noise = CoupledNoise(1, [0, 1], 50, torch.device("cpu"))
    first = [noise.at(row, 0).clone() for row in range(2)]
    for position in range(1000):
        for row in range(2):
            noise.at(row, position)
    assert len(noise._blocks) <= 2 * 3
    # and it is the same when it is made again
    assert all(torch.equal(noise.at(row, 0), first[row]) for row in range(2))


def test_buffers_are_allocated_once_and_keep_their_address():
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, draft, tree=BestFirstTree(16, 4, 4))
    addresses = set()
    for k in range(4):
        for part in spec.stream(prompts(1, 6 + k, seed=k), max_new_tokens=60, do_sample=False):
            assert len(part)
            addresses.add(
                tuple(
                    keys.data_ptr() for keys in (*spec._target.cache.keys, *spec._model.cache.keys)
                )
            )
    assert len(addresses) == 1


def test_a_speculator_is_freed_with_its_buffers():
    target, draft = tiny_pair("llama")
    spec = TreeSpeculator(target, [draft, "ngram"], tree=BestFirstTree(16, 4, 4))
    spec.generate(prompts(1, 6), max_new_tokens=40, do_sample=False)
    buffer = weakref.ref(spec._target.cache.keys[0].untyped_storage())
    caches = [weakref.ref(spec._target.cache), weakref.ref(spec._model.cache)]
    spec.reset()
    gc.collect()
    assert buffer() is None and all(ref() is None for ref in caches)
    spec.generate(prompts(1, 6), max_new_tokens=40, do_sample=False)
    cache = weakref.ref(spec._target.cache)
    del spec
    gc.collect()
    assert cache() is None
