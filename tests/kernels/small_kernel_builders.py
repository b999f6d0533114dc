"""What ``compile_tools`` compiles of the small kernels: each builder returns the arguments of one
``compile_kernel`` call, with the tile sizes the launchers would choose."""

from __future__ import annotations


def _builder(module, name, pointers, scalars, constants, num_warps, aligned=None):
    import importlib

    kernel = getattr(importlib.import_module(f"treespec.kernels.{module}"), name)
    names = kernel.arg_names

    def pick(mapping):
        return {key: value for key, value in mapping.items() if key in names}

    constants = {**constants, **{key: None for key, value in pointers.items() if value is None}}
    pointers = {key: value for key, value in pointers.items() if value is not None}
    return {
        "kernel": kernel,
        "pointers": pick(pointers),
        "scalars": pick(scalars),
        "constants": constants,
        "num_warps": num_warps,
        "aligned": aligned,
    }


def choose(capability, dtype="bf16", sample=False, cut=False, vocab_size=151936, rows=64):
    import triton.language as tl
    from treespec.kernels.round_tuning import choice_config

    config = choice_config(rows, vocab_size)
    noise = {
        "positions_ptr": "i64",
        "rows_ptr": "i64",
        "seeds_ptr": "i64",
        "temperature_ptr": "fp32",
    }
    pointers = {
        "logits_ptr": dtype,
        "num_nodes_ptr": "i64",
        "value_ptr": "fp32",
        "token_ptr": "i32",
        **(noise if sample else dict.fromkeys(noise)),
        "threshold_ptr": "fp32" if cut else None,
    }
    scalars = {
        "capacity": "i32",
        "vocab_size": "i32",
        "counters_per_split": "i32",
        "stride_lb": "i32",
        "stride_ln": "i32",
    }
    constants = {"SAMPLE": sample, "CUT": cut, "DTYPE": tl.float32, "BLOCK": config.block}
    aligned = {*pointers, "stride_lb", "stride_ln", "vocab_size", "counters_per_split"}
    return _builder(
        "verify", "choose_kernel", pointers, scalars, constants, config.num_warps, aligned
    ) | {"capability": capability}


def walk(capability, nodes=256):
    from treespec.kernels.round_tuning import tree_warps

    pointers = {
        "value_ptr": "fp32",
        "token_ptr": "i32",
        "tokens_ptr": "i64",
        "parents_ptr": "i64",
        "num_nodes_ptr": "i64",
        "path_ptr": "i64",
        "accept_ptr": "i64",
        "bonus_ptr": "i64",
    }
    scalars = {"capacity": "i32", "num_splits": "i32", "stride_tb": "i32", "stride_pb": "i32"}
    constants = {"BLOCK_N": nodes, "BLOCK_S": 8}
    return _builder("verify", "walk_kernel", pointers, scalars, constants, tree_warps(nodes)) | {
        "capability": capability
    }


def gumbel(capability):
    from treespec.kernels.round_tuning import noise_config

    config = noise_config(151936)
    pointers = {
        "seeds_ptr": "i64",
        "rows_ptr": "i64",
        "positions_ptr": "i64",
        "streams_ptr": "i64",
        "out_ptr": "fp32",
    }
    scalars = {"num_positions": "i32", "vocab_size": "i32"}
    constants = {"BLOCK": config.block}
    return _builder(
        "philox",
        "_gumbel_kernel",
        pointers,
        scalars,
        constants,
        config.num_warps,
        {*pointers, "vocab_size"},
    ) | {"capability": capability}


def cut(capability, filters=True, draft=True, dtype="bf16"):
    from treespec.kernels.round_tuning import row_config

    config = row_config(151936)
    filter_types = {
        "top_k_ptr": "i32",
        "top_p_ptr": "fp32",
        "min_p_ptr": "fp32",
        "threshold_ptr": "fp32",
    }
    pointers = {
        "logits_ptr": dtype,
        "draft_ptr": "fp32" if draft else None,
        "parents_ptr": "i64",
        "num_nodes_ptr": "i64",
        "temperature_ptr": "fp32",
        "logsumexp_ptr": "fp32" if draft else None,
        **(filter_types if filters else dict.fromkeys(filter_types)),
    }
    scalars = {
        "capacity": "i32",
        "vocab_size": "i32",
        "stride_lb": "i32",
        "stride_ln": "i32",
        "stride_db": "i32",
        "stride_dn": "i32",
        "stride_pb": "i32",
    }
    constants = {"CUT": filters, "DRAFT": draft, "BLOCK": config.block, "BLOCK_N": 64}
    return _builder(
        "vocabulary_cut",
        "cut_kernel",
        pointers,
        scalars,
        constants,
        config.num_warps,
        {*pointers, "stride_lb", "stride_ln", "vocab_size"},
    ) | {"capability": capability}


def rejection(capability, traversal=True, filters=True, dtype="bf16"):
    from treespec.kernels.round_tuning import row_config

    config = row_config(151936)
    pointers = {
        "logits_ptr": dtype,
        "draft_ptr": "fp32",
        "tokens_ptr": "i64",
        "parents_ptr": "i64",
        "num_nodes_ptr": "i64",
        "positions_ptr": "i64",
        "rows_ptr": "i64",
        "seeds_ptr": "i64",
        "temperature_ptr": "fp32",
        "threshold_ptr": "fp32" if filters else None,
        "logsumexp_ptr": "fp32",
        "links_ptr": "i32",
        "record_ptr": "fp32",
        "path_ptr": "i64",
        "accept_ptr": "i64",
        "bonus_ptr": "i64",
    }
    scalars = {
        "capacity": "i32",
        "vocab_size": "i32",
        "num_counters": "i32",
        "stride_lb": "i32",
        "stride_ln": "i32",
        "stride_db": "i32",
        "stride_dn": "i32",
    }
    constants = {
        "TRAVERSAL": traversal,
        "CUT": filters,
        "BLOCK": config.block,
        "BLOCK_C": config.block // 4,
        "BLOCK_N": 64,
    }
    return _builder(
        "verify_rejection",
        "rejection_kernel",
        pointers,
        scalars,
        constants,
        8,
        {*pointers, *(name for name in scalars if name.startswith("stride_")), "vocab_size"},
    ) | {"capability": capability}


def ancestry(capability, bits=True):
    pointers = {
        "parents_ptr": "i64",
        "num_nodes_ptr": "i64",
        "bits_ptr": "i32" if bits else None,
        "depths_ptr": None if bits else "i64",
    }
    scalars = {"capacity": "i32", "width": "i32"}
    constants = {"BITS": bits, "DEPTHS": not bits, "BLOCK_W": 8}
    return _builder("tree_building", "ancestry_kernel", pointers, scalars, constants, 1) | {
        "capability": capability
    }


def select(capability, candidates=2048):
    pointers = {
        "scores_ptr": "fp32",
        "parents_ptr": "i64",
        "nodes_ptr": "i64",
        "new_parents_ptr": "i64",
        "counts_ptr": "i64",
    }
    scalars = {"candidates": "i32", "max_nodes": "i32"}
    constants = {"DOUBLINGS": candidates.bit_length() - 1, "BLOCK_C": candidates, "BLOCK_N": 256}
    return _builder("tree_building", "select_kernel", pointers, scalars, constants, 8) | {
        "capability": capability
    }


def scan(capability):
    pointers = {"tokens_ptr": "i64", "lens_ptr": "i64", "ranks_ptr": "i64"}
    scalars = {"max_ngram": "i32", "num_matches": "i32", "min_ngram": "i32", "stride_tb": "i32"}
    return _builder(
        "ngram_match", "scan_kernel", pointers, scalars, {"BLOCK": 256, "BLOCK_M": 4}, 4
    ) | {"capability": capability}


def continuation(capability):
    pointers = {
        "tokens_ptr": "i64",
        "lens_ptr": "i64",
        "ranks_ptr": "i64",
        "continuations_ptr": "i64",
        "match_length_ptr": "i64",
    }
    scalars = {"num_ranks": "i32", "num_matches": "i32", "length": "i32", "stride_tb": "i32"}
    constants = {"LONGEST_ONLY": True, "BLOCK_R": 1024, "BLOCK_L": 16}
    return _builder("ngram_match", "continue_kernel", pointers, scalars, constants, 4) | {
        "capability": capability
    }


def compact(capability, word=16, columns=64):
    pointers = {"table_ptr": "i64", "path_ptr": "i64", "accept_ptr": "i64", "prefix_ptr": "i64"}
    constants = {
        "FIELDS": 6,
        "WORD": min(word, 4),
        "ALIGNED": word == 16,
        "BLOCK_R": 16,
        "BLOCK_D": columns,
        "BLOCK_N": 64,
    }
    return _builder("compaction", "compact_kernel", pointers, {"capacity": "i32"}, constants, 4) | {
        "capability": capability
    }


def rotary(capability, head_dim=128, interleaved=False, dtype="bf16"):
    names = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "out")
    pointers = {f"{name}_ptr": dtype for name in names} | {"prefix_ptr": "i64"}
    sizes = ("num_nodes", "slots", "q_heads", "kv_heads", "rotary_dim")
    qkv = [f"{one}{axis}" for one in "qkv" for axis in "bhnd"]
    strides = [*qkv, "cb", "cn", "sb", "sn", "kcb", "kch", "kcs", "vcb", "vch", "vcs"]
    scalars = dict.fromkeys((*sizes, *(f"stride_{name}" for name in strides)), "i32")
    # The launcher specialises on unit strides, as Triton does with any argument equal to 1.
    units = {"stride_qd": 1, "stride_kd": 1, "stride_vd": 1}
    constants = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": head_dim,
        "INTERLEAVED": interleaved,
        "BLOCK_D": 128,
        "BLOCK_V": 128,
        **units,
    }
    scalars = {name: kind for name, kind in scalars.items() if name not in units}
    return _builder("rotary", "append_kernel", pointers, scalars, constants, 1) | {
        "capability": capability
    }


def children(capability, drafting="top", filters=False, dtype="bf16", vocab_size=151936, kids=8):
    from treespec.kernels.noise import DRAFT_STREAM
    from treespec.kernels.round_tuning import children_config

    config = children_config(vocab_size)
    noise = {"seeds_ptr": "i64", "rows_ptr": "i64", "places_ptr": "i64"}
    pointers = {
        "logits_ptr": dtype,
        "cum_ptr": "fp32",
        "temperature_ptr": "fp32",
        "sharpness_ptr": "fp32",
        "threshold_ptr": "fp32" if filters else None,
        **(dict.fromkeys(noise) if drafting == "top" else noise),
        "roots_ptr": "i64" if drafting == "sampled" else None,
        "ranks_ptr": "i64",
        "peak_ptr": "fp32",
        "mass_ptr": "fp32",
    }
    counts = ("frontier", "vocab_size", "num_children", "stride_lb", "stride_lf")
    scalars = {**dict.fromkeys(counts, "i32"), "min_logprob": "fp32"}
    constants = {
        "COUPLED": drafting == "coupled",
        "SAMPLED": drafting == "sampled",
        "CUT": filters,
        "STREAM": DRAFT_STREAM,
        "BLOCK": config.block,
        "BLOCK_K": kids,
    }
    aligned = {*pointers, "stride_lb", "stride_lf", "vocab_size"}
    return _builder(
        "drafting", "part_kernel", pointers, scalars, constants, config.num_warps, aligned
    ) | {"capability": capability}


def children_join(capability, sampled=False, parts=38, kids=8, dtype="bf16"):
    from treespec.kernels.round_tuning import next_power_of_two

    pointers = {
        "logits_ptr": dtype,
        "cum_ptr": "fp32",
        "breadth_ptr": "i64" if sampled else None,
        "temperature_ptr": "fp32",
        "sharpness_ptr": "fp32",
        "ranks_ptr": "i64",
        "peak_ptr": "fp32",
        "mass_ptr": "fp32",
        "tokens_ptr": "i64",
        "logprobs_ptr": "fp32",
    }
    counts = ("frontier", "num_parts", "num_children", "stride_lb", "stride_lf")
    scalars = {**dict.fromkeys(counts, "i32"), "min_logprob": "fp32"}
    block_r = next_power_of_two(parts * kids)
    constants = {
        "SAMPLED": sampled,
        "LIMITED": sampled,
        "BLOCK_P": next_power_of_two(parts),
        "BLOCK_R": block_r,
        "BLOCK_K": kids,
    }
    warps = 4 if block_r <= 1024 else 8
    return _builder("drafting", "join_kernel", pointers, scalars, constants, warps) | {
        "capability": capability
    }


def merge(capability, num=4):
    from treespec.kernels.drafting_rules import VOTES

    pointers = {
        "continuations_ptr": "i64",
        "parents_ptr": "i64",
        "fresh_ptr": "i8",
        "share_ptr": "fp32",
    }
    constants = {f"VOTE_{place}": vote for place, vote in enumerate(VOTES)} | {"BLOCK_M": num}
    warps = 1 if num <= 16 else 4
    return _builder(
        "tree_building", "merge_kernel", pointers, {"num": "i32", "length": "i32"}, constants, warps
    ) | {"capability": capability}


# Builder arguments, and the least number of 16-byte loads its PTX must have.
VARIANTS = {
    "greedy_bf16": ("choose", {}, 4),
    "greedy_fp32": ("choose", {"dtype": "fp32"}, 4),
    "coupled_bf16": ("choose", {"sample": True}, 4),
    "coupled_cut": ("choose", {"sample": True, "cut": True}, 4),
    "walk_64": ("walk", {"nodes": 64}, 0),
    "walk_256": ("walk", {}, 0),
    "gumbel": ("gumbel", {}, 0),
    "cut": ("cut", {"draft": False}, 4),
    "normaliser": ("cut", {"filters": False}, 4),
    "traversal": ("rejection", {}, 4),
    "without_replacement": ("rejection", {"traversal": False, "filters": False}, 4),
    "ancestor_bits": ("ancestry", {}, 0),
    "node_depths": ("ancestry", {"bits": False}, 0),
    "select_2048": ("select", {}, 0),
    "merge_4": ("merge", {}, 0),
    "merge_64": ("merge", {"num": 64}, 0),
    "children_top": ("children", {}, 4),
    "children_coupled_64": ("children", {"drafting": "coupled", "kids": 64}, 4),
    "children_coupled_fp32": ("children", {"drafting": "coupled", "dtype": "fp32"}, 4),
    "children_sampled_cut": ("children", {"drafting": "sampled", "filters": True}, 4),
    "children_join": ("children_join", {}, 0),
    "children_join_largest": ("children_join", {"sampled": True, "parts": 64, "kids": 64}, 0),
    "scan": ("scan", {}, 0),
    "continue": ("continuation", {}, 0),
    "compact_128": ("compact", {"columns": 64}, 1),
    "compact_80": ("compact", {"columns": 64, "word": 16}, 1),
    "compact_bytes": ("compact", {"word": 1}, 0),
    "rotary_128": ("rotary", {}, 0),
    "rotary_80_interleaved": ("rotary", {"head_dim": 80, "interleaved": True}, 0),
}
# One variant of each kernel, which tests compile for every chip; the others for Hopper alone, as a
# build takes about a second.
EVERYWHERE = (
    "greedy_bf16",
    "coupled_cut",
    "walk_64",
    "cut",
    "traversal",
    "select_2048",
    "merge_4",
    "children_sampled_cut",
    "children_join",
    "compact_128",
    "rotary_128",
    "gumbel",
    "normaliser",
    "ancestor_bits",
    "scan",
    "continue",
)


def job_of(variant: str, capability: int) -> dict:
    """What `compile_tools.run_jobs` builds a variant from."""
    builder, arguments, _ = VARIANTS[variant]
    return {
        "builder": f"small_kernel_builders:{builder}",
        "arguments": {"capability": capability, **arguments},
    }
