"""Tree attention: the reference on trees written out by hand, both paths against the reference, and
refusals."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from treespec.kernels import checks, ops, reference, torch_attention
from treespec.kernels.tuning import TreeAttentionConfig

from treespec import hf

# Absolute slack per dtype, on top of twice the error that the reference itself makes at that dtype.
ATOL = {torch.float32: 2e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
PATHS = ["torch", "triton"]
SMALL_TILES = TreeAttentionConfig(16, 32, 4, 2, num_splits=3, min_tiles=1)


def bits_of(rows: list[list[int]], num_nodes: int) -> torch.Tensor:
    """int32 [N, W] words from the visible nodes of each row."""
    words = [
        [sum(1 << (j % 32) for j in row if j // 32 == w) for w in range(-(-num_nodes // 32))]
        for row in rows
    ]
    return torch.tensor(
        [[w - (1 << 32) if w >> 31 else w for w in row] for row in words], dtype=torch.int32
    )


def random_trees(
    batch: int, num_nodes: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ancestor bits [B, N, W] and depths [B, N] of trees whose parents are drawn from the earlier
    nodes."""
    all_bits, all_depths = [], []
    for _ in range(batch):
        rows, depths = [[0]], [0]
        for i in range(1, num_nodes):
            parent = int(torch.randint(max(0, i - 12), i, (1,), generator=generator))
            rows.append([*rows[parent], i])
            depths.append(depths[parent] + 1)
        all_bits.append(bits_of(rows, num_nodes))
        all_depths.append(torch.tensor(depths, dtype=torch.int32))
    return torch.stack(all_bits), torch.stack(all_depths)


class Case:
    """Inputs of one call, with every cache row past the nodes poisoned."""

    def __init__(
        self, lens, num_nodes, *, heads=(4, 2), dims=(32, 32), seed=0, spare=5, strided=False
    ):
        generator = torch.Generator().manual_seed(seed)
        batch, (q_heads, kv_heads), (head_dim, value_dim) = len(lens), heads, dims
        rows = max(lens) + num_nodes + spare

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        self.q = normal(batch, num_nodes, q_heads, head_dim).transpose(1, 2)
        if strided:
            # Caches laid out row first, with heads and sequences inside, and a wider last dimension
            # than is used.
            self.k = normal(rows, batch, kv_heads, head_dim + 8).permute(1, 2, 0, 3)[..., :head_dim]
            self.v = normal(batch, rows, kv_heads, value_dim + 16).transpose(1, 2)[..., 16:]
        else:
            self.q = self.q.contiguous()
            self.k, self.v = (
                normal(batch, kv_heads, rows, head_dim),
                normal(batch, kv_heads, rows, value_dim),
            )
        for b, length in enumerate(lens):
            self.k[b, :, length + num_nodes :] = float("nan")
            self.v[b, :, length + num_nodes :] = float("nan")
        self.bits, self.depths = random_trees(batch, num_nodes, generator)
        self.lens = torch.tensor(lens, dtype=torch.int32)
        self.features = {
            "sliding_window": {"sliding_window": 7, "depths": self.depths},
            "softcap": {"softcap": 1.5},
            "sinks": {"sinks": normal(q_heads)},
            "alibi_slopes": {
                "alibi_slopes": torch.rand(q_heads, generator=generator),
                "depths": self.depths,
            },
        }

    def options(self, names) -> dict:
        return {key: value for name in names for key, value in self.features[name].items()}

    def truth(self, dtype=torch.float64, bits=None, **options) -> torch.Tensor:
        inputs = [tensor.to(dtype) for tensor in (self.q, self.k, self.v)]
        bits = self.bits if bits is None else bits
        return reference.tree_attention(*inputs, bits, self.lens, **options).double()

    def run(self, path, dtype, device="cpu", *, bits=None, config=None, **options) -> torch.Tensor:
        bits = self.bits if bits is None else bits
        tensors = [self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), bits, self.lens]
        tensors = [tensor.to(device) for tensor in tensors]
        options = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in options.items()
        }
        if config is not None:
            from treespec.kernels.tree_attention import launch_tree_attention

            return launch_tree_attention(*tensors, config=config, **options).cpu().double()
        out = ops.tree_attention(*tensors, implementation=path, **options)
        assert out.dtype == dtype
        return out.cpu().double()


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Every tensor allocated without a value starts as NaN, so a result or partial left unwritten
    shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def assert_matches(got: torch.Tensor, case: Case, dtype: torch.dtype, **options) -> None:
    """The calibrated rule: at most twice the error of the reference computed in the same dtype,
    plus a little."""
    truth = case.truth(**options)
    assert got.shape == truth.shape
    allowed = 2 * (case.truth(dtype, **options) - truth).abs().max() + ATOL[dtype]
    assert (got - truth).abs().max() <= allowed


def small_case(**kwargs) -> Case:
    return Case([40, 0, 3], 19, **kwargs)


# The reference, on cases small enough to write out.


def hand_case():
    """Prefix of two rows, then 0 -> (1, 2), 1 -> 3; queries of zero weigh every visible row
    alike."""
    q = torch.zeros(1, 1, 4, 1, dtype=torch.float64)
    k = torch.zeros(1, 1, 7, 1, dtype=torch.float64)
    v = torch.tensor([10.0, 20.0, 1.0, 2.0, 4.0, 8.0, float("nan")], dtype=torch.float64).view(
        1, 1, 7, 1
    )
    bits = bits_of([[0], [0, 1], [0, 2], [0, 1, 3]], 4).unsqueeze(0)
    depths = torch.tensor([[0, 1, 1, 2]], dtype=torch.int32)
    return [q, k, v, bits, torch.tensor([2])], depths


def test_reference_averages_prefix_and_ancestors():
    arguments, _ = hand_case()
    expected = torch.tensor([31 / 3, 33 / 4, 35 / 4, 41 / 5], dtype=torch.float64)
    assert torch.allclose(reference.tree_attention(*arguments).flatten(), expected)


def test_reference_window_counts_depth_not_slots():
    arguments, depths = hand_case()
    # Positions are 0 1 | 2 3 3 4, so a window of 3 hides row 0 from depth 1 and row 1 from depth 2.
    expected = torch.tensor([31 / 3, 23 / 3, 25 / 3, 11 / 3], dtype=torch.float64)
    got = reference.tree_attention(*arguments, sliding_window=3, depths=depths)
    assert torch.allclose(got.flatten(), expected)


def test_reference_sink_takes_probability_only():
    arguments, _ = hand_case()
    # A sink of log 2 counts as two more rows of value zero.
    got = reference.tree_attention(*arguments, sinks=torch.tensor([math.log(2.0)]))
    assert torch.allclose(
        got.flatten(), torch.tensor([31 / 5, 33 / 6, 35 / 6, 41 / 7], dtype=torch.float64)
    )


def test_reference_alibi_decays_with_distance():
    arguments, depths = hand_case()
    # A slope of log 2 halves the weight of a row with every step back.
    got = reference.tree_attention(
        *arguments, alibi_slopes=torch.tensor([math.log(2.0)]), depths=depths
    ).flatten()
    assert got[0].item() == pytest.approx((10 / 4 + 20 / 2 + 1) / (1 / 4 + 1 / 2 + 1))
    assert got[3].item() == pytest.approx(
        (10 / 16 + 20 / 8 + 1 / 4 + 2 / 2 + 8) / (1 / 16 + 1 / 8 + 1 / 4 + 1 / 2 + 1)
    )


def test_reference_softcap_and_scale():
    (q, k, v, bits, lens), _ = hand_case()
    q, k = (
        q + 3.0,
        torch.tensor([0.0, 2.0, 0, 0, 0, 0, float("nan")], dtype=torch.float64).view(1, 1, 7, 1),
    )
    weight = math.exp(1.5 * math.tanh(3.0 * 2.0 * 0.5 / 1.5))
    got = reference.tree_attention(q, k, v, bits, lens, scale=0.5, softcap=1.5).flatten()
    assert got[0].item() == pytest.approx((10 + 20 * weight + 1) / (2 + weight))


def test_reference_groups_query_heads():
    (q, k, v, bits, lens), _ = hand_case()
    k2, v2 = k.expand(1, 2, 7, 1), torch.cat([v, v * 100], 1)
    got = reference.tree_attention(q.expand(1, 4, 4, 1), k2, v2, bits, lens)
    assert torch.allclose(
        got[0, 0, :, 0], torch.tensor([1.0, 1.0, 100.0, 100.0], dtype=torch.float64) * 31 / 3
    )


# Both paths against the reference.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("num_nodes", [1, 31, 32, 33, 63, 64, 65, 129, 256])
def test_every_tree_size(path, num_nodes, device):
    case = Case(
        [37, 0] if num_nodes < 128 else [37], num_nodes, heads=(2, 1), dims=(16, 16), seed=num_nodes
    )
    dtype = torch.float32 if num_nodes < 33 else torch.float16
    assert_matches(case.run(path, dtype, device), case, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dims", [(32, 32), (64, 64), (80, 80), (96, 64), (128, 128), (256, 256), (40, 72), (7, 9)]
)
def test_every_head_dimension(path, dims, device):
    case = Case([70, 5], 6, heads=(2, 2), dims=dims, seed=dims[0])
    assert_matches(case.run(path, torch.float16, device), case, torch.float16)


@pytest.mark.parametrize("dims", [(80, 80), (96, 40), (64, 96)])
def test_two_piece_head_dimensions(dims, device):
    case = Case([70], 33, heads=(2, 1), dims=dims, seed=dims[1])
    config = TreeAttentionConfig(64, 32, 4, 2, num_splits=2, min_tiles=1)
    assert_matches(case.run("triton", torch.float16, device, config=config), case, torch.float16)


def test_one_stage_is_refused():
    with pytest.raises(ValueError, match="num_stages must be at least 2; got 1"):
        TreeAttentionConfig(64, 32, 4, 1, num_splits=2)


# The rows of a program are 16, 32, 64 and 128, each with tiles of its own.
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256)])
@pytest.mark.parametrize("heads, num_nodes", [((2, 1), 11), ((4, 2), 30), ((8, 2), 30)])
def test_every_block_of_rows(heads, num_nodes, dims, device):
    if device.type == "cpu":
        pytest.skip("the interpreter computes all of them alike")
    case = Case([200], num_nodes, heads=heads, dims=dims, seed=dims[0])
    for dtype in (torch.float16, torch.bfloat16):
        assert_matches(case.run("triton", dtype, device), case, dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (8, 8)])
def test_every_head_ratio(path, heads, device):
    case = small_case(heads=heads, dims=(16, 16), seed=heads[0])
    assert_matches(case.run(path, torch.float16, device), case, torch.float16)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_dtypes_and_strides(path, dtype, strided, device):
    case = small_case(strided=strided, seed=3)
    assert_matches(case.run(path, dtype, device), case, dtype)


FEATURES = ["sliding_window", "softcap", "sinks", "alibi_slopes"]
FEATURE_SETS = [
    *((name,) for name in FEATURES),
    *itertools.combinations(FEATURES, 2),
    tuple(FEATURES),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("names", FEATURE_SETS, ids="+".join)
def test_features_alone_and_in_pairs(path, names, device):
    case = Case([66, 0, 9], 19, dims=(16, 16), seed=5)
    options = case.options(names)
    assert_matches(case.run(path, torch.float32, device, **options), case, torch.float32, **options)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 64])
@pytest.mark.parametrize(
    "names", [(), ("sliding_window", "sinks"), ("softcap", "alibi_slopes")], ids=str
)
def test_split_counts(num_splits, names, device):
    case = Case([131, 0, 40], 21, heads=(2, 1), dims=(16, 16), seed=6)
    config = TreeAttentionConfig(32, 32, 4, 2, num_splits=num_splits, min_tiles=1)
    options = case.options(names)
    got = case.run("triton", torch.float16, device, config=config, **options)
    assert_matches(got, case, torch.float16, **options)


@pytest.mark.parametrize("window", [1, 2, 5, 40, 1000])
def test_window_edges(window, device):
    case = Case([64, 95, 0], 20, heads=(1, 1), dims=(16, 16), seed=window)
    options = {"sliding_window": window, "depths": case.depths.long()}
    got = case.run("triton", torch.float32, device, config=SMALL_TILES, **options)
    assert_matches(got, case, torch.float32, **options)
    assert_matches(case.run("torch", torch.float32, **options), case, torch.float32, **options)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_generated_cases(data, device):
    draw = data.draw
    batch = draw(st.integers(1, 3))
    lens = draw(st.lists(st.integers(0, 70), min_size=batch, max_size=batch))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    case = Case(
        lens,
        draw(st.integers(1, 40)),
        heads=(kv_heads * group, kv_heads),
        dims=(draw(st.sampled_from([8, 16, 24, 48])), draw(st.sampled_from([16, 20, 32]))),
        seed=draw(st.integers(0, 2**20)),
        spare=draw(st.integers(0, 9)),
        strided=draw(st.booleans()),
    )
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    options = case.options(draw(st.sets(st.sampled_from(FEATURES))))
    config = TreeAttentionConfig(
        draw(st.sampled_from([16, 64])),
        draw(st.sampled_from([32, 64])),
        4,
        2,
        draw(st.integers(1, 5)),
        min_tiles=1,
    )
    assert_matches(
        case.run("triton", dtype, device, config=config, **options), case, dtype, **options
    )
    assert_matches(case.run("torch", dtype, device, **options), case, dtype, **options)


@pytest.mark.parametrize("path", PATHS)
def test_a_node_that_sees_nothing_gets_zeros(path, device):
    case = Case([0, 4], 3, dims=(16, 16))
    case.bits[:, 2] = 0
    for names in ((), ("sinks",), ("softcap",)):
        out = case.run(path, torch.float32, device, **case.options(names))
        assert (out[0, 2] == 0).all()
        assert_matches(out, case, torch.float32, **case.options(names))


@pytest.mark.parametrize("path", PATHS)
def test_bits_past_the_last_node_mean_nothing(path, device):
    case = Case([9], 5, dims=(16, 16))
    noisy = case.bits | torch.tensor(-(1 << 5), dtype=torch.int32)
    assert torch.equal(
        case.run(path, torch.float32, device, bits=noisy), case.run(path, torch.float32, device)
    )


@pytest.mark.parametrize("path", PATHS)
def test_results_repeat_to_the_bit(path, device):
    case = Case([50, 7], 17, dims=(16, 16), seed=8)
    config = SMALL_TILES if path == "triton" else None
    first, second = (case.run(path, torch.float16, device, config=config) for _ in range(2))
    assert torch.equal(first, second)


def test_length_types_and_word_strides(device):
    case = Case([20, 6], 40, heads=(1, 1), dims=(16, 16), seed=9)
    expected = case.run("triton", torch.float16, device, **case.options(["alibi_slopes"]))
    case.lens, case.depths = case.lens.long(), case.depths.long()
    case.features["alibi_slopes"]["depths"] = case.depths.t().contiguous().t()
    wide = case.bits.transpose(1, 2).contiguous().transpose(1, 2)
    assert wide.stride(-1) != 1
    got = case.run("triton", torch.float16, device, bits=wide, **case.options(["alibi_slopes"]))
    assert torch.equal(got, expected)


def test_lengths_outside_the_cache_are_clamped_on_the_device(device):
    case = Case([30, 12], 8, dims=(16, 16), spare=0)
    case.k, case.v = case.k.nan_to_num(1.0), case.v.nan_to_num(1.0)
    tensors = [tensor.to(device) for tensor in (case.q, case.k, case.v, case.bits)]
    limits = torch.tensor([30, 0], dtype=torch.int32, device=device)
    wild = torch.tensor([2**31 - 1, -5], dtype=torch.int32, device=device)
    expected = ops.tree_attention(*tensors, limits, implementation="triton")
    got = ops.tree_attention(*tensors, wild, implementation="triton", check_lengths=False)
    assert torch.equal(got, expected)


# The tests above can tell a wrong mask or split from a right one.


@pytest.mark.parametrize("path", PATHS)
def test_a_causal_mask_is_told_apart(path, device):
    case = Case([5], 33, dims=(16, 16), seed=1)
    causal = bits_of([list(range(i + 1)) for i in range(33)], 33).unsqueeze(0)
    with pytest.raises(AssertionError):
        assert_matches(case.run(path, torch.float32, device, bits=causal), case, torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("node, other", [(32, 0), (17, 31), (31, 31)])
def test_one_wrong_bit_is_told_apart(path, node, other, device):
    case = Case([60], 33, dims=(16, 16), seed=2)
    wrong = case.bits.clone()
    wrong[0, node, other // 32] ^= torch.tensor(
        -(1 << 31) if other == 31 else 1 << other, dtype=torch.int32
    )
    with pytest.raises(AssertionError):
        assert_matches(case.run(path, torch.float32, device, bits=wrong), case, torch.float32)


WRONG_EDGES = {
    "first tile skipped": (1, 0, 0, 0),
    "last tile skipped": (0, -1, 0, 0),
    "splits too short": (0, 0, -1, 0),
    "last split unused": (0, 0, 0, -1),
}


@pytest.mark.parametrize("shift", WRONG_EDGES.values(), ids=WRONG_EDGES.keys())
def test_a_wrong_split_edge_is_told_apart(shift, device, monkeypatch):
    from treespec.kernels import tree_attention as kernels

    if device.type == "cuda":
        pytest.skip("a compiled kernel's helpers cannot be replaced")
    case = Case([131], 21, heads=(1, 1), dims=(16, 16), seed=6)
    right = kernels._tile_range
    monkeypatch.setattr(
        kernels, "_tile_range", lambda *a, **k: [x + d for x, d in zip(right(*a, **k), shift)]
    )
    with pytest.raises(AssertionError):
        assert_matches(
            case.run("triton", torch.float16, device, config=SMALL_TILES), case, torch.float16
        )


# The pieces of the PyTorch path.


def test_bias_built_once_serves_every_layer():
    case = Case([11, 11], 9, heads=(6, 2), dims=(16, 16))
    slots = 20
    bias = torch_attention.tree_bias(case.bits, case.lens, slots, torch.float32)
    assert bias.shape == (2, 1, 9, slots)
    packed = torch_attention.pack_bias(bias, 6, 2)
    assert packed.shape == (2, 1, 27, slots)
    k, v = case.k[:, :, :slots], case.v[:, :, :slots]
    for given_bias in (bias, packed):
        out = torch_attention.biased_attention(case.q, k, v, given_bias, scale=0.25)
        assert_matches(out.double(), case, torch.float32)


def test_both_ways_to_a_bias_agree():
    case = Case([11, 0, 4], 35, dims=(16, 16))
    slots = 11 + 35 + 3
    read = torch_attention.tree_bias(case.bits, case.lens, slots, torch.float32)
    gathered = torch_attention.tree_bias(
        case.bits, case.lens, slots, torch.float32, sliding_window=1000, depths=case.depths
    )
    assert torch.equal(read, gathered)


def test_capture_reads_no_length(monkeypatch):
    case = Case([11, 0, 4], 9, dims=(16, 16))
    case.k, case.v = case.k.nan_to_num(1.0), case.v.nan_to_num(1.0)
    monkeypatch.setattr(torch_attention, "_capturing", lambda tensor: True)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("length read"))
    arguments = (case.q, case.k, case.v, case.bits, case.lens)
    out = torch_attention.tree_attention(*arguments)
    monkeypatch.undo()
    assert_matches(out.double(), case, torch.float32)


def test_a_packed_bias_is_never_that_of_another():
    forward = object.__new__(hf.Forward)
    forward._packed = {}
    for value in range(8):
        # each of these dies at once, and the next may get its number
        packed = forward._pack(torch.full((1, 1, 3, 5), float(value)), 4, 2)
        assert packed.shape == (1, 1, 6, 5) and (packed == value).all()


@pytest.mark.parametrize(
    "num_nodes, prefix, packed", [(16, 600, True), (16, 40, False), (17, 600, False)]
)
def test_heads_are_packed_where_it_pays(num_nodes, prefix, packed):
    case = Case([prefix], num_nodes, heads=(6, 2), dims=(16, 16))
    slots = prefix + num_nodes
    assert torch_attention.packs_heads(case.q, 2, slots) == packed
    assert not torch_attention.packs_heads(case.q, 6, slots)
    assert torch_attention.packs_heads(case.q.to("meta"), 2, slots)
    assert_matches(case.run("torch", torch.float32), case, torch.float32)


def test_bias_of_a_tree_written_out():
    arguments, depths = hand_case()
    bias = torch_attention.tree_bias(
        arguments[3], arguments[4], 7, torch.float32, sliding_window=3, depths=depths
    )
    seen = (bias[0, 0] == 0).int().tolist()
    assert seen == [
        [1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 1, 0, 0],
        [0, 0, 1, 1, 0, 1, 0],
    ]
    assert set(bias.flatten().tolist()) == {0.0, -math.inf}


@pytest.mark.parametrize("path", PATHS)
def test_alibi_keeps_its_precision_in_16_bits(path, device):
    # Row 0 scores 371 and lies 1004 back, so it and the node weigh about alike; rounding 371.48 to
    # 16 bits gives 372.
    case = Case([1004], 1, heads=(1, 1), dims=(16, 16), spare=0)
    case.q = torch.zeros(1, 1, 1, 16).index_fill_(3, torch.tensor([0, 1]), 1.0)
    case.k = torch.zeros(1, 1, 1005, 16)
    case.k[..., 0], case.k[0, 0, 0, :2], case.k[0, 0, 1004] = (
        -1000.0,
        torch.tensor([256.0, 115.0]),
        0.0,
    )
    case.v = torch.zeros(1, 1, 1005, 16)
    case.v[0, 0, 0] = 1.0
    options = {"scale": 1.0, "alibi_slopes": torch.tensor([0.37]), "depths": case.depths}
    got = case.run(path, torch.bfloat16, device, **options)
    assert (got - case.truth(**options)).abs().max() < 0.01


# Choice of path, and refusals.


def test_the_path_is_said_with_its_reason(monkeypatch):
    q = torch.zeros(1, 1, 1, 8)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.tree_attention_path(q, 8) == ("torch", "tensors are on the CPU")
    assert ops.tree_attention_path(q, 8, "torch") == ("torch", "asked for")
    assert ops.tree_attention_path(q, 8, "triton") == (
        "triton",
        "TRITON_INTERPRET=1 runs the kernels on the CPU",
    )
    with pytest.raises(RuntimeError, match="kernel takes float16, bfloat16 and float32, not float"):
        ops.tree_attention_path(q.double(), 8, "triton")
    with pytest.raises(RuntimeError, match="cannot run: head dimension 512 is above 256"):
        ops.tree_attention_path(q, 512, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        RuntimeError, match='implementation="triton" cannot run: tensors are on the CPU'
    ):
        ops.tree_attention_path(q, 8, "triton")
    with pytest.raises(
        ValueError, match='implementation must be "auto", "triton" or "torch"; got \'cuda\''
    ):
        ops.tree_attention_path(q, 8, "cuda")


CUDA = torch.device("cuda")
# (device, its capability, a HIP build) -> whether kernels run there, and what is said.
DEVICES = [
    (CUDA, (9, 0), False, True, "compute capability 9.0"),
    (CUDA, (7, 5), False, False, "compute capability 7.5 is below 8.0"),
    (CUDA, (9, 0), True, False, "built for ROCm"),
    (torch.device("mps"), None, False, False, "no kernel for device type 'mps'"),
]


@pytest.mark.parametrize("device_kind, capability, hip, runs, words", DEVICES, ids=str)
def test_status_and_path_are_one_rule(device_kind, capability, hip, runs, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", "6.0" if hip else None)
    status = ops.triton_status(device_kind)
    assert status == (runs, status[1]) and words in status[1]
    path = "triton" if runs else "torch"
    assert checks.kernel_path(device_kind, "auto") == (path, status[1])
    assert checks.kernel_path(device_kind, "auto", "too odd") == (
        "torch",
        "too odd" if runs else status[1],
    )
    assert checks.runs_on_triton(device_kind, "auto") == runs
    assert not checks.runs_on_triton(device_kind, "torch")
    if runs:
        assert checks.runs_on_triton(device_kind, "triton")
    else:
        with pytest.raises(RuntimeError, match=re.escape(status[1])):
            checks.runs_on_triton(device_kind, "triton")


def test_without_triton_everything_is_pytorch(monkeypatch):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    assert ops.triton_status(CUDA) == (False, "triton is not installed")
    assert not checks.runs_on_triton(CUDA, "auto")
    with pytest.raises(RuntimeError, match="triton is not installed"):
        checks.runs_on_triton(CUDA, "triton")


def test_a_cpu_never_interprets_unasked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    cpu = torch.device("cpu")
    assert ops.triton_status(cpu)[0]
    assert not checks.runs_on_triton(cpu, "auto") and checks.runs_on_triton(cpu, "triton")


def valid_arguments() -> dict:
    case = Case([4, 2], 3, dims=(16, 16), spare=0)
    return {
        "q": case.q,
        "k_cache": case.k.nan_to_num(),
        "v_cache": case.v.nan_to_num(),
        "ancestor_bits": case.bits,
        "prefix_lens": case.lens,
    }


REFUSALS = [
    ("q", lambda a: a["q"][0], r"q must be .* \[B, Hq, N, D\].*; got float32 \[4, 3, 16\]"),
    ("q", lambda a: a["q"].int(), r"q must be float16 or .*; got int32"),
    ("q", lambda a: None, r"q must be .*; got NoneType"),
    ("q", lambda a: a["q"][:, :, :0], r"q must hold 1 to 256 nodes.*; got 0"),
    ("q", lambda a: a["q"].repeat(1, 1, 86, 1), r"q must hold 1 to 256 nodes.*; got 258"),
    (
        "q",
        lambda a: a["q"][:, :3],
        r"k_cache must have a number of heads that divides the 3 of q; got 2",
    ),
    ("q", lambda a: a["q"].half(), r"k_cache must be float16 .*; got float32"),
    (
        "q",
        lambda a: a["q"].transpose(2, 3).contiguous().transpose(2, 3),
        r"q must have a last stride of 1",
    ),
    ("k_cache", lambda a: a["k_cache"][..., :8], r"k_cache must be .*; got float32 \[2, 2, 7, 8\]"),
    ("k_cache", lambda a: a["k_cache"][:1], r"k_cache must be .*; got float32 \[1, 2, 7, 16\]"),
    ("k_cache", lambda a: a["k_cache"][:, :, :2], r"k_cache must have at least 3 rows"),
    (
        "k_cache",
        lambda a: a["k_cache"].transpose(2, 3).contiguous().transpose(2, 3),
        r"k_cache must have a last stride",
    ),
    ("k_cache", lambda a: a["k_cache"].to("meta"), r"k_cache must be .* on cpu; got .* on meta"),
    (
        "v_cache",
        lambda a: a["v_cache"][:, :, :6],
        r"v_cache must be .*; got float32 \[2, 2, 6, 16\]",
    ),
    ("v_cache", lambda a: a["v_cache"].double(), r"v_cache must be float32 .*; got float64"),
    (
        "ancestor_bits",
        lambda a: a["ancestor_bits"].long(),
        r"ancestor_bits must be int32 .*; got int64",
    ),
    (
        "ancestor_bits",
        lambda a: a["ancestor_bits"].repeat(1, 1, 2),
        r"ancestor_bits must be .*; got int32 \[2, 3, 2\]",
    ),
    (
        "prefix_lens",
        lambda a: a["prefix_lens"].float(),
        r"prefix_lens must be int32 or int64 .*; got float32",
    ),
    ("prefix_lens", lambda a: a["prefix_lens"][:1], r"prefix_lens must be .*; got int32 \[1\]"),
    ("prefix_lens", lambda a: a["prefix_lens"] + 1, r"prefix_lens must lie in 0\.\.4.*; got 5"),
    ("prefix_lens", lambda a: a["prefix_lens"] - 3, r"prefix_lens must lie in 0\.\.4.*; got -1"),
    ("sliding_window", lambda a: 4, r"depths must be given with sliding_window; got None"),
    ("alibi_slopes", lambda a: torch.ones(4), r"depths must be given with alibi_slopes; got None"),
    (
        "alibi_slopes",
        lambda a: torch.ones(2),
        r"alibi_slopes must be .* \[Hq\].*; got float32 \[2\]",
    ),
    ("sinks", lambda a: torch.ones(4, dtype=torch.int32), r"sinks must be .*; got int32"),
    (
        "depths",
        lambda a: torch.zeros(2, 4, dtype=torch.int32),
        r"depths must be .* \[B, N\].*; got int32 \[2, 4\]",
    ),
    ("softcap", lambda a: 0.0, r"softcap must be positive and finite; got 0.0"),
    ("scale", lambda a: float("inf"), r"scale must be positive and finite; got inf"),
    ("scale", lambda a: -1.0, r"scale must be positive and finite; got -1.0"),
]


@pytest.mark.parametrize(
    "name, change, message", REFUSALS, ids=[f"{i}-{entry[0]}" for i, entry in enumerate(REFUSALS)]
)
def test_bad_input_is_refused_before_any_launch(name, change, message, monkeypatch):
    arguments = valid_arguments()
    monkeypatch.setattr(torch_attention, "tree_attention", lambda *a, **k: pytest.fail("launched"))
    with pytest.raises(ValueError, match=message):
        ops.tree_attention(**{**arguments, name: change(arguments)}, implementation="torch")


@pytest.mark.parametrize("window", [0, -1, 2.5, "4"])
def test_a_window_that_is_no_positive_int_is_refused(window):
    with pytest.raises(ValueError, match="sliding_window must be an int of 1 or more; got"):
        depths = torch.zeros(2, 3, dtype=torch.int32)
        ops.tree_attention(**valid_arguments(), sliding_window=window, depths=depths)
