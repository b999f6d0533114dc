"""Many prompts: batches of similar length, results in the order given, written down as they
come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from treespec.speculator import TreeSpeculator


def prompt_ids(prompt: Any, index: int, tokenizer: Any) -> torch.Tensor:
    """One prompt as a 1-D LongTensor."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"prompts[{index}] is text, which needs a tokenizer: TreeSpeculator(..., "
                "tokenizer=tokenizer)"
            )
        prompt = tokenizer(prompt).input_ids
    ids = torch.as_tensor(prompt)
    if ids.dim() != 1 or ids.numel() == 0:
        raise ValueError(
            f"prompts[{index}] must be text or at least one token id in one dimension; got shape "
            f"{list(ids.shape)}"
        )
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"prompts[{index}] must hold integers; got {ids.dtype}")
    return ids.long()


def generate_many(
    spec: TreeSpeculator,
    prompts: list,
    max_batch: int,
    progress: bool,
    output: str | Path | None,
    options: dict,
) -> list[torch.Tensor]:
    """The work of `TreeSpeculator.generate_many`."""
    if isinstance(prompts, (str, torch.Tensor)):
        raise TypeError(
            "prompts must be a list of texts, id lists or 1-D tensors; got "
            f"{type(prompts).__name__}"
        )
    if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
        raise ValueError(f"max_batch must be a positive integer; got {max_batch!r}")
    ids = [prompt_ids(prompt, k, spec.tokenizer) for k, prompt in enumerate(prompts)]
    results: list[torch.Tensor | None] = [None] * len(ids)
    path = Path(output) if output is not None else None
    if path is not None:
        for index, row in _finished(path, ids).items():
            results[index] = row
    # similar lengths side by side waste the least padding
    waiting = sorted((k for k, row in enumerate(results) if row is None), key=lambda k: len(ids[k]))
    bar = _progress_bar(len(waiting)) if progress else None
    for start in range(0, len(waiting), max_batch):
        batch = waiting[start : start + max_batch]
        for index, row in zip(batch, _generate_batch(spec, [ids[k] for k in batch], options)):
            results[index] = row
            if path is not None:
                with path.open("a") as file:
                    file.write(
                        json.dumps(
                            {"index": index, "prompt_tokens": len(ids[index]), "ids": row.tolist()}
                        )
                        + "\n"
                    )
        if bar is not None:
            bar.update(len(batch))
    if bar is not None:
        bar.close()
    return results


def _generate_batch(
    spec: TreeSpeculator, prompts: list[torch.Tensor], options: dict
) -> list[torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    spec.generate(ids, mask, **options)
    return [
        torch.cat([prompt, torch.tensor(row.new_tokens, dtype=torch.long)])
        for prompt, row in zip(prompts, spec._engine.rows)
    ]


def _finished(path: Path, ids: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Rows of an earlier, interrupted run that continue these very prompts; a torn last line is
    ignored."""
    rows: dict[int, torch.Tensor] = {}
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
            index, row = record["index"], torch.tensor(record["ids"], dtype=torch.long)
        except (ValueError, KeyError, TypeError):
            continue
        if not (isinstance(index, int) and 0 <= index < len(ids)) or not torch.equal(
            row[: len(ids[index])], ids[index]
        ):
            raise ValueError(
                f"output: {path} holds results of other prompts (line for index {index!r}); name "
                "another file"
            )
        rows[index] = row
    return rows


def _progress_bar(total: int):
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="prompt")
