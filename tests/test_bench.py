"""`treespec bench`: figures by hand, files that survive, and above all that a wrong text ends a run
before any time is shown."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import treespec
from treespec import TreeSpeculator, cli, demo, tuner
from treespec.bench import (
    figures,
    memory,
    methods,
    models,
    page,
    plots,
    protocol,
    results,
    sized,
    tables,
)

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ["bench", "reference", "--device", "cpu", "--warm-ups", "1", "--new-tokens", "12"]
SETTINGS = {
    "target": "demo",
    "draft": "demo",
    "sized": None,
    "dtype": None,
    "draft_weights": "trained",
}


def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pair():
    return models.load_pair(SETTINGS, torch.device("cpu"))


@pytest.fixture
def task(pair) -> methods.Task:
    ids = pair.tokenizer("Once upon a time", return_tensors="pt").input_ids
    return methods.Task("once", "fiction", ids, torch.ones_like(ids), new_tokens=8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small finished reference run."""
    path = tmp_path_factory.mktemp("finished") / "run.json"
    rows = "linear K=6 (draft),tree D=4 pruned (draft),tree D=7 pruned (draft),plain,assisted (no"
    rows += ",tree D=4 unpruned (draft)"
    command = [*REFERENCE, "--samples", "2", "--rows", rows, "--output", str(path)]
    assert cli.main(command) == 0
    return path


def test_reference_writes_every_row_and_every_form(finished):
    record = load(finished)
    assert record["finished"] and record["stopped_by"] is None and record["sittings"] == 1
    assert (record["schema"], record["version"]) == (results.SCHEMA, results.VERSION)
    assert record["acceptance"] == results.OWN_ACCEPTANCE
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {
        "transformers plain",
        "transformers assisted (no scikit-learn)",
        "treespec plain",
        "treespec linear K=6 (draft)",
        "treespec tree D=4 pruned (draft)",
        "treespec tree D=4 unpruned (draft)",
        "treespec tree D=7 pruned (draft)",
    }
    pruned = rows["treespec tree D=7 pruned (draft)"]["shape"]
    assert (pruned["depth"], pruned["branching"], pruned["first_branching"]) == (8, 2, 1)
    assert (pruned["prune_threshold"], pruned["max_nodes"]) == (0.05, 32)
    for row in rows.values():
        assert (row["samples"], row["identical"], row["compared"]) == (2, 2, 2)
        assert row["p20_tokens_per_second"] <= row["p80_tokens_per_second"]
        assert row["efficiency"] == pytest.approx(row["speedup"] / row["tokens_per_round"])
    for name in ("transformers plain", "treespec plain"):
        assert rows[name]["tokens_per_round"] == 1.0
    chain = rows["treespec linear K=6 (draft)"]
    assert chain["tokens_per_round"] > 1.2 and 0 < chain["acceptance_rate"] < 1
    assert all(chain["round_ms"][part] > 0 for part in figures.PARTS)
    text = finished.with_suffix(".md").read_text(encoding="utf-8")
    assert "| treespec tree D=7 pruned (draft) |" in text and "**5 steps, draft**" in text
    assert text == tables.markdown(record)
    assert r"\toprule" in finished.with_suffix(".tex").read_text(encoding="utf-8")
    for name in plots.PLOTS:
        picture = finished.with_name(f"{finished.stem}-{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_every_row_of_the_ablation_is_there(pair):
    found, not_run = methods.reference_methods(pair, [("chain:3", treespec.Chain(3))])
    names = [method.name for method in found]
    assert len(set(names)) == len(names)
    shapes = [f"linear K={k}" for k in range(4, 9)] + [f"tree D={d} pruned" for d in range(4, 8)]
    shapes += ["tree D=7 unpruned", "best-first 32/8/8", "adaptive", "chain:3"]
    for shape in shapes:
        assert all(f"treespec {shape} ({source})" in names for source in methods.SOURCES)
    assert {"treespec auto (lookup)", "treespec auto (merged)", "flashspec", "economize"} < {*names}
    by_name = {method.name: method.about()["shape"] for method in found}
    complete = by_name["treespec tree D=7 unpruned (draft)"]
    assert (complete["prune_threshold"], complete["max_nodes"]) == (0, 256)
    assert by_name["treespec auto (merged)"] == {"kind": "auto"}
    assert "treespec auto (draft)" in not_run


def test_suite_runs_by_temperature_and_batch(tmp_path, capsys):
    path = tmp_path / "suite.json"
    command = ["bench", "suite", "--device", "cpu", "--warm-ups", "1", "--new-tokens", "6"]
    command += ["--temperature", "0", "1", "--batch", "1", "2", "--prompts", "fallback"]
    command += ["--rows", "linear,auto,economize", "--output", str(path)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    record = load(path)
    cells = [(cell["temperature"], cell["batch"]) for cell in figures.cells(record)]
    assert cells == [(0.0, 1), (0.0, 2), (1.0, 1), (1.0, 2)]
    for temperature, batch in cells:
        rows = {r["name"]: r for r in figures.rows(record, temperature=temperature, batch=batch)}
        ours = rows["treespec auto (merged)"]
        assert ours["identical"] == ours["compared"] == 1
        assert rows["transformers plain"]["compared"] == (1 if temperature == 0 else 0)
        assert f"T = {temperature:g}, batch {batch}" in out
    tokens = {(s["method"], s["task"]): s["new_tokens"] for s in record["samples"]}
    assert tokens["transformers plain", "dynatree_fallback-0-t1-b2"] == 12


def wrong_text(output):
    """An `_output` that is off by one token at the end, for drafts only."""

    def run(self, request, config):
        ids = output(self, request, config)
        if self.shape is not None and self._model is not None:
            ids[0, -1] = (ids[0, -1] + 1) % 4096
        return ids

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_text_turns_the_run_red_before_any_time(dtype, monkeypatch, tmp_path, capsys):
    output = treespec.TreeSpeculator._output
    monkeypatch.setattr(treespec.TreeSpeculator, "_output", wrong_text(output))
    path = tmp_path / "red.json"
    command = [*REFERENCE, "--samples", "1", "--rows", "K=4 (draft)", "--output", str(path)]
    code = cli.main([*command, "--dtype", dtype])
    out, err = capsys.readouterr()
    record = load(path)
    if dtype == "bfloat16":
        # rounding may decide a tie there: counted, with the logit gap, and shown
        row = next(row for row in record["rows"] if row["ours"])
        assert code == 0 and (row["identical"], row["compared"]) == (0, 1)
        assert row["largest_logit_gap"] > 0 and "0/1 (gap " in out
        return
    assert code == 1
    assert out == ""
    assert "'treespec linear K=4 (draft)' wrote another text" in err and "no time" in err
    assert record["samples"] == [] and record["rows"] == [] and not record["finished"]
    assert sorted(tmp_path.iterdir()) == [path]
    assert cli.main(["bench", "report", str(path)]) == 2
    assert "holds no times" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "records a run that failed" in capsys.readouterr().err


def test_the_pytest_benchmarks_check_before_they_time(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "bench_end_to_end", ROOT / "benchmarks" / "bench_end_to_end.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert set(script.NAMES) <= set(script.rows())

    class Timed(Exception):
        pass

    class Benchmark:
        extra_info: dict = {}  # noqa: RUF012

        def pedantic(self, *_, **__):
            raise Timed

    with pytest.raises(Timed):
        script.check_then_time(script.rows()["treespec linear K=4 (draft)"], Benchmark())
    output = treespec.TreeSpeculator._output
    monkeypatch.setattr(treespec.TreeSpeculator, "_output", wrong_text(output))
    with pytest.raises(AssertionError, match="wrote another text"):
        script.check_then_time(script.rows()["treespec linear K=4 (draft)"], Benchmark())


def test_an_interrupted_run_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    timed, calls = protocol.timed, []
    path = tmp_path / "run.json"

    def interrupted(party, task):
        for method, found, seconds in timed(party, task):
            calls.append(method.name)
            if len(calls) == 7:
                # on disk already, so that not even a killed process loses them
                assert len(load(path)["samples"]) == 3
                raise KeyboardInterrupt
            yield method, found, seconds

    monkeypatch.setattr(protocol, "timed", interrupted)
    command = [*REFERENCE, "--samples", "3", "--rows", "K=4 (draft),treespec plain"]
    command += ["--output", str(path)]
    assert cli.main(command) == 130
    out, err = capsys.readouterr()
    assert out == "" and f"3 samples are in {path}" in err and f"--resume {path}" in err
    before = load(path)["samples"]
    assert len(before) == 3
    assert cli.main(["bench", "report", str(path)]) == 2
    assert "is unfinished, 3 samples so far" in capsys.readouterr().err
    other = [*command, "--new-tokens", "13"]
    assert cli.main(other) == 2
    assert "new_tokens is 12 there and 13 here" in capsys.readouterr().err
    assert load(path)["samples"] == before
    monkeypatch.setattr(protocol, "timed", timed)
    assert cli.main(["bench", "reference", "--resume", str(path)]) == 0
    record = load(path)
    assert record["samples"][:3] == before and len(record["samples"]) == 9
    assert len({(s["method"], s["task"]) for s in record["samples"]}) == 9
    assert record["finished"] and record["sittings"] == 2
    assert "measured in 2 sittings" in capsys.readouterr().out
    assert cli.main(["bench", "reference", "--resume", str(path)]) == 2
    assert "holds a finished run" in capsys.readouterr().err


def test_the_budget_ends_a_run_between_turns_and_says_so(tmp_path, capsys):
    path = tmp_path / "run.json"
    command = [*REFERENCE, "--samples", "5", "--rows", "treespec plain", "--output", str(path)]
    assert cli.main([*command, "--minutes", "0.0001"]) == 0
    record = load(path)
    assert record["stopped_by"] == "minutes" and record["settings"]["minutes"] == 0.0001
    assert {row["samples"] for row in record["rows"]} == {1}
    assert "budget of 0.0001 minutes after 1 of 5 turns" in capsys.readouterr().out


def test_without_warm_ups_the_first_text_of_a_row_is_timed(monkeypatch, tmp_path, capsys):
    timed, written = protocol.timed, []

    def watched(party, task):
        for method, found, seconds in timed(party, task):
            written.append((method.name, task.id))
            yield method, found, seconds

    monkeypatch.setattr(protocol, "timed", watched)
    path = tmp_path / "run.json"
    command = [*REFERENCE, "--samples", "1", "--rows", "treespec plain", "--output", str(path)]
    assert cli.main([*command, "--warm-ups", "0"]) == 0
    assert written == [(s["method"], s["task"]) for s in load(path)["samples"]]
    assert "0 warm-ups" in capsys.readouterr().out


def test_another_machine_does_not_go_on(finished, tmp_path, capsys):
    record = load(finished)
    record |= {"finished": False, "samples": record["samples"][:1]}
    record["settings"] |= {"target": "demo", "draft": "demo"}
    record["environment"]["cpu"] = "an abacus"
    path = tmp_path / "run.json"
    results.save(path, record)
    assert cli.main(["bench", "reference", "--resume", str(path)]) == 2
    assert "another environment: cpu is 'an abacus' there" in capsys.readouterr().err


BAD = {
    "unknown shape": (["--tree", "bush"], "--tree: unknown shape 'bush'"),
    "unknown row": (["--rows", "nonsense"], "--rows: no row's name holds 'nonsense'"),
    "no such target": (
        ["--target", "./no-model", "--draft", "./no-model"],
        "--target: no directory './no-model'",
    ),
    "draft missing": (["--target", "./no-model"], "needs a draft of your own"),
    "unknown prompts": (["--prompts", "novels"], "--prompts"),
    "no budget": (["--minutes", "0"], "must be a number above 0"),
    "warm-ups below none": (["--warm-ups", "-1"], "must be a whole number of at least 0; got '-1'"),
    "too long": (["--new-tokens", "5000"], "the target has 4096 positions"),
    "too little memory": (["--sized", "1x999936", "1x64"], "too little memory"),
    "no size": (["--sized", "large", "1x64"], "'large' is neither LAYERSxHIDDEN"),
    "odd size": (["--sized", "1x65", "1x64"], "a multiple of 64; got '1x65'"),
    "size and path": (["--sized", "1x64", "1x64", "--target", "a"], "take the place of"),
    "two files": (["--resume", "a.json", "--output", "b.json"], "leave this out"),
    "nothing to resume": (["--resume", "no-such.json"], "cannot read 'no-such.json'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options, message = BAD[case]
    assert cli.main(["bench", "reference", "--device", "cpu", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("treespec: error: ") and err.count("\n") == 1, err
    assert message in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ('{"rows": []}', "is not a results file of `treespec bench`"),
        ('{"schema": "treespec-bench", "version": 99}', "has schema version 99; this treespec"),
    ],
)
def test_files_of_another_schema_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / "old.json"
    path.write_text(content)
    for command in (["report", str(path)], ["reference", "--resume", str(path)]):
        assert cli.main(["bench", *command]) == 2
        assert message in capsys.readouterr().err
    assert path.read_text() == content


def test_bench_explains_every_option_without_torch():
    code = "import sys\nfrom treespec.cli import main\ntry: main(['bench', '--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parser = cli.build_parser()._subparsers._group_actions[0].choices["bench"]
    kinds = parser._subparsers._group_actions[0].choices
    for kind in ("reference", "suite", "report", "page"):
        assert kind in done.stdout
        assert [action.dest for action in kinds[kind]._actions if not action.help] == []


def test_percentile_and_ratio_by_hand():
    assert figures.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert figures.percentile([1.0, 2.0], 0.2) == pytest.approx(1.2)
    base = [{"new_tokens": 10, "seconds": 2.0}, {"new_tokens": 10, "seconds": 4.0}]
    ours = [{"new_tokens": 10, "seconds": 1.0}, {"new_tokens": 10, "seconds": 1.0}]
    ratio, low, high = figures.paired_ratio(ours, base)
    # two prompts: a draw holds one twice, the other twice, or both
    assert (ratio, low, high) == (pytest.approx(3.0), pytest.approx(2.0), pytest.approx(4.0))
    assert figures.paired_ratio(ours[:1], base[:1]) == (2.0, None, None)


def fake_sample(method: str, task: str, seconds: float, **more) -> dict:
    sample = {"method": method, "task": task, "sitting": 1, "seconds": seconds, "new_tokens": 10}
    sample |= {"row_rounds": 10, "identical": True, "logit_gap": None, "stats": None}
    return sample | more


@pytest.fixture
def record(finished) -> dict:
    """The finished run with samples made up: one category cut short."""
    record = copy.deepcopy(load(finished))
    names = ("transformers plain", "treespec plain")
    record["methods"] = [m for m in record["methods"] if m["name"] in names]
    tasks = {"a": "prose", "b": "code & 100 %", "c": "code & 100 %"}
    record["tasks"] = [
        {"id": name, "category": category, "temperature": 0.0, "batch": 1}
        for name, category in tasks.items()
    ]
    stats = {"rounds": 5, "drafted_nodes": 20, "accepted": 5}
    stats |= {"draft_ms": 10.0, "verify_ms": 20.0, "commit_ms": 5.0}
    ours = {"row_rounds": 5, "stats": stats}
    record["samples"] = [
        fake_sample("transformers plain", "a", 1.0),
        fake_sample("treespec plain", "a", 0.5, **ours),
        fake_sample("transformers plain", "b", 1.0),
        fake_sample("treespec plain", "b", 0.25, **ours),
        fake_sample("transformers plain", "c", 9.0),
    ]
    return record


def add_methods(record: dict, **families: str) -> None:
    """Rows by name, `_` for a blank; those of peers are not ours."""
    record["methods"] += [
        {"name": name.replace("_", " "), "family": family, "ours": family != "peer"}
        | {"sources": None, "shape": None}
        for name, family in families.items()
    ]


def test_rows_by_hand(record):
    plain, ours = figures.rows(record)
    # the third prompt has no sample of ours, so it counts for neither
    assert plain["samples"] == ours["samples"] == 2
    assert ours["speedup"] == pytest.approx(2 / 0.75)
    assert ours["tokens_per_round"] == 2.0
    assert ours["efficiency"] == pytest.approx(2 / 0.75 / 2)
    assert ours["acceptance_rate"] == 0.25
    assert ours["round_ms"] == {"draft": 2.0, "verify": 4.0, "commit": 1.0}
    (_, prose) = figures.rows(record, category="prose")
    assert (prose["samples"], prose["speedup"]) == (1, 2.0)
    table = tables.category_table(record)
    assert table.columns == ["method", "prose", "code & 100 %", "overall [95 %]"]
    assert table.rows[1][:3] == ["treespec plain", "2.00×", "4.00×"]


def test_standing_of_auto_by_hand(record):
    """By category and over all, over the fastest of each kind; plain `generate` is no rival."""
    assert tables.standing_table(record) is None, "nothing to hold anything against"
    add_methods(record, auto="auto", slow_shape="linear", fast_shape="best-first", peer="peer")
    seconds = {"auto": (0.2, 0.25), "slow shape": (0.8, 0.8), "fast shape": (0.1, 0.4)}
    seconds["peer"] = (0.4, 2.0)
    for name, (first, second) in seconds.items():
        record["samples"] += [fake_sample(name, "a", first), fake_sample(name, "b", second)]
    table = tables.standing_table(record)
    assert table.columns == ["auto over [95 %]", "prose", "code & 100 %", "overall"]
    # of two texts a draw holds one twice, the other twice, or both
    assert table.rows == [
        ["plain decoding in this engine", "2.50×", "1.00×", "1.67× [1.00, 2.50]"],
        ["the fastest shape picked by hand", "0.50×", "1.60×", "1.11× [0.50, 1.60]"],
        ["the fastest other library", "2.00×", "8.00×", "5.33× [2.00, 8.00]"],
    ]


def test_a_ratio_lies_below_by_its_whole_interval():
    assert figures.Ratio(0.9, 0.8, 0.96).lies_below(0.97)
    assert not figures.Ratio(0.9, 0.8, 0.98).lies_below(0.97)
    assert not figures.Ratio(0.5).lies_below(0.97), "one task tells nothing of others"


def test_a_second_row_of_plain_decoding_shows_how_far_equal_rows_are_apart(record, tmp_path):
    """It is no rival of auto, and no shape picked by hand."""
    add_methods(record, auto="auto", shape="linear")
    for name in ("auto", "shape"):
        record["samples"] += [fake_sample(name, "a", 0.2), fake_sample(name, "b", 0.25)]
    before = tables.standing_table(record).rows
    assert figures.control(record) is None and figures.standing_over_both(record) is None
    add_methods(record, again="control")
    record["samples"] += [fake_sample("again", "a", 0.1), fake_sample("again", "b", 0.26)]
    alone = next(row["speedup"] for row in figures.rows(record) if row["name"] == "treespec plain")
    again = next(row["speedup"] for row in figures.rows(record) if row["name"] == "again")
    assert figures.control(record).value == pytest.approx(again / alone)
    after = tables.standing_table(record).rows
    assert after[:-1] == before
    prose, code = (
        figures.control(record, category=one).value for one in figures.categories(record)
    )
    assert after[-1][1:3] == [f"{prose:.2f}×", f"{code:.2f}×"] and prose != code
    results = tmp_path / "results.json"
    results.write_text(json.dumps(record))
    script = Path(__file__).parents[1] / "benchmarks" / "standing_counts.py"
    ran = subprocess.run([sys.executable, script, results], capture_output=True, text=True)
    kept = (prose >= 0.97) + (code >= 0.97)
    assert kept == 1
    last = "plain decoding again, over the first: 1 of 2 at 0.97 or more, 0 wholly below"
    assert ran.stdout.splitlines()[-1] == last, ran.stderr
    # plain decoding took 0.5 s and 0.25 s, then 0.1 s and 0.26 s; auto 0.2 s and 0.25 s
    both = figures.standing_over_both(record)
    assert both.value == pytest.approx((1.11 / 2) / 0.45)
    assert both.low == pytest.approx((0.51 / 2) / 0.25) and both.high == pytest.approx(0.3 / 0.2)
    told = "over both rows of plain decoding: 2 of 2 at 0.97 or more, 0 wholly below"
    assert ran.stdout.splitlines()[-2] == told


@pytest.mark.parametrize("asked", [False, True])
def test_control_is_a_row_of_the_suite_where_asked_for(tmp_path, asked):
    path = tmp_path / "run.json"
    command = ["bench", "suite", "--temperature", "1", "--batch", "1", "--new-tokens", "4"]
    command += ["--warm-ups", "0", "--minutes", "0.001", "--rows", "treespec plain"]
    command += ["--output", str(path), *(["--control"] if asked else [])]
    assert cli.main(command) == 0
    record = load(path)
    assert record["settings"]["control"] is asked
    assert ("treespec plain again" in [m["name"] for m in record["methods"]]) is asked
    assert (figures.control(record) is not None) is asked


def test_standing_on_the_texts_that_both_wrote_alike(record):
    """Every rival has its own; the fastest is the one that `auto` is least ahead of."""
    shapes = dict.fromkeys(("alike_once", "alike_twice", "never_alike"), "linear")
    add_methods(record, auto="auto", **shapes, peer="peer")
    record["samples"] = [sample for sample in record["samples"] if sample["task"] != "c"]
    for sample in record["samples"]:
        sample["text"] = "x"
    texts = {"auto": "xy", "alike once": "xx", "alike twice": "xy", "never alike": "zz"}
    seconds = {"auto": (0.2, 0.2), "alike once": (0.1, 0.1), "alike twice": (0.3, 0.4)}
    for name, (first, second) in {**texts, "peer": "zy"}.items():
        a, b = seconds.get(name, (0.01, 0.02))
        record["samples"] += [fake_sample(name, "a", a, text=first)]
        record["samples"] += [fake_sample(name, "b", b, text=second)]
    titles = list(figures.RIVALS)
    # half as fast as "alike once" in the one text; over both 3.5 times as fast as "alike twice"
    found = figures.standing_on_same_texts(record)
    assert {title: ratio.value for title, ratio in found.items()} == pytest.approx(
        {titles[0]: 0.5 / 0.2, titles[1]: 0.1 / 0.2, titles[2]: 0.02 / 0.2}
    )
    found = figures.standing_on_same_texts(record, category="code & 100 %")
    assert {title: ratio.value for title, ratio in found.items()} == pytest.approx(
        {titles[1]: 0.4 / 0.2, titles[2]: 0.02 / 0.2}
    )
    table = tables.same_text_table(record)
    assert table.rows in [one.rows for one in tables.all_tables(record | {"kind": "suite"})]
    assert table.rows[1][1:] == ["0.50×", "2.00×", "0.50×"] and table.rows[0][2] == "-"
    for sample in record["samples"]:
        sample["text"] = "x"
    assert tables.same_text_table(record) is None, "that would be the other table once more"
    for sample in record["samples"]:
        del sample["text"]
    assert figures.standing_on_same_texts(record) == {} and tables.same_text_table(record) is None


def test_samples_tell_texts_apart(finished):
    texts: dict[str, set] = {}
    for sample in load(finished)["samples"]:
        if sample["identical"]:
            texts.setdefault(sample["task"], set()).add(sample["text"])
    assert len(texts) > 1 and all(len(told) == 1 for told in texts.values())
    assert len(set.union(*texts.values())) == len(texts)


def test_standing_counts_prints_the_cells_below(record, tmp_path):
    """Of two categories one is at 0.97 or more of the shape picked by hand; the other is listed."""
    add_methods(record, auto="auto", shape="linear")
    stats = {"rounds": 5, "drafted_nodes": 20, "accepted": 5}
    stats |= {"draft_ms": 15.0, "verify_ms": 20.0, "commit_ms": 5.0}
    for name, (first, second) in {"auto": (0.2, 0.25), "shape": (0.1, 0.4)}.items():
        record["samples"] += [
            fake_sample(name, task, seconds, stats=stats)
            for task, seconds in (("a", first), ("b", second))
        ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps(record))
    script = Path(__file__).parents[1] / "benchmarks" / "standing_counts.py"
    ran = subprocess.run([sys.executable, script, results], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "over plain decoding in this engine: 2 of 2 at 0.97 or more, 0 wholly below",
        "over the fastest shape picked by hand: 1 of 2 at 0.97 or more, 0 wholly below",
        "  0.500×  results, T = 0, batch 1, prose; 1.00 tokens a round, ms draft +1.00, "
        "verify +0.00, commit +0.00",
    ]
    for sample in record["samples"]:
        sample["text"] = f"{sample['method'] == 'shape'}"
    results.write_text(json.dumps(record))
    ran = subprocess.run(
        [sys.executable, script, results, "--same-text"], capture_output=True, text=True
    )
    assert ran.stdout.splitlines() == [
        "over plain decoding in this engine: 2 of 2 at 0.97 or more, 0 wholly below"
    ]


def test_ranks_and_their_correlation_by_hand():
    assert figures.ranks([2.0, 5.0, 2.0, 1.0]) == [2.5, 1.0, 2.5, 4.0]
    assert figures.rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert figures.rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # 1 - 6 * (1 + 1) / (4 * 15)
    assert figures.rank_correlation([1, 2, 3, 4], [2, 1, 3, 4]) == pytest.approx(0.8)
    assert figures.rank_correlation([1.0], [2.0]) is None
    assert figures.rank_correlation([1.0, 1.0], [2.0, 3.0]) is None


def test_a_rerun_is_held_against_the_first_run(finished, tmp_path, capsys):
    again = json.loads(json.dumps(load(finished)))
    for sample in again["samples"]:
        if sample["method"] == figures.BASE:
            sample["seconds"] *= 3.0
    other = tmp_path / "again.json"
    other.write_text(json.dumps(again))
    assert cli.main(["bench", "report", str(finished), "--against", str(other)]) == 0
    out = capsys.readouterr().out
    found = tables.rerun_table(load(finished), again)
    assert f"over {len(found.rows)} rows" in out and "Spearman" in out
    assert found.rows[0][0] == figures.BASE and len(found.rows) > 2
    for _, first, second, *_ in found.rows[1:]:
        assert float(second[:-1]) == pytest.approx(3 * float(first[:-1]), abs=0.03)
    again["samples"] = [s for s in again["samples"] if s["method"] != figures.BASE]
    other.write_text(json.dumps(again))
    assert cli.main(["bench", "report", str(finished), "--against", str(other)]) == 2
    assert "--against: " in capsys.readouterr().err


def test_rows_that_change_places_by_hand(record):
    """A pair that changed places counts against a table where both runs tell it apart; and a task
    that one run alone finished counts for nothing."""
    add_methods(record, steady="tree", near="tree")
    record["samples"] = [one for one in record["samples"] if one["task"] != "c"]

    def run(*near: float) -> dict:
        times = {"steady": (0.7, 0.7), "near": near}
        made = [
            fake_sample(name, task, time)
            for name, both in times.items()
            for task, time in zip("ab", both)
        ]
        return {**record, "samples": record["samples"] + made}

    slower, mixed, faster = run(0.9, 0.9), run(0.6, 0.7), run(0.6, 0.6)
    assert figures.order_changes(slower, run(0.8, 0.8)) == {}
    assert figures.order_changes(slower, mixed) == {("steady", "near"): False}
    assert figures.order_changes(mixed, slower) == {("near", "steady"): False}
    assert figures.order_changes(slower, faster) == {("steady", "near"): True}
    note = tables.rerun_table(slower, faster).note
    assert "1 of 6 pairs in another order, 1 of which both runs tell apart" in note
    assert "interval of their ratio): steady and near;" in note
    for method in ("steady", "near", "transformers plain", "treespec plain"):
        faster["samples"].append(fake_sample(method, "c", 99.0 if method == "near" else 0.1))
    slower["samples"].append(fake_sample("near", "c", 99.0))
    assert tables.rerun_table(slower, faster).note == note


def test_latex_is_escaped_and_markdown_is_kept_in_its_cells(record):
    record["methods"][1]["name"] = record["samples"][1]["method"] = "a_b|50%"
    record["samples"][3]["method"] = "a_b|50%"
    text = tables.category_table(record).latex()
    assert r"code \& 100 \%" in text and r"a\_b\textbar{}50\% & 2.00$\times$" in text
    assert r"\begin{tabular}{lrrr}" in text
    assert r"| a_b\|50% |" in tables.full_table(record).markdown()
    assert tables.escape_latex(r"{\x}^~#$τ<>") == (
        r"\{\textbackslash{}x\}\textasciicircum{}\textasciitilde{}\#\$$\tau$"
        r"\textless{}\textgreater{}"
    )


def test_ablation_steps_multiply_to_the_whole(finished):
    record = load(finished)
    for steps, length in ((3, 3), (5, 5)):
        table = tables.ablation_table(record, steps, "draft")
        gains = [float(line[3].rstrip("×")) for line in table.rows[1:]]
        first, last = (float(table.rows[k][2].split("×")[0]) for k in (0, -1))
        whole = first
        for gain in gains:
            whole *= gain
        assert len(table.rows) == length and whole == pytest.approx(last, rel=0.1)
    # its row D=7 unpruned was not run
    assert tables.ablation_table(record, 4, "draft") is None
    assert tables.ablation_table(record, 3, "lookup") is None


def test_the_page_holds_what_the_files_say(finished, tmp_path, capsys):
    folder, target = tmp_path / "results", tmp_path / "page.md"
    folder.mkdir()
    (folder / "kernels.json").write_text('{"benchmarks": []}')
    record = load(finished)
    results.save(folder / "run.json", record)
    target.write_text(f"# Title\n\n{page.BEGIN}\nold\n{page.END}\n\nThe end.\n")
    command = ["bench", "page", "--results", str(folder), "--page", str(target)]
    assert cli.main(command) == 0
    text = target.read_text(encoding="utf-8")
    assert text.startswith("# Title\n") and text.endswith("\n\nThe end.\n") and "old" not in text
    assert f"### {tables.machine(record)}\n\n#### run.json" in text
    assert cli.main(command) == 0
    assert target.read_text(encoding="utf-8") == text
    results.save(folder / "other.json", {**record, "version": 0})
    capsys.readouterr()
    assert cli.main(command) == 2
    assert "schema version 0" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == text
    target.write_text("no markers")
    (folder / "other.json").unlink()
    assert cli.main(command) == 2
    assert "markers" in capsys.readouterr().err


def test_the_projects_page_has_its_markers():
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page.results_text({}) in page.rewrite(text, {})


def run_file(tmp_path) -> results.RunFile:
    about = {"environment": {}, "models": {"target": "t", "draft": "d"}, "acceptance": ""}
    return results.RunFile.open(tmp_path / "run.json", "reference", {}, about)


def failing(name: str, error: Exception, ours: bool) -> methods.Method:
    def make():
        raise error

    return methods.Method(name, make, ours=ours)


def compare(pair, run, task, *more: methods.Method) -> dict:
    oracle = methods.make_oracle(pair)
    plain = methods.transformers_methods(pair)[0]
    comparison = protocol.Comparison(pair, oracle, run, 1, None, lambda note: None)
    return comparison.run([protocol.Group([plain, *more], [task], {})])


def stepping(name: str, log: list[str], clock, seconds: float) -> methods.Method:
    """A method of ours that writes the oracle's text in eight rounds of so many seconds."""

    def steps(task):
        for _ in range(8):
            clock.now += seconds
            log.append(name)
            yield
        return methods.Continuation(torch.zeros(1, 1))

    def record(task):
        log.append(f"{name} recorded")

    return methods.Method(name, lambda: methods.Stepwise(steps, record), ours=True)


def test_methods_of_ours_run_side_by_side_on_their_own_time(task, monkeypatch):
    clock, log = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(protocol, "SLICE_S", 0.05)
    quick, slow = stepping("quick", log, clock, 0.02), stepping("slow", log, clock, 0.04)
    found = {m.name: seconds for m, _, seconds in protocol.timed([slow, quick], task)}
    assert list(found) == ["quick", "slow"], "the one that is done first comes first"
    assert found == pytest.approx({"quick": 0.16, "slow": 0.32})
    switches = sum(a != b for a, b in itertools.pairwise(log))
    assert switches >= 4 and sorted(log) == ["quick"] * 8 + ["slow"] * 8
    assert quick.run(task).ids.shape == (1, 1), "at once, too"


@pytest.mark.parametrize("ahead", [False, True])
def test_ours_are_recorded_ahead_where_that_is_asked_for(pair, task, tmp_path, ahead):
    log, oracle = [], torch.zeros(1, 1)
    ours = stepping("ours", log, SimpleNamespace(now=0.0), 0.0)
    theirs = methods.Method("theirs", lambda: lambda task: methods.Continuation(oracle))
    longer = dataclasses.replace(task, id="longer", new_tokens=task.new_tokens + 1)
    run, lengths = run_file(tmp_path), []
    record = ours.run.record
    ours.run = methods.Stepwise(
        ours.run.steps, lambda task: (lengths.append(task.new_tokens), record(task))
    )
    comparison = protocol.Comparison(
        pair, lambda task: oracle, run, 1, None, lambda note: None, ahead
    )
    comparison.run([protocol.Group([theirs, ours], [task, longer], {})])
    rounds = ["ours"] * 8 * 3
    assert log == (["ours recorded", *rounds] if ahead else rounds)
    assert lengths == ([longer.new_tokens] if ahead else []), "for the longest text, once"
    assert list(run.record.get("warmup_s", {})) == (["ours"] if ahead else [])


def test_a_row_is_recorded_ahead_by_warmup_and_the_file_says_so(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        TreeSpeculator, "warmup", lambda self, *sizes, **options: asked.append((*sizes, options))
    )
    path = tmp_path / "run.json"
    command = [*REFERENCE, "--samples", "1", "--rows", "treespec plain", "--output", str(path)]
    assert cli.main([*command, "--record-ahead"]) == 0
    record = load(path)
    assert record["settings"]["record_ahead"] is True
    assert 0.0 <= record["warmup_s"]["treespec plain"] < 60.0
    assert "recorded ahead by warmup(), in " in " ".join(capsys.readouterr().out.split())
    assert asked == [(1, record["tasks"][0]["prompt_tokens"] + 12, {"do_sample": False})]
    path.unlink()
    assert cli.main(command) == 0
    assert load(path)["settings"]["record_ahead"] is False and len(asked) == 1
    assert "recorded ahead" not in capsys.readouterr().out


def test_others_run_one_after_another_and_ours_together():
    named = {n: methods.Method(n, lambda: None, ours=n in "bd") for n in "abcd"}
    for turn in range(4):
        parties = protocol._parties([named[n] for n in "abcd"], turn)
        names = sorted("".join(sorted(m.name for m in party)) for party in parties)
        assert names == ["a", "bd", "c"]


def test_every_row_takes_every_turn_equally_often_in_every_category():
    rows = [methods.Method(n, lambda: None, ours=n != "theirs") for n in ("theirs", *"abcd")]
    nothing = torch.zeros(1, 1, dtype=torch.long)
    tasks = [
        methods.Task(f"{category}-{k}", category, nothing, nothing, 1)
        for k in range(8)
        for category in ("wiki", "code", "math")
    ]
    group = protocol.Group(rows, tasks, {})
    turns, firsts, neighbours = Counter(), Counter(), set()
    for task in tasks:
        parties = protocol._parties(rows, *group.turn_of(task))
        ours = [method.name for party in parties for method in party if method.ours]
        turns.update((task.category, name, turn) for turn, name in enumerate(ours))
        firsts[task.category] += parties[0][0].name == "theirs"
        neighbours.update(itertools.pairwise(ours))
    assert len(turns) == 3 * 4 * 4 and set(turns.values()) == {2}
    assert set(firsts.values()) == {4}
    assert len(neighbours) > 4, "and not always after the same one"


def test_texts_are_checked_when_all_rows_are_done(pair, task, tmp_path, monkeypatch):
    clock, log, oracle = SimpleNamespace(now=0.0), [], torch.zeros(1, 1)
    monkeypatch.setattr(protocol, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    sample = protocol.Comparison._sample

    def checked(self, method, *rest):
        log.append("checked")
        return sample(self, method, *rest)

    monkeypatch.setattr(protocol.Comparison, "_sample", checked)
    rows = [stepping("quick", log, clock, 0.03), stepping("slow", log, clock, 0.09)]
    theirs = methods.Method("theirs", lambda: lambda task: methods.Continuation(oracle))
    run = run_file(tmp_path)
    comparison = protocol.Comparison(pair, lambda task: oracle, run, 0, None, lambda note: None)
    comparison.run([protocol.Group([theirs, *rows], [task], {})])
    kept = "".join(word[0] for word in log)
    assert kept.strip("c").count("c") == 0, "nothing is checked while a row is under way"


def test_others_that_fail_are_left_out_by_name_and_ours_are_not(pair, task, tmp_path):
    record = compare(
        pair, run_file(tmp_path), task, failing("peer", KeyError("no such layer"), ours=False)
    )
    assert record["not_run"] == {"peer": "KeyError: 'no such layer'"}
    assert [row["name"] for row in record["rows"]] == ["transformers plain"]
    (tmp_path / "run.json").unlink()
    with pytest.raises(KeyError, match="no such layer"):
        compare(pair, run_file(tmp_path), task, failing("ours", KeyError("no such layer"), True))
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(protocol.OutOfMemory, match="too little memory for 'ours' on once"):
        compare(pair, run_file(tmp_path), task, failing("ours", error, ours=True))
    assert load(tmp_path / "run.json")["failure"] is None


def test_scikit_learn_is_hidden_for_one_method_only(pair, task, monkeypatch):
    from transformers.generation import candidate_generator

    asked = candidate_generator.is_sklearn_available
    seen = []
    update = candidate_generator.AssistedCandidateGenerator.update_candidate_strategy

    def listen(self, *arguments):
        update(self, *arguments)
        seen.append(hasattr(self, "matches"))

    monkeypatch.setattr(
        candidate_generator.AssistedCandidateGenerator, "update_candidate_strategy", listen
    )
    found = {method.name: method for method in methods.transformers_methods(pair)}
    hidden = found["transformers assisted (no scikit-learn)"].run(task).ids
    assert seen and not any(seen)
    seen.clear()
    if importlib.util.find_spec("sklearn") is None:
        with pytest.raises(ModuleNotFoundError, match="scikit-learn is not installed"):
            _ = found["transformers assisted (scikit-learn)"].run
    else:
        assert torch.equal(found["transformers assisted (scikit-learn)"].run(task).ids, hidden)
        assert seen and all(seen)
    assert candidate_generator.is_sklearn_available is asked


def test_spoilt_drafts():
    ids = torch.tensor([[5, 6, 7]])
    _, draft, _ = demo.load_demo_pair()
    embeddings = draft.get_input_embeddings().weight.clone()
    with torch.no_grad():
        trained = draft(ids).logits
        models.spoil_draft(draft, "adversarial")
        assert torch.allclose(draft(ids).logits, -trained, atol=1e-5)
        assert torch.equal(draft.get_input_embeddings().weight, embeddings)
        models.spoil_draft(draft, "random")
        assert not torch.equal(draft.get_input_embeddings().weight, embeddings)


def test_sized_runs_say_simulated_everywhere(tmp_path, capsys):
    path = tmp_path / "sized.json"
    command = [*REFERENCE, "--sized", "2x64", "1x64", "--rows", "K=4 (draft)", "--samples", "2"]
    assert cli.main([*command, "--output", str(path)]) == 0
    assert "(simulated acceptance)" in capsys.readouterr().out
    record = load(path)
    assert record["acceptance"].startswith("simulated: replayed from")
    row = next(row for row in record["rows"] if row["ours"])
    # a random draft agrees on nothing by itself
    assert row["tokens_per_round"] > 1.5 and row["identical"] == 2
    assert "simulated" in path.with_suffix(".tex").read_text(encoding="utf-8")
    sized_pair = models.load_pair({**SETTINGS, "sized": ["1x64", "1x64"]}, torch.device("cpu"))
    kept, not_run = sized.sized_methods(sized_pair, [], 8)
    assert {"treespec tree D=4 pruned", "treespec adaptive"} < not_run.keys()
    assert not any("lookup" in method.name or "auto" in method.name for method in kept)


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch):
    settings = {**SETTINGS, "threads": 1, "device": "cpu"}
    peak = memory.peak_mib(settings, memory.LOADED_ONLY)
    assert 50 < peak < 1e5
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(memory.MemoryRunFailed, match="exit code 1"):
        memory.peak_mib(settings, memory.LOADED_ONLY)


def test_auto_starts_from_a_tuning_file_only_where_asked(monkeypatch, tmp_path):
    monkeypatch.setenv(tuner.CACHE_VARIABLE, str(tmp_path))
    with methods.tuning_file(True):
        assert tuner.cache_dir() == tmp_path
    with methods.tuning_file(False):
        assert tuner.cache_dir() != tmp_path and not list(tuner.cache_dir().iterdir())
    assert tuner.cache_dir() == tmp_path
