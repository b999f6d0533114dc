"""`generate` as in transformers: stopping, processors, streaming, outputs, options; and what a call
leaves behind.
"""

from __future__ import annotations

import copy
import json
import threading
import time

import pytest
import torch
from lossless_checks import SHAPES, first_difference, prompt_batch, speculator
from tiny_models import prompts, ragged, tiny_pair
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    SynthIDTextWatermarkingConfig,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkingConfig,
)

from treespec import BestFirstTree, TreeSpeculator

SHAPE = BestFirstTree(max_nodes=24, depth=5, width=4)
GREEDY = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": 0}


@pytest.fixture
def spec() -> TreeSpeculator:
    target, draft = tiny_pair("llama")
    return TreeSpeculator(target, [draft, "ngram"], tree=SHAPE)


@pytest.fixture
def own_spec() -> TreeSpeculator:
    """A speculator on models that a test may change."""
    target, draft = (copy.deepcopy(model) for model in tiny_pair("llama"))
    return TreeSpeculator(target, [draft, "ngram"], tree=SHAPE)


def assert_same(spec: TreeSpeculator, ids, mask=None, **options) -> torch.Tensor:
    """Both generate the same text; returns it."""
    options = {**GREEDY, **options}
    expected = spec.target.generate(ids, attention_mask=mask, **options)
    found = spec.generate(ids, mask, **options)
    assert found.dtype == expected.dtype
    assert first_difference(found, expected) is None
    return found


def texts_until(found: torch.Tensor, width: int, eos: list[int]) -> list[list[int]]:
    """New tokens of every row, up to and with the first that ends it."""
    rows = [row[width:].tolist() for row in found]
    return [
        row[: next((k + 1 for k, token in enumerate(row) if token in eos), len(row))]
        for row in rows
    ]


# --- stopping ------------------------------------------------------------------------------------


def test_end_of_text_wherever_it_falls_in_an_accepted_path(spec, monkeypatch):
    ids, _ = prompt_batch(1)
    text = assert_same(spec, ids)[0, ids.shape[1] :].tolist()
    places = [k for k, token in enumerate(text) if token not in text[:k]]
    rounds = []
    monkeypatch.setattr(spec._policy, "observe", rounds.append)
    inside = 0
    for place in places[:14]:
        found = assert_same(spec, ids, eos_token_id=text[place])
        assert found.shape[1] == ids.shape[1] + place + 1
        assert spec.stats.new_tokens == place + 1
        tree, path = rounds[-1].tree, rounds[-1].paths[0]
        drafted = (tree.parents[0] == path[-1]) & (tree.tokens[0] == text[place])
        inside += bool(drafted.any())
    assert inside >= 3, "the tree held the end of the text, and could have gone on"


def test_several_ends_of_text(spec):
    ids, _ = prompt_batch(1)
    text = assert_same(spec, ids)[0, ids.shape[1] :].tolist()
    found = assert_same(spec, ids, eos_token_id=[text[30], text[17], 0])
    assert found.shape[1] <= ids.shape[1] + 18


@pytest.mark.parametrize("shape", ["chain", "best_first", "auto"])
def test_rows_that_finish_at_different_times(shape):
    spec = speculator("llama", shape, "merged")
    ids, mask = prompt_batch(4)
    eos = list(range(1, 7))
    found = assert_same(spec, ids, mask, eos_token_id=eos, max_new_tokens=80)
    lengths = [len(text) for text in texts_until(found, ids.shape[1], eos)]
    assert len(set(lengths)) >= 3
    assert [row.new_tokens for row in spec.stats.per_row] == lengths


def test_all_rows_finish_in_the_same_round(spec):
    ids = prompts(1, 9).repeat(3, 1)
    assert_same(spec, ids, eos_token_id=assert_same(spec, ids)[0, 30].item())


class SumOfTokens(StoppingCriteria):
    """Ends a row when its tokens add up to a multiple of 11; notes what it was asked."""

    def __init__(self, plain_bool: bool = False) -> None:
        self.seen: list[list[int]] = []
        self.plain_bool = plain_bool

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids[0].tolist())
        done = (input_ids.sum(1) % 11 == 0) & (input_ids.shape[1] > 33)
        return bool(done.all()) if self.plain_bool else done


@pytest.mark.parametrize("plain_bool", [False, True])
def test_custom_stopping_criteria_are_asked_as_in_plain_decoding(spec, plain_bool):
    ids, _ = prompt_batch(1)
    theirs, ours = SumOfTokens(plain_bool), SumOfTokens(plain_bool)
    expected = spec.target.generate(ids, stopping_criteria=[theirs], **GREEDY)
    found = spec.generate(ids, stopping_criteria=[ours], **GREEDY)
    assert expected.shape[1] < ids.shape[1] + 60
    assert first_difference(found, expected) is None
    assert ours.seen == theirs.seen


def test_custom_stopping_criteria_end_rows_of_a_batch(spec):
    ids, mask = prompt_batch(4)
    # with an end of text transformers pads the rows that are done; it never comes here
    found = assert_same(
        spec, ids, mask, stopping_criteria=[SumOfTokens()], eos_token_id=0, bad_words_ids=[[0]]
    )
    assert len({int((row[ids.shape[1] :] != 0).sum()) for row in found}) >= 3


def test_stop_strings(demo_pair):
    target, draft, tokenizer = demo_pair
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    spec = TreeSpeculator(target, draft, tree=SHAPE, tokenizer=tokenizer)
    options = {"do_sample": False, "max_new_tokens": 60}
    text = tokenizer.decode(spec.generate(ids, **options)[0, ids.shape[1] :])
    words = text.split()
    for stop in ([words[12][:3]], [words[20], words[9] + " " + words[10]]):
        expected = target.generate(ids, stop_strings=stop, tokenizer=tokenizer, **options)
        assert ids.shape[1] < expected.shape[1] < ids.shape[1] + 60
        assert first_difference(spec.generate(ids, stop_strings=stop, **options), expected) is None
        config = GenerationConfig(stop_strings=stop, **options)
        assert first_difference(spec.generate(ids, generation_config=config), expected) is None
        assert config.stop_strings == stop
    only = TreeSpeculator(target, draft, tree=SHAPE)
    found = only.generate(ids, stop_strings=stop[0], tokenizer=tokenizer, **options)
    assert tokenizer.decode(found[0]).find(stop[0]) > 0


def test_max_time_ends_a_call(spec):
    ids, _ = prompt_batch(1)
    found = spec.generate(ids, max_new_tokens=900, do_sample=False, max_time=0.05)
    assert ids.shape[1] < found.shape[1] < 920


# --- processors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 40, "eos_token_id": list(range(1, 30))},
        {"min_length": 50, "eos_token_id": list(range(1, 30))},
        {"bad_words_ids": [[5], [9, 10], [70]], "repetition_penalty": 1.1},
        {"suppress_tokens": list(range(20, 60)), "begin_suppress_tokens": [3, 60]},
        {"sequence_bias": [[[7], 2.0], [[8, 9], -3.0]]},
        {"forced_eos_token_id": 4},
        {"exponential_decay_length_penalty": (20, 1.2), "eos_token_id": 4},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"encoder_repetition_penalty": 1.5},
        {"encoder_no_repeat_ngram_size": 1},
        {"watermarking_config": WatermarkingConfig(greenlist_ratio=0.5, bias=2.0)},
        {"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[5, 9, 31])},
    ],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("batch", [1, 4])
def test_processors_of_generation_options(spec, options, batch):
    assert_same(spec, *prompt_batch(batch), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"min_p": 0.1},
        {"typical_p": 0.7},
        {"epsilon_cutoff": 0.02},
        {"eta_cutoff": 0.02},
        {"repetition_penalty": 1.3, "top_k": 10},
        {"no_repeat_ngram_size": 2},
        {"top_h": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_warpers_of_sampling(spec, options):
    ids, mask = prompt_batch(4)
    options = {"do_sample": True, "seed": 3, "max_new_tokens": 40, "top_k": 0, **options}
    plain = TreeSpeculator(spec.target, None)
    assert (
        first_difference(spec.generate(ids, mask, **options), plain.generate(ids, mask, **options))
        is None
    )


class EveryFifthCall(LogitsProcessor):
    """Bans the likeliest token at every fifth call; one call too many and the text is another."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        if len(self.seen) % 5 == 0:
            # in place, as a careless processor does
            scores[:, scores.argmax(-1)] = -float("inf")
        return scores


@pytest.mark.parametrize("source", ["draft", "ngram", "merged", "none"])
def test_a_stateful_processor_sees_the_calls_of_plain_decoding(source):
    spec = speculator("llama", "best_first", source)
    ids, _ = prompt_batch(1)
    for options in (
        {},
        {"eos_token_id": list(range(1, 5))},
        {"max_new_tokens": 33},
        {"stopping_criteria": [SumOfTokens()]},
    ):
        theirs, ours = EveryFifthCall(), EveryFifthCall()
        expected = spec.target.generate(ids, logits_processor=[theirs], **{**GREEDY, **options})
        found = spec.generate(ids, logits_processor=[ours], **{**GREEDY, **options})
        assert first_difference(found, expected) is None
        assert ours.seen == theirs.seen


# --- streaming -----------------------------------------------------------------------------------


def test_stream_yields_the_new_tokens(spec):
    ids, _ = prompt_batch(1)
    expected = assert_same(spec, ids)[0, ids.shape[1] :]
    parts = list(spec.stream(ids, **GREEDY))
    assert all(part.dim() == 1 and part.dtype == torch.long and len(part) >= 1 for part in parts)
    assert len(parts) == spec.stats.rounds < 60
    assert torch.equal(torch.cat(parts), expected)
    sampled = {**GREEDY, "do_sample": True, "seed": 3, "eos_token_id": [5, 6, 7]}
    parts = list(spec.stream(ids, **sampled))
    assert torch.equal(torch.cat(parts), spec.generate(ids, **sampled)[0, ids.shape[1] :])


def test_what_is_done_between_the_rounds_of_a_stream_is_no_time_of_the_call(spec):
    ids, _ = prompt_batch(1)
    started, paused = time.perf_counter(), 0.0
    for _ in spec.stream(ids, **GREEDY):
        before = time.perf_counter()
        time.sleep(0.02)
        paused += time.perf_counter() - before
    assert spec.stats.rounds > 3
    assert 0 < spec.stats.total_ms <= 1e3 * (time.perf_counter() - started - paused)


def test_a_stream_closed_early_is_a_valid_beginning(spec):
    ids, _ = prompt_batch(1)
    expected = assert_same(spec, ids)[0, ids.shape[1] :]
    stream = spec.stream(ids, **GREEDY)
    parts = [next(stream) for _ in range(3)]
    stream.close()
    text = torch.cat(parts)
    assert torch.equal(text, expected[: len(text)]) and spec.stats.rounds == 3
    assert_same(spec, ids)


def test_a_stream_notices_that_another_call_took_over(spec):
    """One speculator holds one call at a time; the older one must not go on with the younger one's
    state.
    """
    ids, _ = prompt_batch(1)
    stream = spec.stream(ids, **GREEDY)
    next(stream)
    other = assert_same(spec, prompts(1, 7, seed=9))
    assert other.shape[1] == 67
    stats = spec.stats.as_dict()
    with pytest.raises(RuntimeError, match="another call"):
        next(stream)
    assert spec.stats.as_dict() == stats


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value):
        self.puts.append(value)

    def end(self):
        self.ended += 1


def test_a_streamer_gets_the_prompt_then_the_tokens_then_the_end(spec):
    ids, _ = prompt_batch(1)
    listener = Listener()
    found = spec.generate(ids, streamer=listener, **GREEDY)
    assert torch.equal(listener.puts[0], ids)
    assert (
        torch.equal(torch.cat(listener.puts[1:]), found[0, ids.shape[1] :]) and listener.ended == 1
    )


def test_text_streamers(demo_pair, capsys):
    target, draft, tokenizer = demo_pair
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    options = {"do_sample": False, "max_new_tokens": 40}
    spec = TreeSpeculator(target, [draft, "ngram"], tree=SHAPE)
    text = tokenizer.decode(spec.generate(ids, **options)[0])
    capsys.readouterr()
    spec.generate(ids, streamer=TextStreamer(tokenizer), **options)
    assert capsys.readouterr().out == text + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=spec.generate, args=(ids,), kwargs={"streamer": streamer, **options}
    )
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 3 and tokenizer.decode(ids[0]) + "".join(pieces) == text


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_scores_and_logits_are_those_of_plain_decoding(spec, batch):
    ids, mask = prompt_batch(batch)
    options = {
        **GREEDY,
        "max_new_tokens": 30,
        "repetition_penalty": 1.3,
        "return_dict_in_generate": True,
    }
    options |= {"output_scores": True, "output_logits": True}
    expected = spec.target.generate(ids, attention_mask=mask, **options)
    found = spec.generate(ids, mask, **options)
    assert type(found) is type(expected)
    assert first_difference(found.sequences, expected.sequences) is None
    for name in ("scores", "logits"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert len(ours) == len(theirs) == 30
        for one, other in zip(ours, theirs):
            assert one.shape == other.shape and one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert found.past_key_values is None and not torch.equal(found.scores[9], found.logits[9])


def test_a_dict_holds_what_was_asked_for(spec):
    ids, _ = prompt_batch(1)
    found = spec.generate(ids, return_dict_in_generate=True, **GREEDY)
    assert found.scores is None and found.logits is None
    found = spec.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
    assert found.scores is None and len(found.logits) == 60
    plain = spec.generate(ids, output_scores=True, **GREEDY)
    assert torch.equal(plain, found.sequences)


def test_several_sequences_of_each_prompt(spec):
    ids, mask = ragged(2, 12)
    options = {
        "do_sample": True,
        "max_new_tokens": 30,
        "seed": 4,
        "top_k": 0,
        "num_return_sequences": 3,
    }
    found = spec.generate(ids, mask, **options)
    assert found.shape == (6, 42)
    assert torch.equal(found[:, :12], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in found}) == 6
    plain = TreeSpeculator(spec.target, None).generate(ids, mask, **options)
    assert first_difference(found, plain) is None


# --- options -------------------------------------------------------------------------------------


def test_a_generation_config_is_honoured(own_spec):
    ids, _ = prompt_batch(1)
    config = GenerationConfig(
        max_new_tokens=25,
        do_sample=False,
        repetition_penalty=1.4,
        eos_token_id=[3, 4],
        pad_token_id=0,
    )
    before = config.to_dict()
    expected = own_spec.target.generate(ids, generation_config=config)
    assert first_difference(own_spec.generate(ids, generation_config=config), expected) is None
    # what the call says comes before what the config says
    expected = own_spec.target.generate(
        ids, generation_config=config, max_new_tokens=31, repetition_penalty=1.0
    )
    found = own_spec.generate(
        ids, generation_config=config, max_new_tokens=31, repetition_penalty=1.0
    )
    assert first_difference(found, expected) is None
    assert config.to_dict() == before
    # and the model's own comes last
    own_spec.target.generation_config.update(
        max_new_tokens=18, repetition_penalty=1.2, eos_token_id=9
    )
    expected = own_spec.target.generate(ids)
    assert (
        first_difference(own_spec.generate(ids), expected) is None
        and expected.shape[1] <= ids.shape[1] + 18
    )


def test_custom_generate(spec):
    ids, mask = prompt_batch(4)
    found = spec.target.generate(ids, attention_mask=mask, custom_generate=spec, **GREEDY)
    assert first_difference(found, spec.target.generate(ids, attention_mask=mask, **GREEDY)) is None
    assert spec.stats.tokens_per_round > 1.5
    options = {"do_sample": True, "max_new_tokens": 30, "temperature": 0.9, "top_k": 20, "seed": 8}
    found = spec.target.generate(ids, attention_mask=mask, custom_generate=spec, **options)
    assert first_difference(found, spec.generate(ids, mask, **options)) is None
    options = {
        **GREEDY,
        "return_dict_in_generate": True,
        "output_logits": True,
        "repetition_penalty": 1.2,
    }
    found = spec.target.generate(ids[:1], custom_generate=spec, eos_token_id=5, **options)
    expected = spec.target.generate(ids[:1], eos_token_id=5, **options)
    assert first_difference(found.sequences, expected.sequences) is None and len(
        found.logits
    ) == len(expected.logits)


def test_other_integers_are_taken_as_ids(spec):
    ids, mask = prompt_batch(4)
    expected = assert_same(spec, ids, mask, max_new_tokens=20)
    for dtype, other in (
        (torch.int32, mask),
        (torch.int16, mask.bool()),
        (torch.uint8, mask.float()),
    ):
        found = spec.generate(ids.to(dtype), other, **{**GREEDY, "max_new_tokens": 20})
        assert found.dtype == torch.long and first_difference(found, expected) is None


def test_the_smallest_calls(spec):
    assert_same(spec, prompts(1, 1, seed=5))
    for new_tokens in (1, 2, 3):
        assert_same(spec, prompts(1, 6, seed=6), max_new_tokens=new_tokens)
        assert_same(spec, *prompt_batch(4), max_new_tokens=new_tokens)
    assert_same(spec, prompts(1, 1, seed=5), max_new_tokens=1)


def test_max_length_counts_the_prompt(spec):
    ids, mask = prompt_batch(4)
    options = {"do_sample": False, "pad_token_id": 0, "max_length": 50}
    expected = spec.target.generate(ids, attention_mask=mask, **options)
    assert expected.shape[1] == 50
    assert first_difference(spec.generate(ids, mask, **options), expected) is None


def test_more_padding_than_text(spec):
    ids, mask = ragged(3, 40)
    mask[1:, :-2] = 0
    assert_same(spec, ids * mask, mask)


def test_a_mask_of_ones_is_no_mask(spec):
    ids, _ = prompt_batch(1)
    assert (
        first_difference(assert_same(spec, ids, torch.ones_like(ids)), assert_same(spec, ids))
        is None
    )


@pytest.mark.parametrize("length", [255, 256, 257, 258, 600])
def test_prompts_of_several_prefill_chunks(spec, length):
    assert_same(spec, prompts(1, length, seed=length), max_new_tokens=20)


def test_a_ragged_batch_of_long_and_short_prompts(spec):
    ids, mask = ragged(3, 530)
    mask[2, :-3] = 0
    assert_same(spec, ids * mask, mask, max_new_tokens=20)


def test_up_to_the_last_position(kind):
    """Trees at the end of a model's positions are cut to what still fits."""
    spec = speculator(kind, "best_first", "merged")
    limit = spec._target.position_limit
    assert limit == 1024
    ids = prompts(1, limit - 12, seed=3)
    assert_same(spec, ids, max_new_tokens=12)


# --- insight -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["draft", "ngram", "merged", "none"])
@pytest.mark.parametrize("batch", [1, 4])
def test_stats_add_up(source, batch):
    spec = speculator("llama", "best_first", source)
    ids, mask = prompt_batch(batch)
    found = spec.generate(ids, mask, eos_token_id=[3, 4, 5], **GREEDY)
    stats = spec.stats
    written = [len(text) for text in texts_until(found, ids.shape[1], [3, 4, 5])]
    assert [row.new_tokens for row in stats.per_row] == written and stats.new_tokens == sum(written)
    rounds = [row.rounds for row in stats.per_row]
    assert stats.rounds == max(rounds) and sum(stats.accept_lengths.values()) == sum(rounds)
    assert stats.tokens_per_round == pytest.approx(sum(written) / sum(rounds))
    for row in stats.per_row:
        # every round adds its bonus token, unless it was cut short
        assert row.accepted <= row.new_tokens <= row.accepted + row.rounds
    kept = sum(length * times for length, times in stats.accept_lengths.items())
    assert sum(row.accepted for row in stats.per_row) <= kept <= stats.drafted_nodes
    assert 0 <= stats.acceptance_rate <= 1
    assert min(stats.prefill_ms, stats.verify_ms, stats.commit_ms, stats.draft_ms) >= 0
    parts = stats.prefill_ms + stats.draft_ms + stats.verify_ms + stats.commit_ms
    assert 0 < parts <= stats.total_ms * 1.001
    assert (stats.draft_forwards > 0) == (source in ("draft", "merged"))
    assert (stats.drafted_nodes == 0) == (source == "none")
    data = json.loads(json.dumps(stats.as_dict()))
    assert data["new_tokens"] == stats.new_tokens and len(data["per_row"]) == batch
    assert data["tokens_per_round"] == stats.tokens_per_round


def test_stats_belong_to_the_last_call(spec):
    ids, _ = prompt_batch(1)
    spec.generate(ids, **GREEDY)
    first = spec.stats
    spec.generate(ids, **{**GREEDY, "max_new_tokens": 7})
    assert first.new_tokens == 60 and spec.stats.new_tokens == 7


def test_explain_says_what_runs_and_why():
    target, draft = tiny_pair("llama")
    ids, _ = prompt_batch(1)
    auto = TreeSpeculator(target, draft)
    auto.generate(ids, **GREEDY)
    text = auto.explain()
    for part in (
        "llama",
        "float32",
        "attention",
        "recorded forwards: on",
        "model",
        "ngram",
        "lookup was added",
        "tokens/ms",
    ):
        assert part in text, part
    explicit = TreeSpeculator(target, draft, tree=SHAPE, capture=False).explain()
    assert str(SHAPE) in explicit and "as asked for" in explicit and "capture=False" in explicit
    assert "lookup was added" not in explicit and "ngram" not in explicit
    assert "plain decoding" in TreeSpeculator(target, None).explain()


@pytest.mark.parametrize("shape", SHAPES)
def test_reset_forgets_and_goes_on(shape):
    spec = speculator("llama", shape, "merged")
    ids, mask = prompt_batch(4)
    before = spec.generate(ids, mask, **GREEDY)
    policy = spec._policy
    spec.reset()
    assert spec._target.cache is None and spec._model.cache is None
    assert spec._policy is not policy and spec.stats.rounds == 0
    assert first_difference(spec.generate(ids, mask, **GREEDY), before) is None


# --- what a call leaves behind -------------------------------------------------------------------


def snapshot(model) -> dict:
    """Everything of a model that a call could have changed."""
    modules = dict(model.named_modules())
    return {
        "attention": [
            getattr(m.config, "_attn_implementation", None)
            for m in modules.values()
            if hasattr(m, "config")
        ],
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict(),
        "training": {name: module.training for name, module in modules.items()},
        "hooks": {
            name: [len(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
            for name, module in modules.items()
        },
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "parameters": {
            name: (id(p), p.requires_grad, p._version, p.grad)
            for name, p in model.named_parameters()
        },
        "buffers": {name: (id(b), b._version) for name, b in model.named_buffers()},
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
    }


@pytest.fixture
def odd_spec(own_spec) -> TreeSpeculator:
    """Models in a state that is nobody's default: partly in training, partly frozen, with settings
    of their own.
    """
    for model in (own_spec.target, own_spec._model.model):
        model.model.layers[0].train()
        model.lm_head.weight.requires_grad_(False)
        model.generation_config.update(repetition_penalty=1.1, stop_strings=None)
    own_spec.target.set_attn_implementation("eager")
    return own_spec


def states(spec) -> list[dict]:
    return [snapshot(model) for model in (spec.target, spec._model.model)]


def test_construction_leaves_the_models_as_they_were():
    target, draft = (copy.deepcopy(model).train() for model in tiny_pair("gemma2"))
    before = [snapshot(model) for model in (target, draft)]
    spec = TreeSpeculator(target, draft, tree=SHAPE)
    assert states(spec) == before and target.training


@pytest.mark.parametrize("capture", ["auto", False])
def test_models_in_training_mode_are_asked_without_dropout(capture):
    target, draft = (copy.deepcopy(model).train() for model in tiny_pair("gpt2"))
    assert target.config.resid_pdrop > 0 and target.transformer.h[0].mlp.dropout.training
    spec = TreeSpeculator(target, draft, tree=SHAPE, capture=capture)
    ids, _ = prompt_batch(1)
    found = spec.generate(ids, **GREEDY)
    assert target.training and draft.transformer.h[0].mlp.dropout.training
    assert first_difference(found, tiny_pair("gpt2")[0].generate(ids, **GREEDY)) is None


def test_success_leaves_the_models_as_they_were(odd_spec):
    before = states(odd_spec)
    ids, mask = prompt_batch(4)
    for options in (
        {},
        {"do_sample": True, "seed": 1},
        {"return_dict_in_generate": True, "output_scores": True},
    ):
        odd_spec.generate(ids, mask, **{**GREEDY, **options})
        assert states(odd_spec) == before
    odd_spec.target.generate(ids, attention_mask=mask, custom_generate=odd_spec, **GREEDY)
    assert states(odd_spec) == before
    list(odd_spec.stream(ids[:1], **GREEDY))
    assert states(odd_spec) == before


class Breaks:
    """Fails at the fourth use."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.uses = error, 0

    def use(self):
        self.uses += 1
        if self.uses == 4:
            raise self.error("broken on purpose")


class BreaksStreaming(Breaks, Listener):
    def __init__(self, error):
        Listener.__init__(self)
        super().__init__(error)

    def put(self, value):
        super().put(value)
        self.use()


class BreaksProcessing(Breaks, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.use()
        return scores


class BreaksStopping(Breaks, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.use()
        return torch.zeros(len(input_ids), dtype=torch.bool)


BREAKING = {
    "streamer": BreaksStreaming,
    "logits_processor": lambda error: [BreaksProcessing(error)],
    "stopping_criteria": lambda error: [BreaksStopping(error)],
}


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", BREAKING)
def test_errors_mid_way_leave_the_models_as_they_were(odd_spec, place, error):
    ids, _ = prompt_batch(1)
    expected = odd_spec.generate(ids, **GREEDY)
    before = states(odd_spec)
    broken = BREAKING[place](error)
    with pytest.raises(error, match="broken on purpose"):
        odd_spec.generate(ids, **GREEDY, **{place: broken})
    assert states(odd_spec) == before
    if place == "streamer":
        text = torch.cat(broken.puts[1:])
        assert torch.equal(text, expected[0, ids.shape[1] : ids.shape[1] + len(text)])
    # the speculator goes on as if nothing had happened, alone and in a batch
    assert first_difference(odd_spec.generate(ids, **GREEDY), expected) is None
    several, mask = prompt_batch(4)
    assert_same(odd_spec, several, mask)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("use", [1, 2, 3])
def test_errors_inside_a_forward_leave_the_models_as_they_were(odd_spec, role, error, use):
    """Ctrl-C usually arrives within a model call, also while a forward is being recorded."""
    ids, _ = prompt_batch(1)
    model = odd_spec.target if role == "target" else odd_spec._model.model
    norm, forward, calls = model.model.norm, type(model.model.norm).forward, []

    def interrupted(x):
        calls.append(1)
        if len(calls) == use:
            raise error("broken on purpose")
        return forward(norm, x)

    norm.forward = interrupted
    before = states(odd_spec)
    with pytest.raises(error, match="broken on purpose"):
        odd_spec.generate(ids, **GREEDY)
    assert states(odd_spec) == before
    assert_same(odd_spec, ids)
    del norm.forward


def test_a_dropped_stream_leaves_the_models_as_they_were(odd_spec):
    before = states(odd_spec)
    ids, _ = prompt_batch(1)
    stream = odd_spec.stream(ids, **GREEDY)
    next(stream)
    assert states(odd_spec) == before, "between two parts of a stream the models are the caller's"
    del stream
    assert states(odd_spec) == before
    assert_same(odd_spec, ids)


def test_trees_of_an_uncommon_width_fit_their_buffers():
    """65 nodes are verified as 96; the rows for all of these are there from the start."""
    target, draft = tiny_pair("llama")
    ids = torch.arange(6)[None]
    spec = TreeSpeculator(target, draft, BestFirstTree(65, 4, 16))
    expected = target.generate(ids, max_new_tokens=182, do_sample=False, eos_token_id=None)
    found = spec.generate(ids, max_new_tokens=182, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected)
