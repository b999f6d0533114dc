"""Everything that can be wrong with a call, found before any work: each error names the argument,
what was expected, what came."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from treespec import graphs
from treespec.sources import DraftSource, OneShotSource

if TYPE_CHECKING:
    from treespec.model import TreeModel

_SEED_LIMIT = 1 << 63


def option(name: str, value: Any, allowed: tuple) -> None:
    if not any(
        value is choice or (isinstance(value, str) and value == choice) for choice in allowed
    ):
        listed = ", ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name} must be one of {listed}; got {value!r}")


def causal_lm(name: str, model: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} must be a loaded transformers causal LM; got {type(model).__name__} "
            f"{_short(model)}"
        )


def draft_parts(draft: Any, target: PreTrainedModel) -> list:
    """The sources a `draft=` argument names, checked against the target."""
    if draft is None:
        return []
    parts = list(draft) if isinstance(draft, (list, tuple)) else [draft]
    if not parts:
        raise ValueError(
            "draft must name at least one source, or be None for plain decoding; got an empty list"
        )
    models = 0
    for part in parts:
        if isinstance(part, PreTrainedModel):
            models += 1
            _draft_model(part, target)
        elif isinstance(part, str):
            if part != "ngram":
                raise ValueError(
                    'draft must be a causal LM, "ngram", a DraftSource or a list of these; got '
                    f"{part!r}"
                )
        elif not isinstance(part, DraftSource):
            raise TypeError(
                'draft must be a causal LM, "ngram", a DraftSource, a list of these or None; got '
                f"{type(part).__name__}"
            )
        elif not isinstance(part, OneShotSource):
            raise NotImplementedError(
                f"draft: {type(part).__name__} is not a OneShotSource; only those can be plugged in"
            )
    if models > 1:
        raise NotImplementedError(f"draft: at most one model can draft at a time; got {models}")
    return parts


def on_gpu(cuda_graphs: bool | str, target: PreTrainedModel) -> None:
    device = target.get_input_embeddings().weight.device
    if cuda_graphs is True and not graphs.runs_on(device):
        raise ValueError(f"cuda_graphs=True needs the target on a CUDA device; it is on {device}")


def graphs_captured(model: TreeModel) -> None:
    if model.recording_reason is not None:
        raise ValueError(
            f"cuda_graphs=True cannot capture the {model.role}: {model.recording_reason}"
        )


def drawn_drafts(rule: str, parts: list) -> None:
    """A rejection rule accepts tokens that were drawn from a model, not proposed for sure."""
    for part in parts:
        if not isinstance(part, PreTrainedModel):
            name = repr(part) if isinstance(part, str) else type(part).__name__
            raise ValueError(
                f'sampling="{rule}" needs drafts drawn from a model; got {name}, whose tokens are '
                'fixed; use sampling="coupled"'
            )


def known_warpers(rule: str, warpers: dict | None, processors: Any) -> None:
    """A rejection rule needs the target's whole distribution at nodes nobody has reached yet."""
    if warpers is None:
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise NotImplementedError(
            f'sampling="{rule}" knows temperature, top_k, top_p and min_p, in this order; got '
            f'{names}; use sampling="coupled"'
        )


def _draft_model(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    causal_lm("draft", draft)
    if draft is target:
        raise ValueError("draft must be another model than target; got the same object")
    ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (draft, target))
    # sizes padded to different multiples are the same vocabulary: Qwen2.5 has 151936 and 152064
    padded_alike = min(ours, theirs) >= 32000 and abs(ours - theirs) <= 512
    if ours != theirs and not padded_alike:
        raise ValueError(f"draft must have the target's vocabulary of {theirs} tokens; got {ours}")
    devices = [m.get_input_embeddings().weight.device for m in (draft, target)]
    if devices[0] != devices[1]:
        raise ValueError(f"draft must be on the target's device {devices[1]}; got {devices[0]}")


def input_ids(ids: Any, vocab_size: int) -> None:
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"input_ids must be an integer tensor [B, W]; got {type(ids).__name__}")
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"input_ids must be an integer tensor [B, W]; got dtype {ids.dtype}")
    if ids.dim() != 2:
        raise ValueError(f"input_ids must be [B, W]; got shape {list(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(
            f"input_ids must hold at least one token a row; got shape {list(ids.shape)}"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(
            f"input_ids must be in [0, {vocab_size}), the target's vocabulary; got {wrong}"
        )


def attention_mask(mask: Any, ids: torch.Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"attention_mask must be a tensor like input_ids; got {type(mask).__name__}"
        )
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {list(ids.shape)}; got "
            f"{list(mask.shape)}"
        )
    unpadded(ids, mask)


def unpadded(ids: torch.Tensor, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """The rows of `ids` without their left padding."""
    if mask is None:
        return list(ids)
    kept = mask.bool()
    lengths = kept.sum(1).tolist()
    ends = (kept.long().diff(dim=1) < 0).any(1).tolist()
    for row, (length, broken) in enumerate(zip(lengths, ends)):
        if length == 0:
            raise ValueError(
                f"attention_mask must keep at least one token a row; row {row} keeps none"
            )
        if broken:
            raise ValueError(
                f"attention_mask must be zeros then ones (left padding); row {row} is not"
            )
    return [ids[row, ids.shape[1] - length :] for row, length in enumerate(lengths)]


def seed(value: Any) -> None:
    if value is None or isinstance(value, torch.Generator):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"seed must be an int, a torch.Generator or None; got {type(value).__name__}"
        )
    if not 0 <= value < _SEED_LIMIT:
        raise ValueError(f"seed must be in [0, 2**63); got {value}")


def resolve_seed(value: int | torch.Generator | None) -> int:
    """The seed itself, or one drawn from a generator (torch's global one for None)."""
    if isinstance(value, int):
        return value
    device = value.device if value is not None else "cpu"
    return int(torch.randint(_SEED_LIMIT - 1, (1,), generator=value, device=device))


def generate_options(kwargs: dict, defaults: GenerationConfig) -> None:
    """Options of `generate` that cannot be honoured, or whose values make no sense."""
    for name, reason in _REFUSED_OPTIONS.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: {reason}")
    config = kwargs.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(
            f"generation_config must be a GenerationConfig; got {type(config).__name__}"
        )

    def value(name: str) -> Any:
        for source in (kwargs, config, defaults):
            found = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if found is not None:
                return found
        return None

    for name in ("max_new_tokens", "max_length"):
        given = kwargs.get(name, getattr(config, name, None) if config is not None else None)
        if given is not None and (isinstance(given, bool) or not isinstance(given, int)):
            raise TypeError(f"{name} must be an integer; got {given!r}")
        if given is not None and given < 1:
            raise ValueError(f"{name} must be at least 1; got {given}")
    if (value("num_beams") or 1) > 1:
        raise NotImplementedError(
            f"num_beams: beam search is not supported; got {value('num_beams')}"
        )
    if (value("num_beam_groups") or 1) > 1 or value("constraints") or value("force_words_ids"):
        raise NotImplementedError(
            "constraints: constrained and grouped beam search are not supported"
        )
    if value("penalty_alpha") or value("dola_layers"):
        raise NotImplementedError(
            "penalty_alpha, dola_layers: contrastive and DoLa decoding are not supported"
        )
    if (value("guidance_scale") or 1) != 1:
        raise NotImplementedError(
            "guidance_scale: classifier-free guidance needs a second forward a token"
        )
    if value("output_attentions") or value("output_hidden_states"):
        raise NotImplementedError(
            "output_attentions, output_hidden_states: trees do not give them in text order"
        )
    if value("prompt_lookup_num_tokens") or value("assistant_early_exit"):
        raise NotImplementedError(
            "prompt_lookup_num_tokens, assistant_early_exit: give the speculator its draft instead"
        )
    if value("do_sample"):
        _sampling_options(value)


def _sampling_options(value) -> None:
    temperature, top_p, top_k, min_p = (
        value(name) for name in ("temperature", "top_p", "top_k", "min_p")
    )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature must be above 0 with do_sample=True; got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1]; got {top_p}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 0):
        raise ValueError(f"top_k must be a non-negative integer (0 is off); got {top_k}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be in [0, 1]; got {min_p}")


_REFUSED_OPTIONS = {
    "assistant_model": "the draft is given to TreeSpeculator",
    "past_key_values": "a filled cache cannot be continued",
    "inputs_embeds": "lookups and drafts need input_ids",
    "encoder_outputs": "only decoder-only models are supported",
    "prefix_allowed_tokens_fn": "constrained beam search is not supported; use a LogitsProcessor",
    "negative_prompt_ids": "classifier-free guidance needs a second forward a token",
    "custom_generate": "the speculator is the decoding loop already",
    "position_ids": "positions follow from attention_mask",
    "token_type_ids": "only plain text is supported",
    "pixel_values": "only text prompts are supported",
}


def generation_config(config: GenerationConfig) -> None:
    """The same refusals where transformers calls the speculator itself."""
    generate_options({}, config)


def stop_strings(
    given: Any, kwargs: dict, defaults: GenerationConfig, tokenizer: Any
) -> list[str] | None:
    """The stop strings of a call, wherever they were given."""
    config = kwargs.get("generation_config") or defaults
    strings = given if given is not None else getattr(config, "stop_strings", None)
    if strings is None:
        return None
    strings = [strings] if isinstance(strings, str) else list(strings)
    if not strings or not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"stop_strings must be non-empty strings; got {strings!r}")
    if tokenizer is None:
        raise ValueError("stop_strings needs a tokenizer: TreeSpeculator(..., tokenizer=tokenizer)")
    return strings


@contextlib.contextmanager
def stop_strings_hidden(defaults: GenerationConfig, kwargs: dict):
    """transformers would ask for a tokenizer it never passes on; the criterion is already among the
    others."""
    configs = [
        c
        for c in (defaults, kwargs.get("generation_config"))
        if getattr(c, "stop_strings", None) is not None
    ]
    before = [config.stop_strings for config in configs]
    try:
        for config in configs:
            config.stop_strings = None
        yield
    finally:
        for config, strings in zip(configs, before):
            config.stop_strings = strings


def eos_ids(criteria: Any) -> frozenset[int]:
    """Tokens that end a row, from the stopping criteria that transformers prepared."""
    ids: set[int] = set()
    for criterion in criteria or []:
        if hasattr(criterion, "eos_token_id"):
            ids.update(torch.as_tensor(criterion.eos_token_id).flatten().tolist())
    return frozenset(ids)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float)) else ""
    return text[:80]
