"""The bundled model pair and prompts, and the comparison `treespec demo` runs on them. Everything
is local: no hub access.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

DATA = Path(__file__).resolve().parent / "data"
PROMPT_SETS = tuple(sorted(path.stem for path in (DATA / "prompts").glob("*.jsonl")))
# A prompt and a seed whose sampled continuation is pleasant to read.
LIVE_PROMPT_ID = "dev-011"
LIVE_SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "seed": 5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from itself or its name.

    Raises:
        ValueError: for anything but float32, bfloat16 and float16.
    """
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in DTYPES.values():
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    return resolved


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def load_demo_pair(dtype: torch.dtype | str = torch.float32, device: torch.device | str = "cpu"):
    """The bundled target, draft and tokenizer, from package data, in evaluation mode.

    What they are, and what they were trained on, is told in `treespec/data/demo/MODEL_CARD.md`.

    Args:
        dtype: float32, bfloat16 or float16, as a torch dtype or by name.
        device: where the models go.

    Returns:
        (target, draft, tokenizer): two transformers causal LMs and their common tokenizer.

    Raises:
        ValueError: for another dtype.

    Example:
        >>> target, draft, tokenizer = load_demo_pair()
        >>> target.config.vocab_size
        4096
    """
    resolved = resolve_dtype(dtype)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _no_progress_bars():
        target, draft = (
            AutoModelForCausalLM.from_pretrained(
                DATA / "demo" / role, dtype=resolved, local_files_only=True
            )
            for role in ("target", "draft")
        )
    tokenizer = AutoTokenizer.from_pretrained(DATA / "demo", local_files_only=True)
    return target.to(device).eval(), draft.to(device).eval(), tokenizer


def load_prompts(name: str = "dev") -> list[dict[str, str]]:
    """A bundled prompt set: "dev" (60 prompts of 8 categories), "fallback" (10) or
    "wikitext2_800chars" (10).

    Returns:
        One dict per prompt with at least `id`, `category` and `prompt`, in the order of the file.

    Raises:
        ValueError: for an unknown name.

    Example:
        >>> len(load_prompts("fallback"))
        10
    """
    if name not in PROMPT_SETS:
        raise ValueError(f"name must be one of {', '.join(PROMPT_SETS)}; got {name!r}")
    with open(DATA / "prompts" / f"{name}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def live_prompt() -> str:
    """The prompt that `treespec demo` continues while one watches."""
    return next(p["prompt"] for p in load_prompts("dev") if p["id"] == LIVE_PROMPT_ID)


def spread_prompts(prompts: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """`count` prompts that go round the categories, so that a few of them are still a mixture."""
    categories: dict[str, list[dict[str, str]]] = {}
    for prompt in prompts:
        categories.setdefault(prompt["category"], []).append(prompt)
    longest = max((len(group) for group in categories.values()), default=0)
    rounds = ([group[i] for group in categories.values() if i < len(group)] for i in range(longest))
    return [prompt for turn in rounds for prompt in turn][:count]


@dataclass(frozen=True)
class Method:
    """A way to continue a prompt: `run(input_ids[1, S])` gives `(ids[1, S + new], rounds)`, rounds
    being target forwards.
    """

    name: str
    run: Callable[[torch.Tensor], tuple[torch.Tensor, int]]
    ours: bool = False


@dataclass
class Result:
    """One row of the comparison. `differing` counts prompts whose text is not plain generation's.

    `largest_gap` is, over those, the largest difference between the target's logits of the two
    tokens at the first place where the texts part: in 16 bits it shows whether a difference is a
    rounding tie.
    """

    method: str
    ours: bool
    prompts: int = 0
    new_tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0
    differing: int = 0
    largest_gap: float = 0.0
    ratio: float = 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_round(self) -> float:
        return self.new_tokens / self.rounds if self.rounds else 0.0

    @property
    def identical(self) -> bool:
        return self.differing == 0

    def as_dict(self) -> dict:
        """Plain data, ready for JSON."""
        data = asdict(self)
        for name in ("tokens_per_second", "tokens_per_round", "identical"):
            data[name] = getattr(self, name)
        return data


@contextmanager
def _count_forwards(model) -> Iterator[list[int]]:
    calls = [0]

    def count(*_) -> None:
        calls[0] += 1

    hook = model.register_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def transformers_method(name: str, target, max_new_tokens: int, **generate_kwargs) -> Method:
    """A method that calls `target.generate` greedily with further keywords, counting the target's
    forwards.
    """

    def run(input_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        with _count_forwards(target) as calls:
            ids = target.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                **generate_kwargs,
            )
        return ids, calls[0]

    return Method(name, run)


def speculator_method(name: str, speculator, max_new_tokens: int) -> Method:
    """A method that calls `speculator.generate` greedily; the prefill, which writes the first
    token, counts as a round.
    """

    def run(input_ids: torch.Tensor) -> tuple[torch.Tensor, int]:
        ids = speculator.generate(input_ids, max_new_tokens=max_new_tokens, do_sample=False)
        return ids, speculator.stats.rounds + 1

    return Method(name, run, ours=True)


def demo_methods(
    target, draft, tokenizer, max_new_tokens: int, cuda_graphs: bool | str = "auto"
) -> list[Method]:
    """What `treespec demo` compares: three ways of `target.generate`, then this library's chain,
    trees and auto.
    """
    from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree, TreeSpeculator

    merged = [draft, "ngram"]
    ours = [
        ("treespec chain, draft alone", draft, Chain(length=4)),
        ("treespec tree, draft alone", draft, BestFirstTree(max_nodes=12, depth=4, width=3)),
        ("treespec chain, draft + lookup", merged, Chain(length=4)),
        ("treespec fixed tree, draft + lookup", merged, FixedTree(depth=3, max_nodes=16)),
        (
            "treespec best-first tree, draft + lookup",
            merged,
            BestFirstTree(max_nodes=16, depth=3, width=4),
        ),
        (
            "treespec adaptive tree, draft + lookup",
            merged,
            AdaptiveTree(base_depth=2, max_depth=4, max_nodes=16),
        ),
        ("treespec auto", draft, "auto"),
    ]
    return [
        transformers_method("plain generate", target, max_new_tokens),
        transformers_method("assisted generation", target, max_new_tokens, assistant_model=draft),
        transformers_method("prompt lookup", target, max_new_tokens, prompt_lookup_num_tokens=10),
        *(
            speculator_method(
                name,
                TreeSpeculator(
                    target, sources, tree=tree, tokenizer=tokenizer, cuda_graphs=cuda_graphs
                ),
                max_new_tokens,
            )
            for name, sources, tree in ours
        ),
    ]


@torch.no_grad()
def first_difference_gap(target, plain_ids: torch.Tensor, other_ids: torch.Tensor) -> float:
    """How much the target prefers plain's token over the other's, in logits, where two texts first
    differ.

    Args:
        plain_ids, other_ids: int64 [S], [S'], different.

    Returns:
        The absolute gap; infinity where one text merely ends before the other.
    """
    shorter = min(len(plain_ids), len(other_ids))
    differs = (plain_ids[:shorter] != other_ids[:shorter]).nonzero()
    if len(differs) == 0:
        return float("inf")
    first = int(differs[0, 0])
    logits = target(plain_ids[None, :first]).logits[0, -1].float()
    return float((logits[plain_ids[first]] - logits[other_ids[first]]).abs())


def _timed(method: Method, input_ids: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    on_gpu = input_ids.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(input_ids.device)
    start = time.perf_counter()
    ids, rounds = method.run(input_ids)
    if on_gpu:
        torch.cuda.synchronize(input_ids.device)
    return ids, rounds, time.perf_counter() - start


def compare(
    target,
    methods: list[Method],
    prompts: list[torch.Tensor],
    *,
    warmups: int = 1,
    on_step: Callable[[str], None] | None = None,
) -> list[Result]:
    """Times every method on every prompt, in turns, and checks each text against that of the first
    method.

    All methods see a prompt before any sees the next, in an order that rotates, so drift of the
    machine hits all alike.

    Args:
        target: the model whose logits judge a difference.
        methods: the first one is the reference, plain generation.
        prompts: int64 [1, S] each.
        warmups: untimed passes of every method over the first prompt.
        on_step: called with the method's name after each run, warm-ups included.

    Returns:
        One `Result` per method, in the order given.

    Raises:
        ValueError: without a method or a prompt.
    """
    if not methods or not prompts:
        raise ValueError("methods and prompts must not be empty")
    results = [Result(method.name, method.ours) for method in methods]
    for _ in range(warmups):
        for method in methods:
            method.run(prompts[0])
            if on_step:
                on_step(method.name)
    for turn, input_ids in enumerate(prompts):
        texts: dict[int, torch.Tensor] = {}
        for offset in range(len(methods)):
            index = (turn + offset) % len(methods)
            ids, rounds, seconds = _timed(methods[index], input_ids)
            texts[index] = ids[0]
            result = results[index]
            result.prompts += 1
            result.new_tokens += ids.shape[1] - input_ids.shape[1]
            result.rounds += rounds
            result.seconds += seconds
            if on_step:
                on_step(result.method)
        for index, text in texts.items():
            if not torch.equal(text, texts[0]):
                gap = first_difference_gap(target, texts[0], text)
                results[index].differing += 1
                results[index].largest_gap = max(results[index].largest_gap, gap)
    plain_speed = results[0].tokens_per_second
    for result in results:
        result.ratio = result.tokens_per_second / plain_speed if plain_speed else 0.0
    return results
