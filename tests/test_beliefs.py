"""What drafts are believed to bring, and what trials of them may lose."""

from __future__ import annotations

import math

import pytest

from treespec.beliefs import Belief
from treespec.purse import Purse
from treespec.running_acceptance import DraftGain

# --- trials ---------------------------------------------------------------------------------------


def test_trials_lose_no_more_than_their_share():
    purse = Purse()
    lost = 0.0
    for _ in range(2000):
        purse.pass_time(5.0)
        purse.begin()
        if purse.allows(10.0):
            purse.pay(10.0, trial=True)
            lost += 10.0
    assert 0 < lost <= 0.02 * 2000 * 5.0


def test_trials_that_gain_go_on_and_one_that_lost_is_the_last_of_its_text():
    purse = Purse()
    purse.pass_time(2000.0)
    for _ in range(50):
        assert purse.allows(10.0)
        purse.pay(-4.0, trial=True)
    purse.pay(3.0, trial=True)
    assert not purse.allows(0.1)
    purse.begin()
    assert purse.allows(10.0)
    purse.pay(3.0, trial=True)
    purse.pass_time(500.0)
    assert not purse.allows(0.1)
    purse.pass_time(200.0)
    assert purse.allows(0.1), "3 ms are 0.5 % of 600"


LATELY, HERE = (0.01, math.inf), (math.inf, 0.02)


def test_debts_are_of_the_time_lately_passed_and_little_of_gains_is_saved_up():
    purse = Purse()
    purse.pass_time(1000.0)
    purse.pay(-500.0, trial=False)
    purse.begin()
    purse.pay(15.0, trial=False)
    assert not purse.owes(LATELY, 0.0)
    purse.pay(10.0, trial=False)
    assert purse.owes(LATELY, 0.0), "an earlier gain is no licence to lose"
    purse.pay(-10.0, trial=False)
    assert not purse.owes(LATELY, 0.0), "a later gain makes up for the loss"
    purse.pay(40.0, trial=False)
    purse.pass_time(5000.0, rounds=1000)
    assert not purse.owes(LATELY, 0.0)


def test_a_text_in_which_a_source_gained_is_not_charged_for_others():
    purse = Purse()
    purse.pass_time(1000.0)
    purse.pay(40.0, trial=False)
    purse.begin()
    assert purse.owes(LATELY, 500.0)
    purse.pay(-2.0, trial=False)
    assert purse.owes(LATELY, 500.0), "2 ms may be chance"
    purse.pay(-4.0, trial=False)
    assert not purse.owes(LATELY, 500.0)


def test_no_more_than_a_share_of_a_text_is_lost_in_it():
    purse = Purse()
    purse.pass_time(100_000.0)
    purse.begin()
    purse.pay(8.0, trial=False)
    assert not purse.owes(HERE, ahead_ms=500.0)
    assert purse.owes(HERE, ahead_ms=300.0), "8 ms are more than 2 % of what is left"
    purse.pass_time(200.0)
    assert not purse.owes(HERE, ahead_ms=300.0)
    purse.begin()
    assert not purse.owes(HERE, ahead_ms=300.0)


# --- beliefs -------------------------------------------------------------------------------------


def test_a_text_tells_quickly_and_is_forgotten_with_it():
    belief = Belief(0.5)
    for _ in range(8):
        belief.add(0.0)
    low = belief.value
    assert low < 0.15
    belief.begin(0)
    assert low < belief.value < 0.4, "the next text starts from what texts are like"


def test_kinds_of_texts_are_kept_apart():
    belief = Belief(0.5)
    for kind in (8, 10, 8, 10):
        belief.begin(kind)
        for _ in range(5):
            belief.add(float(kind == 8))
    belief.begin(8)
    short = belief.value
    belief.begin(10)
    assert short > 0.7 and belief.value < 0.3
    belief.begin(9)
    assert belief.value == 0.5


def test_less_is_expected_of_a_kind_of_which_nothing_was_seen():
    belief = Belief(0.8)
    belief.begin(1)
    belief.expect_less(0.5)
    belief.expect_less(0.5)
    assert belief.value == pytest.approx(0.4)
    belief.add(1.0)
    belief.begin(1)
    before = belief.value
    belief.expect_less(0.5)
    assert belief.value == before


def test_what_a_text_told_goes_stale_and_later_counts_among_earlier_texts():
    belief = Belief(0.8)
    for _ in range(3):
        belief.add(0.0)
    before = belief.value
    for _ in range(50):
        belief.age()
    stale = belief.value
    assert stale > 1.5 * before
    for _ in range(50):
        belief.age()
    assert before < belief.value < 0.8 * stale


def test_a_kind_of_text_is_hardly_known_after_a_few_samples():
    belief = Belief(0.5)
    known = []
    for _ in range(6):
        known.append(not belief.hardly_known)
        belief.add(0.0)
    assert known == sorted(known) and not known[2] and known[5]


def test_half_a_sample_twice_is_one_sample():
    once, twice = Belief(0.5), Belief(0.5)
    once.add(1.0)
    twice.add(1.0, 0.5)
    half = twice.value
    twice.add(1.0, 0.5)
    assert 0.5 < half < twice.value == pytest.approx(once.value, abs=0.01)
    for belief, weight in ((once, 1.0), (twice, 0.1)):
        for _ in range(round(20 / weight)):
            belief.add(0.0, weight)
    assert twice.value == pytest.approx(once.value, abs=0.05)
    once.begin(0)
    twice.begin(0)
    assert twice.value == pytest.approx(once.value, abs=0.02)


def test_one_sample_does_not_count_twice():
    """What a text tells is held against the texts before it, not against itself."""
    belief = Belief(1.0, weight=4.0)
    belief.add(-1.0)
    assert belief.value == pytest.approx((4.0 - 1.0) / 5.0)


def test_a_sample_may_be_amended():
    amended, told = Belief(0.5), Belief(0.5)
    for value in (0.2, 0.9):
        amended.add(value)
        amended.amend(0.1)
        amended.amend(-0.4)
        told.add(value - 0.3)
        assert amended.value == pytest.approx(told.value)
    for belief in (amended, told):
        belief.begin(0)
    assert amended.value == pytest.approx(told.value), "in later texts too"


def test_what_is_believed_to_be_little_is_forgiven_with_time():
    belief = Belief(0.5)
    for _ in range(10):
        belief.add(-1.0)
    belief.begin(0)
    low = belief.value
    belief.hope(like=5)
    after_one = belief.value
    assert low < after_one < 0.0
    for _ in range(60):
        belief.begin(0)
        belief.hope(like=5)
    assert belief.value == pytest.approx(0.5, abs=0.05)
    much = Belief(0.5)
    much.add(3.0)
    much.begin(0)
    before = much.value
    much.hope(like=5)
    assert much.value == before > 0.5


def test_an_unknown_kind_of_text_is_half_like_its_neighbour():
    belief = Belief(0.5)
    belief.begin(17)
    for _ in range(30):
        belief.add(2.5)
    near = belief._long[0] / belief._long[1]
    belief.begin(19)
    belief.hope(like=17)
    assert belief.value == pytest.approx(0.5 * (0.5 + near))
    belief.begin(23)
    belief.hope(like=21)
    assert belief.value == 0.5


def test_hope_shrinks_with_evidence_and_is_none_for_the_hopeless():
    belief = Belief(0.6)
    at_first = belief.hopeful - belief.value
    belief.add(0.6)
    assert 0 < belief.hopeful - belief.value < at_first
    hopeless = Belief(0.0)
    assert hopeless.hopeful == 0.0


def test_what_luck_a_gain_has_is_known_by_kind_of_text():
    gain, spread = DraftGain(), []
    for kind, noise in ((1, 0.0), (2, 1.5)):
        gain.begin(kind)
        for _ in range(20):
            gain.add(0.4 + noise)
            gain.add(0.4 - noise)
    for kind in (1, 2):
        gain.begin(kind)
        spread.append(gain.at_best - gain.value)
    assert spread[0] < 0.08 and 0.2 < spread[1] < 0.5
