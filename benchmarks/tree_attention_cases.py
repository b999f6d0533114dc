"""The heads, lengths and compiled variants that the benchmark, the kernel sheet and the compile
tests share."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from treespec.kernels import tuning


@dataclass(frozen=True)
class Heads:
    """Attention shape of a model: query heads, key and value heads, head dimension, softcap and
    window where it has them."""

    q_heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None = None
    sliding_window: int | None = None


MODELS = {
    "pythia-2.8b": Heads(32, 32, 80),
    "llama-3-8b": Heads(32, 8, 128),
    "qwen3-8b": Heads(32, 8, 128),
    "gemma-2-9b": Heads(16, 8, 256, softcap=50.0, sliding_window=4096),
}


# Small and large row blocks of the models, and the options that need most registers: arguments of
# ``split_kernel``.
_LLAMA = {"q_heads": 32, "kv_heads": 8, "head_dim": 128}
_PYTHIA = {"q_heads": 32, "kv_heads": 32, "head_dim": 80, "dtype": "fp16"}
_GEMMA = {"q_heads": 16, "kv_heads": 8, "head_dim": 256, "softcap": True, "window": True}
_GPT_OSS = {"q_heads": 64, "kv_heads": 8, "head_dim": 64, "sinks": True, "window": True}
_FLOAT32 = {"q_heads": 8, "kv_heads": 4, "head_dim": 128, "dtype": "fp32"}
VARIANTS = {
    "llama-3-8b, 1 node": {**_LLAMA, "num_nodes": 1},
    "llama-3-8b, 64 nodes": {**_LLAMA, "num_nodes": 64},
    "pythia-2.8b, 16 nodes": {**_PYTHIA, "num_nodes": 16},
    "pythia-2.8b, 64 nodes": {**_PYTHIA, "num_nodes": 64},
    "gemma-2-9b, 64 nodes": {**_GEMMA, "num_nodes": 64},
    "gpt-oss, 32 nodes": {**_GPT_OSS, "num_nodes": 32},
    "float32, 16 nodes": {**_FLOAT32, "num_nodes": 16},
}
# These differ little between chips of a family, so they are compiled for fewer of them.
FEWER_CHIPS = {"pythia-2.8b, 16 nodes": (80, 90), "float32, 16 nodes": (86, 90)}
# Choices that were looked at and not taken; design note 004 says why. Arguments of ``split_kernel``
# and the chips they are compiled for.
_EVERY = (80, 86, 89, 90, 100, 120)
_WIDE_FLOAT32 = {**_FLOAT32, "head_dim": 256, "num_nodes": 16}
ALTERNATIVES = {
    "128-slot tiles, llama-3-8b, 64 nodes": (
        {**_LLAMA, "num_nodes": 64, "config": {"block_slots": 128}},
        (90,),
    ),
    "80 as 64 + 16, pythia-2.8b, 16 nodes": (
        {**_PYTHIA, "num_nodes": 16, "pieces": [64, 16]},
        (90,),
    ),
    "whole tiles under a window and ALiBi, llama-3-8b, 64 nodes": (
        {**_LLAMA, "num_nodes": 64, "window": True, "alibi": True, "config": {"block_slots": 64}},
        (80, 90, 100),
    ),
    "whole tiles under a window, gpt-oss, 32 nodes": (
        {**_GPT_OSS, "num_nodes": 32, "config": {"block_slots": 128}},
        (90, 100),
    ),
    "four warps, float32, 16 nodes": (
        {**_FLOAT32, "num_nodes": 16, "config": {"num_warps": 4}},
        _EVERY,
    ),
    "four warps, float32, 16 nodes of 256": (
        {**_WIDE_FLOAT32, "config": {"num_warps": 4}},
        _EVERY,
    ),
    "tf32x3, float32, 16 nodes": ({**_FLOAT32, "num_nodes": 16, "precision": "tf32x3"}, _EVERY),
    "tf32x3, float32, 16 nodes of 256": ({**_WIDE_FLOAT32, "precision": "tf32x3"}, _EVERY),
}
COMBINE = {"group": 4, "kv_heads": 8, "value_dim": 128, "num_splits": 16}


def compile_jobs(capabilities) -> dict[tuple[str, int], dict]:
    """Every kernel and chip of the sheet and the compile tests: ``(name, capability)`` -> job of
    ``compile_tools``."""
    jobs = {}
    for capability in capabilities:
        for name, arguments in VARIANTS.items():
            if capability in FEWER_CHIPS.get(name, (capability,)):
                arguments = {"capability": capability, **arguments}
                jobs[name, capability] = {
                    "builder": "tree_attention_cases:split_kernel",
                    "arguments": arguments,
                }
        arguments = {"capability": capability, **COMBINE}
        jobs["combine", capability] = {
            "builder": "tree_attention_cases:combine_kernel",
            "arguments": arguments,
        }
    return jobs


def alternative_jobs() -> dict[tuple[str, int], dict]:
    """The choices not taken, as ``compile_jobs``."""
    return {
        (name, capability): {
            "builder": "tree_attention_cases:split_kernel",
            "arguments": {"capability": capability, **arguments},
        }
        for name, (arguments, capabilities) in ALTERNATIVES.items()
        for capability in capabilities
    }


def chosen_config(
    capability: int,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    num_nodes: int,
    value_dim: int | None = None,
    num_slots: int = 8192,
    batch: int = 1,
    dtype: str = "bf16",
    reshaped: bool = False,
) -> tuning.TreeAttentionConfig:
    """The tuning table's choice for a case."""
    return tuning.tree_attention_config(
        capability,
        batch=batch,
        q_heads=q_heads,
        kv_heads=kv_heads,
        num_nodes=num_nodes,
        num_slots=num_slots,
        head_dim=head_dim,
        value_dim=head_dim if value_dim is None else value_dim,
        element_bytes=4 if dtype == "fp32" else 2,
        reshaped=reshaped,
    )


def copies_of_a_tile(capability: int, variant: dict) -> int:
    """16-byte copies that one thread makes of a tile of keys and values, if none is narrower."""
    options = {"window", "softcap", "alibi"}
    shape = {name: value for name, value in variant.items() if name not in options | {"sinks"}}
    config = chosen_config(capability, reshaped=any(variant.get(name) for name in options), **shape)
    columns = 2 * sum(tuning.split_head_dim(variant["head_dim"], config.block_rows))
    tile_bytes = config.block_slots * columns * (4 if variant.get("dtype") == "fp32" else 2)
    return tile_bytes // (16 * 32 * config.num_warps)


# Scalars that the launcher does not specialise, and the strides of small index tensors.
_UNALIGNED = {"num_nodes", "num_slots", "num_splits", "window", "scale", "softcap"}
_UNALIGNED |= {"stride_bb", "stride_bn", "stride_db"}


def split_kernel(
    capability: int,
    *,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    num_nodes: int,
    value_dim: int | None = None,
    num_slots: int = 8192,
    batch: int = 1,
    dtype: str = "bf16",
    window: bool = False,
    softcap: bool = False,
    sinks: bool = False,
    alibi: bool = False,
    config: dict | None = None,
    pieces: list[int] | None = None,
    precision: str | None = None,
    aligned: bool = True,
) -> dict:
    """Arguments of ``compile_tools.compile_kernel`` for the split kernel as the launcher would
    start it.

    ``config`` replaces fields of the tuning table's choice, ``pieces`` the powers of two that hold
    the head dimension, ``precision`` that of the products; without ``aligned`` nothing is known to
    be divisible by 16.
    """
    from treespec.kernels import tree_attention

    value_dim = head_dim if value_dim is None else value_dim
    chosen = chosen_config(
        capability,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        num_nodes=num_nodes,
        value_dim=value_dim,
        num_slots=num_slots,
        batch=batch,
        dtype=dtype,
        reshaped=window or softcap or alibi,
    )
    config = dataclasses.replace(chosen, **(config or {}))
    split = config.num_splits > 1
    pointers = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), dtype)
    pointers |= {"bits_ptr": "i32", "prefix_lens_ptr": "i32"}
    optional = {
        "depths_ptr": ("i32", window or alibi),
        "sinks_ptr": (dtype, sinks and not split),
        "slopes_ptr": ("fp32", alibi),
        "workspace_ptr": ("fp32", split),
    }
    pointers |= {name: kind for name, (kind, present) in optional.items() if present}
    d1, d2 = tuning.split_head_dim(head_dim, config.block_rows)
    v1, v2 = tuning.split_head_dim(value_dim, config.block_rows)
    if pieces is not None:
        (d1, d2), (v1, v2) = pieces, pieces
    names = tree_attention.tree_attention_split_kernel.arg_names
    scalars = {name: "i32" for name in names if name.startswith("stride_") and name[-1] != "s"}
    scalars |= dict.fromkeys(("num_nodes", "num_slots", "num_splits", "window"), "i32")
    scalars |= {"scale": "fp32", "softcap": "fp32"}
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": q_heads // kv_heads,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HAS_WINDOW": window,
        "HAS_SOFTCAP": softcap,
        "HAS_SINKS": sinks and not split,
        "HAS_ALIBI": alibi,
        "D1": d1,
        "D2": d2,
        "V1": v1,
        "V2": v2,
        "BLOCK_M": config.block_rows,
        "BLOCK_S": config.block_slots,
        "MIN_TILES": config.min_tiles,
        "SPLIT": split,
        "stride_ks": head_dim,
        "stride_vs": value_dim,
        "PRECISION": precision or tree_attention.PRECISION,
        "UPCAST": False,
    }
    constants |= {name: None for name, (_, present) in optional.items() if not present}
    return {
        "kernel": tree_attention.tree_attention_split_kernel,
        "capability": capability,
        "pointers": pointers,
        "scalars": scalars,
        "constants": constants,
        # Bits, depths and their strides come in any size; the cache, queries and outputs are whole
        # vectors.
        "aligned": ({*pointers, *scalars} - _UNALIGNED) if aligned else set(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def combine_kernel(
    capability: int,
    *,
    group: int,
    kv_heads: int,
    value_dim: int,
    num_splits: int,
    dtype: str = "bf16",
    sinks: bool = False,
) -> dict:
    """Arguments of ``compile_tools.compile_kernel`` for the combine kernel."""
    from treespec.kernels import tree_attention

    splits = 1 << (num_splits - 1).bit_length()
    pointers = {"workspace_ptr": "fp32", "prefix_lens_ptr": "i32", "out_ptr": dtype}
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "VALUE_DIM": value_dim,
        "HAS_WINDOW": False,
        "HAS_SINKS": sinks,
        "BLOCK_S": 64,
        "MIN_TILES": 2,
        "BLOCK_SPLITS": splits,
        "CHUNK": min(16, splits),
        "BLOCK_V": 1 << (value_dim - 1).bit_length(),
    }
    if sinks:
        pointers["sinks_ptr"] = dtype
    else:
        constants["sinks_ptr"] = None
    return {
        "kernel": tree_attention.tree_attention_combine_kernel,
        "capability": capability,
        "pointers": pointers,
        "scalars": dict.fromkeys(("num_nodes", "num_slots", "num_splits", "window"), "i32"),
        "constants": constants,
        "num_warps": 4,
        "num_stages": 2,
    }
