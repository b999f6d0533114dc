"""The bundled pair and prompts, and the comparison: above all, that it finds text which differs."""

from __future__ import annotations

import json
import re
import socket

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from treespec import demo


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
def prompt(pair) -> torch.Tensor:
    return pair[2]("Question: Ann has three apples and", return_tensors="pt")["input_ids"]


def test_pair_loads_offline_in_evaluation_mode(monkeypatch):
    def refuse(*_):
        raise AssertionError("load_demo_pair opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    target, draft, tokenizer = demo.load_demo_pair(dtype="bfloat16")
    for model in (target, draft):
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = "naïve “quotes”,\n\ttabs and 数字 🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_model_card_states_the_parameters(pair):
    card = (demo.DATA / "demo" / "MODEL_CARD.md").read_text(encoding="utf-8")
    stated = re.search(r"^\| parameters \| ([\d,]+) \| ([\d,]+) \|$", card, re.M)
    assert [int(figure.replace(",", "")) for figure in stated.groups()] == [
        m.num_parameters() for m in pair[:2]
    ]


@pytest.mark.parametrize("dtype", ["float8", torch.int64, None])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16; got"):
        demo.load_demo_pair(dtype=dtype)


@pytest.mark.parametrize("name, count", [("dev", 60), ("fallback", 10), ("wikitext2_800chars", 10)])
def test_prompts(name, count):
    prompts = demo.load_prompts(name)
    assert len({prompt["id"] for prompt in prompts}) == count
    assert all(prompt["prompt"].strip() and prompt["category"] for prompt in prompts)


def test_unknown_prompts_are_refused():
    with pytest.raises(
        ValueError, match="name must be one of dev, fallback, wikitext2_800chars; got 'nope'"
    ):
        demo.load_prompts("nope")


def test_spread_prompts_goes_round_the_categories():
    prompts = [
        {"id": f"{c}{i}", "category": c}
        for c, n in (("a", 3), ("b", 1), ("c", 2))
        for i in range(n)
    ]
    order = [prompt["id"] for prompt in demo.spread_prompts(prompts, 10)]
    assert order == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert len({prompt["category"] for prompt in demo.spread_prompts(demo.load_prompts(), 8)}) == 8


def continuation(name: str, log: list, change=None, ours: bool = True) -> demo.Method:
    """A method that appends 5, 6, 7 in two rounds, after a change to them."""

    def run(input_ids):
        log.append(name)
        new = torch.tensor([[5, 6, 7]])
        return torch.cat([input_ids, change(new) if change else new], dim=1), 2

    return demo.Method(name, run, ours)


def test_compare_finds_differing_text(pair):
    target = pair[0]
    prompts = [torch.tensor([[1, 2, 3]]), torch.tensor([[4, 8]]), torch.tensor([[9, 9]])]
    log: list[str] = []
    seen = []

    def second_prompt_only(new):
        # The first of its calls is the warm-up.
        return torch.tensor([[5, 9, 7]]) if log.count("wrong") == 3 else new

    methods = [
        continuation("plain", log, ours=False),
        continuation("right", log),
        continuation("wrong", log, second_prompt_only),
        continuation("short", log, lambda new: new[:, :2]),
    ]
    plain, right, wrong, short = demo.compare(target, methods, prompts, on_step=seen.append)
    assert plain.identical and right.identical and not wrong.identical and not short.identical
    assert (right.differing, wrong.differing, short.differing) == (0, 1, 3)
    with torch.no_grad():
        logits = target(torch.tensor([[4, 8, 5]])).logits[0, -1]
    assert wrong.largest_gap == pytest.approx((logits[6] - logits[9]).abs().item(), rel=1e-5)
    assert short.largest_gap == float("inf")
    assert (plain.prompts, plain.new_tokens, plain.rounds) == (3, 9, 6)
    assert (short.new_tokens, short.tokens_per_round) == (6, 1.0)
    assert plain.ratio == 1.0
    names = ["plain", "right", "wrong", "short"]
    # The warm-up comes first, then every prompt begins with another method.
    assert log == names + names + names[1:] + names[:1] + names[2:] + names[:2]
    assert seen == log
    json.dumps([row.as_dict() for row in (plain, right, wrong, short)])


def test_compare_leaves_warm_ups_out_of_the_figures(pair):
    log: list[str] = []
    (result,) = demo.compare(
        pair[0], [continuation("plain", log)], [torch.tensor([[1, 2]])], warmups=3
    )
    assert len(log) == 4
    assert (result.prompts, result.new_tokens) == (1, 3)


@pytest.mark.parametrize(
    "methods, prompts", [([], [torch.tensor([[1]])]), ([demo.Method("plain", None)], [])]
)
def test_compare_needs_methods_and_prompts(pair, methods, prompts):
    with pytest.raises(ValueError, match="must not be empty"):
        demo.compare(pair[0], methods, prompts)


def test_rounds_of_transformers_methods_are_counted(pair, prompt):
    target, draft, _ = pair
    plain = demo.transformers_method("plain", target, 12)
    ids, rounds = plain.run(prompt)
    assert rounds == ids.shape[1] - prompt.shape[1] == 12
    assisted = demo.transformers_method("assisted", target, 12, assistant_model=draft)
    assisted_ids, rounds = assisted.run(prompt)
    assert torch.equal(ids, assisted_ids)
    assert 1 < rounds < 12
    assert not target._forward_pre_hooks


def test_demo_methods_write_the_targets_own_text(pair, prompt):
    target, draft, tokenizer = pair
    config = target.config.to_dict()
    methods = demo.demo_methods(target, draft, tokenizer, 24)
    results = demo.compare(target, methods, [prompt], warmups=0)
    assert [result.method for result in results if not result.identical] == []
    assert len({result.method for result in results}) == len(results)
    assert sum(result.ours for result in results) >= 5
    for result in results:
        assert result.new_tokens == 24
        # our rounds count the prefill, and auto may write a text of this length plainly
        assert 24 / 25 <= result.tokens_per_round <= 24
    assert max(result.tokens_per_round for result in results if result.ours) > 1.5
    assert target.config.to_dict() == config


def test_first_difference_gap_by_hand():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=11,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    plain, other = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([3, 1, 4, 7, 5])
    with torch.no_grad():
        logits = model(plain[None]).logits[0, 2]
    expected = (logits[1] - logits[7]).abs().item()
    assert demo.first_difference_gap(model, plain, other) == pytest.approx(expected, rel=1e-4)
