"""Small seeded models and prompts that the tests share."""

from __future__ import annotations

import functools

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from treespec import load_demo_pair

VOCAB = 120
POSITIONS = 1024
KINDS = ("llama", "gpt_neox", "gpt2", "qwen3", "gemma2")

_SIZES = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
_WIDE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.3,
}


def tiny_config(kind: str, num_layers: int):
    """A configuration of a few thousand weights, drawn wide enough that no two logits are nearly
    the same.
    """
    common = {**_SIZES, **_WIDE, "num_hidden_layers": num_layers}
    if kind == "llama":
        return LlamaConfig(**common, num_key_value_heads=2)
    if kind == "gpt_neox":
        return GPTNeoXConfig(**common, rotary_pct=0.5)
    if kind == "gpt2":
        # with a padding token this type looks for it in every forward, and is not recorded
        return GPT2Config(
            **{**_SIZES, "pad_token_id": None},
            n_embd=48,
            n_head=4,
            n_layer=num_layers,
            n_positions=POSITIONS,
            initializer_range=0.3,
        )
    if kind == "qwen3":
        return Qwen3Config(**common, num_key_value_heads=2, head_dim=16)
    assert kind == "gemma2"
    # the window is shorter than the prompts, and both caps lie within the range of the scores
    return Gemma2Config(
        **common,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,
        attn_logit_softcapping=4.0,
        final_logit_softcapping=20.0,
        tie_word_embeddings=False,
    )


@functools.cache
def tiny_pair(kind: str):
    """A random target of two layers, and a draft that shares its first layer and so agrees with it
    now and then.
    """
    torch.manual_seed(KINDS.index(kind))
    implementation = "eager" if kind == "gemma2" else "sdpa"
    target, draft = (
        AutoModelForCausalLM.from_config(
            tiny_config(kind, layers), attn_implementation=implementation
        ).eval()
        for layers in (2, 1)
    )
    kept = {
        name: weight for name, weight in target.state_dict().items() if name in draft.state_dict()
    }
    draft.load_state_dict(kept)
    # a second layer that decides less lets the draft agree more often
    with torch.no_grad():
        for name, weight in target.named_parameters():
            if ".1." in name and weight.dim() == 2:
                weight.mul_(0.5)
    return target, draft


def prompts(batch: int, length: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    """Random ids `[B, L]` without 0, which pads."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab_size, (batch, length), generator=generator)


def ragged(batch: int = 4, longest: int = 24, seed: int = 1, vocab_size: int = VOCAB):
    """Left-padded ids and their mask, every row of another length, the first one full."""
    ids = prompts(batch, longest, seed, vocab_size)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : (row * longest) // (batch + 1) + row] = 0
    return ids * mask, mask


@functools.cache
def demo_models():
    """The bundled target, draft and tokenizer, loaded once."""
    return load_demo_pair()
