"""The pair a benchmark runs on: the bundled one, two paths, or random weights of a given size."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

DRAFT_WEIGHTS = ("trained", "random", "adversarial")
SIZED_VOCABULARY = 32000
_GIB = 2**30


class ModelError(ValueError):
    """A pair that cannot be loaded; the message says which and why."""


@dataclass
class Pair:
    """Target and draft, end of text turned off in both.

    Attributes:
        target, draft: causal LMs on one device.
        tokenizer: theirs; None for random weights.
        about: what a record says of them.
        cuda_graphs: `cuda_graphs=` of this library's rows.
    """

    target: Any
    draft: Any
    tokenizer: Any
    about: dict[str, Any]
    cuda_graphs: bool | str = "auto"

    @property
    def simulated(self) -> bool:
        return bool(self.about["simulated"])

    @property
    def exact(self) -> bool:
        """Whether texts must agree token for token: in float32."""
        return self.target.dtype == torch.float32


def free_memory(device: torch.device) -> int | None:
    """Bytes that a model may take on a device; None where that is not told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def require_memory(needed: int, device: torch.device) -> None:
    """Refuses models that do not fit, before they are loaded.

    Raises:
        ModelError: if `needed` bytes are more than what is free.
    """
    free = free_memory(device)
    if free is not None and needed > free:
        raise ModelError(
            f"too little memory: the models' weights need {needed / _GIB:.1f} GiB and {device} has "
            f"{free / _GIB:.1f} GiB free"
        )


def _demo(dtype: str | None, device: torch.device):
    from treespec.demo import load_demo_pair

    return load_demo_pair(dtype=dtype or "float32", device=device)


def _weights_bytes(path: str) -> int:
    files = Path(path).glob("*.safetensors") if Path(path).is_dir() else []
    return sum(file.stat().st_size for file in files)


def _loaded(target: str, draft: str, dtype: str | None, device: torch.device):
    from treespec import cli
    from treespec.demo import resolve_dtype

    require_memory(_weights_bytes(target) + _weights_bytes(draft), device)
    models = [
        cli._load_model(option, path, resolve_dtype(dtype) if dtype else "auto", device)
        for option, path in (("--target", target), ("--draft", draft))
    ]
    return models[0], models[1].to(models[0].dtype), cli._load_tokenizer(target)


def sized_config(text: str):
    """A configuration: `LAYERSxHIDDEN`, a Llama of that size, or the path of a configuration.

    Raises:
        ModelError: if it is neither.
    """
    layers, times, hidden = text.partition("x")
    if times and layers.isdigit() and hidden.isdigit():
        if int(layers) < 1 or int(hidden) < 64 or int(hidden) % 64:
            raise ModelError(
                "--sized: LAYERSxHIDDEN needs a layer and a multiple of 64; got " + repr(text)
            )
        return LlamaConfig(
            vocab_size=SIZED_VOCABULARY,
            hidden_size=int(hidden),
            intermediate_size=int(hidden) * 8 // 3,
            num_hidden_layers=int(layers),
            num_attention_heads=int(hidden) // 64,
            num_key_value_heads=int(hidden) // 64,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            initializer_range=0.05,
        )
    if not Path(text).exists():
        raise ModelError(f"--sized: {text!r} is neither LAYERSxHIDDEN nor a configuration's path")
    try:
        return AutoConfig.from_pretrained(text)
    except (OSError, ValueError) as error:
        raise ModelError(f"--sized: {' '.join(str(error).split())[:300]}") from None


def _sized(texts: list[str], dtype: str | None, device: torch.device):
    from treespec.demo import resolve_dtype

    configs = [sized_config(text) for text in texts]
    if configs[0].vocab_size != configs[1].vocab_size:
        raise ModelError(
            "--sized: both configurations must have one vocabulary; got "
            f"{configs[0].vocab_size} and {configs[1].vocab_size} tokens"
        )
    resolved = resolve_dtype(dtype or "float32")
    with torch.device("meta"):
        count = sum(AutoModelForCausalLM.from_config(config).num_parameters() for config in configs)
    require_memory(count * resolved.itemsize, device)
    models = []
    for seed, config in enumerate(configs):
        torch.manual_seed(seed)
        # drawn where they will be: a GPU draws billions in a second
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=resolved)
        models.append(model.eval())
    return models[0], models[1], None


@torch.no_grad()
def spoil_draft(draft, how: str) -> None:
    """Makes a draft worse, in place.

    Args:
        draft: a causal LM.
        how: "trained" leaves it, "random" draws its weights anew, "adversarial" turns its head
            around, so that what it thought likeliest comes last.
    """
    if how == "random":
        generator = torch.Generator(device=draft.device).manual_seed(0)
        for parameter in draft.parameters():
            parameter.normal_(std=0.02, generator=generator)
    elif how == "adversarial":
        # the head may share its weights with the embeddings, which must stay
        head = copy.deepcopy(draft.get_output_embeddings())
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, torch.nn.Parameter(-parameter, requires_grad=False))
        draft.config.tie_word_embeddings = False
        draft.set_output_embeddings(head)


def load_pair(settings: dict[str, Any], device: torch.device) -> Pair:
    """The pair that settings ask for.

    Args:
        settings: `target` and `draft` (paths, both "demo" for the bundled pair), `sized` (two
            configurations, or None), `dtype` (a name or None), `draft_weights`, and perhaps
            `cuda_graphs`.

    Raises:
        ModelError: if the models are missing, do not fit together, or do not fit the memory.
    """
    if settings["sized"]:
        target, draft, tokenizer = _sized(settings["sized"], settings["dtype"], device)
        names = [Path(text).name for text in settings["sized"]]
    elif settings["target"] == "demo":
        if settings["draft"] != "demo":
            raise ModelError("--draft: the bundled target goes with the bundled draft")
        target, draft, tokenizer = _demo(settings["dtype"], device)
        names = ["demo target", "demo draft"]
    elif settings["draft"] == "demo":
        raise ModelError("--draft: a target of your own needs a draft of your own")
    else:
        target, draft, tokenizer = _loaded(
            settings["target"], settings["draft"], settings["dtype"], device
        )
        names = [Path(settings[role]).name for role in ("target", "draft")]
    spoil_draft(draft, settings["draft_weights"])
    for model in (target, draft):
        model.generation_config.eos_token_id = None
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = 0
    about = {
        "target": names[0],
        "draft": names[1],
        "target_parameters": target.num_parameters(),
        "draft_parameters": draft.num_parameters(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": device.type,
        "draft_weights": settings["draft_weights"],
        "simulated": bool(settings["sized"]),
    }
    graphs = settings.get("cuda_graphs")
    return Pair(target, draft, tokenizer, about, "auto" if graphs is None else graphs)
