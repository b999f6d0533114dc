"""Tasks from the bundled prompts, or random ones for models of random weights."""

from __future__ import annotations

import torch

from treespec.bench.methods import Task
from treespec.bench.models import Pair
from treespec.demo import load_prompts, spread_prompts

MAX_PROMPT_TOKENS = 512
_RANDOM_PROMPT_TOKENS = 64


def _pad(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids `[B, W]` and their mask."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = row
        mask[place, width - len(row) :] = 1
    return ids, mask


def _encode(pair: Pair, text: str) -> torch.Tensor:
    ids = pair.tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[-MAX_PROMPT_TOKENS:]


def _task(pair: Pair, name: str, category: str, rows: list[torch.Tensor], **more) -> Task:
    ids, mask = _pad(rows)
    device = pair.target.device
    return Task(name, category, ids.to(device), mask.to(device), **more)


def reference_tasks(pair: Pair, prompts: str, samples: int, new_tokens: int) -> list[Task]:
    """One prompt a task; prompts come again when there are fewer than samples."""
    if pair.simulated:
        vocab_size = pair.target.config.vocab_size
        generator = torch.Generator().manual_seed(0)
        shape = (samples, _RANDOM_PROMPT_TOKENS)
        ids = torch.randint(1, vocab_size, shape, generator=generator)
        return [
            _task(pair, f"random-{k}", "random", [row], new_tokens=new_tokens)
            for k, row in enumerate(ids)
        ]
    bundled = load_prompts(prompts)
    ordered = spread_prompts(bundled, len(bundled))
    tasks = []
    for sample in range(samples):
        again, place = divmod(sample, len(ordered))
        prompt = ordered[place]
        name = prompt["id"] + (f"-again-{again}" if again else "")
        rows = [_encode(pair, prompt["prompt"])]
        tasks.append(_task(pair, name, prompt["category"], rows, new_tokens=new_tokens))
    return tasks


def suite_tasks(
    pair: Pair, prompts: str, samples: int, new_tokens: int, temperature: float, batch: int
) -> list[Task]:
    """`samples` batches of every category, category by category in turn; a category with fewer
    prompts than a batch repeats them."""
    groups: dict[str, list[str]] = {}
    for prompt in load_prompts(prompts):
        groups.setdefault(prompt["category"], []).append(prompt["prompt"])
    tasks = []
    for sample in range(samples):
        for category, texts in groups.items():
            chosen = [texts[(sample * batch + k) % len(texts)] for k in range(batch)]
            name = f"{category}-{sample}-t{temperature:g}-b{batch}"
            rows = [_encode(pair, text) for text in chosen]
            options = {"new_tokens": new_tokens, "temperature": temperature, "seed": sample + 1}
            tasks.append(_task(pair, name, category, rows, **options))
    return tasks
