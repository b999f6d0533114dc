"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
import torch

import treespec
from treespec import cli, console, demo

PROMPT = "Once upon a time there was"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair():
    return demo.load_demo_pair()


@pytest.fixture(scope="module")
def plain_ids(pair) -> list[int]:
    """24 greedy tokens after PROMPT, by the target itself."""
    target, _, tokenizer = pair
    inputs = tokenizer(PROMPT, return_tensors="pt")
    return target.generate(**inputs, max_new_tokens=24, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ].tolist()


@pytest.fixture
def loaded(monkeypatch, pair):
    """The bundled pair without loading it anew for every command."""
    monkeypatch.setattr(demo, "load_demo_pair", lambda dtype=None, device="cpu": pair)
    return pair


def generate(capsys, *options: str) -> dict:
    assert (
        cli.main(["generate", "--json", "--max-new-tokens", "24", "--device", "cpu", *options]) == 0
    )
    return json.loads(capsys.readouterr().out)


def test_help_is_quick_and_names_the_commands():
    code = "import sys\nfrom treespec.cli import main\ntry: main(['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("demo", "generate", "info"):
        assert command in done.stdout


@pytest.mark.parametrize("command", ["demo", "generate", "info"])
def test_every_option_is_explained(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    parser = cli.build_parser()._subparsers._group_actions[0].choices[command]
    assert [action.dest for action in parser._actions if not action.help] == []
    assert command in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"treespec {treespec.__version__}\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("auto", "auto"),
        ("chain", treespec.Chain()),
        ("chain:3", treespec.Chain(length=3)),
        ("fixed:depth=4,branching=3,prune_threshold=0.1", treespec.FixedTree(4, 3, 0.1)),
        ("fixed:5,first_branching=null", treespec.FixedTree(depth=5)),
        ("best-first:24,depth=4", treespec.BestFirstTree(max_nodes=24, depth=4)),
        ("adaptive:window=5", treespec.AdaptiveTree(window=5)),
    ],
)
def test_tree_spellings(text, expected):
    assert cli.parse_tree(text) == expected


BAD = {
    "no command": ([], "COMMAND"),
    "unknown command": (["sing"], "sing"),
    "unknown option": (["info", "--loud"], "--loud"),
    "unknown shape": (
        ["generate", "--prompt", "a", "--tree", "bush"],
        "unknown shape 'bush'; known: auto, chain",
    ),
    "auto with values": (["generate", "--prompt", "a", "--tree", "auto:3"], "unknown shape 'auto'"),
    "unknown field": (
        ["generate", "--prompt", "a", "--tree", "chain:depth=3"],
        "no value 'depth'; known: length",
    ),
    "field no number": (
        ["generate", "--prompt", "a", "--tree", "chain:long"],
        "length must be a number; got 'long'",
    ),
    "impossible field": (
        ["generate", "--prompt", "a", "--tree", "chain:0"],
        "between 1 and 64; got 0",
    ),
    "fractional field": (
        ["generate", "--prompt", "a", "--tree", "chain:2.5"],
        "must be an integer; got 2.5",
    ),
    "negative budget": (
        ["generate", "--prompt", "a", "--max-new-tokens", "-1"],
        "--max-new-tokens",
    ),
    "no prompts": (["demo", "--prompts", "0"], "--prompts"),
    "prompt twice": (["generate", "--prompt", "a", "--file", "b"], "--file"),
    "stream and json": (["generate", "--prompt", "a", "--stream", "--json"], "--json"),
    "missing file": (
        ["generate", "--file", "/no/such/file"],
        "--file: cannot read '/no/such/file'",
    ),
    "empty prompt": (["generate", "--prompt", ""], "the prompt is empty"),
    "top-k without sampling": (
        ["generate", "--prompt", "a", "--top-k", "3"],
        "--top-k needs --temperature",
    ),
    "temperature 0": (["generate", "--prompt", "a", "--temperature", "0"], "temperature"),
    "top-p of 2": (["generate", "--prompt", "a", "--temperature", "1", "--top-p", "2"], "top_p"),
    "no such model": (
        ["generate", "--prompt", "a", "--model", "./no-model"],
        "--model: no directory './no-model'",
    ),
    "no such draft": (
        ["generate", "--prompt", "a", "--draft", "./no-model"],
        "--draft: no directory './no-model'",
    ),
    "none and more": (
        ["generate", "--prompt", "a", "--draft", "none", "--draft", "ngram"],
        "cannot be combined",
    ),
    "no such device": (
        ["generate", "--prompt", "a", "--device", "abacus"],
        "--device: 'abacus' cannot be used here",
    ),
    "graphs without a GPU": (
        ["generate", "--prompt", "a", "--device", "cpu", "--cuda-graphs"],
        "--cuda-graphs: needs a CUDA device; this is cpu",
    ),
    "no chat": (["generate", "--prompt", "a", "--chat"], "no chat template"),
    "too long": (["generate", "--prompt", "a", "--max-new-tokens", "5000"], "max_new_tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_one_line_and_exit_code_2(case, loaded, capsys):
    arguments, message = BAD[case]
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("treespec: error: ") and err.count("\n") == 1, err
    assert message in err


def test_a_directory_without_a_model_is_refused(tmp_path, loaded, capsys):
    assert cli.main(["generate", "--prompt", "a", "--model", str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    assert cli.main(["generate", "--prompt", "a", "--model", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(f"treespec: error: --model: cannot load {str(tmp_path)!r}")
        and err.count("\n") == 1
    )


def test_generate_writes_the_targets_own_text(loaded, plain_ids, capsys):
    report = generate(capsys, "--prompt", PROMPT)
    assert report["new_ids"] == plain_ids
    assert report["text"] == loaded[2].decode(plain_ids)
    assert report["stats"]["new_tokens"] == 24
    assert report["stats"]["rounds"] < 24


@pytest.mark.parametrize("tree", ["chain:3", "fixed:depth=2", "best-first:8", "adaptive"])
def test_generate_with_every_shape(tree, loaded, plain_ids, capsys):
    report = generate(
        capsys, "--prompt", PROMPT, "--tree", tree, "--draft", "demo", "--draft", "ngram"
    )
    assert report["new_ids"] == plain_ids


def test_generate_from_a_model_directory(loaded, plain_ids, capsys, tmp_path):
    target, draft, tokenizer = loaded
    target.save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    tokenizer.save_pretrained(tmp_path / "target")
    models = ("--model", str(tmp_path / "target"), "--draft", str(tmp_path / "draft"))
    report = generate(capsys, "--prompt", PROMPT, *models, "--dtype", "float32")
    assert report["new_ids"] == plain_ids


def test_same_seed_same_text_with_and_without_a_draft(loaded, plain_ids, capsys):
    options = ("--prompt", PROMPT, "--temperature", "0.9", "--top-p", "0.95")
    one = generate(capsys, *options, "--seed", "5")["new_ids"]
    assert one == generate(capsys, *options, "--seed", "5", "--draft", "none")["new_ids"]
    assert one != generate(capsys, *options, "--seed", "6")["new_ids"]
    assert one != plain_ids


@pytest.mark.parametrize("way", ["file", "stdin", "dash"])
def test_prompts_from_files_and_stdin(way, loaded, plain_ids, capsys, tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    options = {"file": ("--file", str(path)), "stdin": (), "dash": ("--file", "-")}[way]
    assert generate(capsys, *options)["new_ids"] == plain_ids


def test_stream_prints_the_text_and_a_summary(loaded, plain_ids, capsys):
    command = ["generate", "--prompt", PROMPT, "--max-new-tokens", "24", "--device", "cpu"]
    assert cli.main([*command, "--stream"]) == 0
    streamed = capsys.readouterr()
    assert cli.main(command) == 0
    whole = capsys.readouterr()
    assert streamed.out == whole.out == loaded[2].decode(plain_ids) + "\n"
    assert streamed.err.startswith("24 tokens, ")


def test_interruption_and_stray_errors(loaded, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(treespec.TreeSpeculator, "stream", interrupt)
    assert cli.main(["generate", "--prompt", "a", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "treespec: interrupted\n"


def test_demo_prints_live_text_and_a_table(loaded, capsys):
    assert cli.main(["demo", "--prompts", "1", "--max-new-tokens", "16", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    (header,) = [line for line in lines if line.startswith("method ")]
    assert header.split() == ["method", "tokens/s", "ratio", "tokens", "per", "round", "identical"]
    rows = lines[lines.index(header) + 2 : -1]
    assert rows[0].startswith("plain generate")
    assert [row for row in rows if not row.endswith(" yes")] == []
    assert lines[-1] == "identical: yes"
    target, _, tokenizer = loaded
    ids = tokenizer(demo.live_prompt(), return_tensors="pt")["input_ids"]
    plain = treespec.TreeSpeculator(target, None)
    sampled = plain.generate(ids, max_new_tokens=16, **demo.LIVE_SAMPLING)
    assert tokenizer.decode(sampled[0, ids.shape[1] :]) in out
    assert "the same text without speculation: yes" in out


def broken_methods(target, draft, tokenizer, max_new_tokens, cuda_graphs):
    def run(input_ids):
        ids, rounds = plain.run(input_ids)
        ids[0, -1] = (ids[0, -1] + 1) % 4096
        return ids, rounds

    plain = demo.transformers_method("plain generate", target, max_new_tokens)
    return [plain, demo.Method("ours, broken", run, ours=True)]


def test_demo_exits_with_1_when_text_differs(loaded, capsys, monkeypatch):
    monkeypatch.setattr(demo, "demo_methods", broken_methods)
    command = ["demo", "--prompts", "2", "--max-new-tokens", "8", "--device", "cpu"]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "no: 2 of 2, logit gap <= " in out
    assert out.splitlines()[-1] == "identical: no"
    assert err == "treespec demo: text differs from the target's own: ours, broken\n"
    assert cli.main([*command, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] is False
    assert [row["differing"] for row in report["results"]] == [0, 2]


def test_demo_exits_with_1_when_sampled_text_differs(loaded, capsys, monkeypatch):
    generate = treespec.TreeSpeculator.generate

    def other_seed(self, *arguments, **kwargs):
        return generate(self, *arguments, **{**kwargs, "seed": kwargs["seed"] + 1})

    monkeypatch.setattr(treespec.TreeSpeculator, "generate", other_seed)
    monkeypatch.setattr(demo, "demo_methods", lambda *a: broken_methods(*a)[:1])
    command = ["demo", "--prompts", "1", "--max-new-tokens", "12", "--device", "cpu"]
    assert cli.main(command) == 1
    out, err = capsys.readouterr()
    assert "the same text without speculation: no" in out
    assert out.splitlines()[-1] == "identical: no"
    assert err == "treespec demo: text differs from the target's own: the sampled text\n"


def test_demo_reports_differences_in_16_bits_without_failing(capsys, monkeypatch):
    pair = demo.load_demo_pair(dtype="bfloat16")
    monkeypatch.setattr(demo, "load_demo_pair", lambda dtype=None, device="cpu": pair)
    monkeypatch.setattr(demo, "demo_methods", broken_methods)
    command = [
        "demo",
        "--prompts",
        "1",
        "--max-new-tokens",
        "8",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    ]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "no: 1 of 1, logit gap <= " in out
    assert "identical: no" in out.splitlines()


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["treespec"] == treespec.__version__
    assert report["devices"][0]["device"] == "cpu"
    works = {path["path"]: path["works"] for path in report["paths"]}
    assert works['attention="torch"'] is True
    assert works["cuda_graphs=True"] is torch.cuda.is_available()
    assert all(path["reason"] for path in report["paths"])
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for part in ("transformers", "cpu: ", 'attention="triton"', "works here"):
        assert part in out


def test_live_text_never_shows_half_a_character(pair):
    tokenizer = pair[2]
    text = "A 🙂 and 数字.\n    Indented."
    ids = tokenizer(text)["input_ids"]
    pieces: list[str] = []
    live = console.LiveText(tokenizer.decode, pieces.append)
    for token in ids:
        live.add([token])
    live.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_live_text_shows_a_broken_end():
    pieces: list[str] = []
    live = console.LiveText(lambda ids: bytes(ids).decode("utf-8", errors="replace"), pieces.append)
    live.add(list(b"ab\xf0\x9f"))
    assert pieces == []
    live.end()
    assert "".join(pieces) == "ab\ufffd"


def test_format_table_aligns():
    table = console.format_table(("name", "n"), [("a", "1"), ("long name", "100")])
    assert table.splitlines() == [
        "name         n",
        "---------  ---",
        "a            1",
        "long name  100",
    ]
