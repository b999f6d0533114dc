"""The microbenchmark of tree attention: every provider's answer, refusals, and what is kept of a
run."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import bench_tree_attention as bench

on_cpu = pytest.mark.skipif(bench.ON_GPU, reason="the benchmark itself runs these on a GPU")
pytestmark = on_cpu


def problem(model="llama-3-8b", num_nodes=9, prefix_len=20, batch=2, dtype="float32"):
    return bench.Problem(model, num_nodes, prefix_len, batch, dtype)


def eager_flex(made: bench.Problem) -> bench.Provider:
    return bench.flex_attention(made, compiled=False)


PROVIDERS = {
    "treespec": bench.treespec,
    "treespec_torch": bench.treespec_torch,
    "sdpa_mask": bench.sdpa_mask,
    "transformers_sdpa": bench.transformers_sdpa,
    "flex_attention": eager_flex,
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", ["float32", "native"])
@pytest.mark.parametrize("model", ["demo-target", "pythia-2.8b", "llama-3-8b"])
@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_answer_right(name, model, dtype):
    made = problem(model, dtype=dtype)
    assert bench.check(made, PROVIDERS[name](made)) <= bench.TOLERANCE[made.dtype]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["treespec", "treespec_torch", "flex_attention"])
def test_providers_know_softcap_and_window(name, monkeypatch):
    monkeypatch.setitem(
        bench.MODELS, "small-gemma", bench.MODELS["gemma-2-9b"].__class__(4, 2, 32, 2.0, 7)
    )
    made = problem("small-gemma")
    assert not made.mask()[..., : made.prefix_len].all()
    assert bench.check(made, PROVIDERS[name](made)) <= bench.TOLERANCE[made.dtype]


def test_a_wrong_answer_is_seen():
    made = problem()
    build, layer = bench.treespec_torch(made)
    visible, made.visible = made.visible, torch.ones_like(made.visible).tril()
    causal, made.visible = build(), visible
    allowed = 1000 * bench.TOLERANCE[made.dtype]
    assert bench.check(made, (lambda: causal, layer)) > allowed
    wrong_heads = build, lambda mask, k, v: layer(mask, k.flip(1), v.flip(1))
    assert bench.check(made, wrong_heads) > allowed


def test_what_a_provider_cannot_do_is_skipped_with_a_reason(monkeypatch):
    made = problem("gemma-2-9b")
    for name in ("sdpa_mask", "transformers_sdpa"):
        with pytest.raises(pytest.skip.Exception, match="SDPA has no softcap"):
            PROVIDERS[name](made)
    find_spec = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda n: None if n == "xformers" else find_spec(n)
    )
    with pytest.raises(pytest.skip.Exception, match="xformers is not installed"):
        bench.xformers_tree(made)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda n: object())
    with pytest.raises(pytest.skip.Exception, match="xformers' tree attention needs a GPU"):
        bench.xformers_tree(made)
    monkeypatch.setattr(bench, "xformers_reason", lambda: None)
    with pytest.raises(pytest.skip.Exception, match="no softcap and no window"):
        bench.xformers_tree(made)
    monkeypatch.setattr(bench.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="needs a C\\+\\+ compiler"):
        bench.flex_attention(made)


def documented_tree_attention(q, spec_k, spec_v, cache_k, cache_v, spec_attn_bias, prefix_bias):
    """xformers' documented layouts, in PyTorch: q [B, T, G, H, D], caches [B, M, G, H, D]."""
    batch, nodes, groups, heads, dim = q.shape
    assert cache_k.view(1, -1, groups, heads, dim).shape[1] == batch * cache_k.shape[1]
    assert spec_attn_bias.shape == (nodes, nodes)
    assert prefix_bias.q_seqlen == [nodes] * batch
    assert prefix_bias.kv_seqlen == [prefix_bias.kv_padding] * batch == [cache_k.shape[1]] * batch
    prefix_scores = torch.einsum("btghd,bmghd->bghtm", q, cache_k)
    tree_scores = torch.einsum("btghd,bmghd->bghtm", q, spec_k) * dim**-0.5 + spec_attn_bias
    probs = torch.cat([prefix_scores * dim**-0.5, tree_scores], -1).softmax(-1)
    return torch.einsum("bghtm,bmghd->btghd", probs, torch.cat([cache_v, spec_v], 1))


def test_xformers_is_called_as_documented(monkeypatch):
    names = ["xformers", "xformers.ops", "xformers.ops.fmha", "xformers.ops.fmha.attn_bias"]
    for name in [*names, "xformers.ops.tree_attention"]:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    padded = SimpleNamespace(from_seqlens=lambda **lens: SimpleNamespace(**lens))
    sys.modules["xformers.ops.fmha.attn_bias"].BlockDiagonalPaddedKeysMask = padded
    sys.modules["xformers.ops.tree_attention"].tree_attention = documented_tree_attention
    monkeypatch.setattr(bench, "xformers_reason", lambda: None)
    made = problem()
    assert bench.check(made, bench.xformers_tree(made)) <= bench.TOLERANCE[made.dtype]


def test_rounds_alternate_and_are_summed_up(monkeypatch):
    made, order, now = problem("demo-target"), [], 0.0

    def lasting(name, seconds):
        def build():
            nonlocal now
            order.append(name)
            # the first five rounds of each warm up
            now += 100.0 if order.count(name) <= 5 else seconds

        return build, lambda mask, k, v: None

    def pedantic(run, args, setup, rounds):
        for _ in range(rounds):
            setup()
            started = now
            run(*args)
            stats.stats.data.append(now - started)

    stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now)
    monkeypatch.setattr(bench, "sdpa_mask", lambda problem: lasting("theirs", 2.0))
    benchmark = SimpleNamespace(pedantic=pedantic, stats=stats)
    record = bench.time_rounds(benchmark, made, lasting("ours", 0.5), rounds=3)
    assert order == ["theirs", "ours"] * 8 + ["ours"] * 3
    assert record["ratio"] == record["ratio_p20"] == record["ratio_p80"] == 0.25
    assert record["median_us"] == pytest.approx(0.5e6 / bench.LAYERS)
    assert record["mask_us"] == pytest.approx(0.5e6)


def test_the_page_shows_the_committed_figures():
    root = Path(__file__).resolve().parents[2]
    environment, rows = bench.read_records(
        root / "benchmarks" / "results" / "epyc-2cores-tree-attention.json"
    )
    assert environment["torch"] and {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    page = (root / "docs" / "kernels" / "tree_attention.md").read_text()
    assert bench.table(rows) in page


def test_a_table_has_a_row_a_shape():
    row = {"dtype": "float32", "num_nodes": 8, "prefix_len": 128, "provider": "treespec_torch"}
    row |= {"median_us": 12.6, "ratio": 0.5, "ratio_p20": 0.25, "ratio_p80": 0.75}
    other = {**row, "provider": "sdpa_mask", "num_nodes": 64}
    assert bench.table([row, other]) == (
        "| dtype, nodes, prefix | `treespec_torch` | `sdpa_mask` |\n"
        "|---|---|---|\n"
        "| float32, 8, 128 | 13 · 0.50 [0.25, 0.75] |  |\n"
        "| float32, 64, 128 |  | 13 · 0.50 [0.25, 0.75] |\n"
    )


def test_records_are_kept_without_the_machine(tmp_path):
    row = {"provider": "p", "model": "m", "dtype": "float32", "batch": 1, "num_nodes": 8}
    row |= {"prefix_len": 128, "median_us": 1.23456789, "p20_us": 1.0, "p80_us": 2.0}
    recorded = {"record": row, "environment": {"cpu": "x"}}
    raw_entry, flat_entry = {"extra_info": recorded, "stats": {}}, {"name": "n", **recorded}
    made = {"machine_info": {"node": "secret-host"}, "benchmarks": [raw_entry, flat_entry]}
    raw, kept = tmp_path / "out.json", tmp_path / "kept.json"
    raw.write_text(json.dumps(made))
    bench.keep(raw, kept)
    assert json.loads(kept.read_text()) == {
        "environment": {"cpu": "x"},
        "rows": [{**row, "median_us": 1.235}] * 2,
    }
    assert bench.read_records(kept)[1][0]["num_nodes"] == 8
    pytest.importorskip("matplotlib")
    for source in (raw, kept):
        assert bench.plot(source).stat().st_size > 1000
