"""The small kernels of a round against straightforward PyTorch, under pytest-benchmark.

    pytest benchmarks/bench_small_kernels.py --benchmark-json=out.json

Every provider's answer is checked against the reference, or for the largest vocabularies against
the other provider, before it is timed. On a GPU a call is a CUDA graph's replay, with the logits
rotated through enough copies that the L2 cache is cold; on a CPU it is the call itself, one thread.
Records carry the bytes a call must move, and on a GPU the floor at the chip's bandwidth.
"""

from __future__ import annotations

import functools
import platform

import pytest
import torch
from treespec.kernels import ops, reference

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# (nodes, vocabulary): the demo pair on a CPU, real models on a GPU.
VERIFY = (
    ((16, 128256), (64, 128256), (64, 151936), (256, 50257))
    if ON_GPU
    else ((24, 4096), (64, 32000))
)
RULES = ("coupled", "target_only", "without_replacement", "traversal")
L2_BYTES = 64 << 20


def tree(nodes: int, branching: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Parents [1, N] of a bushy tree, and num_nodes [1]."""
    parents = [-1] + [(node - 1) // branching for node in range(1, nodes)]
    return torch.tensor([parents], device=DEVICE), torch.tensor([nodes], device=DEVICE)


def verify_inputs(nodes: int, vocab_size: int, copies: int):
    """Logits that agree with the draft for three levels, and a draft distribution near the
    target's.
    """
    generator = torch.Generator().manual_seed(nodes)
    parents, num_nodes = tree(nodes)
    tokens = torch.randint(0, vocab_size, (1, nodes), generator=generator)
    logits = torch.randn(1, nodes, vocab_size, generator=generator)
    node = 0
    for _ in range(3):
        child = 3 * node + 2
        if child < nodes:
            logits[0, node, tokens[0, child]] = 30.0
            node = child
    logits = logits.to(DEVICE, torch.bfloat16)
    draft_probs = (logits.float() + 0.3).softmax(-1)
    positions = ops.node_depths(parents, num_nodes) + 100
    return (
        [logits.clone() for _ in range(copies)],
        tokens.to(DEVICE),
        parents,
        num_nodes,
        positions,
        draft_probs,
    )


def copies_of(size: int) -> int:
    return max(1, min(16, -(-2 * L2_BYTES // size))) if ON_GPU else 1


def torch_greedy(logits, tokens, parents, num_nodes):
    """What one would write first: argmax of all nodes, then a walk on the host."""
    choices = logits.argmax(-1).tolist()
    paths, bonus = [], []
    for b, count in enumerate(num_nodes.tolist()):
        node, path = 0, [0]
        while True:
            hits = [
                n
                for n in range(1, count)
                if parents[b, n] == node and tokens[b, n] == choices[b][node]
            ]
            if not hits:
                break
            node = hits[0]
            path.append(node)
        paths.append(path)
        bonus.append(choices[b][node])
    return paths, bonus


def torch_multinomial(logits, tokens, parents, num_nodes):
    """A softmax over all nodes and a walk that draws at each: what ``coupled`` replaces."""
    probs = logits.float().softmax(-1)
    node = 0
    while True:
        choice = int(torch.multinomial(probs[0, node], 1))
        hits = ((parents[0] == node) & (tokens[0] == choice)).nonzero()
        if not len(hits):
            return choice
        node = int(hits[0])


def measure(
    benchmark, call, inputs: list, name: str, shape: str, moved_bytes: int, graph: bool = True
) -> None:
    """Time ``call(input)`` over rotating inputs; on a GPU by replaying a graph of one call an
    input.
    """
    benchmark.extra_info.update(
        provider=name, shape=shape, bytes=moved_bytes, torch=torch.__version__,
        python=platform.python_version(),
        device=torch.cuda.get_device_name() if ON_GPU else platform.processor() or "cpu",
        calls=len(inputs),
    )  # fmt: skip
    if not ON_GPU:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        benchmark.pedantic(call, args=(inputs[0],), rounds=30, iterations=3, warmup_rounds=3)
        torch.set_num_threads(threads)
        return
    for one in inputs:
        call(one)
    torch.cuda.synchronize()
    if not graph:
        benchmark.pedantic(
            lambda: (call(inputs[0]), torch.cuda.synchronize()), rounds=30, warmup_rounds=3
        )
        return
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for one in inputs:
            call(one)
    benchmark.pedantic(
        lambda: (captured.replay(), torch.cuda.synchronize()), rounds=50, warmup_rounds=5
    )


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("nodes, vocab_size", VERIFY)
def test_verify_greedy(benchmark, nodes, vocab_size, provider):
    copies = copies_of(nodes * vocab_size * 2)
    logits, tokens, parents, num_nodes, _, _ = verify_inputs(nodes, vocab_size, copies)
    call = torch_greedy if provider == "torch" else ops.verify_greedy
    paths, bonus = torch_greedy(logits[0], tokens, parents, num_nodes)
    verdict = ops.verify_greedy(logits[0], tokens, parents, num_nodes)
    assert (
        verdict.path[0, : len(paths[0])].tolist() == paths[0]
        and verdict.bonus_token.tolist() == bonus
    )
    measure(benchmark, lambda x: call(x, tokens, parents, num_nodes), logits, provider,
            f"N={nodes} V={vocab_size}", nodes * vocab_size * 2,
                graph=provider != "torch")  # fmt: skip


@pytest.mark.parametrize("provider", [*RULES, "coupled, noise at hand", "torch multinomial"])
@pytest.mark.parametrize("nodes, vocab_size", VERIFY)
def test_verify_sampled(benchmark, nodes, vocab_size, provider):
    copies = copies_of(nodes * vocab_size * 2)
    logits, tokens, parents, num_nodes, positions, draft_probs = verify_inputs(
        nodes, vocab_size, copies
    )
    if provider == "torch multinomial":

        def call(x):
            return torch_multinomial(x, tokens, parents, num_nodes)
    else:
        rule, _, at_hand = provider.partition(", ")
        steps = torch.arange(9, device=DEVICE)
        rows = torch.zeros(1, dtype=torch.long, device=DEVICE)
        noise = ops.gumbel_noise(7, rows, positions[:, :1] + 1 + steps, vocab_size)
        call = functools.partial(
            ops.verify_sampled, tokens=tokens, parents=parents, num_nodes=num_nodes,
            positions=positions, draft_probs=draft_probs, rule=rule, seed=7,
            noise=noise if at_hand else None,
        )  # fmt: skip
        verdict, again = call(logits[0]), call(logits[0])
        assert (
            torch.equal(verdict.path, again.path) and 0 <= int(verdict.bonus_token[0]) < vocab_size
        )
    measure(benchmark, call, logits, provider, f"N={nodes} V={vocab_size}", nodes * vocab_size * 2,
            graph=provider != "torch multinomial")  # fmt: skip


def torch_children(logits, cum_logprobs, num_children, noise):
    """Log-softmax over all, then top-k of all; which of equal tokens is taken is not defined."""
    scores = logits.float() if noise is None else logits.float() + noise
    values, tokens = scores.log_softmax(-1).topk(num_children)
    return tokens, values + cum_logprobs[..., None]


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("drafting", ["top", "coupled", "sampled"])
@pytest.mark.parametrize(
    "frontier, vocab_size", [(8, 151936), (32, 128256)] if ON_GPU else [(6, 4096), (6, 32000)]
)
def test_draft_children(benchmark, frontier, vocab_size, drafting, provider):
    """Coupled drafting has its noise at hand on a CPU, in both; drawn children never have."""
    generator = torch.Generator().manual_seed(3)
    # Distinct numbers in every row: topk need not order equal ones.
    order = torch.stack([torch.randperm(vocab_size, generator=generator) for _ in range(frontier)])
    logits = (order[None] / vocab_size * 20).to(DEVICE)
    parents = torch.zeros(1, frontier, device=DEVICE)
    rows = torch.zeros(1, dtype=torch.long, device=DEVICE)
    places = torch.arange(frontier, device=DEVICE)[None]
    level = torch.full((1, frontier), 9, device=DEVICE)
    shared = ops.gumbel_noise(7, rows, level[:, :1], vocab_size)

    def own(x):
        return ops.gumbel_noise(7, rows, places, vocab_size, stream=4 * 8 + 1)

    def treespec(x):
        return ops.draft_children(
            x, parents, 6, drafting=drafting, seed=7, rows=rows, positions=level, nodes=places,
            root_positions=level[:, 0] - 1, noise=shared if drafting == "coupled" else None,
        )  # fmt: skip

    def plain(x):
        if drafting != "sampled":
            return torch_children(x, parents, 6, shared if drafting == "coupled" else None)
        logprobs = x.log_softmax(-1)
        tokens = (logprobs + own(x)).topk(6).indices
        return tokens, logprobs.gather(2, tokens) + parents[..., None]

    wanted, got = plain(logits), treespec(logits)
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)
    inputs = [logits.clone() for _ in range(copies_of(logits.numel() * 4))]
    measure(benchmark, plain if provider == "torch" else treespec, inputs, provider,
            f"{drafting} F={frontier} V={vocab_size} K=6", logits.numel() * 4)  # fmt: skip


def torch_merge(continuations):
    """Every pair of continuations compared at once."""
    num, length = continuations.shape[1:]
    known = (continuations >= 0).cumprod(2).bool()
    equal = (continuations[:, :, None] == continuations[:, None]) & known[:, None]
    same = equal.cumprod(3)
    first = same.argmax(2)
    fresh = (first == torch.arange(num, device=DEVICE)[:, None]) & known
    place = first * length + torch.arange(length, device=DEVICE)
    parents = torch.nn.functional.pad(place[..., :-1], (1, 0), value=-1)
    votes = torch.tensor([0.4, 0.25, 0.2, *[0.15] * num][:num]).to(DEVICE)
    total = (votes * known[..., 0]).sum(1).clamp(min=1e-9)
    share = (same * votes[:, None]).sum(2) / total[:, None, None]
    return parents.masked_fill(~fresh, -1), fresh, share


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("num, length", [(4, 8), (8, 16)])
def test_merge_continuations(benchmark, num, length, provider):
    generator = torch.Generator().manual_seed(4)
    continuations = torch.randint(0, 2, (1, num, length), generator=generator).to(DEVICE)
    call = torch_merge if provider == "torch" else ops.merge_continuations
    wanted = reference.merge_continuations(continuations.cpu())
    for one, other in zip(call(continuations), wanted):
        torch.testing.assert_close(one.cpu(), other)
    measure(benchmark, call, [continuations], provider, f"M={num} L={length}",
            num * length * (8 + 8 + 1 + 4))  # fmt: skip


@pytest.mark.parametrize("vocab_size", [4096, 151936] if ON_GPU else [4096, 32000])
def test_gumbel_noise(benchmark, vocab_size):
    rows, positions = torch.tensor([3], device=DEVICE), torch.arange(32, device=DEVICE)[None]
    few = ops.gumbel_noise(7, rows, positions[:, :1], 200)
    torch.testing.assert_close(
        few.cpu(), reference.gumbel_noise(7, rows, positions[:, :1], 200), rtol=1e-6, atol=1e-6
    )
    measure(benchmark, lambda p: ops.gumbel_noise(7, rows, p, vocab_size), [positions], "treespec",
            f"32 positions V={vocab_size}", 32 * vocab_size * 4)  # fmt: skip


def torch_ancestor_bits(parents, num_nodes):
    """A dense mask by repeated products, then packed."""
    batch, capacity = parents.shape
    index = torch.arange(capacity, device=parents.device)
    step = (parents.clamp(min=0)[..., None] == index) & (parents[..., None] >= 0)
    mask = torch.eye(capacity, dtype=torch.bool, device=parents.device).expand(batch, -1, -1)
    for _ in range(capacity.bit_length()):
        mask = mask | (step.float() @ mask.float() > 0)
        step = step.float() @ step.float() > 0
    padded = torch.nn.functional.pad(mask.long(), (0, -capacity % 32)).reshape(
        batch, capacity, -1, 32
    )
    return (padded << torch.arange(32, device=parents.device)).sum(-1).to(torch.int32)


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("nodes", [24, 64, 256])
def test_ancestor_bits(benchmark, nodes, provider):
    parents, num_nodes = tree(nodes)
    call = torch_ancestor_bits if provider == "torch" else ops.ancestor_bits
    assert torch.equal(
        call(parents, num_nodes).cpu(), reference.ancestor_bits(parents.cpu(), num_nodes.cpu())
    )
    measure(
        benchmark,
        lambda p: call(p, num_nodes),
        [parents],
        provider,
        f"N={nodes}",
        nodes * (8 + 4 * -(-nodes // 32)),
    )


def torch_select(scores, parents, max_nodes):
    """The top N by value; parents of equal value are not guaranteed a place, and nothing is
    renumbered.
    """
    return scores.topk(max_nodes).indices.sort().values


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("candidates, max_nodes", [(64, 24), (512, 64), (2048, 256)])
def test_select_best_nodes(benchmark, candidates, max_nodes, provider):
    parents, _ = tree(candidates)
    generator = torch.Generator().manual_seed(1)
    steps = -torch.rand(candidates, generator=generator)
    scores = torch.zeros(1, candidates)
    for node in range(1, candidates):
        scores[0, node] = scores[0, (node - 1) // 3] + steps[node]
    scores = scores.to(DEVICE)
    selection = ops.select_best_nodes(scores, parents, max_nodes)
    assert torch.equal(selection.nodes, torch_select(scores, parents, max_nodes))
    call = torch_select if provider == "torch" else ops.select_best_nodes
    measure(benchmark, lambda x: call(x, parents, max_nodes), [scores], provider,
    f"C={candidates} N={max_nodes}",
            candidates * 12 + max_nodes * 16)  # fmt: skip


def torch_match(tokens, lens, max_ngram, num_matches, length):
    """Windows of every size compared with the tail, the longest first."""
    count = int(lens[0])
    history = tokens[0, :count]
    for size in range(max_ngram, 0, -1):
        windows = history[: count - 1].unfold(0, size, 1)
        ends = (windows == history[count - size :]).all(1).nonzero()[:, 0] + size
        if len(ends):
            return [
                history[end : end + length].tolist() for end in ends.flip(0)[:num_matches].tolist()
            ], size
    return [], 0


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("history", [1000, 32000])
def test_match_ngrams(benchmark, history, provider):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 300, (1, history), generator=generator)
    tokens[0, 100:120] = tokens[0, -20:]
    tokens, lens = tokens.to(DEVICE), torch.tensor([history], device=DEVICE)
    options = {"max_ngram": 4, "num_matches": 4, "length": 8}
    wanted, size = torch_match(tokens, lens, **options)
    got, match_length = ops.match_ngrams(tokens, lens, **options)
    assert match_length.item() == size and got[0, 0].tolist() == wanted[0]
    call = torch_match if provider == "torch" else ops.match_ngrams
    measure(benchmark, lambda x: call(x, lens, **options), [tokens], provider, f"S={history}",
    history * 8,
            graph=provider != "torch")  # fmt: skip


def torch_compact(layers, path, accept_length, prefix_lens):
    """An index copy a cache."""
    count, start = int(accept_length[0]) + 1, int(prefix_lens[0])
    source = start + path[0, :count]
    for pair in layers:
        for cache in pair:
            cache[0, :, start : start + count] = cache[0, :, source]


@pytest.mark.parametrize("provider", ["treespec", "torch"])
@pytest.mark.parametrize("moves", ["prefix", "scattered"])
def test_compact_kv(benchmark, moves, provider):
    num_layers, heads, slots, dim = (32, 8, 4096, 128) if ON_GPU else (12, 4, 1024, 64)
    dtype = torch.bfloat16
    layers = [
        tuple(torch.randn(1, heads, slots, dim, device=DEVICE).to(dtype) for _ in "kv")
        for _ in range(num_layers)
    ]
    nodes = [0, 1, 2, 3, 4] if moves == "prefix" else [0, 2, 5, 9, 14]
    path = torch.tensor([nodes + [-1] * 19], device=DEVICE)
    accept_length, prefix_lens = (
        torch.tensor([4], device=DEVICE),
        torch.tensor([900], device=DEVICE),
    )
    wanted = [tuple(cache.cpu() for cache in pair) for pair in layers[:1]]
    reference.compact_kv(wanted, path.cpu(), accept_length.cpu(), prefix_lens.cpu())
    call = torch_compact if provider == "torch" else ops.compact_kv
    call(layers, path, accept_length, prefix_lens)
    assert all(torch.equal(got.cpu(), right) for got, right in zip(layers[0], wanted[0]))
    moved = sum(node != place for place, node in enumerate(nodes))
    measure(benchmark, lambda p: call(layers, p, accept_length, prefix_lens), [path], provider,
    f"{num_layers} layers, {moves}",
            4 * num_layers * heads * dim * 2 * moved, graph=provider != "torch")  # fmt: skip
