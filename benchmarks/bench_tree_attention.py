"""Tree attention against SDPA with a mask, FlexAttention and xformers, layer by layer.

    pytest benchmarks/bench_tree_attention.py --benchmark-json=out.json
        a reduced grid; on a GPU, TREESPEC_FULL=1 times the whole one
    python benchmarks/bench_tree_attention.py out.json
        a plot from the JSON alone, out.png
    python benchmarks/bench_tree_attention.py out.json --records FILE
        the records alone, without the plugin's own figures, in a JSON to keep
    python benchmarks/bench_tree_attention.py FILE --table
        the table of docs/kernels/tree_attention.md

Every provider's answer is checked against the reference before it is timed. On a GPU a CUDA graph
of one call per copy of the cache is replayed, with enough copies that the L2 cache is cold, and the
time of a call is that of the replay over the number of copies; masks are built before. On a CPU a
round is timed: the provider's mask, built once, then a call for each of ``LAYERS`` layers with
caches of their own; times are a layer's share of it. Rounds of the provider and of SDPA with a
dense mask alternate, and ``ratio`` is the median of provider over SDPA, round by round. Each record
carries bytes, flops and, on a GPU, the floor of the chip and the fraction of it reached.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tree_attention_cases import MODELS
from treespec.kernels import ops, torch_attention, tuning

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The whole grid of a GPU takes more than an hour.
WHOLE = ON_GPU and bool(os.environ.get("TREESPEC_FULL"))
NODES = (1, 8, 16, 32, 64, 128, 256) if WHOLE else (8, 64)
LENGTHS = (128, 1024, 8192, 32768) if WHOLE else (1024, 8192) if ON_GPU else (128, 1024)
BATCHES = (1, 4, 8) if WHOLE else (1,)
# The demo pair's target, for a CPU; the large models' caches would only measure a laptop's memory.
SMALL_MODELS = {"demo-target": (4, 2, 64)}
LAYERS = 10
MODEL_NAMES = tuple(MODELS) if ON_GPU else tuple(SMALL_MODELS)
# On a GPU each model has the dtype it is used with.
DTYPES = ("native",) if ON_GPU else ("float32", "bfloat16")
BASELINE = "sdpa_mask"
PROVIDERS = (
    "treespec", "treespec_torch", BASELINE, "transformers_sdpa", "flex_attention", "xformers_tree",
)  # fmt: skip
L2_BYTES = 64 << 20
TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.02}

# What is called once a round, and what is called in every layer: ``layer(mask, k, v)``.
Provider = tuple[Callable[[], object], Callable[..., torch.Tensor]]


class Problem:
    """One call's tensors, with copies of the cache to rotate through, and what an answer costs at
    least."""

    def __init__(
        self, model: str, num_nodes: int, prefix_len: int, batch: int, dtype: str = "native"
    ):
        if model in MODELS:
            heads = MODELS[model]
            shape = (heads.q_heads, heads.kv_heads, heads.head_dim)
            self.softcap, self.window = heads.softcap, heads.sliding_window
        else:
            shape, self.softcap, self.window = SMALL_MODELS[model], None, None
        q_heads, kv_heads, head_dim = shape
        native = "float16" if model.startswith("pythia") else "bfloat16"
        self.dtype = getattr(torch, native if dtype == "native" else dtype)
        self.num_nodes, self.prefix_len, self.scale = num_nodes, prefix_len, head_dim**-0.5
        self.group = q_heads // kv_heads
        generator = torch.Generator().manual_seed(num_nodes + prefix_len)
        slots = prefix_len + num_nodes
        cache_bytes = 4 * batch * kv_heads * slots * head_dim
        copies = min(16, max(1, -(-2 * L2_BYTES // cache_bytes))) if ON_GPU else LAYERS

        def normal(*sizes):
            return torch.randn(*sizes, generator=generator).to(DEVICE, self.dtype)

        # Queries lie as a model's projection leaves them, nodes outside heads.
        self.q = normal(batch, num_nodes, q_heads, head_dim).transpose(1, 2)
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
        self.visible = visible.to(DEVICE).expand(batch, num_nodes, num_nodes)
        self.depths = depths.expand(batch, num_nodes).contiguous().to(DEVICE)
        self.lens = torch.full((batch,), prefix_len, dtype=torch.int32, device=DEVICE)
        parents = torch.tensor(parents, device=DEVICE).expand(batch, num_nodes).contiguous()
        counts = torch.full((batch,), num_nodes, dtype=torch.int32, device=DEVICE)
        self.bits = ops.ancestor_bits(parents.int(), counts)
        self.cost = tuning.tree_attention_cost(
            batch=batch, q_heads=q_heads, kv_heads=kv_heads, num_nodes=num_nodes, head_dim=head_dim,
            value_dim=head_dim, element_bytes=self.dtype.itemsize,
            prefix_len=prefix_len if self.window is None else min(prefix_len, self.window),
        )  # fmt: skip

    def mask(self) -> torch.Tensor:
        """The dense mask that SDPA needs, bool ``[B, 1, N, S]``, from the tree's own N x N."""
        batch, num_nodes, _ = self.visible.shape
        slots = self.prefix_len + num_nodes
        mask = torch.ones(batch, 1, num_nodes, slots, dtype=torch.bool, device=DEVICE)
        mask[:, 0, :, self.prefix_len :] = self.visible
        if self.window is not None:
            prefix = torch.arange(self.prefix_len, device=DEVICE).expand(batch, -1)
            keys = torch.cat([prefix, self.prefix_len + self.depths], 1)
            distance = (self.prefix_len + self.depths)[:, :, None] - keys[:, None]
            mask &= (distance < self.window)[:, None]
        return mask

    def options(self) -> dict:
        window = (
            {} if self.window is None else {"sliding_window": self.window, "depths": self.depths}
        )
        return {"softcap": self.softcap, **window}

    def truth(self) -> torch.Tensor:
        """float32 attention under the dense mask, written out: an oracle that shares no code with a
        provider."""
        k, v = (tensor.float() for tensor in self.caches[0])
        scores = self.q.float() @ k.repeat_interleave(self.group, 1).transpose(-1, -2) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        probs = scores.masked_fill(~self.mask(), float("-inf")).softmax(-1)
        return (probs @ v.repeat_interleave(self.group, 1)).transpose(1, 2)


def nothing() -> None:
    """The mask of a provider that needs none."""


def treespec(problem: Problem) -> Provider:
    implementation = "triton" if ON_GPU else "torch"
    options = {"implementation": implementation, "check_lengths": False, **problem.options()}

    def layer(_, k, v):
        return ops.tree_attention(problem.q, k, v, problem.bits, problem.lens, **options)

    return nothing, layer


def treespec_torch(problem: Problem) -> Provider:
    """The PyTorch path as an engine calls it: the bias once for the layers of a round."""
    q, slots = problem.q, problem.prefix_len + problem.num_nodes
    kv_heads = problem.caches[0][0].shape[1]

    def build():
        if problem.window is None:
            lens = [problem.prefix_len] * len(q)
            bias = torch_attention.visible_bias(problem.visible, lens, slots, problem.dtype)
        else:
            window = {"sliding_window": problem.window, "depths": problem.depths}
            bias = torch_attention.tree_bias(
                problem.bits, problem.lens, slots, problem.dtype, **window
            )
        if problem.softcap is None and not torch_attention.packs_heads(q, kv_heads, slots):
            return bias
        return torch_attention.pack_bias(bias, q.shape[1], kv_heads)

    def layer(bias, k, v):
        return torch_attention.biased_attention(
            q, k, v, bias, scale=problem.scale, softcap=problem.softcap
        )

    return build, layer


def sdpa_mask(problem: Problem) -> Provider:
    """SDPA with a dense additive mask, heads grouped: the fastest of its ways on a CPU."""
    if problem.softcap is not None:
        pytest.skip("SDPA has no softcap")

    def build():
        mask = problem.mask()
        bias = torch.zeros(mask.shape, dtype=problem.dtype, device=DEVICE)
        return bias.masked_fill_(~mask, float("-inf"))

    def layer(bias, k, v):
        out = torch.nn.functional.scaled_dot_product_attention(
            problem.q, k, v, attn_mask=bias, scale=problem.scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    return build, layer


def transformers_sdpa(problem: Problem) -> Provider:
    """SDPA with a dense mask as transformers' models call it."""
    if problem.softcap is not None:
        pytest.skip("SDPA has no softcap")
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = SimpleNamespace(num_key_value_groups=problem.group, is_causal=True)

    def layer(mask, k, v):
        return sdpa_attention_forward(module, problem.q, k, v, mask, scaling=problem.scale)[0]

    return problem.mask, layer


def flex_attention(problem: Problem, compiled: bool = True) -> Provider:
    if not ON_GPU and compiled and shutil.which("g++") is None:
        pytest.skip("FlexAttention compiled for a CPU needs a C++ compiler")
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    softcap = problem.softcap
    batch, num_nodes, _ = problem.visible.shape
    slots = problem.prefix_len + num_nodes
    cap = (
        None
        if softcap is None
        else (lambda score, b, h, i, j: softcap * torch.tanh(score / softcap))
    )
    run = functools.partial(flex, enable_gqa=True, scale=problem.scale)
    if compiled:
        # what was compiled for other shapes counts towards a limit of eight
        torch.compiler.reset()
        run = torch.compile(run, dynamic=False)

    def build():
        mask = problem.mask()[:, 0]
        return create_block_mask(
            lambda b, h, i, j: mask[b, i, j], batch, None, num_nodes, slots, device=DEVICE
        )

    def layer(blocks, k, v):
        return run(problem.q, k, v, score_mod=cap, block_mask=blocks).transpose(1, 2)

    return build, layer


def xformers_reason() -> str | None:
    """Why xformers' tree attention cannot run here; None where it can."""
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    return None if ON_GPU else "xformers' tree attention needs a GPU"


def xformers_tree(problem: Problem) -> Provider:
    if (reason := xformers_reason()) is not None:
        pytest.skip(reason)
    if problem.softcap is not None or problem.window is not None:
        pytest.skip("xformers' tree attention has no softcap and no window by depth")
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask
    from xformers.ops.tree_attention import tree_attention

    prefix_len, num_nodes = problem.prefix_len, problem.num_nodes
    batch, q_heads = problem.q.shape[:2]
    kv_heads, group = problem.caches[0][0].shape[1], problem.group
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

    def build():
        lens = BlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[num_nodes] * batch, kv_seqlen=[prefix_len] * batch, kv_padding=prefix_len
        )
        bias = torch.zeros(num_nodes, num_nodes, device=DEVICE, dtype=problem.dtype)
        return bias.masked_fill_(~problem.visible[0], float("-inf")), lens

    def layer(biases, k, v):
        out = tree_attention(queries, *parts[k.data_ptr()], *biases)
        return out.reshape(batch, num_nodes, q_heads, -1)

    return build, layer


@functools.cache
def facts() -> dict:
    """The machine and versions of a record."""

    def output(*command):
        try:
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    found = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for package in ("triton", "transformers", "xformers"):
        if importlib.util.find_spec(package) is not None:
            found[package] = importlib.metadata.version(package)
    found["git"] = output("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD")
    if ON_GPU:
        found["gpu"] = torch.cuda.get_device_name()
        found["driver"] = output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def graph_of(provider: Provider, caches):
    """A CUDA graph of one call per copy of the cache."""
    build, layer = provider
    mask = build()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for k, v in caches[:1]:
            layer(mask, k, v)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for k, v in caches:
            layer(mask, k, v)
    return graph


def run_round(provider: Provider, caches) -> None:
    """A round of a CPU: the mask once, then every layer."""
    build, layer = provider
    mask = build()
    for k, v in caches:
        layer(mask, k, v)


def time_graph(benchmark, problem: Problem, provider: Provider) -> dict:
    """Times of a call in microseconds on a GPU, beside the floor of the chip."""
    graph = graph_of(provider, problem.caches)

    def replay():
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, warmup_rounds=5, rounds=40)
    major, minor = torch.cuda.get_device_capability()
    _, chip = tuning.chip_for(10 * major + minor)
    record = summary(benchmark, len(problem.caches))
    record |= {"floor_us": problem.cost.floor_us(chip), "floor_chip": chip.name}
    record["fraction_of_floor"] = record["floor_us"] / record["median_us"]
    return record


def time_rounds(benchmark, problem: Problem, provider: Provider, rounds: int = 60) -> dict:
    """Times of a layer's share of a round in microseconds on a CPU, and ratios to alternating
    rounds of SDPA; the first rounds are dropped."""
    baseline, warm_ups, other_s = sdpa_mask(problem), 5, []

    def other_round():
        started = time.perf_counter()
        run_round(baseline, problem.caches)
        other_s.append(time.perf_counter() - started)

    arguments = (provider, problem.caches)
    for _ in range(warm_ups):
        other_round()
        run_round(*arguments)
    other_s.clear()
    benchmark.pedantic(run_round, args=arguments, setup=other_round, rounds=rounds)
    own_s = benchmark.stats.stats.data
    ratios = torch.tensor([own / other for own, other in zip(own_s, other_s)])
    low, middle, high = ratios.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    builds = []
    for _ in range(rounds):
        started = time.perf_counter()
        provider[0]()
        builds.append(time.perf_counter() - started)
    record = summary(benchmark, len(problem.caches))
    record |= {"ratio": middle, "ratio_p20": low, "ratio_p80": high}
    return record | {"layers": LAYERS, "mask_us": sorted(builds)[rounds // 2] * 1e6}


def summary(benchmark, calls: int) -> dict:
    times = torch.tensor(benchmark.stats.stats.data) * 1e6 / calls
    low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"median_us": middle, "p20_us": low, "p80_us": high}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("prefix_len", LENGTHS)
@pytest.mark.parametrize("num_nodes", NODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODEL_NAMES)
@torch.no_grad()
def test_layer(benchmark, model, dtype, num_nodes, prefix_len, batch, provider):
    problem = Problem(model, num_nodes, prefix_len, batch, dtype)
    run = globals()[provider](problem)
    error = check(problem, run)
    assert error <= TOLERANCE[problem.dtype], f"{provider} is wrong by {error}"
    dtype = str(problem.dtype).removeprefix("torch.")
    benchmark.group = f"{model} {dtype} N={num_nodes} L={prefix_len} B={batch}"
    record = {
        "provider": provider,
        "model": model,
        "dtype": dtype,
        "num_nodes": num_nodes,
        "prefix_len": prefix_len,
        "batch": batch,
        "bytes": problem.cost.bytes,
        "flops": problem.cost.flops,
        "max_error": error,
    }
    record |= (time_graph if ON_GPU else time_rounds)(benchmark, problem, run)
    benchmark.extra_info.update(record=record, environment=facts())


def check(problem: Problem, provider: Provider) -> float:
    """The largest error of a provider's answer."""
    build, layer = provider
    got, truth = layer(build(), *problem.caches[0]).float(), problem.truth()
    assert got.shape == truth.shape, f"got {list(got.shape)}, expected {list(truth.shape)}"
    return (got - truth).abs().max().item()


def read_records(path: Path) -> tuple[dict, list[dict]]:
    """The environment and the records of a JSON of pytest-benchmark, or of one that was kept."""
    content = json.loads(path.read_text())
    if "rows" in content:
        return content["environment"], content["rows"]
    # benchmarks/conftest.py lays what a test recorded beside the plugin's own figures.
    entries = [entry.get("extra_info", entry) for entry in content["benchmarks"]]
    return entries[0]["environment"], [entry["record"] for entry in entries]


def keep(path: Path, kept: Path) -> None:
    """Writes the records alone, numbers to four digits."""
    environment, records = read_records(path)
    rows = [
        {
            name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in record.items()
        }
        for record in records
    ]
    kept.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


def plot(path: Path) -> Path:
    """A picture of the medians in a JSON of pytest-benchmark, one panel per model and batch; needs
    nothing else."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    _, records = read_records(path)
    panels = sorted({panel_of(record) for record in records})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels):
        here = [record for record in records if panel_of(record) == panel]
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
            title="{}, {}, batch {}".format(*panel),
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


def table(records: list[dict]) -> str:
    """Rounds of a CPU as a page's table: a row a shape, a column a provider."""
    names = [name for name in PROVIDERS if any(r["provider"] == name for r in records)]
    cells = {
        (r["dtype"], r["num_nodes"], r["prefix_len"], r["provider"]): (
            f"{r['median_us']:.0f} · {r['ratio']:.2f} [{r['ratio_p20']:.2f}, {r['ratio_p80']:.2f}]"
        )
        for r in records
    }
    lines = [f"| dtype, nodes, prefix | {' | '.join(f'`{name}`' for name in names)} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for shape in dict.fromkeys(key[:3] for key in cells):
        row = [cells.get((*shape, name), "") for name in names]
        lines.append("| " + " | ".join([", ".join(map(str, shape)), *row]) + " |")
    return "\n".join(lines) + "\n"


def panel_of(record: dict) -> tuple:
    return record["model"], record["dtype"], record["batch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="of pytest-benchmark, or records that were kept")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--records", type=Path, help="write the records here instead of a plot")
    mode.add_argument("--table", action="store_true", help="print a table instead of a plot")
    options = parser.parse_args()
    if options.records is not None:
        keep(options.json, options.records)
    elif options.table:
        print(table(read_records(options.json)[1]), end="")
    else:
        print(plot(options.json))


if __name__ == "__main__":
    main()
