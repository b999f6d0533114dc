"""Trains a target and a draft on a text file, from scratch, and reports how well the draft knows
the target.

    python benchmarks/train_pair.py --text corpus.txt --out pair

trains a tokenizer, then the target on the text, then the draft on the target's distributions
(distillation), and writes `pair/tokenizer.json`, `pair/target`, `pair/draft` and `pair/report.json`
with held-out losses and greedy agreement. It can be stopped at any time: the same command resumes
from its last checkpoint and ends with the same weights as an uninterrupted run on the same machine.
Larger pairs are a matter of arguments:

    python benchmarks/train_pair.py --text corpus.txt --out big --device cuda --dtype bfloat16 \\
        --target qwen3:hidden_size=1024,intermediate_size=3072,num_hidden_layers=24 \\
        --draft draft-config.json --vocab-size 32768 --batch-size 64 --length 1024 \\
        --target-steps 50000 --compile

`--evaluate` only measures a pair that is there, on `--valid`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

_TARGET = "llama:hidden_size=256,intermediate_size=640,num_hidden_layers=10,num_attention_heads=4"
_TARGET += ",num_key_value_heads=2,max_position_embeddings=4096,tie_word_embeddings=true"
_DRAFT = _TARGET.replace("num_hidden_layers=10", "num_hidden_layers=1")


def read_config(text: str, **overrides):
    """A transformers configuration from a JSON file, from inline JSON, or from
    `model_type:name=value,...`.

    Raises:
        ValueError: unreadable JSON, no `model_type`, a type transformers does not know, a value
            without a name, or values that do not fit each other.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if text.lstrip().startswith("{"):
        values = json.loads(text)
    elif Path(text).is_file():
        values = json.loads(Path(text).read_text(encoding="utf-8"))
    else:
        model_type, _, rest = text.partition(":")
        values = {"model_type": model_type}
        for item in filter(None, rest.split(",")):
            name, equals, value = item.partition("=")
            if not equals:
                raise ValueError(
                    f"configuration must be model_type:name=value,...; got {item!r} in {text!r}"
                )
            try:
                values[name] = json.loads(value)
            except ValueError:
                values[name] = value
    if "model_type" not in values:
        raise ValueError(f"configuration must have a model_type; got {sorted(values)}")
    model_type = values.pop("model_type")
    try:
        return AutoConfig.for_model(model_type, **{**values, **overrides})
    except StrictDataclassError as error:
        raise ValueError(
            f"configuration {text!r} is not valid: {' '.join(str(error).split())}"
        ) from error


def documents(path: Path, separator: str) -> list[str]:
    """The documents of a text file: what stands between lines that hold only the separator."""
    text = path.read_text(encoding="utf-8")
    return [part for part in text.split(f"\n{separator}\n") if part.strip()]


def get_tokenizer(out: Path, source: str | None, texts: list[str], vocab_size: int, separator: str):
    """The tokenizer of `out`; else the one of `source`; else a byte-level BPE trained on the texts.
    Saved in `out`.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (out / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(out)
    if source is not None:
        tokenizer = AutoTokenizer.from_pretrained(source)
    else:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[separator],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=sys.stderr.isatty(),
        )
        raw.train_from_iterator(texts, trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token=separator, eos_token=separator, pad_token=separator
        )
    tokenizer.save_pretrained(out)
    return tokenizer


def encode(tokenizer, texts: list[str], description: str) -> torch.Tensor:
    """All texts as one stream of ids, int64 [S], an end-of-text id after each."""
    stream: list[np.ndarray] = []
    for start in tqdm(range(0, len(texts), 256), desc=description, unit="x256 texts", disable=None):
        for ids in tokenizer(texts[start : start + 256], add_special_tokens=False)["input_ids"]:
            stream.append(np.asarray([*ids, tokenizer.eos_token_id], dtype=np.int64))
    return torch.from_numpy(np.concatenate(stream))


def sample_batch(
    stream: torch.Tensor, batch_size: int, length: int, seed: int, step: int
) -> torch.Tensor:
    """Windows [batch_size, length + 1] of the stream. They depend on (seed, step) alone, so a
    resumed run sees the same.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - length, (batch_size,), generator=generator)
    return stream[starts[:, None] + torch.arange(length + 1)]


def next_token_loss(model, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the text, nats a token."""
    logits = model(batch[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def distillation_loss(target, temperature: float = 1.0, text_weight: float = 0.0) -> Callable:
    """KL(target || draft) a token at a temperature, mixed with the text's cross-entropy (Hinton et
    al., 1503.02531, section 2).
    """

    def loss(draft, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target_logits = target(batch[:, :-1], use_cache=False).logits.float() / temperature
        logits = draft(batch[:, :-1], use_cache=False).logits.float()
        target_logprobs = target_logits.log_softmax(-1).flatten(0, 1)
        draft_logprobs = (logits / temperature).log_softmax(-1).flatten(0, 1)
        divergence = F.kl_div(
            draft_logprobs, target_logprobs, reduction="batchmean", log_target=True
        )
        result = (1 - text_weight) * temperature**2 * divergence
        if text_weight:
            result = result + text_weight * F.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten()
            )
        return result

    return loss


@dataclass(frozen=True)
class Plan:
    """How one model is trained. Everything here decides the weights, so a checkpoint only resumes
    under an equal plan.
    """

    steps: int
    batch_size: int
    length: int
    learning_rate: float
    warmup: int
    weight_decay: float
    accumulate: int
    seed: int
    dtype: str

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


def save_atomically(state: dict, path: Path) -> None:
    """Writes beside the file, then replaces it: an interruption leaves the old checkpoint whole."""
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    beside.replace(path)


def train(
    name: str,
    model,
    stream: torch.Tensor,
    loss_of: Callable,
    plan: Plan,
    checkpoint: Path,
    *,
    checkpoint_every: int = 200,
    compile_model: bool = False,
    on_step: Callable[[int], None] | None = None,
) -> float:
    """Trains a model in place, resuming from the checkpoint if there is one, and saves one at the
    end or when interrupted.

    Args:
        name: for the progress bar.
        model: a causal LM on its device, float32 weights.
        stream: int64 [S], longer than `plan.length`.
        loss_of: (model, batch[B, length + 1]) -> scalar.
        plan: steps, sizes, rates.
        checkpoint: the file.
        checkpoint_every: steps between checkpoints.
        compile_model: through `torch.compile`.
        on_step: called with the number of finished steps; may raise KeyboardInterrupt to stop.

    Returns:
        The mean loss of the last 50 steps of this call; NaN where none was left to do.

    Raises:
        ValueError: a text shorter than one window, or a checkpoint of another plan.
    """
    if len(stream) <= plan.length:
        raise ValueError(
            f"text must have more tokens than --length {plan.length}; got {len(stream)}"
        )
    device = next(model.parameters()).device
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": plan.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.95))
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        if state["plan"] != vars(plan):
            changed = [
                f"{k} {state['plan'].get(k)} -> {v}"
                for k, v in vars(plan).items()
                if state["plan"].get(k) != v
            ]
            raise ValueError(
                f"{checkpoint} was made with other settings ({', '.join(changed)}); "
                "remove it to start anew"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    called = torch.compile(model) if compile_model else model
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=plan.dtype == "bfloat16")
    losses: list[float] = []
    step = saved = first
    updating = False

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "plan": vars(plan),
        }
        save_atomically(state, checkpoint)

    model.train()
    bar = tqdm(total=plan.steps, initial=first, desc=name, unit="step", disable=None)
    try:
        while step < plan.steps:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            total = 0.0
            for part in range(plan.accumulate):
                number = step * plan.accumulate + part
                batch = sample_batch(stream, plan.batch_size, plan.length, plan.seed, number).to(
                    device
                )
                # Dropout, too, depends on the step alone.
                torch.manual_seed(plan.seed * 1_000_003 + number)
                with autocast:
                    loss = loss_of(called, batch) / plan.accumulate
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            updating = True
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            updating = False
            losses.append(total)
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
            bar.update()
            if step - saved >= checkpoint_every:
                save()
                saved = step
            if on_step:
                on_step(step)
    finally:
        bar.close()
        # Outside an update the weights are those of `step`; a half-made one is not worth keeping.
        if step != saved and not updating:
            save()
    model.eval()
    recent = losses[-50:]
    return sum(recent) / len(recent) if recent else math.nan


def windows(
    stream: torch.Tensor, length: int, batch_size: int, limit: int
) -> Iterator[torch.Tensor]:
    """Windows [<= batch_size, length + 1] that share no target: all that fit, or `limit` tokens'
    worth spread over the stream.
    """
    length = min(length, len(stream) - 1)
    fit = (len(stream) - 1) // length
    chosen = torch.linspace(0, fit - 1, max(1, min(fit, limit // length))).long()
    yield from stream[chosen[:, None] * length + torch.arange(length + 1)].split(batch_size)


@torch.no_grad()
def evaluate(
    target, draft, stream: torch.Tensor, *, length: int, batch_size: int, limit: int
) -> dict[str, float]:
    """Held-out figures of a pair.

    Args:
        target, draft: causal LMs on one device, evaluation mode.
        stream: int64 [S], S >= 2, held-out text.
        length, batch_size: window sizes.
        limit: most tokens to look at.

    Returns:
        `tokens`; `target_loss` and `draft_loss`, nats a token; `kl`, KL(target || draft) a token;
        and `greedy_agreement`, the share of positions where both models' likeliest token is the
        same.
    """
    device = next(target.parameters()).device
    sums = dict.fromkeys(("target_loss", "draft_loss", "kl", "greedy_agreement"), 0.0)
    tokens = 0
    batches = list(windows(stream, length, batch_size, limit))
    for batch in tqdm(batches, desc="evaluate", unit="batch", disable=None):
        batch = batch.to(device)
        target_logprobs = (
            target(batch[:, :-1], use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        )
        draft_logprobs = (
            draft(batch[:, :-1], use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        )
        text = batch[:, 1:].flatten()
        sums["target_loss"] += F.nll_loss(target_logprobs, text, reduction="sum").item()
        sums["draft_loss"] += F.nll_loss(draft_logprobs, text, reduction="sum").item()
        sums["kl"] += F.kl_div(
            draft_logprobs, target_logprobs, reduction="sum", log_target=True
        ).item()
        sums["greedy_agreement"] += (
            (target_logprobs.argmax(-1) == draft_logprobs.argmax(-1)).sum().item()
        )
        tokens += text.numel()
    return {"tokens": tokens, **{name: value / tokens for name, value in sums.items()}}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="directory of the pair: written, resumed from, or with --evaluate read",
    )
    add("--text", type=Path, help="training text, UTF-8")
    add(
        "--valid",
        type=Path,
        help="held-out text (default: every 100th document of --text, not trained on)",
    )
    add(
        "--separator",
        default="<|endoftext|>",
        help="a line that separates documents (default: %(default)s)",
    )
    add("--tokenizer", help="directory of a tokenizer to use instead of training one")
    add(
        "--vocab-size",
        type=int,
        default=4096,
        help="of the trained tokenizer (default: %(default)s)",
    )
    add(
        "--target",
        default=_TARGET,
        help="configuration: a JSON file, inline JSON, or model_type:name=value,...",
    )
    add("--draft", default=_DRAFT, help="configuration of the draft, in the same forms")
    add("--target-steps", type=int, default=5000)
    add("--draft-steps", type=int, default=3000)
    add("--batch-size", type=int, default=4, help="windows of a forward (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="forwards of a step (default: %(default)s)")
    add("--length", type=int, default=512, help="tokens of a window (default: %(default)s)")
    add("--learning-rate", type=float, default=2.5e-3)
    add("--warmup", type=int, default=100)
    add("--weight-decay", type=float, default=0.1)
    add("--temperature", type=float, default=1.0, help="of the distillation (default: %(default)s)")
    add(
        "--text-weight",
        type=float,
        default=0.0,
        help="share of the text's own loss in the draft's (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 trains under autocast",
    )
    add("--save-dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--threads", type=int, help="CPU threads")
    add("--seed", type=int, default=0)
    add("--checkpoint-every", type=int, default=200, metavar="STEPS")
    add(
        "--eval-tokens",
        type=int,
        default=100_000,
        help="most held-out tokens to look at (default: %(default)s)",
    )
    add(
        "--evaluate",
        action="store_true",
        help="train nothing: measure the pair in --out on --valid",
    )
    arguments = parser.parse_args(argv)
    needed = arguments.valid if arguments.evaluate else arguments.text
    if needed is None:
        parser.error("--evaluate needs --valid" if arguments.evaluate else "--text is needed")
    for path in filter(None, (arguments.text, arguments.valid)):
        if not path.is_file():
            parser.error(f"no file {path}")
    return arguments


def load_model(path: Path, dtype: torch.dtype, device: str):
    from transformers import AutoModelForCausalLM

    return (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
        .to(device)
        .eval()
    )


def run_evaluation(arguments: argparse.Namespace, target, draft, stream: torch.Tensor) -> dict:
    """Evaluates a pair and adds what the figures were measured on."""
    figures = evaluate(
        target,
        draft,
        stream,
        length=arguments.length,
        batch_size=arguments.batch_size,
        limit=arguments.eval_tokens,
    )
    sizes = {
        f"{role}_parameters": model.num_parameters()
        for role, model in (("target", target), ("draft", draft))
    }
    return {**sizes, "dtype": str(target.dtype).removeprefix("torch."), **figures}


def train_pair(
    arguments: argparse.Namespace, on_step: Callable[[str, int], None] | None = None
) -> dict:
    """All stages; returns and writes the report. `on_step(stage, finished steps)` may raise
    KeyboardInterrupt.
    """
    from transformers import AutoModelForCausalLM

    out, device = arguments.out, arguments.device
    out.mkdir(parents=True, exist_ok=True)
    texts = documents(arguments.text, arguments.separator)
    if arguments.valid:
        held_out = documents(arguments.valid, arguments.separator)
    else:
        held_out = texts[::100]
        texts = [text for number, text in enumerate(texts) if number % 100]
    if not texts or not held_out:
        raise ValueError("--text must have at least two documents, or --valid must be given")
    tokenizer = get_tokenizer(
        out, arguments.tokenizer, texts, arguments.vocab_size, arguments.separator
    )
    stream, held_out_stream = (
        encode(tokenizer, texts, "encode"),
        encode(tokenizer, held_out, "encode held-out"),
    )
    ids = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    trained = {}
    report: dict = {"train_tokens": len(stream), "seconds": {}}
    for stage, spelled, steps in (
        ("target", arguments.target, arguments.target_steps),
        ("draft", arguments.draft, arguments.draft_steps),
    ):
        torch.manual_seed(arguments.seed)
        config = read_config(spelled, vocab_size=len(tokenizer), **ids)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
        plan = Plan(
            steps=steps,
            batch_size=arguments.batch_size,
            length=arguments.length,
            learning_rate=arguments.learning_rate,
            warmup=min(arguments.warmup, steps),
            weight_decay=arguments.weight_decay,
            accumulate=arguments.accumulate,
            seed=arguments.seed,
            dtype=arguments.dtype,
        )
        loss_of: Callable = next_token_loss
        if stage == "draft":
            loss_of = distillation_loss(
                trained["target"], arguments.temperature, arguments.text_weight
            )
        start = time.perf_counter()
        train(
            stage,
            model,
            stream,
            loss_of,
            plan,
            out / f"{stage}.ckpt",
            checkpoint_every=arguments.checkpoint_every,
            compile_model=arguments.compile,
            on_step=(lambda step, stage=stage: on_step(stage, step)) if on_step else None,
        )
        report["seconds"][stage] = round(time.perf_counter() - start, 1)
        trained[stage] = model
        # The training weights stay float32 in the checkpoint; what is saved is a converted copy.
        copy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        copy.load_state_dict(model.state_dict())
        copy.to(getattr(torch, arguments.save_dtype)).save_pretrained(out / stage)
    report.update(run_evaluation(arguments, trained["target"], trained["draft"], held_out_stream))
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(arguments).items()
    }
    report["arguments"] = settings
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.evaluate:
            from transformers import AutoTokenizer

            dtype = getattr(torch, arguments.dtype)
            target, draft = (
                load_model(arguments.out / role, dtype, arguments.device)
                for role in ("target", "draft")
            )
            tokenizer = AutoTokenizer.from_pretrained(arguments.out, local_files_only=True)
            stream = encode(
                tokenizer, documents(arguments.valid, arguments.separator), "encode held-out"
            )
            report = run_evaluation(arguments, target, draft, stream)
        else:
            report = train_pair(arguments)
    except (ValueError, OSError) as error:
        print(f"train_pair: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\ntrain_pair: interrupted; the same command resumes from the checkpoint",
            file=sys.stderr,
        )
        return 130
    print(
        json.dumps({name: value for name, value in report.items() if name != "arguments"}, indent=2)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
