"""The training script: a tiny pair from end to end, resuming, and its figures against hand
computation.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "train_pair.py"
TINY = "llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2"
TINY += ",num_key_value_heads=1,tie_word_embeddings=true,max_position_embeddings=64"
# Of another type, and with dropout, which a resumed run must repeat too.
TINY_DRAFT = "gpt2:n_embd=16,n_layer=1,n_head=2,n_positions=64,resid_pdrop=0.2"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_pair", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_pair"] = module
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield module
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    verbs, nouns = ("sees", "hears", "finds"), ("a tree", "the river", "one stone", "my brother")
    lines = [
        f"Number {i}: {nouns[i % 4]} {verbs[i % 3]} {nouns[(i * 7 + 1) % 4]}." for i in range(300)
    ]
    path.write_text("\n<|endoftext|>\n".join(lines) + "\n", encoding="utf-8")
    return path


def arguments(script, corpus: Path, out: Path, *more: str):
    options = f"--text {corpus} --out {out} --target {TINY} --draft {TINY_DRAFT} --device cpu"
    options += " --vocab-size 300 --batch-size 4 --length 16 --warmup 4 --learning-rate 1e-2"
    options += " --target-steps 30 --draft-steps 24 --checkpoint-every 10"
    return script.parse_arguments([*options.split(), *more])


@pytest.fixture(scope="module")
def finished(script, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("pair")
    return SimpleNamespace(out=out, report=script.train_pair(arguments(script, corpus, out)))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {
        f"{role}.{name}": tensor
        for role in ("target", "draft")
        for name, tensor in torch.load(out / f"{role}.ckpt", weights_only=True)["model"].items()
    }


def test_learns_and_writes_a_pair(script, finished):
    report = finished.report
    assert report["target_loss"] < math.log(300) - 1
    assert report["draft_loss"] < math.log(300) - 0.5
    assert 0.2 < report["greedy_agreement"] <= 1
    assert report == json.loads((finished.out / "report.json").read_text())
    target = script.load_model(finished.out / "target", torch.float32, "cpu")
    assert target.num_parameters() == report["target_parameters"]
    assert not target.training
    saved = target.model.embed_tokens.weight
    trained = weights(finished.out)["target.model.embed_tokens.weight"]
    torch.testing.assert_close(saved, trained.bfloat16().float(), rtol=0, atol=0)


@pytest.mark.parametrize("stage, step", [("target", 17), ("draft", 13), ("draft", 20)])
def test_interrupted_and_resumed_equals_uninterrupted(
    script, corpus, finished, tmp_path, stage, step
):
    def interrupt(at_stage: str, at_step: int) -> None:
        if (at_stage, at_step) == (stage, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        script.train_pair(arguments(script, corpus, tmp_path), on_step=interrupt)
    assert torch.load(tmp_path / f"{stage}.ckpt", weights_only=True)["step"] == step
    seen: list[tuple[str, int]] = []
    report = script.train_pair(
        arguments(script, corpus, tmp_path), on_step=lambda *at: seen.append(at)
    )
    first = (stage, step + 1)
    assert seen[0] == first
    expected = weights(finished.out)
    resumed = weights(tmp_path)
    assert expected.keys() == resumed.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, resumed[name]), name
    for name in ("target_loss", "draft_loss", "kl", "greedy_agreement"):
        assert report[name] == finished.report[name]


def test_a_checkpoint_of_other_settings_is_refused(script, corpus, finished):
    with pytest.raises(ValueError, match=r"other settings \(batch_size 4 -> 8\)"):
        script.train_pair(arguments(script, corpus, finished.out, "--batch-size", "8"))


class Table(torch.nn.Module):
    """A "model" whose logits depend on the last token only, by a fixed table."""

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Parameter(table)

    def forward(self, ids, use_cache=False):
        return SimpleNamespace(logits=self.table[ids])


def test_evaluate_by_hand(script):
    target = Table(torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 1.0]]))
    draft = Table(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    stream = torch.tensor([0, 1, 2, 0, 0])
    figures = script.evaluate(target, draft, stream, length=2, batch_size=1, limit=100)
    pairs = [(0, 1), (1, 2), (2, 0), (0, 0)]
    p, q = target.table.double().log_softmax(-1), draft.table.double().log_softmax(-1)
    assert figures["tokens"] == 4
    assert figures["target_loss"] == pytest.approx(
        -sum(p[a, b].item() for a, b in pairs) / 4, rel=1e-6
    )
    assert figures["draft_loss"] == pytest.approx(
        -sum(q[a, b].item() for a, b in pairs) / 4, rel=1e-6
    )
    kl = sum((p[a].exp() * (p[a] - q[a])).sum().item() for a, _ in pairs) / 4
    assert figures["kl"] == pytest.approx(kl, rel=1e-5)
    # Only after token 1 do the likeliest tokens differ.
    assert figures["greedy_agreement"] == 0.75


def test_distillation_loss_by_hand(script):
    target = Table(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    draft = Table(torch.tensor([[0.5, 0.0], [0.0, 0.0]]))
    batch = torch.tensor([[0, 1, 1]])
    p, q = (table.double() / 2 for table in (target.table, draft.table))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    kl = sum((p[a].exp() * (p[a] - q[a])).sum().item() for a in (0, 1)) / 2
    text = -sum(draft.table.double().log_softmax(-1)[a, 1].item() for a in (0, 1)) / 2
    loss = script.distillation_loss(target, temperature=2.0, text_weight=0.25)(draft, batch)
    assert loss.item() == pytest.approx(0.75 * 4 * kl + 0.25 * text, rel=1e-5)
    loss.backward()
    assert target.table.grad is None


def test_windows_cover_the_stream_once(script):
    stream = torch.arange(100)
    rows = torch.cat(list(script.windows(stream, length=8, batch_size=5, limit=1000)))
    assert rows[:, 1:].flatten().tolist() == list(range(1, 97))
    few = torch.cat(list(script.windows(stream, length=8, batch_size=5, limit=24)))
    assert few[:, 0].tolist() == [0, 40, 88]


@pytest.mark.parametrize("form", ["arguments", "inline", "file"])
def test_configuration_forms(script, tmp_path, form):
    values = {
        "model_type": "gpt_neox",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "hidden_act": "relu",
        "tie_word_embeddings": True,
    }
    text = "gpt_neox:hidden_size=48,num_attention_heads=4,hidden_act=relu,tie_word_embeddings=true"
    if form == "inline":
        text = json.dumps(values)
    if form == "file":
        text = str(tmp_path / "config.json")
        Path(text).write_text(json.dumps(values))
    config = script.read_config(text, vocab_size=77)
    assert (config.model_type, config.hidden_size, config.hidden_act) == ("gpt_neox", 48, "relu")
    assert (config.tie_word_embeddings, config.vocab_size) == (True, 77)


def test_bad_input_is_refused_in_one_line(script, corpus, tmp_path, capsys):
    with pytest.raises(ValueError, match="model_type"):
        script.read_config('{"hidden_size": 8}')
    with pytest.raises(ValueError, match="name=value"):
        script.read_config("llama:hidden_size")
    with pytest.raises(ValueError, match=r"hidden_size=48.*divisible"):
        script.read_config("gpt_neox:hidden_size=48,num_attention_heads=7")
    for options in (
        ["--out", "x"],
        ["--out", "x", "--text", "/no/such/file"],
        ["--out", "x", "--evaluate"],
    ):
        with pytest.raises(SystemExit) as stopped:
            script.parse_arguments(options)
        assert stopped.value.code == 2
    short = tmp_path / "short.txt"
    short.write_text("one\n<|endoftext|>\ntwo\n")
    out = str(tmp_path / "out")
    status = script.main(
        [
            "--text",
            str(short),
            "--out",
            out,
            "--target",
            TINY,
            "--draft",
            TINY,
            "--vocab-size",
            "300",
        ]
    )
    assert status == 2
    assert "--length 512" in capsys.readouterr().err.splitlines()[-1]
