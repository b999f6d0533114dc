"""`treespec bench`: options, files and messages around a comparison. Light to import: torch comes
when a run begins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from treespec.bench.methods import Method
    from treespec.bench.models import Pair
    from treespec.bench.protocol import Group
    from treespec.bench.results import RunFile

PROMPTS = ("fallback", "wikitext2_800chars", "dev")
# Leaves loading and drawing their share of a quarter of an hour.
DEMO_MINUTES = 13.0


class UsageError(ValueError):
    """An option that cannot be used; the message is one line."""


def _settings(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """What defines a run, as the record keeps it."""
    import torch

    settings = {
        "target": arguments.target,
        "draft": arguments.draft,
        "sized": arguments.sized if kind == "reference" else None,
        "draft_weights": arguments.draft_weights,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "cuda_graphs": arguments.cuda_graphs,
        "threads": torch.get_num_threads(),
        "prompts": arguments.prompts,
        "samples": arguments.samples,
        "new_tokens": arguments.new_tokens,
        "warm_ups": arguments.warm_ups,
        "minutes": arguments.minutes,
        "rows": arguments.rows,
        "tree": arguments.tree,
        "tuned": arguments.tuned,
        "record_ahead": arguments.record_ahead,
    }
    if kind == "suite":
        settings |= {"temperature": arguments.temperature, "batch": arguments.batch}
        settings |= {"control": arguments.control}
    bundled = settings["target"] == "demo" and not settings["sized"]
    if settings["sized"]:
        settings["prompts"] = "random"
    if settings["minutes"] is None and bundled:
        settings["minutes"] = DEMO_MINUTES
    return settings


def _check_together(arguments: argparse.Namespace) -> None:
    if arguments.resume and arguments.output:
        raise UsageError("--output: a run that is gone on with stays in its file; leave this out")
    if getattr(arguments, "sized", None) and (arguments.target, arguments.draft) != ("demo",) * 2:
        raise UsageError("--sized: random weights take the place of --target and --draft")


def _more_shapes(texts: list[str]) -> list[tuple[str, Any]]:
    """Further rows as (name, shape), from their spelling on the command line."""
    from treespec.cli import parse_tree

    return [(text, parse_tree(text)) for text in texts]


def _chosen(
    methods: list[Method], not_run: dict[str, str], rows: str | None
) -> tuple[list[Method], dict[str, str]]:
    """The methods whose names hold one of the comma-separated parts; plain generation always."""
    from treespec.bench.figures import BASE

    if rows is None:
        return methods, not_run
    parts = [part.strip() for part in rows.split(",") if part.strip()]
    for part in parts:
        if not any(part in method.name for method in methods):
            known = "; ".join(method.name for method in methods)
            raise UsageError(f"--rows: no row's name holds {part!r}; rows: {known}")
    kept = [m for m in methods if m.name == BASE or any(part in m.name for part in parts)]
    return kept, {n: why for n, why in not_run.items() if any(part in n for part in parts)}


def build_reference(pair: Pair, settings: dict[str, Any]) -> Group:
    """The ablation's methods and tasks."""
    from treespec.bench import methods, prompts, protocol

    more = _more_shapes(settings["tree"])
    if pair.simulated:
        from treespec.bench import sized

        found = sized.sized_methods(pair, more, settings["new_tokens"])
    else:
        found = methods.reference_methods(pair, more)
    chosen, not_run = _chosen(*found, settings["rows"])
    tasks = prompts.reference_tasks(
        pair, settings["prompts"], settings["samples"], settings["new_tokens"]
    )
    return protocol.Group(chosen, tasks, not_run)


def build_suite(pair: Pair, settings: dict[str, Any]) -> list[Group]:
    """The suite's methods and tasks by temperature and batch."""
    from treespec.bench import methods, prompts, protocol

    more = _more_shapes(settings["tree"])
    of_cell = methods.suite_methods(pair, more, settings.get("control", False))
    groups = []
    for temperature in settings["temperature"]:
        for batch in settings["batch"]:
            chosen, not_run = _chosen(*of_cell(temperature, batch), settings["rows"])
            tasks = prompts.suite_tasks(
                pair,
                settings["prompts"],
                settings["samples"],
                settings["new_tokens"],
                temperature,
                batch,
            )
            label = f", T = {temperature:g}, batch {batch}"
            groups.append(protocol.Group(chosen, tasks, not_run, label))
    return groups


_GROUPS: dict[str, Callable[[Any, dict[str, Any]], list[Group]]] = {
    "reference": lambda pair, settings: [build_reference(pair, settings)],
    "suite": build_suite,
}


def _check_positions(pair: Pair, groups: list[Group]) -> None:
    longest = max(
        task.input_ids.shape[1] + task.new_tokens for group in groups for task in group.tasks
    )
    for role, model in (("target", pair.target), ("draft", pair.draft)):
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and longest > limit:
            raise UsageError(
                f"--new-tokens: the longest prompt and its new tokens are {longest} tokens, and "
                f"the {role} has {limit} positions"
            )


def _resolve(arguments: argparse.Namespace, kind: str, path: Path) -> dict[str, Any]:
    """The settings of a run, its own or those of the file it goes on with, once torch, threads and
    device are ready. What can be refused without a model is refused here.
    """
    from treespec import cli
    from treespec.bench import results

    _check_together(arguments)
    _more_shapes(arguments.tree)
    there: dict[str, Any] = {}
    if arguments.resume or path.exists():
        there = results.load_unfinished(path, kind)["settings"]
    if arguments.resume:
        arguments.threads, arguments.device = there["threads"], there["device"]
    _, device = cli._load_torch(arguments)
    arguments.device = str(device)
    if not arguments.resume:
        return _settings(arguments, kind)
    return {**there, **({"minutes": arguments.minutes} if arguments.minutes else {})}


def _measure(arguments: argparse.Namespace, kind: str) -> int:
    """A run from its options to its files; the exit code."""
    from treespec import console

    path = Path(arguments.resume or arguments.output or f"bench-{kind}.json")
    settings = _resolve(arguments, kind, path)

    import torch
    from transformers.utils import logging

    from treespec.bench import methods, models, protocol, results, sized

    logging.set_verbosity_error()
    with console.progress("loading models"):
        pair = models.load_pair(settings, torch.device(settings["device"]))
    groups = _GROUPS[kind](pair, settings)
    _check_positions(pair, groups)
    acceptance = sized.ACCEPTANCE if pair.simulated else results.OWN_ACCEPTANCE
    about = {"environment": results.environment(), "models": pair.about, "acceptance": acceptance}
    run = results.RunFile.open(path, kind, settings, about)
    ahead = bool(settings.get("record_ahead"))
    steps = sum(len(g.methods) * (len(g.tasks) + settings["warm_ups"]) for g in groups)
    steps += sum(method.ours for group in groups for method in group.methods) if ahead else 0
    oracle, limits = methods.make_oracle(pair), (settings["warm_ups"], settings["minutes"])
    try:
        with (
            methods.tuning_file(settings["tuned"]),
            console.progress("measuring", total=steps) as advance,
        ):
            comparison = protocol.Comparison(
                pair, oracle, run, *limits, lambda note: advance(1, note), ahead
            )
            comparison.run(groups)
    except protocol.DifferingText as error:
        print(f"treespec bench: {error}; no time is reported", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"treespec bench: {len(run.record['samples'])} samples are in {path}; go on with: "
            f"treespec bench {kind} --resume {path}",
            file=sys.stderr,
        )
        raise
    if kind == "reference" and arguments.memory:
        _measure_memory(run, settings)
    _report(run.record, path)
    return 0


def _measure_memory(run: RunFile, settings: dict[str, Any]) -> None:
    """Every row's peak memory, each in a process of its own."""
    from treespec import console
    from treespec.bench import memory

    record = run.record
    names = [m["name"] for m in record["methods"] if m["name"] not in record["not_run"]]
    peaks: dict[str, float | None] = {}
    with console.progress("measuring memory", total=len(names) + 1) as advance:
        for name in (memory.LOADED_ONLY, *names):
            try:
                peaks[name] = memory.peak_mib(settings, name)
            except memory.MemoryRunFailed as error:
                peaks[name] = None
                record["not_run"][f"memory of {name}"] = str(error)
            advance(1, name)
    record["peak_memory_mib"] = peaks
    run.save()


def _report(record: dict[str, Any], path: Path) -> None:
    """Tables on stdout; Markdown, LaTeX and pictures beside the JSON."""
    from treespec.bench import plots, tables

    text = tables.markdown(record)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    path.with_suffix(".tex").write_text(tables.latex(record), encoding="utf-8")
    print(text)
    try:
        plots.draw(record, path.parent, path.stem)
    except plots.PlotError as error:
        print(f"treespec bench: no pictures: {error}", file=sys.stderr)


def run_reference(arguments: argparse.Namespace) -> int:
    """`treespec bench reference`."""
    return _measure(arguments, "reference")


def run_suite(arguments: argparse.Namespace) -> int:
    """`treespec bench suite`."""
    return _measure(arguments, "suite")


def run_report(arguments: argparse.Namespace) -> int:
    """`treespec bench report`."""
    from treespec.bench import plots, results, tables

    path = Path(arguments.file)
    record = results.load_finished(path)
    if arguments.plots:
        for drawn in plots.draw(record, Path(arguments.plots), path.stem):
            print(drawn, file=sys.stderr)
    if arguments.against:
        return _report_rerun(record, Path(arguments.against), arguments.format)
    render = tables.latex if arguments.format == "latex" else tables.markdown
    print(render(record), end="")
    return 0


def _report_rerun(record: dict[str, Any], path: Path, form: str) -> int:
    """Prints how two runs rank the same rows."""
    from treespec.bench import figures, results, tables

    other = results.load_finished(path)
    cells = figures.cells(record) if record["kind"] == "suite" else [{}]
    made = [tables.rerun_table(record, other, **cell) for cell in cells]
    shared = [table for table in made if table is not None]
    if not shared:
        raise UsageError(f"--against: {str(path)!r} has no row in common with the other file")
    print("\n".join(t.latex() if form == "latex" else t.markdown() for t in shared), end="")
    return 0


def run_page(arguments: argparse.Namespace) -> int:
    """`treespec bench page`."""
    from treespec.bench import page

    path = Path(arguments.page)
    records = page.find_records(Path(arguments.results))
    try:
        before = path.read_text(encoding="utf-8")
    except OSError as error:
        raise page.PageError(f"--page: cannot read {str(path)!r}: {error.strerror}") from None
    path.write_text(page.rewrite(before, records), encoding="utf-8")
    print(f"{path}: {len(records)} results")
    return 0


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {text!r}")
    return value


def _warm_ups(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 0; got {text!r}")
    return int(text)


def _add_common(parser, positive: Callable[[str], int], prompts: str, samples: int, tokens: int):
    add = parser.add_argument
    add("--target", default="demo", help="directory or hub name (default: the bundled target)")
    add("--draft", default="demo", help="directory or hub name (default: the bundled draft)")
    add(
        "--draft-weights",
        default="trained",
        choices=("trained", "random", "adversarial"),
        help="the draft as it is, with weights drawn anew, or with its head negated",
    )
    add("--prompts", default=prompts, choices=PROMPTS, help=f"prompt set (default: {prompts})")
    add("--samples", type=positive, default=samples, metavar="N", help=f"default: {samples}")
    add("--new-tokens", type=positive, default=tokens, metavar="N", help=f"default: {tokens}")
    add(
        "--warm-ups",
        type=_warm_ups,
        default=2,
        metavar="N",
        help="untimed prompts (default: 2); with 0 what a process writes first is timed",
    )
    add(
        "--minutes",
        type=_minutes,
        metavar="M",
        help="begin no turn that would end later; the file says how many were run "
        f"(default: {DEMO_MINUTES:g} for the bundled pair, else no limit)",
    )
    add("--rows", metavar="PARTS", help="comma-separated parts of the names of the rows to run")
    add(
        "--tree",
        action="append",
        default=[],
        metavar="SHAPE",
        help="a further shape, as in treespec generate --tree; repeat it for more",
    )
    add("--tuned", action="store_true", help="auto starts from what `treespec tune` kept here")
    add(
        "--record-ahead",
        action="store_true",
        help="rows of this library call warmup() before their untimed prompts",
    )
    add("--output", metavar="FILE", help="results file; an unfinished one is gone on with")
    add("--resume", metavar="FILE", help="go on with this file, by the settings it began with")


def add_parser(commands, machine, positive: Callable[[str], int], parser_class: type):
    """Adds `bench` to the command's subparsers.

    Args:
        commands: subparsers of `treespec`.
        machine: parent parser of --dtype, --device and --threads.
        positive: argparse type of whole numbers above 0.
        parser_class: of the parsers.

    Returns:
        The subparsers of `bench`, to add further benchmarks to.
    """
    bench = commands.add_parser(
        "bench",
        help="measure this library beside others, in turns, every text checked",
        description="Benchmarks of whole generations. Every method continues a prompt before any "
        "sees the next; a float32 text of ours that differs ends the run without a time.",
    )
    kinds = bench.add_subparsers(
        dest="bench", required=True, metavar="BENCHMARK", parser_class=parser_class
    )
    reference = kinds.add_parser(
        "reference",
        parents=[machine],
        help="the ablation: plain, linear, trees, pruning, depth, auto, beside other libraries",
        description="The ablation of the DynaTree experiment and more: 500 new tokens, 2 warm-ups, "
        "10 samples. Writes JSON, Markdown, LaTeX and PNG. Exit code 1 where a text differs.",
    )
    _add_common(reference, positive, "fallback", 10, 500)
    reference.add_argument(
        "--sized",
        nargs=2,
        metavar=("TARGET", "DRAFT"),
        help="random weights of these sizes, each LAYERSxHIDDEN or a configuration's path, with "
        "the acceptance of a recorded run replayed: times are real, acceptance is simulated",
    )
    reference.add_argument(
        "--memory", action="store_true", help="also every row's peak memory, in its own process"
    )
    reference.set_defaults(run=run_reference)

    suite = kinds.add_parser(
        "suite",
        parents=[machine],
        help="by category of prompt, temperature and batch",
        description="Spec-Bench's question: speed by category, at several temperatures and "
        "batches. Writes JSON, Markdown, LaTeX and PNG. Exit code 1 where a text differs.",
    )
    _add_common(suite, positive, "dev", 1, 120)
    suite.add_argument(
        "--temperature",
        nargs="+",
        type=_temperature,
        default=[0.0, 0.7, 1.0],
        metavar="T",
        help="default: 0 0.7 1; 0 is greedy",
    )
    suite.add_argument(
        "--batch", nargs="+", type=positive, default=[1, 4, 8], metavar="B", help="default: 1 4 8"
    )
    suite.add_argument(
        "--control",
        action="store_true",
        help="plain decoding a second time, which shows how far rows are apart that do the same",
    )
    suite.set_defaults(run=run_suite)

    report = kinds.add_parser(
        "report",
        help="tables and pictures of a results file",
        description="Prints the tables of a finished run, and draws its pictures.",
    )
    report.add_argument("file", metavar="FILE", help="JSON of a finished run")
    report.add_argument(
        "--format", default="markdown", choices=("markdown", "latex"), help="default: markdown"
    )
    report.add_argument(
        "--against", metavar="OTHER", help="how another run of the same table ranks its rows"
    )
    report.add_argument("--plots", metavar="FOLDER", help="where to draw PNG files")
    report.set_defaults(run=run_report)

    page = kinds.add_parser(
        "page",
        help="write the results into docs/benchmarks.md",
        description="Writes the tables of all finished runs of a folder between the page's "
        "markers, by machine.",
    )
    page.add_argument("--results", default="benchmarks/results", metavar="FOLDER", help="of JSON")
    page.add_argument("--page", default="docs/benchmarks.md", metavar="FILE", help="the page")
    page.set_defaults(run=run_page)
    return kinds
