"""The tuner: what it measures, how it keeps it, which files it ignores, and `whatif`."""

from __future__ import annotations

import argparse
import itertools
import json
import math

import pytest
import torch
from tiny_models import tiny_pair

import treespec
from treespec import TreeSpeculator, cli, tuner, whatif
from treespec.whatif import RoundCosts

COSTS = RoundCosts({1: 4.0, 8: 5.4, 24: 7.8}, 1.0, {1: 0.8, 4: 0.9}, 0.5, 0.3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory that is the tuner's."""
    monkeypatch.setenv(tuner.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_spec() -> TreeSpeculator:
    return TreeSpeculator(*tiny_pair("llama"))


def key_of(spec: TreeSpeculator) -> tuner.Key:
    return tuner.make_key(spec._target, spec._model)


# --- costs ---------------------------------------------------------------------------------------


def test_a_round_is_the_sum_of_its_parts():
    assert COSTS.plain_ms == pytest.approx(4.3)
    assert COSTS.predict_round_ms(8) == pytest.approx(0.3 + 5.4)
    assert COSTS.predict_round_ms(8, lookup=True) == pytest.approx(0.3 + 5.4 + 0.5)
    assert COSTS.predict_round_ms(8, levels=3, width=4) == pytest.approx(0.3 + 5.4 + 1.0 + 1.8)


def test_costs_between_and_beyond_measured_sizes():
    assert COSTS.verify(16) == pytest.approx(6.6)
    assert COSTS.verify(47) == pytest.approx(7.8 + 3.8)
    assert COSTS.level(2) == pytest.approx(0.8 + 0.1 / 3)
    # noise: the wider one was faster
    assert whatif.CostCurve({1: 4.0, 8: 3.0, 16: 6.0}).at(8) == 4.0


# --- the file ------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(cache):
    key = key_of(make_spec())
    path = tuner.save(key, {1: COSTS, 4: COSTS})
    assert path.parent == cache and [p.name for p in cache.iterdir()] == [path.name]
    costs, origin = tuner.load(key)
    assert costs == {1: COSTS, 4: COSTS} and str(path) in origin


def test_auto_starts_from_a_file_and_says_so(cache):
    before = make_spec()
    assert before._policy.now.verify.at(8) is None
    tuner.save(key_of(before), {1: COSTS})
    spec = make_spec()
    assert spec._policy.now.verify.at(24) == pytest.approx(7.8)
    assert spec._policy.rate == pytest.approx(1 / 4.3)
    text = spec.explain()
    assert str(cache) in text and "predicted tokens/ms now: plain 0.233" in text


def rewrite(path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda d: d.update(schema=0), "format is version 0, and this package reads version 1"),
        (lambda d: d.pop("schema"), "format is version None"),
        (lambda d: d["key"].update(pair="another"), "of another pair of models"),
        (lambda d: d["key"].update(device="abacus"), "was measured on abacus, and this is"),
        (lambda d: d["key"]["versions"].update(torch="0.1"), "was measured with torch 0.1, now"),
        (lambda d: d["key"].update(versions=None), "was measured with torch None, now"),
    ],
)
def test_a_file_of_something_else_is_ignored_with_a_reason(cache, change, reason):
    path = tuner.save(key_of(make_spec()), {1: COSTS})
    rewrite(path, change)
    spec = make_spec()
    assert spec._policy.now.verify.at(1) is None
    text = spec.explain()
    assert reason in text and "is ignored" in text and str(path) in text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b'{"schema": 1}',
        b'{"schema": 1, "key": 3}',
        b"[" * 100_000,
    ],
)
def test_a_corrupt_file_never_stops_generation(cache, content):
    path = tuner.save(key_of(make_spec()), {1: COSTS})
    path.write_bytes(content)
    spec = make_spec()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert spec.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 8)
    spec.reset()
    assert str(path) in spec._policy.origin


@pytest.mark.parametrize(
    "change",
    [
        lambda known: known["verify_ms"].update({"1": -1.0}),
        lambda known: known["verify_ms"].update({"1": math.nan}),
        lambda known: known["verify_ms"].update({"1": "slow"}),
        lambda known: known["verify_ms"].pop("1"),
        lambda known: known["level_ms"].update({"four": 1.0}),
        lambda known: known.update(root_ms=math.inf),
        lambda known: known.pop("overhead_ms"),
    ],
)
def test_impossible_costs_are_ignored(cache, change):
    key = key_of(make_spec())
    path = tuner.save(key, {1: COSTS})
    rewrite(path, lambda data: change(data["costs"]["1"]))
    costs, origin = tuner.load(key)
    assert costs == {} and "is damaged" in origin


def test_keys_tell_pairs_dtypes_and_threads_apart(cache):
    target, _ = tiny_pair("llama")
    key = key_of(make_spec())
    other, _ = tiny_pair("qwen3")
    assert tuner.make_key(*models(other, None)).pair != key.pair
    assert tuner.make_key(*models(target, None)).pair != key.pair
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert key_of(make_spec()).device != key.device
    finally:
        torch.set_num_threads(threads)
    assert key_of(make_spec()) == key


def models(target, draft):
    spec = TreeSpeculator(target, draft)
    return spec._target, spec._model


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv(tuner.CACHE_VARIABLE, str(file / "cache"))
    key = key_of(make_spec())
    with pytest.raises(tuner.TuningError, match=r"cannot write to .*file"):
        tuner.save(key, {1: COSTS})
    assert tuner.load(key)[0] == {}


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv(tuner.CACHE_VARIABLE, str(tmp_path))
    assert tuner.cache_dir() == tmp_path
    monkeypatch.delenv(tuner.CACHE_VARIABLE)
    assert tuner.cache_dir().name == "treespec" and tuner.cache_dir() != tmp_path


# --- measuring -----------------------------------------------------------------------------------


def test_measuring_the_shapes_asked_for(monkeypatch):
    """The engine really draws each shape: as many nodes and levels as it says."""
    bench = tuner.Bench(make_spec(), 2)
    rounds = bench._rounds()
    for shape in [tuner.Shape(1), tuner.Shape(32), tuner.Shape(64), tuner.Shape(8, 3, 4)] * 2:
        bench._draw(shape)
        outcomes = list(itertools.islice(rounds, 3))
        assert {o.num_nodes for o in outcomes} == {shape.num_nodes}
        assert {o.draft_levels for o in outcomes} == {shape.levels}
        assert {len(o.paths) for o in outcomes} == {2}
        assert {o.match_lengths is None for o in outcomes} == {shape.continuation == 0}
    bench._draw(tuner.Shape(8, 5, 4))
    # more rounds than a text has
    assert {o.draft_levels for o in itertools.islice(rounds, 200)} == {5}
    rounds.close()


def test_rounds_of_a_shape_are_its_own(monkeypatch):
    """What is kept of a shape was drawn for it, after a few rounds that are not."""
    bench, kept = tuner.Bench(make_spec(), 1), []
    monkeypatch.setattr(tuner.Timing, "of", kept.append)
    shapes = [tuner.Shape(1), tuner.Shape(4, 2), tuner.Shape(16), tuner.Shape(8, lookup=True)]
    bench.time_all(shapes, turns=3)
    for shape, outcomes in zip(shapes, kept):
        assert len(outcomes) == 3 * tuner._ROUNDS
        assert {o.draft_levels for o in outcomes} == {shape.levels}
    assert {o.num_nodes for o in kept[0]} == {1} and {o.num_nodes for o in kept[2]} == {16}


def test_measured_costs_are_those_of_the_rounds(monkeypatch):
    def time(shape):
        draft = 0.5 + shape.levels * (1.0 + 0.1 * shape.width) + 0.3 * shape.lookup
        verify = 4.0 + 0.1 * shape.num_nodes
        # what a tree takes to be committed beyond a plain round
        rest = 0.25 + 0.2 * (shape.num_nodes > 1)
        return tuner.Timing(draft, verify, rest, draft + verify + rest, shape.num_nodes)

    def time_all(self, listed, advance=None, turns=None):
        for shape in listed:
            advance(str(shape))
        return {shape: time(shape) for shape in listed}

    monkeypatch.setattr(tuner.Bench, "time_all", time_all)
    spec, seen = make_spec(), []
    costs = tuner.measure(spec, 1, seen.append)
    assert len(seen) == len(tuner.shapes(spec))
    assert costs.verify_ms[32] == pytest.approx(7.2) and costs.root_ms == pytest.approx(1.3)
    assert costs.level_ms[1] == pytest.approx(1.1)
    assert costs.lookup_ms == pytest.approx(0.5)
    assert costs.overhead_ms == pytest.approx(0.75), "what a plain round spends on growing is in it"
    again, found = tuner.measure_and_check(spec, 1, seen.append)
    assert again == costs and [shape for shape, *_ in found] == tuner.check_shapes(spec)
    assert not set(tuner.check_shapes(spec)) & set(tuner.shapes(spec))
    for shape, predicted, measured in found:
        if shape.width == 1:
            assert predicted == pytest.approx(measured), shape


def test_tuning_leaves_the_speculator_as_it_was():
    spec = make_spec()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = spec.generate(ids, max_new_tokens=12, do_sample=False)
    tuner.Bench(spec, 1).time_all([tuner.Shape(8, 2, 4)], turns=1)
    assert torch.equal(spec.generate(ids, max_new_tokens=12, do_sample=False), before)


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture
def tiny_command(monkeypatch):
    """`treespec tune` on a tiny pair, in a few rounds."""
    monkeypatch.setattr(cli, "_load_pair", lambda arguments, device: (*tiny_pair("llama"), None))
    monkeypatch.setattr(tuner, "_TURNS", 1)


def test_tune_measures_and_keeps(cache, tiny_command, capsys):
    assert cli.main(["tune", "--check", "--json", "--device", "cpu"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["costs"]["1"]["verify_ms"]["32"] > 0
    checked = {row["shape"] for row in report["check"]}
    assert checked >= {"12 nodes, lookup", "4 nodes, 2 levels of 1"}
    costs, origin = tuner.load(key_of(make_spec()))
    assert report["path"] in origin and set(costs) == {1}
    assert report["environment"]["versions"]["torch"] == torch.__version__


def test_tune_prints_a_table(cache, tiny_command, capsys):
    assert cli.main(["tune", "--batch-sizes", "2", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "verification, 32 nodes" in out and "draft, level of 3" in out and str(cache) in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-sizes", "3"], "must be powers of two"),
        (["--batch-sizes", "0"], "must be a whole number above 0"),
        (["--model", "./no-such-model"], "no directory './no-such-model'"),
        (["--draft", "none"], "leaves nothing to tune"),
    ],
)
def test_tune_refuses(cache, capsys, arguments, message):
    assert cli.main(["tune", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and len(captured.err.splitlines()) == 1


def test_tune_into_a_directory_that_cannot_be_written(tmp_path, monkeypatch, tiny_command, capsys):
    file = tmp_path / "file"
    file.write_text("in the way")
    monkeypatch.setenv(tuner.CACHE_VARIABLE, str(file))
    assert cli.main(["tune", "--device", "cpu"]) == 2
    message = capsys.readouterr().err
    assert "cannot write to" in message and tuner.CACHE_VARIABLE in message


# --- whatif --------------------------------------------------------------------------------------


def test_tokens_of_a_chain():
    assert whatif.chain_tokens(0.0, 4) == 1.0
    assert whatif.chain_tokens(1.0, 4) == 5.0
    assert whatif.chain_tokens(0.5, 2) == pytest.approx(1.75)


def test_the_best_tree_against_all_trees():
    """By hand: chances 0.6 and 0.3; of seven nodes two levels deep the likeliest three below the
    root are 0.6, 0.36 (its first child) and 0.3."""
    nodes = list(whatif.best_nodes([0.6, 0.3], 4, 2))
    assert [chance for chance, _ in nodes] == pytest.approx([0.6, 0.36, 0.3])
    assert [level for _, level in nodes] == [1, 2, 1]
    assert len(list(whatif.best_nodes([0.6, 0.3], 99, 2))) == 6
    assert list(whatif.best_nodes([0.6], 99, 0)) == []


def test_a_tree_of_one_child_each_is_a_chain():
    chain = whatif.chains(COSTS, 0.7, 4)[-1]
    tree = next(p for p in whatif.trees(COSTS, [0.7], 4, [5], width=1) if p.levels == 4)
    assert tree.tokens == pytest.approx(chain.tokens)
    assert tree.round_ms == pytest.approx(chain.round_ms)


def run_whatif(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    whatif.add_whatif_parser(parser.add_subparsers())
    options = parser.parse_args(["whatif", *arguments])
    return options.run(options)


def test_whatif_predicts(capsys):
    given = ["--verify-ms", "1:6.6,24:8.7", "--level-ms", "1.3", "--acceptance", "0.7"]
    assert run_whatif(*given, "--depth", "5", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in report["predictions"]}
    assert rows["plain"]["speedup"] == 1.0
    chain = rows["chain of 3"]
    assert chain["tokens"] == pytest.approx(1 + 0.7 + 0.49 + 0.343)
    round_ms = 6.6 + 3 * 2.1 / 23 + 3 * 1.3
    assert chain["speedup"] == pytest.approx(chain["tokens"] / round_ms * 6.6)
    assert report["best"] == max(rows.values(), key=lambda row: row["speedup"])["name"]


def test_whatif_names_plain_when_nothing_pays(capsys):
    given = ["--verify-ms", "1:5,8:9", "--level-ms", "6", "--acceptance", "0.3,0.1"]
    assert run_whatif(*given, "--plain-ms", "5.5") == 0
    assert "best: plain, 1.00x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"--verify-ms": "8:5"}, "--verify-ms must tell the cost of 1 node"),
        ({"--verify-ms": "1:-5"}, "--verify-ms must be like"),
        ({"--level-ms": "fast"}, "--level-ms must be like"),
        ({"--acceptance": "0.9,0.3"}, "--acceptance must be chances"),
        ({"--acceptance": "1.3"}, "--acceptance must be chances"),
        ({"--depth": "0"}, "--depth must be from 1 to 64"),
        ({"--nodes": "1"}, "--nodes must be sizes"),
        ({"--plain-ms": "0"}, "--plain-ms must be above 0"),
    ],
)
def test_whatif_refuses(changed, message):
    given = {"--verify-ms": "1:5,8:6", "--level-ms": "1", "--acceptance": "0.7", **changed}
    with pytest.raises(ValueError, match=message):
        run_whatif(*(part for pair in given.items() for part in pair))


def test_version_is_part_of_the_key(monkeypatch, cache):
    key = key_of(make_spec())
    tuner.save(key, {1: COSTS})
    monkeypatch.setattr(treespec, "__version__", "99")
    assert "treespec " in tuner.load(key_of(make_spec()))[1]
    assert "now 99" in tuner.load(key_of(make_spec()))[1]
