"""What the parts of a round are believed to cost, from measurements of many kinds."""

from __future__ import annotations

import pytest
import torch

from treespec.costs import MeasuredCosts, RunningTime, VerifyCosts, never_falling, row_shares
from treespec.whatif import RoundCosts


def test_a_cost_shrugs_off_an_outlier_and_prefers_settled_times():
    time = RunningTime()
    time.add(9.0, settled=False)
    time.add(30.0, settled=False)
    assert time.value == 9.0
    time.add(4.0)
    assert time.value == 4.0, "the first settled time replaces what came before"
    time.add(5.0)
    time.add(4.2)
    time.add(400.0)
    assert 4.0 < time.value <= 4.5
    time.add(1.0, settled=False)
    assert time.value > 4.0


def test_the_first_of_a_few_measurements_may_find_cold_code():
    """A draft whose only measurement was dear would never be asked again."""
    time = RunningTime()
    time.add(20.0)
    assert time.expected(3.0) == 3.0 and time.expected(30.0) == 20.0
    time.add(4.0)
    assert time.value == 4.0 and time.expected(3.0) == 3.0
    time.add(5.0)
    assert time.value == time.expected(3.0) == 4.0


def test_no_part_of_a_round_takes_less_than_no_time():
    """What others left of a round may be negative; it would shrink for ever."""
    time, verify = RunningTime(), VerifyCosts(1)
    for _ in range(200):
        time.add(-0.5)
        verify.add(1, -0.2)
    assert 0.0 < time.value <= 0.01 and 0.0 < verify.at(1) <= 0.01
    for _ in range(200):
        time.add(0.3)
    assert time.value == pytest.approx(0.3, rel=0.1)


def test_what_lookups_seem_to_cost_gives_way_to_the_first_level_beside_them():
    """Rounds with lookups alone are few, and find cold code."""
    generator = torch.Generator().manual_seed(0)
    costs = MeasuredCosts(1, RoundCosts({1: 4.0}, 0.5, {3: 0.5}, 1.2, 0.3))
    for levels in (1 + torch.randint(0, 6, (300,), generator=generator)).tolist():
        costs.add_levels(levels, 0.5 + 0.4 + (levels - 1) * 0.25, True, costs.lookup, doubted=True)
    assert costs.level.value == pytest.approx(0.25, rel=0.15)
    assert costs.root.value >= costs.level.value
    assert costs.lookup.value + costs.root.value == pytest.approx(0.9, rel=0.1)
    known, costs.root.value = costs.lookup.value, 0.1
    costs.add_levels(2, known + 0.35, True, costs.lookup)
    assert costs.lookup.value == known, "measured lately"
    costs.add_levels(2, known + 0.35, True, costs.lookup, doubted=True)
    assert costs.lookup.value < known


def test_rounds_of_different_depth_tell_the_first_level_of_a_draft_from_further_ones():
    generator = torch.Generator().manual_seed(0)
    depths = (2 + torch.randint(0, 4, (300,), generator=generator)).tolist()
    for believed in ((2.0, 2.0), (0.5, 3.0)):
        costs = MeasuredCosts(1, RoundCosts({1: 4.0}, believed[0], {4: believed[1]}, 0.5, 0.3))
        for at, levels in enumerate(depths):
            busy = 40.0 if at % 50 == 49 else 0.0
            costs.add_levels(levels, 1.6 + (levels - 1) * 1.1 + busy, True)
        assert costs.root.value == pytest.approx(1.6, rel=0.2)
        assert costs.level.value == pytest.approx(1.1, rel=0.15)
        costs.add_levels(3, 500.0, settled=False)
        assert costs.level.value < 1.3


def test_verification_costs_between_beyond_and_before():
    costs = VerifyCosts(1)
    assert costs.at(8) is None
    costs.add(8, 6.0)
    assert costs.at(1) < 6.0 < costs.at(24), "one size alone says something of the others"
    costs.add(24, 9.0)
    assert costs.at(16) == pytest.approx(7.5)
    for _ in range(10):
        costs.add(8, 6.0)
    for _ in range(60):
        costs.add(8, 12.0)
    assert costs.at(24) > 13.0, "what slows one size slows all"


def test_one_lucky_measurement_of_a_width_is_no_change_of_pace():
    """Plain decoding would seem slow, and drafting worth its time."""
    costs = VerifyCosts(1)
    for _ in range(20):
        costs.add(1, 5.0)
    costs.add(8, 8.0)
    for _ in range(20):
        costs.add(8, 11.0)
    assert costs.at(1) == pytest.approx(5.0, rel=0.05)
    assert costs.at(8) == pytest.approx(11.0, rel=0.05)


def test_a_width_measured_in_a_busy_moment_is_tried_again_some_texts_later():
    costs = VerifyCosts(1)
    for _ in range(20):
        costs.add(1, 5.0)
        costs.add(16, 12.0)
    costs.add(8, 40.0)
    for _ in range(40):
        costs.begin()
        costs.add(1, 5.0)
        costs.add(16, 12.0)
    assert costs.at(8) < 13.0
    assert costs.at(8) > 6.0, "doubt makes no width as cheap as one node"
    assert costs.at(16) == pytest.approx(12.0) and costs.at(1) == pytest.approx(5.0)
    cheap = VerifyCosts(1, {1: 5.0})
    cheap.add(64, 5.2)
    cheap.begin()
    assert 5.0 <= cheap.at(64) <= 5.2, "what was measured to be cheap stays so"


def test_a_width_no_longer_in_use_is_tried_again_some_texts_later():
    """However often it was measured: what was not tried for long may have become cheaper."""
    costs = VerifyCosts(1)
    for _ in range(200):
        for size, milliseconds in ((1, 5.0), (4, 6.0), (8, 12.0)):
            costs.add(size, milliseconds)
    found = []
    for _ in range(30):
        costs.begin()
        costs.add(4, 6.0)
        found.append(costs.at(8))
    assert found[0] == found[1] == pytest.approx(12.0)
    assert found[-1] < 7.0


def test_a_width_that_was_measured_cold_at_first_is_soon_known():
    costs = VerifyCosts(1)
    for _ in range(20):
        costs.add(1, 5.0)
    costs.add(8, 30.0)
    for _ in range(10):
        costs.add(8, 10.0)
    assert costs.at(8) < 12.5


def test_a_width_in_seldom_use_is_not_taken_for_cheap():
    """Doubt that outlasts measurements would make wide trees seem to pay."""
    costs = VerifyCosts(1)
    for _ in range(20):
        costs.add(1, 4.0)
    costs.add(16, 11.0)
    believed = []
    for text in range(60):
        costs.begin()
        for _ in range(20):
            costs.add(1, 4.0)
        if text % 3 == 0:
            believed.append(costs.at(16))
            costs.add(16, 12.0 if text % 2 else 10.0)
            assert costs.at(16) > 10.0, "a measurement ends the doubt"
    assert sum(believed[3:]) / len(believed[3:]) == pytest.approx(10.7, rel=0.05)
    assert costs.at(1) == pytest.approx(4.0, rel=0.02), "nor do others seem dearer"


def test_widths_in_use_leave_the_costs_of_others_alone():
    """Texts of wide verifications and of plain decoding by turns, with busy moments: widths that
    are not in use would seem dearer with every turn if all times could shrink as the pace grows."""
    costs = VerifyCosts(1)
    for _ in range(50):
        for size, milliseconds in ((1, 4.0), (8, 5.0), (16, 6.0)):
            costs.add(size, milliseconds)
    for turn in range(40):
        for size, milliseconds in ((16, 6.6 if turn % 2 else 6.0), (1, 4.0)):
            for nth in range(30):
                costs.add(size, milliseconds * (1.0 if nth % 5 else 1.4))
    assert costs.at(8) / costs.at(1) == pytest.approx(1.25, rel=0.02)


def test_plain_decoding_takes_no_longer_than_a_wider_verification():
    costs = VerifyCosts(1, {1: 60.0, 8: 15.0})
    assert costs.at(1) == 15.0
    costs.begin()
    assert costs.at(8) <= 15.0, "nor does it make others dearer"
    costs.add(1, 5.0)
    assert costs.at(1) == pytest.approx(5.0) and costs.at(8) == pytest.approx(15.0)


def test_plain_decoding_measured_in_a_busy_moment_is_measured_again_some_texts_later():
    """Where it seems dear every draft seems to gain, so that no round would tell."""
    costs = VerifyCosts(1)
    for _ in range(20):
        costs.add(1, 14.0)
        costs.add(8, 15.0)
    for _ in range(12):
        costs.begin()
        for _ in range(20):
            costs.add(8, 15.0, drafted=True)
    assert costs.at(1) < 7.0
    costs.add(1, 5.0)
    assert costs.at(1) == pytest.approx(5.0), "what was doubted gives way at once"
    costs.add(1, 50.0)
    assert costs.at(1) < 10.0, "and is then believed"


def test_plain_decoding_that_is_measured_in_every_text_is_not_doubted():
    costs = VerifyCosts(1)
    for _ in range(20):
        costs.add(1, 5.0)
    for _ in range(12):
        costs.begin()
        costs.add(1, 5.0)
    few = VerifyCosts(1)
    few.add(1, 5.0)
    for each in (costs, few):
        each.begin()
        assert each.at(1) == pytest.approx(5.0)


def test_of_two_widths_the_one_that_was_measured_more_often_is_believed():
    """More nodes cannot cost less, since fewer could be verified by the same forward."""
    assert never_falling({1: 4.0, 8: 7.0, 16: 5.0}, {1: 9.0, 8: 1.0, 16: 9.0}) == {
        1: 4.0,
        8: pytest.approx(5.2),
        16: pytest.approx(5.2),
    }
    rising = {1: 4.0, 8: 5.0, 16: 6.0}
    assert never_falling(rising, dict.fromkeys(rising, 1.0)) == rising
    falling = {1: 6.0, 4: 5.0, 8: 4.0}
    assert set(never_falling(falling, dict.fromkeys(falling, 1.0)).values()) == {5.0}


def test_unrecorded_forwards_are_only_believed_until_there_is_better():
    costs = VerifyCosts(1)
    costs.add(8, 40.0, settled=False)
    costs.add(8, 11.0, settled=False)
    assert costs.at(8) == pytest.approx(11.0)
    costs.add(12, 5.0)
    assert costs.at(12) == pytest.approx(5.0) and costs.at(8) < 5.0


def test_a_guess_stands_in_for_a_cost_that_is_not_settled():
    """The first asks of a draft take in recordings; they must not be the last."""
    time = RunningTime()
    assert time.expected(2.0) == 2.0
    time.add(30.0, settled=False)
    assert time.expected(2.0) == 2.0 and time.expected(40.0) == 30.0
    for _ in range(3):
        time.add(3.0)
    assert time.expected(2.0) == 3.0


def test_plain_decoding_that_never_settles_does_not_hold_everything_up():
    costs = MeasuredCosts(1)
    waited = 0
    while costs.needs_plain:
        costs.verify.add(1, 20.0, settled=False)
        costs.add_rate(1.0, 20.0)
        waited += 1
    assert 0 < waited < 30


def test_tokens_of_a_sequence_that_is_ahead_are_worth_little():
    assert row_shares([50], 0.6).tolist() == [1.0]
    assert row_shares([80, 80, 80, 80], 0.6) == pytest.approx([0.25] * 4)
    ahead, *others, behind = row_shares([20, 60, 60, 100], 0.6)
    assert ahead == pytest.approx(0.1, abs=0.01) and behind > 0.55
    assert ahead + sum(others) + behind == pytest.approx(1.0)
    assert row_shares([20, 100], 0.0) == pytest.approx([0.5, 0.5]), "no part of a round is shared"
    assert row_shares([20, 100], 1.0)[1] > 0.99, "sequences beyond one are for free"


def test_fixed_part_of_a_round_from_costs_of_one_and_of_several():
    alone, four = MeasuredCosts(1), MeasuredCosts(4)
    assert 0 < four.fixed_share(alone) < 1, "a guess before both are known"
    alone.verify.add(1, 6.0)
    four.verify.add(1, 9.0)
    assert four.fixed_share(alone) == pytest.approx(5.0 / 9.0)


def test_a_verification_after_a_draft_does_not_make_plain_decoding_dearer():
    for drafted in (False, True):
        costs = VerifyCosts(1, {1: 4.0, 8: 5.0})
        for _ in range(20):
            costs.add(8, 6.0, drafted=drafted)
        assert (costs.at(1) == 4.0) == drafted
        assert costs.at(8) > 5.5
