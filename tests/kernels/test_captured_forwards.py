"""Forwards captured as graphs: replays over fixed addresses give every tree's own logits. On a GPU
the graphs are CUDA's; elsewhere they are emulated, over kernels in the interpreter."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from treespec import BestFirstTree, TreeSpeculator, graphs, model
from treespec.tree import ancestor_matrix

pytestmark = pytest.mark.usefixtures("made")

ROUNDING = 2e-5
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# a layer with a window of 12 tokens, and one without
_WINDOWS = {"head_dim": 16, "sliding_window": 12, "num_hidden_layers": 2}
_CONFIGS = {
    "gpt_neox": _SMALL,
    "llama": _SMALL,
    "gemma2": {**_SMALL, **_WINDOWS},
    "gpt2": {**_SMALL, "pad_token_id": None},
}


def small_model(kind: str, device):
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **_CONFIGS[kind])
    return AutoModelForCausalLM.from_config(config).eval().to(device)


def both(kind: str, device):
    """The same model, captured and eager."""
    target = small_model(kind, device)
    return (
        model.TreeModel(target, "target", attention="triton", graphs=captured)
        for captured in (True, False)
    )


def random_tree(num_nodes: int, seed: int, device):
    generator = torch.Generator().manual_seed(seed)
    parents = [-1] + [int(torch.randint(k, (1,), generator=generator)) for k in range(1, num_nodes)]
    tokens = torch.randint(2, 128, (1, num_nodes), generator=generator).to(device)
    visible = ancestor_matrix(torch.tensor([parents], device=device), num_nodes)
    return tokens, visible


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma2", "llama"])
@torch.inference_mode()
def test_replays_give_every_trees_own_logits(kind, device, made):
    """Other trees, other tokens, and longer prefixes than the one that was captured."""
    captured, eager = both(kind, device)
    made.clear()
    for one in (captured, eager):
        one.begin()
        one.allocate(1, 96)
    ids = torch.randint(2, 128, (1, 60), generator=torch.Generator().manual_seed(5)).to(device)
    for step, length in enumerate((9, 10, 17, 40, 60)):
        tokens, visible = random_tree(6, step, device)
        found, expected = [], []
        for one, logits in ((captured, found), (eager, expected)):
            one.ingest(ids, [length])
            positions = length + visible.sum(2) - 1
            logits.append(one.forward(tokens, positions, visible).clone())
            one.cache.commit([[]])
        error = (found[0] - expected[0]).abs().max() / expected[0].std()
        assert error < ROUNDING, (step, length)
    assert captured.recording_reason is None and eager.recording_reason is not None
    assert [recording.checks_left for recording in captured._recordings.values()] == [0]
    if device.type != "cuda":
        assert [graph.replays for graph in made] == [5]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@torch.inference_mode()
def test_levels_of_a_draft_are_captured_apart(kind, device):
    """A frontier behind other nodes, as a draft forwards it, two sequences of different length;
    where no rotary kernel writes the rows, and where a window is counted from nodes before."""
    captured, eager = both(kind, device)
    for one in (captured, eager):
        one.begin()
        one.allocate(2, 64)
    ids = torch.randint(2, 128, (2, 40), generator=torch.Generator().manual_seed(5)).to(device)
    seen = torch.tensor([[[True, True, False], [True, False, True]]], device=device)
    for step in range(4):
        lens = [8 + step, 30 - 2 * step]
        found = []
        for one in (captured, eager):
            one.allocate(2, 64)
            one.ingest(ids, lens)
            roots = torch.tensor(lens, device=device)[:, None]
            tokens = ids[:, step : step + 1]
            root = torch.ones(2, 1, 1, dtype=torch.bool, device=device)
            one.forward(tokens, roots, root)
            level = ids[:, step + 1 : step + 3]
            positions = (roots + 1).expand(2, 2)
            rows = torch.cat([roots, positions], 1)
            found.append(one.forward(level, positions, seen.expand(2, -1, -1), 1, rows).clone())
        error = (found[0] - found[1]).abs().max() / found[1].std()
        assert error < ROUNDING, step
    assert {key[2] for key in captured._recordings} == {0, 1}


def test_text_is_identical(device, made):
    """Greedy and sampled, of one sequence and of two of different length."""
    target = small_model("llama", device)
    draft = copy.deepcopy(target)
    tree = BestFirstTree(4, 2, 2)
    spec = TreeSpeculator(target, [draft, "ngram"], tree, attention="triton", cuda_graphs=True)
    ids = torch.randint(2, 128, (2, 14), generator=torch.Generator().manual_seed(1)).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for rows in (1, 2):
        options = {"attention_mask": mask[:rows], "max_new_tokens": 7, "do_sample": False}
        expected = target.generate(ids[:rows], **options)
        assert torch.equal(spec.generate(ids[:rows], **options), expected)
    drawn = {"max_new_tokens": 4, "do_sample": True, "seed": 3, "top_k": 0}
    eager = TreeSpeculator(target, None, attention="torch").generate(ids, mask, **drawn)
    assert torch.equal(spec.generate(ids, mask, **drawn), eager)
    assert "CUDA graphs: on; shapes so far" in spec.explain()
    assert "CUDA graphs take their place" in spec.explain()
    if device.type != "cuda":
        assert sum(graph.replays for graph in made) > 8


def test_a_new_cache_takes_its_graphs_with_it(device):
    target = small_model("llama", device)
    spec = TreeSpeculator(target, None, attention="triton", cuda_graphs=True)
    ids = torch.arange(2, 12, device=device)[None]
    spec.generate(ids, max_new_tokens=6, do_sample=False)
    cache, kept = spec._target.cache, dict(spec._target._recordings)
    spec.generate(ids[:, :4], max_new_tokens=4, do_sample=False)
    assert spec._target.cache is cache and spec._target._recordings == kept
    spec.generate(ids.repeat(2, 1), max_new_tokens=4, do_sample=False)
    assert spec._target.cache is not cache
    assert all(key[0] == 2 for key in spec._target._recordings)


@pytest.mark.parametrize("left_out", ["prefix_lens", "positions", "visible"])
@torch.inference_mode()
def test_what_a_replay_does_not_fill_is_found(left_out, device, monkeypatch):
    """A graph that keeps the first call's data is dropped when it is checked."""
    captured, _ = both("llama", device)
    take_over = graphs.GraphForward.take_over

    def forgetful(self, *arguments):
        name = "_prefix_lens" if left_out == "prefix_lens" else left_out
        kept = getattr(self, name).clone()
        take_over(self, *arguments)
        getattr(self, name).copy_(kept)

    monkeypatch.setattr(graphs.GraphForward, "take_over", forgetful)
    captured.begin()
    captured.allocate(1, 96)
    ids = torch.randint(2, 128, (1, 60), generator=torch.Generator().manual_seed(5)).to(device)
    for step, length in enumerate((9, 23)):
        captured.ingest(ids, [length])
        tokens, visible = random_tree(6, step, device)
        captured.forward(tokens, length + visible.sum(2) - 1, visible)
    assert "differs from the eager forward" in captured.recording_reason


def test_a_forward_that_reads_on_the_host_stays_eager(device, monkeypatch):
    target = small_model("llama", device)
    layer = target.model.layers[0].mlp
    forward = layer.forward

    def reads(hidden):
        return forward(hidden) * (1.0 if float(hidden.sum()) < 1e9 else 2.0)

    monkeypatch.setattr(layer, "forward", reads)
    ids = torch.arange(2, 12, device=device)[None]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = target.generate(ids, **options)
    with pytest.raises(ValueError, match="cuda_graphs=True cannot capture the target: recording"):
        TreeSpeculator(target, None, attention="triton", cuda_graphs=True)
    ready = model.TreeModel(target, "target", attention="triton", graphs=True)
    assert "recording was refused" in ready.recording_reason
    assert "not permitted when stream is capturing" in ready.recording_reason
    spec = TreeSpeculator(target, None, attention="triton")
    assert torch.equal(spec.generate(ids, **options), expected)


def test_what_cannot_be_captured_is_refused_by_name(device):
    target = small_model("llama", device)
    with pytest.raises(ValueError, match="cannot capture the target: graphs need the Triton"):
        TreeSpeculator(target, None, attention="torch", cuda_graphs=True)
    target.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="cannot capture the target: the model has forward hooks"):
        TreeSpeculator(target, None, attention="triton", cuda_graphs=True)


@torch.inference_mode()
def test_products_do_not_point_at_memory_of_graphs_that_are_gone(device):
    """Another user of graphs may give torch's shared workspaces back to the driver."""
    if device.type != "cuda":
        pytest.skip("workspaces are cuBLAS's")
    gone = torch.randn(64, 64, device=device)
    replay, _ = graphs.capture_graph(lambda: gone @ gone, device, graphs.new_pool())
    del replay, _
    weight, x = (torch.randn(n, 4096, device=device, dtype=torch.float16) for n in (512, 48))
    replay, out = graphs.capture_graph(lambda: x @ weight.T, device, graphs.new_pool())
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    replay()
    torch.testing.assert_close(out, x @ weight.T)


def test_a_mask_that_is_no_window_is_refused(device):
    """Its layer would attend by PyTorch, over rows cut to one text's length."""
    forward = graphs.GraphForward
    with pytest.raises(model.RecordingRefused, match="attends by PyTorch"):
        forward.attend(
            type("Call", (), {"kernel": True})(), *(None,) * 3, torch.empty(0), 1.0, None, None
        )


def test_few_capacities():
    found = [graphs.roomy(rows) for rows in (1, 1024, 1025, 5000, 8193)]
    assert found == [graphs._FEWEST_ROWS, 1024, 2048, 8192, 16384]
