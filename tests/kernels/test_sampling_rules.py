"""The text of every rule has the target's distribution: three tokens on a vocabulary of four, every
outcome enumerated, tree and chain, every way of drafting, every warper.

Each test is a chi-square test on seeded samples that a correct rule fails with probability 1e-6, so
all of them together would raise a false alarm less than once in ten thousand seeds. The faults at
the end show what the tests can see.
"""

from __future__ import annotations

import pytest
import torch
from sampling_model import CHAIN, TREE, chi_square_p, decode, exact_distribution, grow, tables
from treespec.kernels import ops, rejection, torch_acceptance

FALSE_ALARM = 1e-6
SAMPLES = 200_000
FAULT_SAMPLES = 60_000
SEED = 5
WARPERS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7, "temperature": 1.3},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
}
SHAPES = {"tree": TREE, "chain": CHAIN}


def fit(shape, rule, drafting, samples=FAULT_SAMPLES, wanted=None, **options) -> float:
    """The p-value of the text's distribution, and of a run that must be the target's."""
    outcomes, _ = decode(shape, rule, drafting, samples, SEED, **options)
    options = {name: value for name, value in options.items() if name in ops_warpers()}
    return chi_square_p(outcomes, exact_distribution(tables()[0], **(wanted or options)))


def ops_warpers() -> tuple[str, ...]:
    return ("temperature", "top_k", "top_p", "min_p")


@pytest.mark.parametrize("warper", WARPERS)
def test_coupled_text_has_the_target_distribution(warper):
    assert fit(TREE, "coupled", "coupled", SAMPLES, **WARPERS[warper]) > FALSE_ALARM


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["coupled", "target_only"])
@pytest.mark.parametrize("drafting", ["coupled", "deterministic", "sampled"])
def test_coupled_text_does_not_depend_on_tree_or_drafting(shape, rule, drafting):
    for warper in WARPERS.values():
        plain, _ = decode((-1,), "coupled", "deterministic", 1500, SEED, **warper)
        text, _ = decode(SHAPES[shape], rule, drafting, 1500, SEED, **warper)
        assert torch.equal(text, plain)


@pytest.mark.parametrize("warper", WARPERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_rejection_text_has_the_target_distribution(shape, rule, warper):
    assert fit(SHAPES[shape], rule, "sampled", SAMPLES, **WARPERS[warper]) > FALSE_ALARM


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_a_draft_that_gives_tokens_no_probability_stays_lossless(rule):
    """A cold draft: most of its probabilities round to zero, so later siblings "
    "could not be drawn."""
    assert fit(TREE, rule, "sampled", SAMPLES, draft_temperature=0.01) > FALSE_ALARM


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_a_draft_equal_to_the_target_is_always_accepted(rule):
    target, _ = tables()

    def grow_from_target(draft, *rest):
        return grow(target, *rest)

    _, tokens_per_round = decode(CHAIN, rule, "sampled", 2000, SEED, drafter=grow_from_target)
    assert tokens_per_round > 3.99


def test_traversal_accepts_at_least_as_much_as_without_replacement():
    for shape in SHAPES.values():
        _, one_by_one = decode(shape, "without_replacement", "sampled", FAULT_SAMPLES, SEED)
        _, traversed = decode(shape, "traversal", "sampled", FAULT_SAMPLES, SEED)
        assert traversed > one_by_one


REJECTION = [("without_replacement", TREE), ("traversal", TREE), ("traversal", CHAIN)]


@pytest.mark.parametrize("rule, shape", REJECTION)
def test_fault_no_renormalisation_is_seen(monkeypatch, rule, shape):
    sound = rejection.residual

    def unnormalised(p, q, rate):
        left, mass = sound(p, q, rate)
        return left * mass[:, None], mass

    monkeypatch.setattr(rejection, "residual", unnormalised)
    assert fit(TREE, rule, "sampled") < FALSE_ALARM


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_fault_siblings_taken_as_independent_is_seen(monkeypatch, rule):
    monkeypatch.setattr(rejection, "without_token", lambda q, x: q)
    assert fit(TREE, rule, "sampled") < FALSE_ALARM


@pytest.mark.parametrize("rule, shape", REJECTION)
def test_fault_bonus_from_the_target_instead_of_the_residual_is_seen(monkeypatch, rule, shape):
    name = rule
    sound = getattr(torch_acceptance, name)

    def careless(trees):
        outcome = sound(trees)
        rows = torch.arange(len(outcome.last)).numpy()
        outcome.bonus_probs = trees.target_probs(rows, outcome.last)
        return outcome

    monkeypatch.setattr(torch_acceptance, name, careless)
    assert fit(shape, rule, "sampled") < FALSE_ALARM


@pytest.mark.parametrize(
    "rule, drafting",
    [
        ("coupled", "coupled"),
        ("target_only", "deterministic"),
        ("without_replacement", "sampled"),
        ("traversal", "sampled"),
    ],
)
@pytest.mark.parametrize("warper", WARPERS)
def test_fault_target_left_unwarped_is_seen(rule, drafting, warper):
    assert fit(TREE, rule, drafting, wanted=WARPERS[warper]) < FALSE_ALARM


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_fault_draft_probs_before_its_temperature_are_seen(rule):
    """The draft draws at one temperature and reports its distribution at another."""

    def misreporting(draft, *rest):
        tokens, states, _ = grow(draft, *rest)
        return tokens, states, draft[states].softmax(-1)

    assert fit(TREE, rule, "sampled", drafter=misreporting, draft_temperature=0.5) < FALSE_ALARM


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_fault_deterministic_siblings_under_a_rejection_rule_are_seen(rule):
    def by_rank(draft, states, shape, drafting, *rest):
        return grow(draft, states, shape, "deterministic", *rest)

    assert fit(TREE, rule, "sampled", drafter=by_rank) < FALSE_ALARM


@pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
def test_fault_draft_sharing_numbers_with_the_residual_is_seen(monkeypatch, rule):
    monkeypatch.setattr(torch_acceptance, "RESIDUAL_STREAM", 1)
    assert fit(CHAIN, rule, "sampled") < FALSE_ALARM


def test_fault_selecting_siblings_after_drawing_them_is_seen():
    """Swapping siblings by their probability breaks the order in which they were drawn."""

    def sorted_siblings(draft, *rest):
        tokens, states, probs = grow(draft, *rest)
        order = probs[:, 0].gather(1, tokens[:, 1:4]).argsort(1, descending=True) + 1
        return (
            tokens.scatter(1, torch.tensor([[1, 2, 3]]).expand_as(order), tokens.gather(1, order)),
            states,
            probs,
        )

    shape = (-1, 0, 0, 0)
    assert fit(shape, "without_replacement", "sampled", drafter=sorted_siblings) < FALSE_ALARM


def test_fault_noise_keyed_on_the_node_but_not_its_position_is_seen(monkeypatch):
    """Two tokens of one text must not meet the same noise."""
    sound = torch_acceptance.token_words

    def stuck(seeds, places, *rest):
        return sound(seeds, places * 0, *rest)

    monkeypatch.setattr(torch_acceptance, "token_words", stuck)
    outcomes, _ = decode(TREE, "coupled", "deterministic", FAULT_SAMPLES, SEED)
    assert chi_square_p(outcomes, exact_distribution(tables()[0])) < FALSE_ALARM


def test_fault_rate_of_a_deleted_leaf_left_alone_is_seen(monkeypatch):
    """Traversal that keeps the parent's rate instead of S / (S + 1 - r)."""
    sound = rejection.residual

    def all_kept(p, q, rate):
        left, mass = sound(p, q, rate)
        return left, mass * 0 + 1e9

    monkeypatch.setattr(rejection, "residual", all_kept)
    assert fit(TREE, "traversal", "sampled") < FALSE_ALARM


def test_fault_draft_noise_keyed_on_positions_is_seen_under_traversal():
    """The next round meets the numbers of this round's deep nodes again, which decisions were made
    on.
    """

    def keyed_on_positions(draft, states, shape, drafting, *rest):
        return grow(draft, states, shape, "coupled", *rest)

    assert fit(CHAIN, "traversal", "sampled", drafter=keyed_on_positions) < FALSE_ALARM


class TestMisfits:
    """What does not belong together is refused by name."""

    def verify(self, **options):
        settings = {"positions": torch.tensor([[3, 4]]), "seed": 1}
        settings.update(options)
        return ops.verify_sampled(
            torch.zeros(1, 2, 4),
            torch.tensor([[0, 1]]),
            torch.tensor([[-1, 0]]),
            torch.tensor([2]),
            **settings,
        )

    @pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
    @pytest.mark.parametrize("drafting, reason", [("deterministic", "rank"), ("coupled", "shared")])
    def test_drafting_that_biases_a_rejection(self, rule, drafting, reason):
        with pytest.raises(
            ValueError, match=f"drafting must be .sampled. for rule '{rule}'.*{reason}"
        ):
            self.verify(rule=rule, drafting=drafting, draft_probs=torch.ones(1, 2, 4) / 4)

    @pytest.mark.parametrize("rule", ["without_replacement", "traversal"])
    def test_missing_draft_probs(self, rule):
        with pytest.raises(ValueError, match="draft_probs must be given with rule"):
            self.verify(rule=rule)

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("rule", "typical", "rule must be one of coupled"),
            ("drafting", "lucky", "drafting must be None or one of"),
            ("temperature", -0.5, "temperature must be positive; got -0.5"),
            ("temperature", 0.0, "temperature must be positive"),
            ("temperature", torch.tensor([float("nan")]), "temperature must be positive"),
            ("temperature", torch.ones(2), r"temperature must be .*\[B\] = \[1\]"),
            ("top_k", -1, r"top_k must be 0 \(off\) or more"),
            ("top_p", 0.0, r"top_p must be in \(0, 1\]; got 0.0"),
            ("top_p", 1.5, r"top_p must be in \(0, 1\]"),
            ("min_p", -0.1, r"min_p must be in \[0, 1\]"),
            ("seed", -1, "seed must be an int in"),
            ("seed", 2**64, "seed must be an int in"),
            ("positions", torch.tensor([[3]]), r"positions must be .*\[B, N\] = \[1, 2\]"),
            ("rows", torch.tensor([1, 2]), r"rows must be .*\[B\] = \[1\]"),
            ("draft_probs", torch.ones(1, 2, 3), r"draft_probs must be .*\[1, 2, 4\]"),
        ],
    )
    def test_bad_arguments(self, name, value, message):
        options = {"rule": "traversal", "draft_probs": torch.ones(1, 2, 4) / 4, name: value}
        with pytest.raises(ValueError, match=message):
            self.verify(**options)
