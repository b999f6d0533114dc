"""Whole models through the Triton attention kernel, in the interpreter where there is no GPU:
token-identical text."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from treespec import BestFirstTree, TreeSpeculator, hf, load_demo_pair

_BASE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_CONFIGS = {
    "llama": _BASE,
    "gpt_neox": _BASE,
    "gemma2": {**_BASE, "head_dim": 32, "sliding_window": 12},
    "gpt_oss": {
        **_BASE,
        "head_dim": 32,
        "num_local_experts": 4,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def _model(kind: str, device: torch.device):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_CONFIGS[kind])).eval()
    return model.to(device)


@pytest.mark.parametrize("kind", list(_CONFIGS))
def test_text_is_identical_through_the_kernel(kind, device, monkeypatch):
    target = _model(kind, device)
    # the draft agrees with the target, so that paths of several nodes are accepted
    spec = TreeSpeculator(
        target, [copy.deepcopy(target), "ngram"], BestFirstTree(6, 2, 2), attention="triton"
    )
    calls = 0
    in_kernel = hf.Forward._attend_in_kernel

    def count(self, *args):
        nonlocal calls
        calls += 1
        return in_kernel(self, *args)

    monkeypatch.setattr(hf.Forward, "_attend_in_kernel", count)
    ids = torch.randint(2, 128, (2, 16), generator=torch.Generator().manual_seed(1)).to(
        target.device
    )
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"max_new_tokens": 5, "do_sample": False}
    found = spec.generate(ids, mask, **options)
    assert torch.equal(found, target.generate(ids, attention_mask=mask, **options))
    assert spec.stats.tokens_per_round > 1.5
    assert calls >= 2 * spec.stats.rounds
    assert "Triton kernel" in spec.explain()


def test_demo_pair_is_identical_through_the_kernel(device):
    target, draft, tokenizer = load_demo_pair()
    target, draft = target.to(device), draft.to(device)
    spec = TreeSpeculator(target, draft, BestFirstTree(4, 1, 3), attention="triton")
    ids = tokenizer("The river rises in the hills and", return_tensors="pt").input_ids.to(device)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(spec.generate(ids, **options), target.generate(ids, **options))


def test_a_causal_mask_instead_of_the_tree_is_seen(device, monkeypatch):
    """The same run with every earlier node visible: siblings leak, and the attachment check refuses
    the model."""
    target = _model("gpt_neox", device)
    pack = hf.pack_bits
    monkeypatch.setattr(hf, "pack_bits", lambda visible: pack(torch.ones_like(visible).tril()))
    # the dense mask, made by PyTorch, still serves the model
    assert TreeSpeculator(target, None, attention="triton")._target.route == "masks"
