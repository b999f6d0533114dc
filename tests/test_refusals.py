"""What cannot be done is refused by name before any work, and the speculator works afterwards."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lossless_checks import GarbageSource, first_difference
from tiny_models import POSITIONS, VOCAB, prompts, ragged, tiny_config, tiny_pair
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    MambaConfig,
    MptConfig,
    RwkvConfig,
    T5Config,
)

from treespec import AdaptiveTree, BestFirstTree, Chain, FixedTree, TreeSpeculator
from treespec.sources import DraftSource, OneShotSource, Proposal

SHAPE = BestFirstTree(max_nodes=16, depth=4, width=4)
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def spec() -> TreeSpeculator:
    """On models of its own, whose forwards are counted; `calls` must not grow in a refused call."""
    target, draft = (copy.deepcopy(model) for model in tiny_pair("llama"))
    made = TreeSpeculator(target, draft, tree=SHAPE)
    made.calls = []
    for model in (target, draft):
        model.register_forward_pre_hook(lambda *_: made.calls.append(1))
    return made


@pytest.fixture(scope="module")
def expected(spec) -> torch.Tensor:
    return spec.target.generate(prompts(1, 9), **GREEDY)


@pytest.fixture
def untouched(spec, expected):
    """Fails if the test made a model work, or left the speculator unable to."""
    spec.calls.clear()
    yield
    assert not spec.calls, "a refused call asked a model"
    assert first_difference(spec.generate(prompts(1, 9), **GREEDY), expected) is None


# --- construction --------------------------------------------------------------------------------


class Stepwise(DraftSource):
    """A source of no kind that can be plugged in."""


def other_vocabulary():
    config = tiny_config("llama", 1)
    config.vocab_size = VOCAB + 8
    return AutoModelForCausalLM.from_config(config)


def on_meta():
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config("llama", 1))


CONSTRUCTION = [
    (
        {"target": "gpt2"},
        TypeError,
        r"^target must be a loaded transformers causal LM; got str 'gpt2'",
    ),
    ({"target": None}, TypeError, r"^target must be .*; got NoneType"),
    ({"target": torch.nn.Linear(2, 2)}, TypeError, r"^target must be .*; got Linear"),
    ({"draft": "gpt2"}, ValueError, r"^draft must be .*; got 'gpt2'"),
    ({"draft": "n-gram"}, ValueError, r"^draft must be .*; got 'n-gram'"),
    ({"draft": 3}, TypeError, r"^draft must be .*; got int"),
    ({"draft": []}, ValueError, r"^draft must name at least one source.*; got an empty list"),
    ({"draft": ["ngram", 3]}, TypeError, r"^draft must be .*; got int"),
    ({"draft": ["ngram", None]}, TypeError, r"^draft must be .*; got NoneType"),
    ({"draft": Stepwise()}, NotImplementedError, r"^draft: Stepwise is not"),
    (
        {"draft": other_vocabulary},
        ValueError,
        rf"^draft must have the target's vocabulary of {VOCAB} tokens; got {VOCAB + 8}",
    ),
    ({"draft": on_meta}, ValueError, r"^draft must be on the target's device cpu; got meta"),
    (
        {"draft": lambda: tiny_pair("llama")[0]},
        ValueError,
        r"^draft must be another model than target",
    ),
    (
        {"draft": lambda: [tiny_pair("llama")[1], tiny_pair("qwen3")[1]]},
        NotImplementedError,
        r"^draft: at most one model",
    ),
    ({"tree": "tree"}, ValueError, r'^tree must be "auto" or a shape .*; got \'tree\''),
    ({"tree": None}, TypeError, r"^tree must be .*; got NoneType"),
    ({"tree": 7}, TypeError, r"^tree must be .*; got int"),
    ({"tree": BestFirstTree}, TypeError, r"^tree must be .*; got type"),
    ({"sampling": "greedy"}, ValueError, r"^sampling must be one of 'coupled'.*; got 'greedy'"),
    ({"sampling": None}, ValueError, r"^sampling must be one of .*; got None"),
    ({"attention": "flash"}, ValueError, r"^attention must be one of .*; got 'flash'"),
    ({"cuda_graphs": "yes"}, ValueError, r"^cuda_graphs must be one of .*; got 'yes'"),
    (
        {"cuda_graphs": True},
        ValueError,
        r"^cuda_graphs=True needs the target on a CUDA device; it is on cpu",
    ),
    ({"cuda_graphs": 1}, ValueError, r"^cuda_graphs must be one of .*; got 1"),
    ({"capture": "no"}, ValueError, r"^capture must be one of .*; got 'no'"),
]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    CONSTRUCTION,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_construction(options, error, message):
    target, draft = tiny_pair("llama")
    options = {
        name: value()
        if callable(value) and not isinstance(value, (type, torch.nn.Module))
        else value
        for name, value in options.items()
    }
    with pytest.raises(error, match=message):
        TreeSpeculator(**{"target": target, "draft": draft, **options})


def small(config_class, **fields):
    return config_class(**{"vocab_size": 50, **fields})


REFUSED_MODELS = {
    "encoder-decoder": (
        lambda: AutoModelForSeq2SeqLM.from_config(
            small(T5Config, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        ),
        "is an encoder-decoder model",
    ),
    "mamba": (
        lambda: AutoModelForCausalLM.from_config(
            small(MambaConfig, hidden_size=16, num_hidden_layers=1, state_size=4)
        ),
        "keeps a recurrent or convolutional state",
    ),
    "rwkv": (
        lambda: AutoModelForCausalLM.from_config(
            small(RwkvConfig, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
        ),
        "keeps a recurrent or convolutional state",
    ),
    "alibi": (
        lambda: AutoModelForCausalLM.from_config(
            small(MptConfig, d_model=16, n_heads=2, n_layers=1)
        ),
        "takes no position_ids",
    ),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_model_types_that_cannot_verify_a_tree(name, role):
    make, message = REFUSED_MODELS[name]
    model = make().eval()
    config = tiny_config("llama", 1)
    config.vocab_size = 50
    other = AutoModelForCausalLM.from_config(config).eval()
    models = (
        {"target": model, "draft": "ngram"}
        if role == "target"
        else {"target": other, "draft": model}
    )
    with pytest.raises(NotImplementedError, match=rf"^{role} \(\w+\) .*{message}"):
        TreeSpeculator(**models)


def test_a_model_without_a_head():
    model = BertModel(
        small(
            BertConfig,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    )
    with pytest.raises((TypeError, NotImplementedError), match=r"^target"):
        TreeSpeculator(model, "ngram")


def test_models_of_different_dtypes_work_together():
    """They need not match: each has a cache of its own."""
    target, draft = tiny_pair("llama")
    made = TreeSpeculator(target, copy.deepcopy(draft).to(torch.bfloat16), tree=SHAPE)
    ids = prompts(1, 9)
    assert first_difference(made.generate(ids, **GREEDY), target.generate(ids, **GREEDY)) is None


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        (Chain, {"length": 0}),
        (Chain, {"length": -1}),
        (Chain, {"length": 2.5}),
        (Chain, {"length": 65}),
        (FixedTree, {"branching": 0}),
        (FixedTree, {"prune_threshold": 1.0}),
        (FixedTree, {"prune_threshold": -0.1}),
        (FixedTree, {"max_nodes": 257}),
        (FixedTree, {"first_branching": 0}),
        (BestFirstTree, {"max_nodes": 1}),
        (BestFirstTree, {"max_nodes": 257}),
        (BestFirstTree, {"width": 1.5}),
        (AdaptiveTree, {"base_depth": 0}),
        (AdaptiveTree, {"window": -3}),
        (AdaptiveTree, {"max_nodes": 1000}),
    ],
    ids=str,
)
def test_impossible_shapes(shape, fields):
    with pytest.raises(
        (ValueError, TypeError), match=rf"^{shape.__name__}: {next(iter(fields))} must"
    ):
        shape(**fields)


# --- calls ---------------------------------------------------------------------------------------

IDS = prompts(1, 9)
HOLE = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1]])
RIGHT_PADDED = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0]])

INPUTS = [
    ({"input_ids": None}, TypeError, r"^input_ids must be an integer tensor"),
    (
        {"input_ids": [[1, 2, 3]]},
        TypeError,
        r"^input_ids must be an integer tensor \[B, W\]; got list",
    ),
    (
        {"input_ids": "Once upon a time"},
        TypeError,
        r"^input_ids must be an integer tensor \[B, W\]; got str",
    ),
    ({"input_ids": IDS.float()}, TypeError, r"^input_ids must be an integer tensor.*float32"),
    ({"input_ids": IDS > 3}, TypeError, r"^input_ids must be an integer tensor.*bool"),
    ({"input_ids": IDS[0]}, ValueError, r"^input_ids must be \[B, W\]; got shape \[9\]"),
    ({"input_ids": IDS[None]}, ValueError, r"^input_ids must be \[B, W\]; got shape \[1, 1, 9\]"),
    (
        {"input_ids": IDS[:, :0]},
        ValueError,
        r"^input_ids must hold at least one token a row; got shape \[1, 0\]",
    ),
    (
        {"input_ids": IDS[:0]},
        ValueError,
        r"^input_ids must hold at least one token a row; got shape \[0, 9\]",
    ),
    ({"input_ids": IDS - 200}, ValueError, rf"^input_ids must be in \[0, {VOCAB}\).*; got -\d+"),
    (
        {"input_ids": IDS * 0 + VOCAB},
        ValueError,
        rf"^input_ids must be in \[0, {VOCAB}\).*; got {VOCAB}",
    ),
    (
        {"attention_mask": torch.ones(1, 8)},
        ValueError,
        r"^attention_mask must have the shape of input_ids \[1, 9\]; got \[1, 8\]",
    ),
    (
        {"attention_mask": torch.ones(9)},
        ValueError,
        r"^attention_mask must have the shape of input_ids",
    ),
    (
        {"attention_mask": [[1] * 9]},
        TypeError,
        r"^attention_mask must be a tensor like input_ids; got list",
    ),
    (
        {"attention_mask": HOLE},
        ValueError,
        r"^attention_mask must be zeros then ones \(left padding\); row 0 is not",
    ),
    ({"attention_mask": RIGHT_PADDED}, ValueError, r"^attention_mask must be zeros then ones"),
    (
        {"attention_mask": torch.zeros(1, 9)},
        ValueError,
        r"^attention_mask must keep at least one token a row; row 0 keeps none",
    ),
]

OPTIONS = [
    ({"max_new_tokens": 0}, ValueError, r"^max_new_tokens must be at least 1; got 0"),
    ({"max_new_tokens": -5}, ValueError, r"^max_new_tokens must be at least 1; got -5"),
    ({"max_new_tokens": 2.5}, TypeError, r"^max_new_tokens must be an integer; got 2.5"),
    ({"max_new_tokens": True}, TypeError, r"^max_new_tokens must be an integer; got True"),
    ({"max_new_tokens": "9"}, TypeError, r"^max_new_tokens must be an integer; got '9'"),
    (
        {"max_new_tokens": None, "max_length": -1},
        ValueError,
        r"^max_length must be at least 1; got -1",
    ),
    (
        {"max_new_tokens": POSITIONS},
        ValueError,
        rf"^max_new_tokens: the prompt's 9 tokens and {POSITIONS} new ones exceed",
    ),
    ({"num_beams": 2}, NotImplementedError, r"^num_beams: beam search"),
    (
        {"generation_config": GenerationConfig(num_beams=3)},
        NotImplementedError,
        r"^num_beams: beam search",
    ),
    ({"num_beam_groups": 2}, NotImplementedError, r"^constraints|^num_beam_groups"),
    ({"force_words_ids": [[3]]}, NotImplementedError, r"^constraints"),
    ({"penalty_alpha": 0.6, "top_k": 4}, NotImplementedError, r"^penalty_alpha"),
    ({"dola_layers": "low"}, NotImplementedError, r"^penalty_alpha, dola_layers"),
    ({"guidance_scale": 1.5}, NotImplementedError, r"^guidance_scale"),
    ({"prompt_lookup_num_tokens": 3}, NotImplementedError, r"^prompt_lookup_num_tokens"),
    (
        {"assistant_model": "model"},
        NotImplementedError,
        r"^assistant_model: the draft is given to TreeSpeculator",
    ),
    ({"past_key_values": DynamicCache()}, NotImplementedError, r"^past_key_values"),
    ({"inputs_embeds": torch.zeros(1, 9, 48)}, NotImplementedError, r"^inputs_embeds"),
    (
        {"prefix_allowed_tokens_fn": lambda *_: [1]},
        NotImplementedError,
        r"^prefix_allowed_tokens_fn",
    ),
    ({"negative_prompt_ids": IDS}, NotImplementedError, r"^negative_prompt_ids"),
    ({"custom_generate": "somewhere"}, NotImplementedError, r"^custom_generate"),
    ({"position_ids": IDS}, NotImplementedError, r"^position_ids"),
    ({"output_attentions": True}, NotImplementedError, r"^output_attentions"),
    (
        {"output_hidden_states": True},
        NotImplementedError,
        r"^output_attentions, output_hidden_states",
    ),
    (
        {"generation_config": {"max_new_tokens": 3}},
        TypeError,
        r"^generation_config must be a GenerationConfig; got dict",
    ),
    ({"stop_strings": "end"}, ValueError, r"^stop_strings needs a tokenizer"),
    ({"stop_strings": [""]}, ValueError, r"^stop_strings must be non-empty strings"),
    ({"stop_strings": [3]}, ValueError, r"^stop_strings must be non-empty strings"),
    ({"stop_strings": []}, ValueError, r"^stop_strings must be non-empty strings"),
    (
        {"seed": 1.5, "do_sample": True},
        TypeError,
        r"^seed must be an int, a torch.Generator or None; got float",
    ),
    ({"seed": "7", "do_sample": True}, TypeError, r"^seed must be an int.*; got str"),
    ({"seed": True, "do_sample": True}, TypeError, r"^seed must be an int.*; got bool"),
    ({"seed": -1, "do_sample": True}, ValueError, r"^seed must be in \[0, 2\*\*63\); got -1"),
    ({"seed": 2**63, "do_sample": True}, ValueError, r"^seed must be in \[0, 2\*\*63\)"),
    (
        {"do_sample": True, "temperature": 0},
        ValueError,
        r"^temperature must be above 0 with do_sample=True; got 0",
    ),
    ({"do_sample": True, "temperature": 0.0}, ValueError, r"^temperature must be above 0"),
    ({"do_sample": True, "temperature": -1.0}, ValueError, r"^temperature must be above 0"),
    ({"do_sample": True, "temperature": math.nan}, ValueError, r"^temperature must be above 0"),
    ({"do_sample": True, "top_p": 0.0}, ValueError, r"^top_p must be in \(0, 1\]; got 0.0"),
    ({"do_sample": True, "top_p": 1.5}, ValueError, r"^top_p must be in \(0, 1\]; got 1.5"),
    ({"do_sample": True, "top_p": -0.5}, ValueError, r"^top_p must be in \(0, 1\]"),
    ({"do_sample": True, "top_k": -3}, ValueError, r"^top_k must be a non-negative integer"),
    ({"do_sample": True, "top_k": 2.5}, ValueError, r"^top_k must be a non-negative integer"),
    ({"do_sample": True, "min_p": 1.5}, ValueError, r"^min_p must be in \[0, 1\]; got 1.5"),
    (
        {
            "generation_config": GenerationConfig(do_sample=True, top_p=0.5),
            "do_sample": None,
            "top_p": 2.0,
        },
        ValueError,
        r"^top_p",
    ),
]


def call(spec, how: str, options: dict):
    options = {"input_ids": IDS, **GREEDY, **options}
    options = {
        name: value for name, value in options.items() if value is not None or name == "input_ids"
    }
    if how == "generate":
        return spec.generate(**options)
    # refused when asked, not when first read
    return spec.stream(**options)


@pytest.mark.parametrize("how", ["generate", "stream"])
@pytest.mark.parametrize(
    ("options", "error", "message"), INPUTS, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.usefixtures("untouched")
def test_inputs(spec, how, options, error, message):
    with pytest.raises(error, match=message):
        call(spec, how, options)


@pytest.mark.parametrize(
    ("options", "error", "message"), OPTIONS, ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.usefixtures("untouched")
def test_options(spec, options, error, message):
    for how in ("generate", "stream"):
        with pytest.raises(error, match=message):
            call(spec, how, options)


@pytest.mark.usefixtures("untouched")
def test_unknown_options_are_refused_by_name(spec):
    with pytest.raises((ValueError, TypeError), match="max_new_tokenz"):
        spec.generate(IDS, max_new_tokenz=4)


@pytest.mark.usefixtures("untouched")
def test_prompts_past_the_position_limit(spec):
    with pytest.raises(
        ValueError,
        match=rf"^max_new_tokens: .* {POSITIONS} tokens and 1 new ones exceed the target's",
    ):
        spec.generate(prompts(1, POSITIONS), max_new_tokens=1)
    with pytest.raises(ValueError, match=rf"^max_new_tokens: the prompt's {POSITIONS + 90} tokens"):
        spec.generate(prompts(1, POSITIONS + 90), max_new_tokens=5)


def test_budgets_past_the_drafts_position_limit():
    config = tiny_config("llama", 1)
    config.max_position_embeddings = 64
    target = tiny_pair("llama")[0]
    made = TreeSpeculator(target, AutoModelForCausalLM.from_config(config).eval(), tree=SHAPE)
    with pytest.raises(
        ValueError,
        match=r"^max_new_tokens: .* 9 tokens and 56 new ones exceed the draft's 64 positions",
    ):
        made.generate(IDS, max_new_tokens=56)
    assert first_difference(made.generate(IDS, **GREEDY), target.generate(IDS, **GREEDY)) is None


@pytest.mark.usefixtures("untouched")
def test_only_one_prompt_can_be_streamed(spec):
    ids, mask = ragged(2, 9)
    with pytest.raises(ValueError, match=r"^input_ids must hold one prompt to stream; got 2"):
        spec.stream(ids, mask, **GREEDY)

    class Streamer:
        def put(self, value):
            raise AssertionError("nothing is streamed by a refused call")

        end = put

    with pytest.raises(ValueError, match=r"^streamer works with one sequence; got 2"):
        spec.generate(ids, mask, streamer=Streamer(), **GREEDY)
    with pytest.raises(ValueError, match=r"^streamer works with one sequence; got 3"):
        spec.generate(
            IDS, streamer=Streamer(), do_sample=True, num_return_sequences=3, max_new_tokens=4
        )


@pytest.mark.usefixtures("untouched")
def test_refusals_through_custom_generate(spec):
    def generate(**options):
        return spec.target.generate(IDS, custom_generate=spec, **{**GREEDY, **options})

    with pytest.raises(NotImplementedError, match=r"^num_beams: beam search"):
        generate(num_beams=2)
    with pytest.raises(ValueError, match=r"^max_new_tokens: the prompt's 9 tokens"):
        generate(max_new_tokens=POSITIONS)
    with pytest.raises(NotImplementedError, match=r"^output_attentions"):
        generate(output_attentions=True, return_dict_in_generate=True)
    with pytest.raises((ValueError, TypeError), match="seed"):
        generate(do_sample=True, seed="x")
    with pytest.raises(ValueError, match=r"^custom_generate must be called on the target"):
        tiny_pair("llama")[0].generate(IDS, custom_generate=spec, **GREEDY)


# --- logits that are no numbers ------------------------------------------------------------------


class NanAfter(LogitsProcessor):
    """Makes the scores NaN, or all -inf, once so many tokens have been picked."""

    def __init__(self, calls: int, value: float) -> None:
        self.calls, self.value = calls, value

    def __call__(self, input_ids, scores):
        self.calls -= 1
        return torch.full_like(scores, self.value) if self.calls < 0 else scores


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize(("value", "said"), [(math.nan, "NaN"), (-math.inf, "all -inf")])
def test_scores_of_no_number_stop_the_call(spec, expected, value, said, do_sample):
    ids = prompts(1, 9)
    options = {**GREEDY, "do_sample": do_sample, "seed": 1}
    whole = spec.generate(ids, **options)[0, 9:]
    stream, parts = spec.stream(ids, logits_processor=[NanAfter(7, value)], **options), []
    with pytest.raises(
        ValueError, match=rf"^target: no token can be picked at position 16: its scores are {said}"
    ):
        for part in stream:
            parts.append(part)
    text = torch.cat(parts)
    assert 1 <= len(text) <= 7 and torch.equal(text, whole[: len(text)])
    assert first_difference(spec.generate(prompts(1, 9), **GREEDY), expected) is None


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("with_draft", [False, True])
def test_a_target_that_turns_nan_stops_the_call(do_sample, with_draft):
    """Weights that overflow at one token: what was streamed before it stands, and later calls are
    right again.
    """
    target, draft = (copy.deepcopy(model) for model in tiny_pair("llama"))
    made = TreeSpeculator(target, draft if with_draft else None, tree=SHAPE)
    options = {"max_new_tokens": 40, "do_sample": do_sample, "seed": 2}
    whole = made.generate(IDS, **options)[0, 9:].tolist()
    place = next(
        k for k in range(8, 40) if whole[k] not in whole[:k] and whole[k] not in IDS[0].tolist()
    )
    kept = target.model.embed_tokens.weight[whole[place]].detach().clone()
    with torch.no_grad():
        target.model.embed_tokens.weight[whole[place]] = math.nan
    parts = []
    message = rf"^target: no token can be picked at position {9 + place + 1}: its scores are NaN"
    with pytest.raises(ValueError, match=message):
        for part in made.stream(IDS, **options):
            parts += part.tolist()
    assert parts == whole[: place + 1]
    with torch.no_grad():
        target.model.embed_tokens.weight[whole[place]] = kept
    for ids, mask in ((IDS, None), ragged(4)):
        expected = target.generate(ids, attention_mask=mask, **GREEDY)
        assert first_difference(made.generate(ids, mask, **GREEDY), expected) is None


@pytest.mark.parametrize("with_draft", [False, True])
def test_nan_of_a_batch_is_not_left_in_the_buffers(with_draft):
    """Rows that a failed call wrote are not seen by the next one, not even as rows of weight 0."""
    target, draft = (copy.deepcopy(model) for model in tiny_pair("llama"))
    made = TreeSpeculator(target, draft if with_draft else None, tree=SHAPE)
    ids, mask = ragged(4, 30)
    # the shortest row's unused rows lie among those that the longest row uses
    expected = made.generate(ids, mask, **GREEDY)
    kept = target.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        target.model.embed_tokens.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"^target: no token can be picked"):
        made.generate(torch.ones_like(ids), torch.ones_like(mask), **GREEDY)
    with torch.no_grad():
        target.model.embed_tokens.weight.copy_(kept)
    assert first_difference(made.generate(ids, mask, **GREEDY), expected) is None


def test_a_token_that_overflows_in_a_branch_not_taken_costs_nothing():
    """A node's NaN stays its own: it must not reach its siblings through attention weights of 0."""
    target = copy.deepcopy(tiny_pair("llama")[0])
    whole = target.generate(IDS, max_new_tokens=30, do_sample=False)
    never = next(token for token in range(1, VOCAB) if token not in whole[0].tolist())
    with torch.no_grad():
        target.model.embed_tokens.weight[never] = math.nan
    made = TreeSpeculator(target, AlwaysProposes(never), tree=Chain(3))
    assert first_difference(made.generate(IDS, max_new_tokens=30, do_sample=False), whole) is None
    ids, mask = ragged(4)
    expected = target.generate(ids, attention_mask=mask, **GREEDY)
    assert never not in expected
    assert first_difference(made.generate(ids, mask, **GREEDY), expected) is None


class AlwaysProposes(OneShotSource):
    """The same token over and over, in a branch beside one of another token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def propose(self, sequences, length):
        continuations = torch.full((len(sequences.lens), 2, length), self.token)
        # of several rows only the first meets it
        continuations[:, 1] = continuations[1:] = 1
        return Proposal(continuations, [8] * len(sequences.lens))


@pytest.mark.parametrize("shape", [SHAPE, Chain(4), FixedTree(4), AdaptiveTree(), "auto"], ids=str)
def test_a_draft_that_turns_nan_costs_time_never_text(shape):
    target, draft = (copy.deepcopy(model) for model in tiny_pair("llama"))
    made = TreeSpeculator(target, [draft, GarbageSource(VOCAB)], tree=shape)
    with torch.no_grad():
        draft.model.norm.weight.fill_(math.nan)
    for do_sample in (False, True):
        options = {**GREEDY, "do_sample": do_sample, "seed": 1}
        expected = TreeSpeculator(target, None).generate(IDS, **options)
        assert first_difference(made.generate(IDS, **options), expected) is None


WARM_UPS = [
    ({"batch_sizes": 0}, ValueError, r"^batch_sizes must be positive integers; got 0"),
    ({"batch_sizes": [2, True]}, ValueError, r"^batch_sizes must be positive integers; got \[2"),
    ({"max_length": 15}, ValueError, r"^max_length must be an integer of at least 16; got 15"),
    ({"max_new_tokens": 9}, TypeError, r"^max_new_tokens: warmup\(\) writes nothing that is kept"),
    ({"seed": 1}, TypeError, r"^seed: warmup\(\) writes nothing that is kept"),
    ({"do_sample": True, "temperature": -1.0}, ValueError, "temperature"),
    ({"num_beams": 2}, NotImplementedError, "num_beams"),
]


@pytest.mark.parametrize(("options", "error", "message"), WARM_UPS)
def test_a_warm_up_that_makes_no_sense_is_refused(spec, options, error, message):
    before = len(spec.calls)
    with pytest.raises(error, match=message):
        spec.warmup(**options)
    assert len(spec.calls) == before


def test_a_warm_up_takes_the_options_of_sampling(spec):
    spec.warmup(max_length=32, do_sample=True, temperature=0.7, top_k=5)
    assert spec.stats.new_tokens == 16
