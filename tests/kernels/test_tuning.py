"""The tuning table of tree attention: pure arithmetic, the same on every machine."""

from __future__ import annotations

import subprocess
import sys

import pytest
from treespec.kernels import tuning

LLAMA = {"batch": 1, "q_heads": 32, "kv_heads": 8, "head_dim": 128, "value_dim": 128}


def config(capability=90, num_nodes=16, num_slots=8192, element_bytes=2, **changes):
    return tuning.tree_attention_config(
        capability,
        num_nodes=num_nodes,
        num_slots=num_slots,
        element_bytes=element_bytes,
        **{**LLAMA, **changes},
    )


@pytest.mark.parametrize(
    "head_dim, block_rows, pieces",
    [
        (80, 64, (64, 16)),
        (80, 16, (128, 0)),
        (96, 64, (64, 32)),
        (96, 16, (64, 32)),
        (96, 32, (128, 0)),
        (128, 64, (128, 0)),
        (112, 64, (128, 0)),
        (72, 128, (64, 16)),
        (40, 16, (64, 0)),
        (1, 16, (16, 0)),
        (16, 64, (16, 0)),
        (17, 64, (32, 0)),
        (160, 64, (128, 32)),
        (256, 128, (256, 0)),
    ],
)
def test_pieces_of_a_head_dimension(head_dim, block_rows, pieces):
    assert tuning.split_head_dim(head_dim, block_rows) == pieces


def test_pieces_always_hold_the_head_dimension():
    for block_rows in (16, 32, 64, 128):
        for head_dim in range(1, 257):
            main, rest = tuning.split_head_dim(head_dim, block_rows)
            assert main + rest >= head_dim and main + rest < 2 * max(head_dim, 9)
            for piece in (main, rest):
                assert piece == 0 or (piece >= 16 and piece & (piece - 1) == 0)


@pytest.mark.parametrize(
    "num_nodes, block_rows", [(1, 16), (4, 16), (5, 32), (8, 32), (16, 64), (17, 128)]
)
def test_row_blocks_follow_packed_rows(num_nodes, block_rows):
    assert config(num_nodes=num_nodes).block_rows == block_rows


def test_wgmma_needs_64_rows_only_where_there_are_as_many():
    assert config(90, num_nodes=256).block_rows == 128
    assert config(80, num_nodes=256).block_rows == 64
    assert config(90, num_nodes=256, element_bytes=4).block_rows == 16


def test_splits_fill_the_chip_once_and_no_more():
    for num_nodes in (1, 16, 64, 256):
        chosen = config(num_nodes=num_nodes, num_slots=32768)
        programs = 8 * -(-num_nodes * 4 // chosen.block_rows) * chosen.num_splits
        room = 132 * (2 if chosen.block_rows <= 32 else 1)
        assert room / 2 < programs <= room


def test_splits_shrink_with_batch_cache_and_chip():
    assert config(num_nodes=64, batch=64).num_splits == 1
    assert config(num_slots=64).num_splits == 1
    assert config(num_slots=256).num_splits == 2
    assert config(num_nodes=64, num_sms=66).num_splits < config(num_nodes=64).num_splits


def test_reshaped_scores_take_smaller_tiles():
    assert config(num_nodes=64, reshaped=True).block_slots < config(num_nodes=64).block_slots
    assert config(num_nodes=1, reshaped=True) == config(num_nodes=1)


def test_an_unknown_chip_takes_the_nearest_lower_entry():
    assert tuning.chip_for(87)[0] == 86
    assert tuning.chip_for(103)[0] == 100
    assert tuning.chip_for(75)[0] == 80
    assert config(121) == config(120)


def test_cost_of_a_call_written_out():
    cost = tuning.tree_attention_cost(
        batch=2,
        q_heads=4,
        kv_heads=2,
        num_nodes=3,
        prefix_len=10,
        head_dim=8,
        value_dim=16,
        element_bytes=2,
    )
    # Cache 2 x 13 x 2 x 24 x 2, queries and results 2 x 3 x 4 x 24 x 2, bits 2 x 3 x 4.
    assert cost.bytes == 2496 + 1152 + 24
    assert cost.flops == 2 * 2 * 3 * 13 * 4 * 24
    chip = tuning.Chip(1, 1, 1, 1, 1000.0, 1.0, 1.0, "toy")
    assert tuning.Cost(4_000_000, 1).floor_us(chip) == pytest.approx(4.0)
    assert tuning.Cost(1, 3_000_000).floor_us(chip) == pytest.approx(3.0)


def test_importing_ops_and_the_table_leaves_triton_alone():
    code = (
        "import sys; from treespec.kernels import ops, reference, torch_attention, tuning; "
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
