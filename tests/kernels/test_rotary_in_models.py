"""The fused rotary kernel inside whole models: taken over only where the model's own function
agrees, and left out by name elsewhere.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from treespec.kernels import ops

from treespec import BestFirstTree, TreeSpeculator, rotary

_BASE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
# what is turned: halves, part of a head, neighbouring columns, normed heads, scaled positions
TAKEN_OVER = {
    "llama": _BASE,
    "gpt_neox": {**_BASE, "rotary_pct": 0.5},
    "cohere": _BASE,
    "qwen3": {**_BASE, "head_dim": 16},
    "yarn": {
        **_BASE,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 128,
        },
    },
}
LEFT_OUT = {
    "phi": ({**_BASE, "partial_rotary_factor": 0.5}, "change between rotation and"),
    "glm": ({**_BASE, "head_dim": 16}, "turns other pairs"),
    "gpt2": (
        {
            **{k: _BASE[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")},
            "n_embd": 32,
            "n_head": 2,
            "n_layer": 1,
            "n_positions": 512,
        },
        "no apply_rotary_pos_emb",
    ),
}
PROMPT = torch.tensor([[5, 17, 3, 99, 5, 17, 3]])


def model_of(kind: str, settings: dict):
    torch.manual_seed(3)
    config = AutoConfig.for_model("llama" if kind == "yarn" else kind, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def same_text(target, draft="ngram") -> TreeSpeculator:
    """Generates through the kernels and compares with the target's own text."""
    spec = TreeSpeculator(target, draft, BestFirstTree(4, 2, 2), attention="triton")
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(spec.generate(PROMPT, **options), target.generate(PROMPT, **options))
    return spec


@pytest.mark.parametrize("kind", TAKEN_OVER)
def test_models_whose_rotary_function_is_taken_over(kind, monkeypatch):
    launches = []
    sound = ops.append_rotary

    def counted(*args, **kwargs):
        launches.append(kwargs.get("implementation"))
        return sound(*args, **kwargs)

    monkeypatch.setattr(ops, "append_rotary", counted)
    target = model_of(kind, TAKEN_OVER[kind])
    # a draft forwards its levels to rows behind those of the levels before
    spec = same_text(target, copy.deepcopy(target) if kind == "llama" else "ngram")
    assert isinstance(spec._target.rotary, rotary.FusedRotary)
    assert launches.count("triton") > spec.stats.rounds
    pairs = "neighbouring columns" if kind == "cohere" else "halves"
    assert f"fused with the cache write (agrees with the model's own; pairs of {pairs})" in (
        spec.explain()
    )


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_models_that_keep_their_own(kind):
    settings, reason = LEFT_OUT[kind]
    spec = same_text(model_of(kind, settings))
    assert spec._target.rotary is None
    assert "rotary embedding: the model's own" in spec.explain() and reason in spec.explain()


def test_the_function_is_put_back_also_after_an_error(monkeypatch):
    target = model_of("llama", _BASE)
    module = sys.modules[type(target).__module__]
    own = module.apply_rotary_pos_emb
    spec = TreeSpeculator(target, None, attention="triton")
    assert module.apply_rotary_pos_emb is own
    monkeypatch.setattr(
        rotary.FusedRotary, "write", lambda *args: (_ for _ in ()).throw(RuntimeError("full"))
    )
    with pytest.raises(RuntimeError, match="full"):
        spec.generate(PROMPT, max_new_tokens=4, do_sample=False)
    assert module.apply_rotary_pos_emb is own


def test_a_function_that_turns_the_other_way_is_left_alone(monkeypatch):
    target = model_of("llama", _BASE)
    module = sys.modules[type(target).__module__]
    own = module.apply_rotary_pos_emb
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda q, k, cos, sin: own(q, k, cos, -sin)
    )
    spec = same_text(target)
    assert spec._target.rotary is None and "turns other pairs" in spec._target.rotary_reason


def test_a_wrong_kernel_is_noticed_at_attachment(monkeypatch):
    """The second look, at the logits of a whole forward, needs no agreement of the first."""
    monkeypatch.setattr(rotary.WatchedRotary, "_agrees", lambda self, q, k, c, s, x: x)
    spec = same_text(model_of("llama", _BASE))
    assert spec._target.rotary is None and "logits differ" in spec._target.rotary_reason


def test_the_pytorch_path_leaves_it_to_the_model():
    spec = TreeSpeculator(model_of("llama", _BASE), None, attention="torch")
    assert spec._target.rotary is None and "only the Triton path" in spec.explain()
