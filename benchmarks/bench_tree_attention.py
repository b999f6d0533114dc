"""Tree attention against SDPA with a mask, FlexAttention and xformers, layer by layer.

    pytest benchmarks/bench_tree_attention.py --benchmark-json=out.json     a reduced grid on a CPU,
    the whole one on a GPU python benchmarks/bench_tree_attention.py out.json                      a
    plot from the JSON alone, out.png

Every provider's answer is checked against the reference before it is timed. On a GPU a CUDA graph
of one call per copy of the cache is replayed, with enough copies that the L2 cache is cold, and the
time of a call is that of the replay over the number of copies. Each record carries bytes, flops,
the floor of the chip and the fraction of it reached.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tree_attention_cases import MODELS
from treespec.kernels import ops, torch_attention, tuning

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NODES = (1, 8, 16, 32, 64, 128, 256) if ON_GPU else (8, 64)
LENGTHS = (128, 1024, 8192, 32768) if ON_GPU else (128, 1024)
BATCHES = (1, 4, 8) if ON_GPU else (1,)
# The demo pair's target, for a CPU; the large models' caches would only measure a laptop's memory.
SMALL_MODELS = {"demo-target": (4, 2, 64)}
MODEL_NAMES = tuple(MODELS) if ON_GPU else tuple(SMALL_MODELS)
PROVIDERS = ("treespec", "treespec_torch", "sdpa_mask", "flex_attention", "xformers_tree")
L2_BYTES = 64 << 20


class Problem:
    """One call's tensors, with copies of the cache to rotate through, and what an answer costs at
    least."""

    def __init__(self, model: str, num_nodes: int, prefix_len: int, batch: int):
        if model in MODELS:
            heads = MODELS[model]
            shape = (heads.q_heads, heads.kv_heads, heads.head_dim)
            self.softcap, self.window = heads.softcap, heads.sliding_window
        else:
            shape, self.softcap, self.window = SMALL_MODELS[model], None, None
        q_heads, kv_heads, head_dim = shape
        self.dtype = torch.float16 if model.startswith("pythia") else torch.bfloat16
        self.num_nodes, self.prefix_len, self.scale = num_nodes, prefix_len, head_dim**-0.5
        generator = torch.Generator().manual_seed(num_nodes + prefix_len)
        slots = prefix_len + num_nodes
        cache_bytes = 4 * batch * kv_heads * slots * head_dim
        copies = min(16, max(1, -(-2 * L2_BYTES // cache_bytes))) if ON_GPU else 1

        def normal(*sizes):
            return torch.randn(*sizes, generator=generator).to(DEVICE, self.dtype)

        self.q = normal(batch, q_heads, num_nodes, head_dim)
        self.caches = [
            (normal(batch, kv_heads, slots, head_dim), normal(batch, kv_heads, slots, head_dim))
        ]
        self.caches += [
            tuple(tensor.clone() for tensor in self.caches[0]) for _ in range(copies - 1)
        ]
        parents = [
            -1,
            *(
                int(torch.randint(max(0, i - 8), i, (1,), generator=generator))
                for i in range(1, num_nodes)
            ),
        ]
        visible = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)
        depths = torch.zeros(num_nodes, dtype=torch.int32)
        for node, parent in enumerate(parents):
            if parent >= 0:
                visible[node], depths[node] = visible[parent], depths[parent] + 1
            visible[node, node] = True
        self.depths = depths.expand(batch, num_nodes).contiguous().to(DEVICE)
        self.lens = torch.full((batch,), prefix_len, dtype=torch.int32, device=DEVICE)
        parents = torch.tensor(parents, device=DEVICE).expand(batch, num_nodes).contiguous()
        counts = torch.full((batch,), num_nodes, dtype=torch.int32, device=DEVICE)
        self.bits = ops.ancestor_bits(parents.int(), counts)
        mask = torch.cat([torch.ones(num_nodes, prefix_len, dtype=torch.bool), visible], 1)
        if self.window is not None:
            positions = torch.cat([torch.arange(prefix_len), prefix_len + depths])
            mask &= (prefix_len + depths)[:, None] - positions[None] < self.window
        self.mask = mask.to(DEVICE).expand(batch, 1, num_nodes, slots)
        self.cost = tuning.tree_attention_cost(
            batch=batch, q_heads=q_heads, kv_heads=kv_heads, num_nodes=num_nodes, head_dim=head_dim,
            value_dim=head_dim, element_bytes=2,
            prefix_len=prefix_len if self.window is None else min(prefix_len, self.window),
        )  # fmt: skip

    def options(self) -> dict:
        window = (
            {} if self.window is None else {"sliding_window": self.window, "depths": self.depths}
        )
        return {"softcap": self.softcap, **window}

    def truth(self) -> torch.Tensor:
        """float32 attention under the dense mask, written out: an oracle that shares no code with a
        provider."""
        k, v = (tensor.float() for tensor in self.caches[0])
        group = self.q.shape[1] // k.shape[1]
        scores = self.q.float() @ k.repeat_interleave(group, 1).transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        probs = scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        return (probs @ v.repeat_interleave(group, 1)).transpose(1, 2)


def treespec(problem: Problem):
    implementation = "triton" if ON_GPU else "torch"
    options = {"implementation": implementation, "check_lengths": False, **problem.options()}
    return lambda k, v: ops.tree_attention(problem.q, k, v, problem.bits, problem.lens, **options)


def treespec_torch(problem: Problem):
    """The PyTorch path with the bias built once, as an engine does for the layers of a round."""
    slots = problem.prefix_len + problem.num_nodes
    window = {
        key: value
        for key, value in problem.options().items()
        if key in ("sliding_window", "depths")
    }
    bias = torch_attention.tree_bias(problem.bits, problem.lens, slots, problem.dtype, **window)
    bias = torch_attention.pack_bias(bias, problem.q.shape[1], problem.caches[0][0].shape[1])
    return lambda k, v: torch_attention.biased_attention(
        problem.q, k, v, bias, scale=problem.scale, softcap=problem.softcap
    )


def sdpa_mask(problem: Problem):
    if problem.softcap is not None:
        pytest.skip("SDPA has no softcap")

    def run(k, v):
        out = torch.nn.functional.scaled_dot_product_attention(
            problem.q, k, v, attn_mask=problem.mask, scale=problem.scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    return run


def flex_attention(problem: Problem):
    if not ON_GPU:
        pytest.skip("FlexAttention is compiled for a GPU")
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask, softcap = problem.mask[0, 0], problem.softcap
    batch, _, num_nodes, slots = problem.mask.shape
    blocks = create_block_mask(
        lambda b, h, i, j: mask[i, j], batch, None, num_nodes, slots, device=DEVICE
    )
    cap = (
        None
        if softcap is None
        else (lambda score, b, h, i, j: softcap * torch.tanh(score / softcap))
    )
    run = torch.compile(
        functools.partial(flex, enable_gqa=True, scale=problem.scale), dynamic=False
    )
    return lambda k, v: run(problem.q, k, v, score_mod=cap, block_mask=blocks).transpose(1, 2)


def xformers_tree(problem: Problem):
    if not ON_GPU or importlib.util.find_spec("xformers") is None:
        pytest.skip("xformers is not installed, or there is no GPU")
    if problem.softcap is not None:
        pytest.skip("xformers' tree attention has no softcap")
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask
    from xformers.ops.tree_attention import tree_attention

    if problem.window is not None:
        pytest.skip("xformers' tree attention has no window by depth")
    prefix_len, num_nodes = problem.prefix_len, problem.num_nodes
    batch, q_heads = problem.q.shape[:2]
    kv_heads = problem.caches[0][0].shape[1]
    lens = BlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[num_nodes] * batch, kv_seqlen=[prefix_len] * batch, kv_padding=prefix_len
    )
    bias = torch.zeros(num_nodes, num_nodes, device=DEVICE, dtype=problem.dtype)
    bias.masked_fill_(~problem.mask[0, 0, :, prefix_len:], float("-inf"))
    group = q_heads // kv_heads
    queries = problem.q.transpose(1, 2).unflatten(2, (kv_heads, group)).contiguous()

    def rows(tensor):
        rows_first = tensor.transpose(1, 2).contiguous().unsqueeze(3)
        return rows_first.expand(-1, -1, -1, group, -1)

    # Its own layout, prefix and tree apart, is prepared outside the timing.
    parts = {
        k.data_ptr(): [
            *(rows(tensor[:, :, prefix_len:]) for tensor in (k, v)),
            *(rows(tensor[:, :, :prefix_len]) for tensor in (k, v)),
        ]
        for k, v in problem.caches
    }  # fmt: skip

    def run(k, v):
        out = tree_attention(queries, *parts[k.data_ptr()], bias, lens)
        return out.reshape(batch, num_nodes, q_heads, -1)

    return run


@functools.cache
def facts() -> dict:
    """The machine and versions of a record."""
    import transformers

    def output(*command):
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    found = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": platform.processor(),
    }
    found["git"] = output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.metadata.version("triton")
    if ON_GPU:
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def graph_of(run, caches):
    """A CUDA graph of one call per copy of the cache."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for k, v in caches[:1]:
            run(k, v)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k, v in caches:
            run(k, v)
    return graph


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("prefix_len", LENGTHS)
@pytest.mark.parametrize("num_nodes", NODES)
@pytest.mark.parametrize("model", MODEL_NAMES)
def test_layer(benchmark, model, num_nodes, prefix_len, batch, provider):
    problem = Problem(model, num_nodes, prefix_len, batch)
    run = globals()[provider](problem)
    got, truth = run(*problem.caches[0]).float(), problem.truth()
    error = (got - truth).abs().max().item()
    assert got.shape == truth.shape and error <= 0.02, f"{provider} is wrong by {error}"
    benchmark.group = f"{model} N={num_nodes} L={prefix_len} B={batch}"
    record = {
        "provider": provider,
        "model": model,
        "num_nodes": num_nodes,
        "prefix_len": prefix_len,
        "batch": batch,
    }
    record |= {
        "bytes": problem.cost.bytes,
        "flops": problem.cost.flops,
        "max_error": error,
        **facts(),
    }
    if ON_GPU:
        graph = graph_of(run, problem.caches)

        def replay():
            graph.replay()
            torch.cuda.synchronize()

        benchmark.pedantic(replay, warmup_rounds=5, rounds=40)
        calls = len(problem.caches)
        _, chip = tuning.chip_for(
            10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
        )
        record["floor_us"], record["floor_chip"] = problem.cost.floor_us(chip), chip.name
    else:
        benchmark.pedantic(run, args=problem.caches[0], warmup_rounds=5, rounds=60)
        calls = 1
    times = torch.tensor(benchmark.stats.stats.data) * 1e6 / calls
    record["median_us"] = times.median().item()
    record["p20_us"], record["p80_us"] = times.quantile(torch.tensor([0.2, 0.8])).tolist()
    if "floor_us" in record:
        record["fraction_of_floor"] = record["floor_us"] / record["median_us"]
    benchmark.extra_info.update(record)


def plot(path: Path) -> Path:
    """A picture of the medians in a JSON of pytest-benchmark, one panel per model and batch; needs
    nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    panels = sorted({(record["model"], record["batch"]) for record in records})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (model, batch) in zip(axes[0], panels):
        here = [
            record for record in records if (record["model"], record["batch"]) == (model, batch)
        ]
        for provider, length in sorted(
            {(record["provider"], record["prefix_len"]) for record in here}
        ):
            line = sorted(
                (record["num_nodes"], record["median_us"], record["p20_us"], record["p80_us"])
                for record in here
                if (record["provider"], record["prefix_len"]) == (provider, length)
            )
            nodes, median, low, high = zip(*line)
            axis.plot(nodes, median, marker="o", label=f"{provider}, L={length}")
            axis.fill_between(nodes, low, high, alpha=0.15)
        axis.set(
            title=f"{model}, batch {batch}",
            xlabel="tree nodes",
            ylabel="µs a layer",
            xscale="log",
            yscale="log",
        )
        axis.legend(fontsize="x-small")
    picture = path.with_suffix(".png")
    figure.tight_layout()
    figure.savefig(picture)
    return picture


if __name__ == "__main__":
    print(plot(Path(sys.argv[1])))
