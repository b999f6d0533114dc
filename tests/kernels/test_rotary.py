"""Rotary embedding and the cache write: against the reference, and against transformers' own
functions.
"""

from __future__ import annotations

import pytest
import torch
from treespec.kernels import ops, reference

BOTH = pytest.mark.parametrize("implementation", ["torch", "triton"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    dtype=torch.float32,
    head_dim=16,
    rotary_dim=16,
    value_dim=16,
    q_heads=4,
    kv_heads=2,
    nodes=3,
    interleaved=False,
):
    """Inputs whose caches are NaN, and the prefix lengths 5 and 0."""
    generator = torch.Generator().manual_seed(head_dim + rotary_dim)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q, k = normal(2, q_heads, nodes, head_dim), normal(2, kv_heads, nodes, head_dim)
    v = normal(2, nodes, kv_heads, value_dim).transpose(1, 2)
    angles = torch.rand(2, nodes, rotary_dim // 2, generator=generator) * 6
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    caches = [
        torch.full((2, kv_heads, 9, size), float("nan"), dtype=dtype)
        for size in (head_dim, value_dim)
    ]
    return [q, k, v, angles.cos().to(dtype), angles.sin().to(dtype), *caches, torch.tensor([5, 0])]


@pytest.mark.parametrize("implementation", ["reference", "torch", "triton"])
def test_a_quarter_turn_by_hand(implementation):
    q = torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]).reshape(1, 1, 1, 5)
    wanted = {False: [-3.0, -4.0, 1.0, 2.0, 9.0], True: [-2.0, 1.0, -4.0, 3.0, 9.0]}
    for interleaved, turned in wanted.items():
        k_cache, v_cache = torch.zeros(1, 1, 3, 5), torch.zeros(1, 1, 3, 2)
        inputs = (q, q, torch.tensor([7.0, 8.0]).reshape(1, 1, 1, 2), torch.zeros(1, 1, 4),
        torch.ones(1, 1, 4),
                  k_cache, v_cache, torch.tensor([1]))  # fmt: skip
        if implementation == "reference":
            out = reference.append_rotary(*inputs, interleaved=interleaved)
        else:
            out = ops.append_rotary(*inputs, interleaved=interleaved, implementation=implementation)
        assert out.flatten().tolist() == turned
        assert k_cache[0, 0].tolist() == [[0.0] * 5, turned, [0.0] * 5]
        assert v_cache[0, 0].tolist() == [[0.0] * 2, [7.0, 8.0], [0.0] * 2]


@BOTH
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"head_dim": 80, "rotary_dim": 20},
        {"head_dim": 10, "rotary_dim": 6, "value_dim": 3, "q_heads": 2},
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(dtype, sizes, interleaved, implementation):
    inputs = case(dtype, interleaved=interleaved, **sizes)
    wanted_inputs = [x.clone() for x in inputs]
    got = ops.append_rotary(*inputs, interleaved=interleaved, implementation=implementation)
    wanted = reference.append_rotary(*wanted_inputs, interleaved=interleaved)
    # One rounding of a float32 result, so at most one unit in the last place from the float64
    # truth.
    tolerance = {
        "rtol": 2 * torch.finfo(dtype).eps,
        "atol": 2 * torch.finfo(dtype).eps,
        "equal_nan": True,
    }
    torch.testing.assert_close(got, wanted, **tolerance)
    torch.testing.assert_close(inputs[5], wanted_inputs[5], **tolerance)
    torch.testing.assert_close(inputs[6], wanted_inputs[6], rtol=0, atol=0, equal_nan=True)


@BOTH
@pytest.mark.parametrize(
    "module, interleaved, rotary_dim",
    [
        ("llama", False, 16),
        ("gpt_neox", False, 4),
        ("cohere", True, 16),
        ("glm", True, 8),
    ],
)
def test_equals_transformers(module, interleaved, rotary_dim, implementation):
    """Half and interleaved pairs, whole and partial rotation, as these model types do it, in
    float32.
    """
    import importlib

    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    inputs = case(rotary_dim=rotary_dim, interleaved=interleaved)
    q, k, _, cos, sin, k_cache, _, _ = inputs
    if module == "glm":
        # This type takes the first half of the columns and repeats it itself.
        theirs = modeling.apply_rotary_pos_emb(
            q, k, torch.cat([cos[..., ::2]] * 2, -1), torch.cat([sin[..., ::2]] * 2, -1)
        )
    elif module == "gpt_neox":
        turned = modeling.apply_rotary_pos_emb(q[..., :rotary_dim], k[..., :rotary_dim], cos, sin)
        theirs = tuple(torch.cat([a, b[..., rotary_dim:]], -1) for a, b in zip(turned, (q, k)))
    else:
        theirs = modeling.apply_rotary_pos_emb(q, k, cos, sin)
    got = ops.append_rotary(*inputs, interleaved=interleaved, implementation=implementation)
    torch.testing.assert_close(got, theirs[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_cache[0, :, 5:8], theirs[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_cache[1, :, 0:3], theirs[1][1], rtol=1e-6, atol=1e-6)


@BOTH
def test_only_the_rows_of_the_nodes_are_written(implementation):
    inputs = case()
    ops.append_rotary(*inputs, implementation=implementation)
    written = ~inputs[5].isnan().any(-1).any(1)
    assert written.tolist() == [[5 <= row < 8 for row in range(9)], [row < 3 for row in range(9)]]


@pytest.mark.parametrize("index, value, message", [
    (0, torch.zeros(2, 4, 3), r"q must be .*\[B, Hq, N, D\]; got float32 \[2, 4, 3\]"),
    (1, torch.zeros(2, 2, 3, 8), r"k must be float32 \[B, Hkv, N, D\]"),
    (1, torch.zeros(2, 2, 3, 16).half(), "k must be float32 .*got float16"),
    (2, torch.zeros(2, 3, 3, 16), "v must be float32"),
    (3, torch.zeros(2, 3, 17), "sin must be"),
    (4, torch.zeros(2, 3, 8), "sin must be"),
    (5, torch.zeros(2, 2, 9, 32)[..., ::2], "k_cache must have a last stride of 1"),
    (6, torch.zeros(2, 2, 8, 16), "v_cache must be"),
    (7, torch.tensor([7, 0]), r"prefix_lens must lie in 0\.\.6, so that the nodes fit; got 7"),
    (7, torch.tensor([0.0, 0.0]), "prefix_lens must be int32 or int64"),
])  # fmt: skip
def test_errors(index, value, message):
    inputs = case()
    inputs[index] = value
    with pytest.raises(ValueError, match=message):
        ops.append_rotary(*inputs)


@pytest.mark.parametrize("rotary_dim", [5, 18])
def test_rotary_size(rotary_dim):
    inputs = case()
    inputs[3] = inputs[4] = torch.zeros(2, 3, rotary_dim)
    with pytest.raises(
        ValueError, match=f"cos must have an even last size of at most 16; got {rotary_dim}"
    ):
        ops.append_rotary(*inputs)
