"""The `treespec` command: `demo`, `generate`, `tune`, `info` and `bench`.

Answers go to stdout, progress and summaries to stderr. Exit codes: 0 done, 1 the demo or a
benchmark found text that differs from the target's own, 2 a value or path that cannot be used, 130
interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from treespec import __version__, console

SHAPES = {
    "chain": "Chain",
    "fixed": "FixedTree",
    "best-first": "BestFirstTree",
    "adaptive": "AdaptiveTree",
}
_TREE_HELP = (
    'shape of the drafted tree: "auto", or one of '
    + ", ".join(SHAPES)
    + ", with values after a colon, "
    "as in chain:4 or fixed:depth=5,branching=2,prune_threshold=0.05 (default: auto)"
)


class UsageError(Exception):
    """Something the user can put right; its message is one line."""


def parse_tree(text: str):
    """A `tree=` argument from its spelling on the command line; a value without a name is the
    shape's first field.

    Raises:
        UsageError: unknown shape, field or value; the message says which are known.

    Example:
        >>> parse_tree("fixed:depth=5,branching=2").depth
        5
    """
    import treespec

    name, _, rest = text.partition(":")
    if name == "auto" and not rest:
        return "auto"
    if name not in SHAPES:
        raise UsageError(f"--tree: unknown shape {name!r}; known: auto, {', '.join(SHAPES)}")
    shape = getattr(treespec, SHAPES[name])
    known = [field.name for field in fields(shape)]
    values = {}
    for index, item in enumerate(filter(None, rest.split(","))):
        key, equals, value = item.partition("=")
        if not equals and index == 0:
            key, value = known[0], item
        if key not in known:
            raise UsageError(f"--tree: {name} has no value {key!r}; known: {', '.join(known)}")
        try:
            values[key] = json.loads(value)
        except ValueError:
            raise UsageError(f"--tree: {key} must be a number; got {value!r}") from None
    try:
        return shape(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"--tree: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _load_torch(arguments: argparse.Namespace):
    """Imports torch, sets threads and checks the device: before any model is loaded."""
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
        if arguments.cuda_graphs and device.type != "cuda":
            raise UsageError(f"--cuda-graphs: needs a CUDA device; this is {device}")
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"--device: {arguments.device!r} cannot be used here: {_one_line(error)}"
        ) from None
    return torch, device


def _graphs(arguments: argparse.Namespace) -> bool | str:
    """The `cuda_graphs=` of a speculator."""
    return "auto" if arguments.cuda_graphs is None else arguments.cuda_graphs


def _load_model(option: str, name: str, dtype, device):
    """A causal LM from a directory or a hub name."""
    from transformers import AutoModelForCausalLM

    path = Path(name)
    if path.exists() and not (path / "config.json").is_file():
        raise UsageError(f"{option}: {name!r} is not a model directory: it holds no config.json")
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"{option}: no directory {name!r}")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"{option}: cannot load {name!r}: {_one_line(error)[:300]}") from None
    return model.to(device).eval()


def _load_tokenizer(name: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        reason = _one_line(error)[:300]
        raise UsageError(f"--model: no tokenizer in {name!r}: {reason}") from None


def _load_pair(arguments: argparse.Namespace, device):
    """Target, draft argument and tokenizer as --model and --draft ask."""
    from treespec.demo import load_demo_pair, resolve_dtype

    names = arguments.draft or (["demo"] if arguments.model == "demo" else ["ngram"])
    if "none" in names and len(names) > 1:
        raise UsageError("--draft: none cannot be combined with another draft")
    demo_draft: Any = None
    if arguments.model == "demo":
        dtype = arguments.dtype or "float32"
        target, demo_draft, tokenizer = load_demo_pair(dtype=dtype, device=device)
    else:
        dtype = resolve_dtype(arguments.dtype) if arguments.dtype else "auto"
        target = _load_model("--model", arguments.model, dtype, device)
        tokenizer = _load_tokenizer(arguments.model)
    drafts: list[Any] = []
    for name in names:
        if name == "demo":
            drafts.append(demo_draft or load_demo_pair(dtype=target.dtype, device=device)[1])
        elif name == "ngram":
            drafts.append("ngram")
        elif name != "none":
            drafts.append(_load_model("--draft", name, target.dtype, device))
    return target, (drafts if len(drafts) > 1 else drafts[0] if drafts else None), tokenizer


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.file in (None, "-"):
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("no prompt: give --prompt TEXT, --file PATH, or text on stdin")
        return sys.stdin.read()
    try:
        return Path(arguments.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--file: cannot read {arguments.file!r}: {_one_line(error)}") from None


def _encode(tokenizer, prompt: str, chat: bool, device):
    if not prompt:
        raise UsageError("the prompt is empty")
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError("--chat: this model's tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded["input_ids"].to(device)


def _sampling_kwargs(arguments: argparse.Namespace) -> dict:
    given = {"top_k": arguments.top_k, "top_p": arguments.top_p, "seed": arguments.seed}
    kwargs = {name: value for name, value in given.items() if value is not None}
    if arguments.temperature is None:
        if kwargs:
            raise UsageError(f"--{next(iter(kwargs)).replace('_', '-')} needs --temperature")
        return {"do_sample": False}
    return {"do_sample": True, "temperature": arguments.temperature, **kwargs}


def _stream(spec, tokenizer, input_ids, write, advance, **kwargs) -> list[int]:
    """Generates, writing text and telling progress as it comes; returns the new ids."""
    live = console.LiveText(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), write)
    new_ids: list[int] = []
    for chunk in spec.stream(input_ids, **kwargs):
        new_ids += chunk.tolist()
        live.add(chunk.tolist())
        advance(len(chunk))
    live.end()
    return new_ids


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def run_generate(arguments: argparse.Namespace) -> int:
    """`treespec generate`."""
    tree = parse_tree(arguments.tree)
    sampling = _sampling_kwargs(arguments)
    prompt = _read_prompt(arguments)
    _, device = _load_torch(arguments)
    with console.progress("loading models"):
        from treespec import TreeSpeculator

        target, draft, tokenizer = _load_pair(arguments, device)
        spec = TreeSpeculator(
            target, draft, tree=tree, tokenizer=tokenizer, cuda_graphs=_graphs(arguments)
        )
    input_ids = _encode(tokenizer, prompt, arguments.chat, device)
    kwargs = {"max_new_tokens": arguments.max_new_tokens, **sampling}
    pieces: list[str] = []
    if arguments.stream:
        new_ids = _stream(spec, tokenizer, input_ids, _write_now, lambda steps: None, **kwargs)
        _write_now("\n")
    else:
        with console.progress("generating", total=arguments.max_new_tokens) as advance:
            new_ids = _stream(spec, tokenizer, input_ids, pieces.append, advance, **kwargs)
    stats = spec.stats
    if arguments.json:
        report = {"text": "".join(pieces), "new_ids": new_ids, "stats": stats.as_dict()}
        print(json.dumps(report, ensure_ascii=False))
    elif not arguments.stream:
        print("".join(pieces))
    if arguments.explain:
        print(spec.explain(), file=sys.stderr)
    if not arguments.json:
        speed = 1e3 * len(new_ids) / stats.total_ms if stats.total_ms else 0.0
        summary = f"{len(new_ids)} tokens, {speed:.0f} tokens/s, "
        summary += f"{stats.tokens_per_round:.2f} tokens per round"
        print(summary, file=sys.stderr)
    return 0


_DEMO_COLUMNS = ("method", "tokens/s", "ratio", "tokens per round", "identical")


def _demo_row(result) -> tuple[str, ...]:
    identical = "yes"
    if not result.identical:
        identical = (
            f"no: {result.differing} of {result.prompts}, logit gap <= {result.largest_gap:.2g}"
        )
    speed, per_round = f"{result.tokens_per_second:.0f}", f"{result.tokens_per_round:.2f}"
    return result.method, speed, f"{result.ratio:.2f}x", per_round, identical


def _demo_live(
    target, draft, tokenizer, cuda_graphs: bool | str, max_new_tokens: int, device, show
) -> bool:
    """Streams one sampled text; whether plain decoding with the same seed writes the same."""
    from treespec import TreeSpeculator, demo

    prompt = demo.live_prompt()
    input_ids = _encode(tokenizer, prompt, False, device)
    kwargs = {"max_new_tokens": max_new_tokens, **demo.LIVE_SAMPLING}
    show(f"{prompt.rstrip()[-300:]}\n--- continued by the target, with speculation:\n")
    options = {"tokenizer": tokenizer, "cuda_graphs": cuda_graphs}
    spec = TreeSpeculator(target, draft, **options)
    new_ids = _stream(spec, tokenizer, input_ids, show, lambda steps: None, **kwargs)
    plain = TreeSpeculator(target, None, **options).generate(input_ids, **kwargs)
    identical = plain[0, input_ids.shape[1] :].tolist() == new_ids
    how = f"sampled at temperature {kwargs['temperature']}, seed {kwargs['seed']}"
    same = "yes" if identical else "no"
    show(f"\n--- {how}; the same text without speculation: {same}\n\n")
    return identical


def run_demo(arguments: argparse.Namespace) -> int:
    """`treespec demo`: live text, then one table; exit code 1 where float32 text of ours is not the
    target's own.
    """
    torch, device = _load_torch(arguments)
    with console.progress("loading the demo pair"):
        from treespec import demo

        target, draft, tokenizer = demo.load_demo_pair(
            dtype=arguments.dtype or "float32", device=device
        )
    budget = arguments.max_new_tokens
    prompts = demo.spread_prompts(demo.load_prompts("dev"), arguments.prompts)
    encoded = [_encode(tokenizer, prompt["prompt"], False, device) for prompt in prompts]
    dtype = str(target.dtype).removeprefix("torch.")
    show = (lambda text: None) if arguments.json else _write_now
    graphs = _graphs(arguments)
    sampled_identical = _demo_live(target, draft, tokenizer, graphs, budget, device, show)
    methods = demo.demo_methods(target, draft, tokenizer, budget, graphs)
    steps = len(methods) * (len(encoded) + 1)
    with console.progress("comparing", total=steps) as advance:
        results = demo.compare(target, methods, encoded, on_step=lambda name: advance(1, name))
    broken = [result.method for result in results if result.ours and not result.identical]
    if not sampled_identical:
        broken.append("the sampled text")
    if arguments.json:
        report = {
            "dtype": dtype,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "max_new_tokens": budget,
            "prompts": [prompt["id"] for prompt in prompts],
            "identical": not broken,
            "sampled_identical": sampled_identical,
            "results": [result.as_dict() for result in results],
        }
        print(json.dumps(report))
    else:
        size = f"{len(encoded)} prompts x {budget} new tokens"
        title = f"{size}, greedy, {dtype}, {device}"
        console.print_table(title, _DEMO_COLUMNS, [_demo_row(result) for result in results])
        print(f"identical: {'no' if broken else 'yes'}")
        if broken and dtype != "float32":
            print(
                "In 16 bits a tie of two tokens can fall either way; "
                "the logit gap shows how close they were."
            )
    if broken and dtype == "float32":
        names = ", ".join(broken)
        print(f"treespec demo: text differs from the target's own: {names}", file=sys.stderr)
        return 1
    return 0


def run_tune(arguments: argparse.Namespace) -> int:
    """`treespec tune`: measures, prints, and keeps what `tree="auto"` starts from."""
    _, device = _load_torch(arguments)
    with console.progress("loading models"):
        from treespec import TreeSpeculator, tuner

        target, draft, tokenizer = _load_pair(arguments, device)
        if draft is None:
            raise UsageError("--draft: none leaves nothing to tune; give a model or ngram")
        spec = TreeSpeculator(
            target, draft, tokenizer=tokenizer, cuda_graphs=_graphs(arguments)
        )
    key = tuner.make_key(spec._target, spec._model)
    shapes = tuner.shapes(spec) + (tuner.check_shapes(spec) if arguments.check else [])
    costs, checked = {}, []
    with console.progress("measuring", total=len(arguments.batch_sizes) * len(shapes)) as advance:
        for rows in arguments.batch_sizes:
            if arguments.check:
                costs[rows], found = tuner.measure_and_check(
                    spec, rows, lambda name: advance(1, name)
                )
                checked += [(rows, *comparison) for comparison in found]
            else:
                costs[rows] = tuner.measure(spec, rows, lambda name: advance(1, name))
    try:
        path = tuner.save(key, costs)
    except tuner.TuningError as error:
        raise UsageError(f"{error}; {tuner.CACHE_VARIABLE} names another directory") from None
    if arguments.json:
        from treespec.bench.results import environment

        report = {
            "path": str(path),
            "device": key.device,
            "environment": environment(),
            "costs": {rows: vars(known) for rows, known in costs.items()},
            "check": [
                {"rows": rows, "shape": str(shape), "predicted_ms": predicted, "measured_ms": ms}
                for rows, shape, predicted, ms in checked
            ],
        }
        print(json.dumps(report))
        return 0
    _print_costs(costs, checked)
    print(f"kept for {key.device} in {path}")
    return 0


def _print_costs(costs, checked) -> None:
    rows = []
    for batch, known in costs.items():
        parts = {f"verification, {size} nodes": ms for size, ms in known.verify_ms.items()}
        if known.level_ms:
            parts["draft, first level"] = known.root_ms
            widths = known.level_ms.items()
            parts.update({f"draft, level of {width}": ms for width, ms in widths})
        if known.lookup_ms:
            parts["lookup"] = known.lookup_ms
        parts["everything else"] = known.overhead_ms
        parts["plain round"] = known.plain_ms
        rows += [(name, str(batch), f"{ms:.2f}") for name, ms in parts.items()]
    console.print_table("milliseconds", ("part of a round", "sequences", "ms"), rows)
    if checked:
        found = [
            (
                str(shape),
                str(batch),
                f"{predicted:.2f}",
                f"{measured:.2f}",
                f"{predicted / measured - 1:+.0%}",
            )
            for batch, shape, predicted, measured in checked
        ]
        columns = ("round", "sequences", "predicted ms", "measured ms", "off by")
        console.print_table("check", columns, found)


def run_info(arguments: argparse.Namespace) -> int:
    """`treespec info`."""
    from treespec import environment

    report = environment.describe()
    if arguments.json:
        print(json.dumps(report))
        return 0
    versions = [(name, found or "not installed") for name, found in report["versions"].items()]
    console.print_table("versions", ("package", "version"), versions, text_columns=2)
    print()
    for device in report["devices"]:
        details = [
            f"{key} {value}" for key, value in device.items() if key not in ("device", "name")
        ]
        print(f"{device['device']}: {device['name']} ({', '.join(details)})")
    print()
    rows = [
        (path["path"], "yes" if path["works"] else "no", path["reason"]) for path in report["paths"]
    ]
    console.print_table("paths", ("path", "works here", "why"), rows, text_columns=3)
    return 0


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text!r}")
    return value


def _batch_sizes(text: str) -> list[int]:
    """Powers of two: costs of other sizes are taken from the next one."""
    sizes = sorted({_positive(item) for item in text.split(",")})
    odd = [size for size in sizes if size & (size - 1)]
    if odd:
        raise argparse.ArgumentTypeError(f"must be powers of two, as in 1,4,16; got {text!r}")
    return sizes


class _Parser(argparse.ArgumentParser):
    """Errors in one line, without the usage text."""

    def error(self, message: str):
        raise UsageError(message)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = _Parser(
        prog="treespec",
        description="The text a Hugging Face causal LM would write, several times faster, "
        "by lossless tree speculation.",
        epilog="Try: treespec demo. With TREESPEC_TRACEBACK=1 in the environment "
        "an error shows where it came from.",
    )
    parser.add_argument("--version", action="version", version=f"treespec {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )

    machine = _Parser(add_help=False)
    machine.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="precision of the models"
    )
    machine.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA device if there is one)"
    )
    machine.add_argument(
        "--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)"
    )

    machine.add_argument(
        "--cuda-graphs",
        action=argparse.BooleanOptionalAction,
        help="capture CUDA graphs, or an error; or do not (default: where that can be)",
    )

    demo = commands.add_parser(
        "demo",
        parents=[machine],
        help="watch it write, beside plain decoding, on a bundled model pair",
        description="Streams a text, then times plain decoding, assisted generation, prompt lookup "
        "and this library's chains and trees on the bundled pair, in turns, and checks that all "
        "wrote the same text. No network, no GPU needed. Exit code 1 if a float32 text of this "
        "library differs.",
    )
    demo.add_argument(
        "--prompts",
        type=_positive,
        default=8,
        metavar="N",
        help="prompts to time (default: 8, up to 60)",
    )
    demo.add_argument(
        "--max-new-tokens", type=_positive, default=100, metavar="N", help="default: 100"
    )
    demo.add_argument(
        "--json", action="store_true", help="print one JSON object instead of text and table"
    )
    demo.set_defaults(run=run_demo)

    generate = commands.add_parser(
        "generate",
        parents=[machine],
        help="continue a prompt",
        description="Continues a prompt with the target's own text. "
        "The prompt comes from --prompt, --file or stdin.",
        epilog='Examples: treespec generate --prompt "Once upon a time" --stream · '
        "treespec generate --model ./my-model --draft ./my-small-model --draft ngram "
        "--file prompt.txt",
    )
    generate.add_argument(
        "--model", default="demo", help="directory, hub name, or demo, the bundled target (default)"
    )
    generate.add_argument(
        "--draft",
        action="append",
        metavar="DRAFT",
        help="directory, hub name, demo, ngram (lookup in the text so far) or none; "
        "repeat it to merge several (default: demo for the bundled target, else ngram)",
    )
    source = generate.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    source.add_argument(
        "--file", metavar="PATH", help="a UTF-8 file that holds the prompt; - for stdin"
    )
    generate.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    generate.add_argument("--tree", default="auto", help=_TREE_HELP)
    generate.add_argument(
        "--max-new-tokens", type=_positive, default=200, metavar="N", help="default: 200"
    )
    generate.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="sample at this temperature (default: greedy)",
    )
    generate.add_argument(
        "--top-k", type=int, metavar="K", help="sample among the K likeliest tokens"
    )
    generate.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample among the likeliest tokens of total probability P",
    )
    generate.add_argument("--seed", type=int, help="same seed, same text, with any draft and tree")
    generate.add_argument(
        "--explain", action="store_true", help="say on stderr what was chosen and why"
    )
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print text as it is written")
    form.add_argument(
        "--json", action="store_true", help="print text, ids and statistics as one JSON object"
    )
    generate.set_defaults(run=run_generate)

    info = commands.add_parser(
        "info",
        help="versions, devices, and which paths work here",
        description="Prints versions, devices, and which ways of computing work here, "
        "and why the others do not.",
    )
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.set_defaults(run=run_info)

    tune = commands.add_parser(
        "tune",
        parents=[machine],
        help="measure what a pair costs on this device, for tree=auto",
        description="Times verifications by number of nodes, draft levels, lookups and plain "
        "rounds of a pair on this device, and keeps them in a small file, which tree=auto reads "
        "from then on. The file is for this pair, dtype, device, number of threads and these "
        "versions; anywhere else it is ignored. TREESPEC_CACHE_DIR names its directory.",
    )
    tune.add_argument(
        "--model", default="demo", help="directory, hub name, or demo, the bundled target (default)"
    )
    tune.add_argument(
        "--draft",
        action="append",
        metavar="DRAFT",
        help="directory, hub name, demo or ngram (default: demo for the bundled target, else "
        "ngram)",
    )
    tune.add_argument(
        "--batch-sizes",
        type=_batch_sizes,
        default=[1],
        metavar="B,...",
        help="sequences at a time, as in 1,4,16 (default: 1)",
    )
    tune.add_argument(
        "--check", action="store_true", help="hold predicted against measured times of rounds"
    )
    tune.add_argument("--json", action="store_true", help="print one JSON object")
    tune.set_defaults(run=run_tune)

    from treespec import whatif
    from treespec.bench import command as bench

    benchmarks = bench.add_parser(commands, machine, _positive, _Parser)
    whatif.add_whatif_parser(benchmarks)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code.

    Args:
        argv: arguments without the program's name; None takes the process's own.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0" if sys.stderr.isatty() else "1")
    try:
        arguments = build_parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return arguments.run(arguments)
    except UsageError as error:
        print(f"treespec: error: {error}", file=sys.stderr)
    except (ValueError, TypeError, NotImplementedError) as error:
        if os.environ.get("TREESPEC_TRACEBACK"):
            raise
        print(f"treespec: error: {_one_line(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("treespec: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 2
