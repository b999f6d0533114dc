"""Times treespec against what a user would install instead, on one machine, alternating prompt by
prompt in one run.

    python benchmarks/compare_peers.py --dtype bfloat16 --output benchmarks/results/NAME.json

Greedy text is checked against `target.generate` before any time counts: in float32 every method of
treespec must be identical, or the run ends with an error and writes nothing. In 16 bits the count
of identical texts is reported beside the times. Peers that are not installed are left out by name.
The JSON holds every sample; ratios are of sums over prompts, with a bootstrap interval over
prompts.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from treespec import BestFirstTree, Chain, TreeSpeculator, load_demo_pair
from treespec.demo import load_prompts

Method = Callable[[torch.Tensor], torch.Tensor]


def treespec_methods(target, draft, options: dict) -> dict[str, tuple[Method, TreeSpeculator]]:
    """treespec's rows: the engine's plain decoding, draft alone, lookup alone, merged, and auto."""
    specs = {
        "treespec plain": TreeSpeculator(target, None),
        "treespec chain 4, draft": TreeSpeculator(target, draft, Chain(4)),
        "treespec chain 6, draft": TreeSpeculator(target, draft, Chain(6)),
        "treespec tree, draft": TreeSpeculator(target, draft, BestFirstTree(12, 4, 3)),
        "treespec tree, lookup": TreeSpeculator(target, "ngram", BestFirstTree(24, 10, 8)),
        "treespec tree, merged": TreeSpeculator(target, [draft, "ngram"], BestFirstTree(24, 3, 4)),
        "treespec auto": TreeSpeculator(target, draft),
    }
    seed = {"seed": 1} if options["do_sample"] else {}
    return {
        name: (lambda ids, s=spec: s.generate(ids, **options, **seed), spec)
        for name, spec in specs.items()
    }


def transformers_methods(target, draft, options: dict) -> dict[str, Method]:
    return {
        "transformers plain": lambda ids: target.generate(ids, **options),
        "transformers assisted": lambda ids: target.generate(ids, assistant_model=draft, **options),
        "transformers prompt lookup": lambda ids: target.generate(
            ids, prompt_lookup_num_tokens=10, **options
        ),
    }


def flashspec_methods(target, draft, options: dict, temperature: float) -> dict[str, Method]:
    from flashspec import FlashSpecConfig, SamplingConfig, SpeculativeEngine
    from flashspec.engine import HuggingFaceDrafter, TargetModel

    device = target.device
    drafter = HuggingFaceDrafter("draft", device, draft.dtype, temperature=temperature, model=draft)
    sampling = SamplingConfig(temperature=temperature, seed=1)
    config = FlashSpecConfig(device=str(device), sampling=sampling)
    engine = SpeculativeEngine(
        config, [drafter], TargetModel("target", device, target.dtype, model=target)
    )

    def run(ids: torch.Tensor) -> torch.Tensor:
        result = engine.generate(ids, max_new_tokens=options["max_new_tokens"], eos_token_ids=())
        return result if isinstance(result, torch.Tensor) else result.output_ids

    return {"flashspec": run}


def economize_methods(target, draft_path: str, options: dict) -> dict[str, Method]:
    import economize
    from economize.techniques.draft_model import DraftModelConfig

    model = economize.apply(target, DraftModelConfig(model=draft_path))
    decoding = economize.DecodeConfig(cycle_length=4)
    return {"economize": lambda ids: model.generate(ids, decoding=decoding, **options)}


def environment() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit or None,
        "packages": {name: _version(name) for name in ("flashspec", "economize")},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def ratio(
    samples: dict[str, list[float]],
    tokens: dict[str, list[int]],
    base: str,
    name: str,
    draws: int = 2000,
) -> dict:
    """Tokens per second of `name` over those of `base`, with a 95 % bootstrap interval over
    prompts."""

    def value(chosen: list[int]) -> float:
        ours = sum(tokens[name][k] for k in chosen) / sum(samples[name][k] for k in chosen)
        theirs = sum(tokens[base][k] for k in chosen) / sum(samples[base][k] for k in chosen)
        return ours / theirs

    count = len(samples[name])
    generator = random.Random(0)
    values = sorted(value(generator.choices(range(count), k=count)) for _ in range(draws))
    return {
        "ratio": value(list(range(count))),
        "low": values[int(0.025 * draws)],
        "high": values[int(0.975 * draws)],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--new-tokens", type=int, default=120)
    parser.add_argument("--prompts", default="dev", help="name of a bundled prompt file")
    parser.add_argument("--stride", type=int, default=5, help="take every n-th prompt")
    parser.add_argument("--target", help="path of another target; needs --draft")
    parser.add_argument("--draft", help="path of its draft")
    parser.add_argument(
        "--random-draft", action="store_true", help="replace the draft's weights by random ones"
    )
    parser.add_argument(
        "--only", help="comma-separated parts of method names to run (plain is always run)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()

    if args.target:
        load = transformers.AutoModelForCausalLM.from_pretrained
        target, draft = (
            load(path, dtype=getattr(torch, args.dtype)).eval()
            for path in (args.target, args.draft)
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.target)
    else:
        target, draft, tokenizer = load_demo_pair(dtype=args.dtype)
    target, draft = target.to(args.device), draft.to(args.device)
    if args.random_draft:
        torch.manual_seed(0)
        for parameter in draft.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    options: dict = {
        "max_new_tokens": args.new_tokens,
        "do_sample": args.temperature > 0,
        "eos_token_id": None,
    }
    # end-of-text off: every method writes the same number of tokens
    target.generation_config.eos_token_id = None
    if options["do_sample"]:
        options |= {"temperature": args.temperature, "top_k": 0}

    methods: dict[str, Method] = transformers_methods(target, draft, options)
    ours = treespec_methods(target, draft, options)
    methods |= {name: method for name, (method, _) in ours.items()}
    missing = {}
    peers = {
        "flashspec": lambda: flashspec_methods(target, draft, options, args.temperature),
        "economize": lambda: economize_methods(target, args.draft or _demo_draft_path(), options),
    }
    for name, make in peers.items():
        try:
            methods |= make()
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    if args.only:
        wanted = [part.strip() for part in args.only.split(",")]
        methods = {
            n: m
            for n, m in methods.items()
            if n == "transformers plain" or any(part in n for part in wanted)
        }

    prompts = load_prompts(args.prompts)[:: args.stride]
    ids = [
        tokenizer(p["prompt"], return_tensors="pt").input_ids[:, -512:].to(args.device)
        for p in prompts
    ]
    samples: dict[str, list[float]] = {name: [] for name in methods}
    tokens: dict[str, list[int]] = {name: [] for name in methods}
    identical = dict.fromkeys(methods, 0)
    rounds = {name: [0, 0] for name in ours}
    for name in list(methods):
        try:
            for warm_up in ids[:2]:
                methods[name](warm_up)
        except Exception as error:
            if name in ours or name == "transformers plain":
                raise
            missing[name] = f"{type(error).__name__}: {error}"
            methods.pop(name), samples.pop(name), tokens.pop(name), identical.pop(name)
    for k, prompt in enumerate(ids):
        texts = {}
        order = list(methods)
        random.Random(k).shuffle(order)
        for name in order:
            torch.manual_seed(k)
            start = time.perf_counter()
            texts[name] = methods[name](prompt).to(args.device)
            if args.device == "cuda":
                torch.cuda.synchronize()
            samples[name].append(time.perf_counter() - start)
            texts[name] = texts[name] if texts[name].dim() == 2 else texts[name][None]
            new = texts[name].shape[1] - (
                prompt.shape[1] if torch.equal(texts[name][:, : prompt.shape[1]], prompt) else 0
            )
            tokens[name].append(new)
            if name in ours:
                stats = ours[name][1].stats
                rounds[name][0] += stats.rounds
                rounds[name][1] += stats.new_tokens
        reference = texts[
            "treespec plain"
            if options["do_sample"] and "treespec plain" in texts
            else "transformers plain"
        ]
        for name, text in texts.items():
            same = torch.equal(text[:, -args.new_tokens :], reference[:, -args.new_tokens :])
            identical[name] += same
            if (
                not same
                and name in ours
                and args.dtype == "float32"
                and not (options["do_sample"] and "treespec plain" not in texts)
            ):
                print(
                    f"error: {name} is not identical on prompt {k}; nothing is reported",
                    file=sys.stderr,
                )
                return 1
        print(f"prompt {k + 1}/{len(ids)}", file=sys.stderr)

    rows = []
    for name in methods:
        row = {"method": name, "tokens_per_second": sum(tokens[name]) / sum(samples[name])}
        row |= ratio(samples, tokens, "transformers plain", name)
        row["identical"] = f"{identical[name]}/{len(ids)}"
        if name in ours:
            row["tokens_per_round"] = rounds[name][1] / max(rounds[name][0], 1)
        row["seconds"] = samples[name]
        rows.append(row)
        per_round = f"{row['tokens_per_round']:.2f}" if name in ours else "-"
        print(
            f"{name:28s} {row['tokens_per_second']:8.1f} tok/s  {row['ratio']:.2f}x "
            f"[{row['low']:.2f}, {row['high']:.2f}]"
            f"  tokens/round {per_round:>5s}  identical {row['identical']}"
        )
    for name, reason in missing.items():
        print(f"{name}: not run: {reason}")
    if args.output:
        arguments = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(args).items()
        }
        record = {
            "environment": environment(),
            "arguments": arguments,
            "rows": rows,
            "not_run": missing,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _demo_draft_path() -> str:
    import treespec

    return str(Path(treespec.__file__).parent / "data" / "demo" / "draft")


if __name__ == "__main__":
    raise SystemExit(main())
