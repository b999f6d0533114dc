"""What `tree="auto"` learns from a round, and what it decides for the next one."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import treespec.engine
from treespec.auto import AutoPolicy
from treespec.beliefs import Belief
from treespec.costs import MeasuredCosts, VerifyCosts
from treespec.policy import Outcome
from treespec.whatif import RoundCosts

pytestmark = pytest.mark.usefixtures("ordinary_outlay")


def tuned(level_ms=0.8, root_ms=1.0) -> AutoPolicy:
    costs = RoundCosts({1: 4.0, 24: 7.5}, root_ms, {1: level_ms, 4: level_ms}, 0.5, 0.3)
    return AutoPolicy(True, True, {1: costs}, "a test")


def a_plain_round(**others) -> Outcome:
    """A round of one sequence that verified its root alone, but for `others`."""
    usual = Outcome(
        tree=SimpleNamespace(lookup=None, scores=torch.zeros(1, 1)),
        paths=[[0]],
        match_lengths=None,
        draft_levels=0,
        draft_ms=0.0,
        verify_ms=4.0,
        total_ms=4.3,
        num_nodes=1,
        new_tokens=1,
        sampled=False,
    )
    return dataclasses.replace(usual, **others)


def a_drafted_round(right: int, looked_up: int = 0, **others) -> Outcome:
    """A round of one level that kept so many nodes, the first ones of them looked up."""
    lookup = torch.tensor([[False, *[k < looked_up for k in range(6)]]]) if looked_up else None
    usual = a_plain_round(
        tree=SimpleNamespace(
            lookup=lookup,
            parents=torch.arange(-1, 6).unsqueeze(0),
            draft_rows=torch.tensor([[0, *[-1] * 6]]),
            scores=-torch.arange(7.0).unsqueeze(0),
        ),
        paths=[list(range(right + 1))],
        match_lengths=[4] if looked_up else None,
        draft_levels=1,
        draft_ms=1.0,
        verify_ms=5.0,
        total_ms=6.3,
        num_nodes=7,
    )
    return dataclasses.replace(usual, **others)


def a_looked_up_chain(length: int, right: int, match_length: int) -> Outcome:
    """A continuation of that many tokens, of which so many were right."""
    tree = SimpleNamespace(
        lookup=torch.tensor([[False, *[True] * length]]),
        parents=torch.arange(-1, length).view(1, -1),
    )
    return a_plain_round(
        tree=tree, paths=[list(range(right + 1))], match_lengths=[match_length], num_nodes=length
    )


def gain_of(outcome: Outcome, draft_rounds: int = 1) -> float | None:
    """What a policy makes of a round, None if it does not count."""
    policy, gains = tuned(), []
    policy.begin_round([50] * len(outcome.paths))
    policy.now.verify = VerifyCosts(1, {1: 4.0, 24: 7.5})
    policy.now.overhead.add(0.3)
    policy.now.root.value, policy.now.level.value = 1.0, 0.8
    policy._draft_rounds, policy._nodes_alone = draft_rounds, 4
    policy.draft.gain = SimpleNamespace(add=gains.append)
    policy._learn_draft_gain(outcome, policy._predicted(outcome))
    return gains[0] if gains else None


def expands(policy: AutoPolicy, depth: int, score: float) -> bool:
    policy._depth = depth
    return policy.worth_expanding(torch.full((1, 1), score))


def learn_lookup(policy: AutoPolicy, outcome: Outcome) -> None:
    policy._learn_lookup(outcome, outcome.brought_by_lookups())


def plain_known(policy: AutoPolicy, rows: int) -> MeasuredCosts:
    """The costs of so many sequences, of which plain decoding was measured."""
    costs = policy._costs_for(rows)
    costs.verify.add(1, 4.0)
    costs._all_rounds = 100
    return costs


def test_a_round_that_captured_its_steps_says_nothing_of_what_is_between_forwards():
    policy = tuned()
    policy.begin_round([50])
    overhead = policy.now.overhead.value
    policy.observe(a_plain_round(total_ms=4.05, overhead_settled=False))
    assert policy.now.overhead.value == overhead
    policy._rest = 0
    policy.observe(a_plain_round(total_ms=4.05))
    assert policy.now.overhead.value < overhead


def test_what_a_tree_takes_to_be_committed_is_no_part_of_plain_decoding():
    """Else plain decoding would look dearer the more is drafted."""
    policy = tuned()
    policy.begin_round([50])
    plain_ms, overhead = policy.now.plain_ms, policy.now.overhead.value
    for _ in range(30):
        policy.observe(a_drafted_round(1, verify_ms=5.0, total_ms=7.3))  # 1.3 ms are others
    assert policy.now.plain_ms == plain_ms and policy.now.overhead.value == overhead
    assert policy.now.verify.at(7) == pytest.approx(5.0 + 1.3 - overhead, rel=0.02)
    assert policy.predict_round_ms(7, 0, False) == pytest.approx(6.3, rel=0.02)


def test_what_lookups_cost_alone_is_doubted_after_a_while_beside_the_draft(monkeypatch):
    policy, told = tuned(), []
    monkeypatch.setattr(
        MeasuredCosts, "add_levels", lambda self, *args: told.append(args[3:])
    )
    policy.begin_round([500])
    drafted = a_plain_round(match_lengths=[3], draft_levels=2, draft_ms=2.0)
    for _ in range(12):
        policy._learn_draft_cost(drafted, True)
    assert [doubted for _, doubted in told] == [False] * 9 + [True] * 2
    assert all(cost is policy.now.miss for cost, _ in told)
    policy.observe(a_plain_round(match_lengths=[0]))
    policy._learn_draft_cost(drafted, True)
    assert told[-1][1] is False


def test_what_a_draft_gains_in_short_texts_is_not_lost_in_long_ones():
    policy, nothing = tuned(), torch.zeros(1, 0)
    for longest, gain in ((600, -1.5), (20, 1.5)):
        policy.begin(longest, False)
        for _ in range(3):
            policy.draft.gain.add(gain)
    asked = []
    for longest in (600, 20):
        policy.begin(longest, False)
        policy.begin_round([50])
        asked.append(policy.wants_draft(nothing))
    assert asked == [False, True]


def test_what_recording_takes_is_no_loss_and_unrecorded_forwards_of_a_batch_are():
    """One sequence has few shapes, which are soon recorded; those of several come and go."""
    lost = {}
    for rows in (1, 2):
        for extra in (0.0, 9.0):
            policy = tuned()
            policy._costs_for(2).verify.add(1, 4.0)
            policy._costs_for(2).verify.add(4, 5.0)
            policy.begin_round([50] * rows)
            outcome = a_plain_round(
                paths=[[0]] * rows,
                verify_ms=5.0 + extra,
                total_ms=5.3 + extra,
                num_nodes=4,
                new_tokens=rows,
                verify_extra_ms=extra,
            )
            lost[rows, extra] = policy._observe_rate(outcome, policy._predicted(outcome))
    assert lost[1, 9.0] == pytest.approx(lost[1, 0.0])
    assert lost[2, 9.0] == pytest.approx(lost[2, 0.0] + 9.0)


def test_there_is_a_rest_after_looking_in_vain_but_not_in_text_that_repeats_itself():
    policy = tuned()
    rests = []
    for gain in (0.0, 4.0):
        policy.lookups.gain = Belief(gain, 1000.0)
        assert policy.begin_round([50])
        policy.observe(a_plain_round(match_lengths=[0], draft_ms=0.5, total_ms=4.8))
        asked = 0
        while not policy.begin_round([50]):
            policy.observe(a_plain_round())
            asked += 1
        rests.append(asked)
    assert rests[0] > 0 and rests[1] == 0


def test_a_trial_verifies_what_was_drafted():
    """Growing candidates and verifying none of them would tell nothing."""
    policy = tuned(level_ms=3.0, root_ms=4.0)
    unlikely = torch.tensor([[0.0, *[-4.0] * 12]])
    policy.begin_round([50])
    policy._draft_purse.pass_time(100_000.0)
    policy.wants_draft(torch.zeros(1, 0))
    assert policy._exploring and policy.nodes_to_verify(unlikely) == policy.node_sizes[1]
    policy.begin_round([50])
    assert policy.nodes_to_verify(unlikely) == 1


# --- what is asked --------------------------------------------------------------------------------


def test_known_costs_decide_the_first_round():
    nothing = torch.zeros(1, 0)
    assert tuned().wants_draft(nothing)
    assert not tuned(level_ms=12.0, root_ms=12.0).wants_draft(nothing)


def test_a_draft_that_lost_lately_is_left_alone_whatever_is_expected_of_it():
    policy, nothing = tuned(), torch.zeros(1, 0)
    policy.begin_round([500])
    assert policy.wants_draft(nothing)
    for _ in range(2):
        policy.draft.gain.add(-1.5)
    assert not policy.wants_draft(nothing)
    for _ in range(4):
        policy.draft.gain.add(1.5)
    assert policy.wants_draft(nothing)


def test_a_drafts_gain_is_its_tokens_less_its_time_in_rounds_of_plain_decoding():
    # 2 ms longer than the 4.3 ms of plain decoding
    assert gain_of(a_drafted_round(0)) == pytest.approx(-2.0 / 4.3)
    assert gain_of(a_drafted_round(2)) == pytest.approx(2.0 - 2.0 / 4.3)
    # tokens of lookups would have come without it, and so would their nodes and the look
    alone_ms = tuned().predict_round_ms(4, 0, True)
    expected = 3.0 - 2.0 - (6.3 - alone_ms) / 4.3
    assert gain_of(a_drafted_round(3, looked_up=2)) == pytest.approx(expected)


def test_what_is_no_usual_time_of_a_draft_is_no_loss_of_it():
    usual = gain_of(a_drafted_round(2))
    prompt = {"draft_ms": 41.0, "total_ms": 46.3, "draft_settled": False}
    assert gain_of(a_drafted_round(2, **prompt), draft_rounds=0) == pytest.approx(usual)
    slow = {"draft_ms": 10.0, "total_ms": 15.3, "draft_extra_ms": 9.0}
    assert gain_of(a_drafted_round(2, **slow)) == pytest.approx(usual)
    # shapes of several sequences come and go
    together = a_drafted_round(2, **slow)
    together = dataclasses.replace(together, paths=together.paths * 2)
    assert gain_of(together) < usual - 1.0
    # a busy moment counts for no more than twice the time
    assert gain_of(a_drafted_round(2, total_ms=500.0)) > usual - 2.0
    assert gain_of(a_drafted_round(2, settled=False)) is None
    assert gain_of(a_drafted_round(2, draft_settled=False)) is None


def after_a_draft() -> AutoPolicy:
    """A policy whose last round had a draft."""
    policy = tuned()
    policy.begin(16, True)
    policy.begin_round([50])
    policy.observe(a_drafted_round(2))
    policy.observe(a_drafted_round(2))
    return policy


def test_rounds_that_a_draft_slows_down_are_held_against_it():
    policy, untouched = after_a_draft(), after_a_draft()
    gain, pace = policy.draft.gain, policy.now.verify.pace
    slow = a_plain_round(verify_ms=1.1 * policy.now.verify.at(1), total_ms=5.0)
    for _ in range(4):
        policy._observe_costs(slow)
    lost = 4 * 0.1 * policy.now.verify.at(1) / policy.now.plain_ms
    assert untouched.draft.gain._sum - gain._sum == pytest.approx(lost)
    assert policy.now.verify.pace == pace, "what they take is not what plain decoding takes"
    told = gain.value
    policy._observe_costs(slow)
    assert gain.value == told and policy.now.verify.pace > pace, "caches are as ever by then"


def test_only_plain_rounds_right_after_a_draft_are_held_against_it():
    def told_by(*outcomes: Outcome) -> bool:
        policy, untouched = after_a_draft(), after_a_draft()
        for outcome in outcomes:
            policy._observe_costs(outcome)
        return policy.draft.gain.value != untouched.draft.gain.value

    slow = a_plain_round(verify_ms=6.0, total_ms=6.3)
    assert told_by(slow)
    # a wider verification, or one that was not recorded, leaves other things there
    assert not told_by(dataclasses.replace(slow, num_nodes=4), slow)
    assert not told_by(dataclasses.replace(slow, settled=False), slow)
    policy = after_a_draft()
    policy.begin(16, True)
    told = policy.draft.gain.value
    policy._observe_costs(slow)
    assert policy.draft.gain.value == told, "a text is not charged for the one before"


def test_no_round_after_a_draft_counts_for_more_than_half_a_round():
    policy, untouched = after_a_draft(), after_a_draft()
    policy._observe_costs(a_plain_round(verify_ms=400.0, total_ms=400.3))
    assert untouched.draft.gain._sum - policy.draft.gain._sum == pytest.approx(0.5)


def test_what_reading_a_prompt_took_is_what_it_takes_the_next_time():
    policy = tuned()

    def believed_after(draft_ms: float, extra_ms: float = 0.0) -> float:
        policy.begin(16, True, prefill_ms=10.0)
        asked = a_drafted_round(0, draft_ms=draft_ms, draft_extra_ms=extra_ms)
        policy._learn_draft_cost(asked, False)
        policy.begin(16, True, prefill_ms=20.0)
        return policy._catch_up_ms()

    # the level itself takes 1 ms, recording is no part of it, and the next prompt is twice as long
    for _ in range(40):
        believed_after(26.0, extra_ms=20.0)
    assert believed_after(6.0) == pytest.approx(10.0)
    assert believed_after(2.0) > 9.0, "one that took little is not what they all take"


def test_no_round_counts_for_more_than_a_few_of_plain_decoding():
    assert gain_of(a_drafted_round(6)) == 3.0
    slow = {"draft_ms": 30.0, "total_ms": 45.0, "draft_levels": 9, "num_nodes": 64}
    assert gain_of(a_drafted_round(0, **slow)) == -3.0


def test_a_draft_goes_on_where_what_was_looked_up_is_likely_to_end():
    """Of several levels, those count that a lookup hardly reaches."""
    worth = []
    for later_right in (0.9, 0.1):
        policy = tuned()
        policy.begin(40, False)
        policy.begin_round([500])
        policy.draft.first = policy.draft.later = Belief(0.95)
        policy.lookups.next_right = [Belief(share) for share in (0.0, 0.5, *[later_right] * 7)]
        policy.lookup_chances([1], 20)
        worth.append(policy._draft_value())
    assert worth[1] > worth[0] + 0.3
    policy.wants_lookup()
    assert policy._draft_value() > worth[1], "nothing was looked up yet"


@pytest.mark.parametrize(
    ("gains", "asked"),
    [((0.0,), False), ((1.5, -1.5), True), ((0.2,), True), ((0.2, -1.4), False)],
    ids=["nothing", "nothing, by luck", "little", "a loss"],
)
def test_a_draft_is_asked_while_it_may_well_gain_something(gains, asked):
    """That all rounds gain nothing says that it does not; lucky and unlucky ones say little."""
    policy, nothing = tuned(), torch.zeros(1, 0)
    for _ in range(5):
        policy.begin(40, False)
        for gain in gains * 20:
            policy.draft.gain.add(gain)
    policy.begin(40, False)
    policy.begin_round([500])
    assert policy.wants_draft(nothing) is asked


def test_one_unlucky_round_is_not_the_last_of_a_draft():
    policy, nothing = tuned(), torch.zeros(1, 0)
    policy.begin(40, False)
    policy.begin_round([500])
    policy._draft_rounds = 1
    policy.draft.gain.add(-3.0)
    assert policy.wants_draft(nothing)
    for _ in range(5):
        policy.draft.gain.add(-1.0)
    assert not policy.wants_draft(nothing)


def test_a_level_of_which_the_draft_promised_too_much_is_not_drafted():
    policy = tuned()
    policy.begin_round([500])
    assert expands(policy, 2, -0.5)
    for _ in range(40):
        policy.promises.by_level[False][2].add(0.1)
    assert not expands(policy, 2, -0.5)
    assert expands(policy, 1, -0.5), "another level kept its promises"


def test_what_lookups_found_makes_levels_promise_more_than_they_keep():
    policy = tuned()
    policy.begin_round([500])
    for level in range(6):
        alone, beside = (policy.promises.by_level[looked_up][level] for looked_up in (False, True))
        assert beside.value < alone.value
    score = next(s / 50 for s in range(0, -100, -1) if not expands(policy, 3, s / 50)) + 0.04
    assert expands(policy, 3, score)
    policy.lookup_chances([2], 8)
    assert not expands(policy, 3, score)
    policy.wants_lookup()
    assert expands(policy, 3, score), "the next round finds nothing"


def test_no_level_promises_more_than_one_token():
    policy = tuned()
    policy.begin_round([500])
    policy.children(0)
    for scores in ([[-0.1, -0.1]], [[-0.0, -9.0]]):
        assert policy.worth_expanding(torch.tensor(scores))
    assert policy.promises.levels[0] == pytest.approx(policy.promises.levels[1])


def test_candidates_are_held_to_their_promises_by_their_place():
    policy = tuned()
    scores = torch.tensor([[0.0, *[-2.0] * 40]])
    narrow = [belief.value for belief in policy.promises.by_place]
    assert policy._expected(scores[:, 1:])[40] == pytest.approx(
        math.exp(-2.0) * sum(n * kept for n, kept in zip((1, 2, 4, 8, 16, 9), narrow))
    )
    before = [belief.value for belief in policy.promises.by_place]
    policy.promises.learn_places([0, 2, 3], [0.0, -3.0, -0.5, -1.0, -2.0])
    after = [belief.value for belief in policy.promises.by_place]
    # the first place was right, which promised 0.61; one of the next two was, which promised 0.50
    # together; the fourth, which comes first in the tree, was not
    assert after[0] > before[0] and after[1] > before[1] and after[2] < before[2]
    assert after[3:] == before[3:]


def test_candidates_of_every_row_promise_their_rows_share():
    policy = tuned()
    policy._shares = np.array([0.75, 0.25])
    for row in range(2):
        scores = torch.full((2, 4), -math.inf)
        scores[row, :2] = math.log(0.5)
        scores[1 - row, 0] = math.log(0.5)
        expected = policy._expected(scores)
        assert expected[1] == pytest.approx(0.5), "the first of both rows"
        assert expected[2] - expected[1] == pytest.approx(0.5 * policy._shares[row])


def test_a_draft_is_held_against_what_lookups_alone_would_verify():
    policy = tuned()
    policy.begin(40, False)
    policy.begin_round([500])
    policy.wants_draft(torch.full((1, 20), -0.05))
    assert policy._nodes_alone == 1 + policy._best_width(torch.full((1, 20), -0.05)) > 4
    policy.wants_draft(torch.zeros(1, 0))
    assert policy._nodes_alone == 1


def test_wide_verifications_that_bring_nothing_become_narrow():
    policy = tuned()
    # so much that the widths after the first are worth their time
    likely = torch.tensor([[0.0, *[-1.2] * 63]])
    width = policy.nodes_to_verify(likely)
    assert width > 8
    for _ in range(60):
        policy.promises.learn_places([0, 1, 2, 3], likely[0].tolist())
    assert 1 < policy.nodes_to_verify(likely) < width


def test_every_round_with_candidates_tells_what_they_kept():
    policy = tuned()
    policy.begin_round([500])
    policy.children(0)
    assert expands(policy, 0, -0.1)
    first = policy.promises.by_place[0]
    alone, beside = (policy.promises.by_level[found][0] for found in (False, True))
    before = [belief.value for belief in (first, alone, beside)]
    policy.observe(a_drafted_round(right=2))
    assert first.value > before[0] and alone.value != before[1] and beside.value == before[2]
    policy.lookup_chances([2], 8)
    policy.observe(a_drafted_round(right=2, looked_up=1))
    assert beside.value != before[2]
    known = first.value
    policy.observe(a_plain_round())
    assert first.value == known, "a root promises nothing"


def test_a_few_unlucky_rounds_do_not_make_verifications_narrow_for_good():
    policy = tuned()
    policy.begin(40, True)
    scores = [0.0, *[math.log(0.05)] * 15]
    place = policy.promises.by_place[3]
    prior = place.value
    for _ in range(8):
        policy.promises.learn_places([0], scores)
    unlucky = place.value
    assert 0.7 * prior < unlucky < prior
    policy.begin(40, True)
    assert unlucky < place.value < prior, "and some of it is forgiven with every text"


def test_a_level_must_pay_for_the_nodes_it_adds_too():
    policy = tuned()
    policy.begin_round([500])
    policy.draft.first = policy.draft.later = Belief(1.0)
    policy.now.verify = VerifyCosts(1, {1: 4.0, 4: 4.0, 6: 4.0})
    level, rate = policy._draft_ms()[1], policy.rate
    # twice what the level itself takes, were it not for the verification
    score = math.log(2.0 * rate * level)
    assert expands(policy, 1, score)
    policy.now.verify = VerifyCosts(1, {1: 4.0, 4: 4.0, 6: 4.0 + 2.0 * level})
    assert not expands(policy, 1, score)


def test_levels_ahead_are_the_best_number_few_on_a_trial_and_one_of_an_unknown_draft():
    policy = tuned()
    for best, planned in ((1, 1), (3, 3), (5, 6), (6, 6)):
        policy._best_levels = best
        assert policy.levels_ahead() == planned
    policy._exploring = True
    assert policy.levels_ahead() == 2
    fresh = AutoPolicy(True, True)
    fresh.begin_round([500])
    assert fresh.levels_ahead() == 1


def test_levels_grown_without_a_look_promise_what_was_reached():
    """As if each had been looked at; a level that nothing reached promises nothing."""
    policy = tuned()
    policy.begin_round([500])
    policy.children(0)
    assert expands(policy, 0, -0.1) and expands(policy, 1, -0.2)
    looked_at = list(policy.promises.levels)
    policy.levels_grown([[math.exp(-0.1), math.exp(-0.2), 0.0, 0.0]])
    assert policy.promises.levels == pytest.approx(looked_at)


def test_graphs_have_few_widths_and_continuations_of_one_length():
    policy = tuned()
    policy.begin(40, False, captured=True)
    policy.begin_round([500])
    assert policy.node_sizes == treespec.auto.FEW_NODE_SIZES and policy.lookup_length == 63
    policy._look_ahead(1)
    assert policy.lookup_length == 63
    policy.begin(40, False)
    policy.begin_round([500])
    assert len(policy.node_sizes) > len(treespec.auto.FEW_NODE_SIZES)
    assert policy.lookup_length == 20


def test_promises_are_held_against_the_path():
    policy = tuned()
    policy.begin_round([500])
    policy.children(0)
    assert expands(policy, 0, -0.1) and expands(policy, 1, -0.2)
    told = [[], [], [], [], [], []]
    policy.promises.by_level[False] = [
        SimpleNamespace(add=lambda value, weight, samples=samples: samples.append((value, weight)))
        for samples in told
    ]
    first, second = policy.promises.levels
    tree = SimpleNamespace(parents=torch.tensor([[-1, 0, 0, 1, 3]]))
    policy._learn_levels(SimpleNamespace(tree=tree, paths=[[0, 1, 3]]))
    assert told[0] == [(1.0 / first, first)] and told[1] == [(0.0, second)] and not any(told[2:])
    # no child of node 2 was verified, so nothing is known of what would have followed it
    policy._learn_levels(SimpleNamespace(tree=tree, paths=[[0, 2]]))
    assert len(told[0]) == 1 and len(told[1]) == 1
    policy.children(0)
    assert policy.promises.levels == [], "every round makes its own"


def test_lookups_are_used_beside_a_draft_for_what_it_would_not_have_found():
    policy = tuned()
    policy.begin(40, False)
    policy.begin_round([500])
    policy.now.lookup.value = 1.3
    policy._lookup_purse.allows = lambda _: False
    policy.draft.gain._earlier, policy.draft.first = 2.0, Belief(0.95)
    short, long = 2, 8
    policy.lookups.by_match[short]._earlier, policy.lookups.beyond[short]._earlier = 0.9, 0.0
    policy.lookups.by_match[long]._earlier, policy.lookups.beyond[long]._earlier = 0.9, 0.9
    assert not policy.wants_matches([short]) and policy.wants_matches([long])
    policy.lookups.by_match[short]._earlier = 6.0
    assert policy.wants_matches([short]), "so much needs no draft"
    policy.lookups.by_match[short]._earlier = 0.9
    policy.draft.gain._earlier = -1.0
    assert policy.wants_matches([short]), "no draft is asked"


def test_lookups_beside_a_draft_are_charged_to_their_own_purse():
    for kept, further in ((0, 0), (1, 0), (4, 3)):
        policy = tuned()
        policy.begin_round([500])
        policy.now.lookup.value = 1.3
        policy._lookup_purse = Mock()
        policy.observe(a_drafted_round(kept, looked_up=6))
        ((lost, _),) = (call.args for call in policy._lookup_purse.pay.call_args_list)
        assert lost == pytest.approx(1.3 - further / policy.rate)


def test_a_draft_is_not_paid_for_what_lookups_brought_beside_it():
    """So that its trials do not go on for what the lookups are worth."""
    lost = {}
    for kept in (0, 4):
        for looked_up in (0, 6):
            policy = tuned()
            policy.begin_round([500])
            policy._draft_purse = Mock()
            policy._nodes_alone = 8
            policy.observe(a_drafted_round(kept, looked_up=looked_up))
            ((lost[kept, looked_up], _),) = (c.args for c in policy._draft_purse.pay.call_args_list)
    alone_ms = policy.predict_round_ms(8, 0, True) - policy.now.plain_ms
    assert alone_ms > 0.5
    assert lost[4, 0] < lost[0, 0] - 10.0, "its own tokens count"
    assert [lost[0, 6], lost[4, 6]] == pytest.approx([lost[0, 0] - alone_ms] * 2)


def test_lookups_are_expected_to_bring_half_as_much_in_sampled_text():
    policy, believed = tuned(), []
    for sampled in (False, True):
        policy.begin(40, sampled)
        lookups = policy.lookups
        by_length = (*lookups.next_right, *lookups.by_match, *lookups.beyond)
        believed.append([belief.value for belief in by_length])
    greedy, drawn = believed
    assert drawn == pytest.approx([0.5 * value for value in greedy]) and max(greedy) > 0.5


def test_tokens_that_the_draft_would_have_had_too_are_not_beyond_it():
    policy = tuned()
    policy.begin_round([500])
    policy._best_levels, told = 3, []
    policy.lookups.beyond[4] = SimpleNamespace(add=told.append)
    for kept in (2, 5):
        learn_lookup(policy, a_drafted_round(kept, looked_up=6))
    assert told == [0, 2]


def test_what_a_draft_gained_in_shorter_texts_is_half_believed_of_longer_ones():
    policy = tuned()
    policy.begin(200, False)
    for _ in range(30):
        policy.draft.gain.add(2.5)
    policy.begin(300, False)
    assert policy.draft.gain.value > 1.0


def test_what_rounds_of_a_draft_take_moves_what_its_levels_are_believed_to_take():
    policy = tuned()
    policy.begin_round([500])
    before = policy._draft_ms()
    for _ in range(20):
        policy._learn_draft_cost(a_drafted_round(1, draft_levels=3, draft_ms=9.0), looked=False)
    assert policy._draft_ms() > before


def test_rest_is_longer_where_nothing_was_worth_asking():
    rests = []
    for looked in (None, [0]):
        policy = tuned()
        policy.begin_round([500])
        policy.lookups.gain._earlier = 0.1
        policy.observe(a_plain_round(match_lengths=looked))
        rests.append(policy._rest)
    assert rests[0] > rests[1] > 0


@pytest.mark.parametrize("sampled", [True, False])
def test_rests_grow_while_nothing_is_worth_asking_in_sampled_text(sampled):
    """Greedy text may repeat itself at any time."""
    policy = tuned()
    policy.begin(100, sampled)
    policy.lookups.gain = Belief(0.1, 1000.0)
    rests = []
    for looked in (None, None, None, None, [0], None, None):
        policy._rest = 0
        policy.begin_round([500])
        policy.observe(a_plain_round(match_lengths=looked, sampled=sampled))
        rests.append(policy._rest)
    first, look, more = rests[0], rests[4], 2 if sampled else 1
    again = [first, more * first]
    assert rests == [*again, more**2 * first, more**2 * first, look, *again] and look < first
    policy.begin(100, sampled)
    policy.begin_round([500])
    policy.observe(a_plain_round())
    assert policy._rest == first, "a new text"


def test_a_further_level_takes_no_longer_than_the_first():
    policy = tuned(level_ms=6.0, root_ms=2.0)
    assert policy._draft_ms() == (2.0, 2.0)


def test_only_a_trial_stops_at_the_depth_of_a_probe():
    policy, likely = tuned(), torch.zeros(1, 1)
    policy.begin_round([500])
    policy._depth = 4
    assert policy.worth_expanding(likely)
    policy._exploring = True
    assert not policy.worth_expanding(likely)


def test_lookups_in_debt_are_used_for_their_best_matches_only():
    costs = RoundCosts({1: 4.0, 24: 24.0}, 1.0, {4: 0.8}, 0.5, 0.3)
    policy = AutoPolicy(True, True, {1: costs})
    policy.begin_round([20])
    assert policy.wants_matches([1]) and policy.wants_matches([8])
    policy._lookup_purse.pay(20.0, trial=False)
    assert not policy.wants_matches([1])
    assert policy.wants_matches([8])


def test_every_right_token_makes_a_longer_match():
    policy = tuned()
    before = [belief.value for belief in policy.lookups.next_right]
    learn_lookup(policy, a_looked_up_chain(4, right=2, match_length=1))
    after = [belief.value for belief in policy.lookups.next_right]
    assert after[1] > before[1] and after[2] > before[2], "both were right"
    assert after[3] < before[3], "the third was not"
    assert after[4:] == before[4:], "nothing is known of the fourth"
    chances = policy.lookup_chances([3], 8)[0]
    assert chances == pytest.approx(np.cumprod([*after[3:], after[8], after[8]]))


def test_a_continuation_that_proved_right_to_its_end_is_followed_by_a_longer_one():
    policy = tuned()
    usual, lengths = policy.lookup_length, []
    for right in (usual, 2 * usual, 1000, 3, 0):
        right = min(right, policy.lookup_length)
        learn_lookup(policy, a_looked_up_chain(policy.lookup_length, right, match_length=8))
        lengths.append(policy.lookup_length)
    assert lengths == [2 * usual, 63, 63, usual, usual]
    learn_lookup(policy, a_looked_up_chain(usual, usual, match_length=8))
    policy.begin(20, False)
    assert policy.lookup_length == usual, "another text"
    assert AutoPolicy(True, False).lookup_length == 0


def test_a_root_of_which_no_child_was_verified_is_no_miss():
    policy = tuned()
    tree = SimpleNamespace(
        draft_rows=torch.zeros(1, 1, dtype=torch.long),
        parents=torch.full((1, 1), -1),
        scores=torch.zeros(1, 1),
    )
    outcome = SimpleNamespace(tree=tree, paths=[[0]])
    before = policy.draft.first.value
    policy.draft.learn(outcome, tree.scores.tolist())
    assert policy.draft.first.value == before
    verified = SimpleNamespace(
        draft_rows=torch.tensor([[0, -1]]),
        parents=torch.tensor([[-1, 0]]),
        scores=torch.tensor([[0.0, -0.5]]),
    )
    policy.draft.learn(SimpleNamespace(tree=verified, paths=[[0]]), verified.scores.tolist())
    assert policy.draft.first.value < before
    later = policy.draft.later.value
    deeper = SimpleNamespace(
        draft_rows=torch.tensor([[0, 1]]), parents=verified.parents, scores=verified.scores
    )
    policy.draft.learn(SimpleNamespace(tree=deeper, paths=[[0, 1]]), deeper.scores.tolist())
    assert policy.draft.later.value == later, "nor does a later node without one"


def test_a_further_level_is_guessed_by_the_drafts_size_until_it_is_known():
    """Else a draft whose first level was dear is never asked for a second."""
    policy = AutoPolicy(True, True, draft_share=0.2)
    policy.now.verify.add(1, 5.0)
    for _ in range(3):
        policy.now.root.add(4.0)
    assert policy._draft_ms() == (4.0, pytest.approx(1.0))
    for _ in range(3):
        policy.now.level.add(3.0)
    assert policy._draft_ms() == (4.0, 3.0)


def test_what_asking_led_to_in_earlier_texts_says_what_a_prompt_may_cost():
    policy, nothing = tuned(), torch.zeros(1, 0)

    def asks(longest: int) -> bool:
        policy.begin(longest, False, prefill_ms=50.0)
        policy.begin_round([50])
        return policy.wants_draft(nothing)

    assert asks(600)
    for _ in range(3):
        # the draft was asked once, and not again
        policy._draft_rounds = 1
        policy.now.verify.add(1, 4.0)
        policy.begin(600, False)
    assert not asks(600) and asks(20)
    for _ in range(3):
        policy._draft_rounds = 40
        policy.now.verify.add(1, 4.0)
        policy.begin(600, False)
    assert asks(600)
    policy.begin(600, False, prefill_ms=50.0)
    policy.begin_round([2])
    assert not policy.wants_draft(nothing), "there is no time for it to pay"


def test_a_long_prompt_makes_the_first_ask_dear():
    policy, nothing = tuned(), torch.zeros(1, 0)
    policy.begin(16, False, prefill_ms=1.0)
    assert policy.wants_draft(nothing)
    policy.begin(16, False, prefill_ms=4000.0)
    assert not policy.wants_draft(nothing)


def test_widths_of_several_sequences_are_few_and_tried_one_at_a_time():
    policy = tuned()
    costs = plain_known(policy, 4)
    policy.begin_round([50] * 4)
    assert 4 not in policy.node_sizes
    likely = torch.full((4, 64), -0.01)
    assert policy.nodes_to_verify(likely) == 8
    costs.verify.add(8, 4.1)
    assert policy.nodes_to_verify(likely) == 16
    policy.begin_round([50])
    assert 4 in policy.node_sizes
    fresh = AutoPolicy(True, True)
    fresh.now.verify.add(1, 4.0)
    assert fresh.nodes_to_verify(likely[:1]) == 4


def test_wide_verifications_must_pay():
    likely = torch.tensor([[0.0, *[-0.2] * 15, *[-9.0] * 20]])
    assert tuned().nodes_to_verify(likely) == 16
    unlikely = torch.tensor([[0.0, *[-9.0] * 12]])
    assert tuned().nodes_to_verify(unlikely) == 1


def test_describe_names_the_numbers():
    text = tuned().describe()
    for part in ("0.233 tokens/ms", "costs: a test", "plain 0.233", "chain of", "tree of", "best"):
        assert part in text, part
    assert "nothing measured yet" in AutoPolicy(True, True).describe()


# --- forwards that were never made before --------------------------------------------------------


def far_behind() -> AutoPolicy:
    """One that has recorded four nodes and sixteen, and cannot afford more."""
    policy = tuned()
    for num_nodes in (4, 16):
        policy._outlay.pay(a_plain_round(num_nodes=num_nodes, recording_ms=50.0), 0.0)
    return policy


def test_a_process_far_behind_verifies_widths_that_it_knows():
    policy, likely = far_behind(), torch.full((1, 64), -0.01)
    assert policy.begin_round([16])
    assert policy.nodes_to_verify(likely) == 16
    assert policy.node_sizes == (1, 4, 16)
    few = torch.full((1, 6), -0.01)
    assert policy.nodes_to_verify(few) == 6  # in a forward of sixteen
    policy.begin_round([4000])
    assert policy.nodes_to_verify(likely) == 32


def test_a_process_far_behind_asks_no_draft_that_it_never_asked():
    policy, nothing = far_behind(), torch.zeros(1, 0)
    policy.begin_round([16])
    assert not policy.wants_draft(nothing)
    policy._outlay.pay(a_plain_round(draft_levels=1), 0.0)
    policy.begin_round([16])
    assert policy.wants_draft(nothing)


@pytest.mark.parametrize("tried", [None, "_exploring", "_lookup_exploring"])
def test_a_trial_is_not_recorded_at_once(tried):
    policy = tuned()
    policy.begin_round([500])
    assert policy.may_record
    if tried:
        setattr(policy, tried, True)
    policy.nodes_to_verify(torch.full((1, 6), -0.5))
    assert policy.may_record == (tried is None)


def test_several_sequences_are_charged_as_their_shapes_come():
    policy = far_behind()
    plain_known(policy, 4)
    policy.begin_round([16] * 4)
    assert not policy.may_record
    assert policy.wants_draft(torch.zeros(4, 0))
    assert policy.nodes_to_verify(torch.full((4, 64), -0.01)) == 8


@pytest.mark.parametrize("extra_ms, allowed", [(0.0, True), (70.0, False)])
def test_what_unrecorded_forwards_take_longer_is_part_of_the_balance(extra_ms, allowed):
    policy = tuned()
    policy.begin_round([100])
    of_forward = {"verify_ms": 4.4 + extra_ms, "verify_extra_ms": extra_ms}
    policy.observe(a_plain_round(num_nodes=4, total_ms=4.7 + extra_ms, **of_forward))
    policy._rest = 0
    policy.begin_round([30])
    assert policy.may_record == allowed


@pytest.mark.parametrize("rows, num_nodes", [(1, 1), (2, 4)])
def test_what_others_record_is_no_part_of_the_balance(rows, num_nodes):
    """Plain decoding, and rounds of several sequences."""
    policy = tuned()
    plain_known(policy, rows)
    policy.begin_round([100] * rows)
    tree = SimpleNamespace(lookup=None, scores=torch.zeros(rows, 1))
    others = {"tree": tree, "paths": [[0]] * rows, "new_tokens": rows}
    policy.observe(a_plain_round(num_nodes=num_nodes, recording_ms=30.0, **others))
    policy._rest = 0
    policy.begin_round([20])
    assert policy.may_record
