"""Which row a sample is follows from its number alone, keeps to the shares, and repeats nothing within an epoch."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mamba_pretrain.data.mixture import RESOLUTION, Mixture, Schedule, Stage, shares_by_size
from tests.helpers.order import window_at

NAMES = ["code", "web", "wiki"]
L = 64
ROWS = [{L: 7}, {L: 40}, {L: 11}]


def shares(*weights: int) -> tuple[Fraction, ...]:
    return tuple(Fraction(weight, sum(weights)) for weight in weights)


def mixture(*stages: tuple[int, int, tuple[Fraction, ...]], seed: int = 5) -> Mixture:
    """Stages of (first sample, seq_len, shares)."""
    return Mixture(NAMES, [Stage(first, seq_len, L, share) for first, seq_len, share in stages], ROWS, seed)


STAGES = [(0, 16, shares(1, 2, 3)), (170, 64, shares(3, 1, 0)), (230, 32, shares(1, 5, 1)), (400, 64, shares(1, 1, 1))]


@given(st.lists(st.integers(0, 400), min_size=1, max_size=9).filter(any), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_every_prefix_holds_each_source_to_within_one_sample(weights: list[int], periods: int) -> None:
    schedule = Schedule(shares(*weights))
    sources, ranks = schedule.at(np.arange((periods + 1) * schedule.period))
    prefix = np.arange(len(sources) + 1)
    for k, weight in enumerate(weights):
        counts = np.concatenate(([0], np.cumsum(sources == k)))
        assert (abs(counts * sum(weights) - prefix * weight) < sum(weights)).all()
        assert (ranks[sources == k] == np.arange(counts[-1])).all()
        assert schedule.taken(len(sources) // 2)[k] == counts[len(sources) // 2]


def test_a_period_of_a_hundred_thousand_is_scheduled() -> None:
    weights = [50_001, 30_000, 19_990, 9]
    sources, _ = Schedule(shares(*weights)).at(np.arange(100_000))
    assert np.bincount(sources).tolist() == weights


def test_one_source_alone_is_in_the_order_of_its_dataset() -> None:
    alone = Mixture(["any"], [Stage(0, L, L, shares(1))], [{L: 13}], seed=3)
    places = alone.locate(np.arange(40))
    assert list(zip(places.epochs, places.rows, strict=True)) == [window_at(i, 13, 3) for i in range(40)]


def test_a_run_that_began_with_one_source_keeps_its_order_when_others_come_in() -> None:
    places = mixture((0, L, shares(0, 1, 0)), (100, L, shares(1, 1, 1))).locate(np.arange(100))
    assert places.rows.tolist() == [window_at(i, 40, 5)[1] for i in range(100)]


def test_the_place_of_a_sample_does_not_depend_on_which_others_are_asked_for() -> None:
    whole = mixture(*STAGES).locate(np.arange(600))
    samples = np.random.default_rng(0).permutation(600)[:250]
    for found, expected in zip(mixture(*STAGES).locate(samples), whole, strict=True):
        assert (found == expected[samples]).all()
    assert whole.stages.tolist() == [sum(i >= stage[0] for stage in STAGES) - 1 for i in range(600)]


def test_nothing_of_a_source_comes_twice_before_all_of_it_came_once() -> None:
    """Counted in the shortest rows. Only what stages of shorter rows leave of their last coarse row is missing."""
    mixed, n, unit = mixture(*STAGES), 700, 16
    places = mixed.locate(np.arange(n))
    seen: dict[tuple[int, int], list[int]] = defaultdict(list)
    latest = [0] * len(NAMES)
    for stage, source, epoch, row in zip(*places, strict=True):
        assert epoch >= latest[source], "epochs of a source follow each other"
        latest[source] = epoch
        units = STAGES[stage][1] // unit
        seen[source, epoch] += range(row * units, (row + 1) * units)
    assert max(latest) >= 3
    for (source, _), units in seen.items():
        assert len(set(units)) == len(units)
        assert max(units) < ROWS[source][L] * L // unit
    for source, left_over in enumerate(mixed.left_over(n)):
        missing = sum(ROWS[source][L] * L // unit - len(seen[source, epoch]) for epoch in range(latest[source]))
        assert missing * unit <= left_over


def test_no_source_is_read_more_than_whole_and_an_unread_one_not_at_all() -> None:
    """Two grids of 8 and 5 rows, one of them read more than once."""
    stages = [Stage(0, L, L, (Fraction(1), Fraction(0))), Stage(20, 2 * L, 2 * L, (Fraction(1), Fraction(0)))]
    mixed = Mixture(["a", "b"], stages, [{L: 8, 2 * L: 5}] * 2, 0)
    for samples, share in ((0, 0), (4, Fraction(1, 2)), (20, 1), (22, 1), (40, 1)):
        assert mixed.distinct(samples) == [share, 0]
    assert mixed.epochs(40) == [Fraction(20, 8) + 4, 0]
    assert [len(grids) for grids in mixed.grids(40)] == [2, 0]
    short = Mixture(
        ["a"], [Stage(0, L, L, (Fraction(1),)), Stage(4, 2 * L, 2 * L, (Fraction(1),))], [{L: 8, 2 * L: 5}], 0
    )
    assert short.distinct(6) == [1 - Fraction(1, 2) * Fraction(3, 5)]


def test_what_a_stage_of_shorter_rows_leaves_over_is_counted_from_its_end_on() -> None:
    stages = [
        Stage(0, 16, L, shares(1)),
        Stage(6, L, L, shares(1)),
        Stage(8, 32, L, shares(1)),
        Stage(9, L, L, shares(1)),
    ]
    mixed = Mixture(["any"], stages, [{L: 100}], seed=1)
    left_over = 2 * L - 6 * 16
    found = {samples: mixed.left_over(samples) for samples in (0, 5, 6, 7, 8, 9)}
    assert found == {0: [0], 5: [0], 6: [left_over], 7: [left_over], 8: [left_over], 9: [left_over + 32]}


def test_the_pieces_of_a_coarse_row_are_scattered() -> None:
    mixed = Mixture(["any"], [Stage(0, 16, L, shares(1)), Stage(400, L, L, shares(1))], [{L: 100}], seed=1)
    rows = mixed.locate(np.arange(400)).rows
    assert sorted(rows.tolist()) == list(range(400)), "a stage of one epoch's length reads all of it"
    assert (abs(np.diff(rows)) == 1).mean() < 0.05


@pytest.mark.parametrize(
    "later",
    [
        [STAGES[0], STAGES[1], (230, 64, shares(1, 0, 0))],
        [STAGES[0], STAGES[1]],
        [STAGES[0], STAGES[1], (231, 16, shares(1, 5, 1)), (300, 32, shares(9, 1, 1))],
    ],
)
def test_later_stages_do_not_change_what_came_before(later: list[tuple[int, int, tuple[Fraction, ...]]]) -> None:
    samples = np.arange(230)
    for found, expected in zip(mixture(*later).locate(samples), mixture(*STAGES).locate(samples), strict=True):
        assert (found == expected).all()


def test_a_last_stage_of_shorter_rows_has_the_order_it_has_however_long_the_run_is() -> None:
    """It has no end, and so permutes its pieces within whole epochs."""
    rows = mixture((0, L, shares(1, 1, 0)), (20, 16, shares(0, 1, 0))).locate(np.arange(20, 20 + 30 * 4)).rows
    assert len(set(rows.tolist())) == 30 * 4, "ten coarse rows of forty were read before it"
    assert abs(rows[:10] - rows[0]).max() > 4


def test_packs_of_different_lengths_have_epochs_of_their_own() -> None:
    stages = [Stage(0, 32, 32, shares(1)), Stage(6, 64, 64, shares(1)), Stage(9, 32, 32, shares(1))]
    mixed = Mixture(["any"], stages, [{32: 8, 64: 5}], seed=2)
    places = mixed.locate(np.arange(12))
    assert places.rows[6:9].tolist() == [window_at(i, 5, 2)[1] for i in range(3)]
    assert places.rows[[*range(6), 9, 10]].tolist() == [window_at(i, 8, 2)[1] for i in range(8)]
    assert mixed.epochs(12) == [Fraction(9, 8) + Fraction(3, 5)]


def test_counts_by_formula_are_the_counts_one_by_one() -> None:
    mixed = mixture(*STAGES)
    places = mixed.locate(np.arange(700))
    for samples in (0, 1, 170, 171, 333, 700):
        for s in range(len(STAGES)):
            here = places.sources[:samples][places.stages[:samples] == s]
            assert mixed.taken(samples)[s] == np.bincount(here, minlength=3).tolist()
    tokens = [sum(STAGES[s][1] for s in places.stages[places.sources == k]) for k in range(3)]
    assert mixed.epochs(700) == [Fraction(n, L * rows[L]) for n, rows in zip(tokens, ROWS, strict=True)]


def test_seeds_and_names_decide_the_order() -> None:
    samples = np.arange(100)
    one = mixture((0, L, shares(1, 1, 1))).locate(samples).rows
    assert (one != mixture((0, L, shares(1, 1, 1)), seed=6).locate(samples).rows).any()
    renamed = Mixture(["a", "b", "c"], [Stage(0, L, L, shares(1, 1, 1))], ROWS, 5).locate(samples).rows
    assert (one != renamed).any()


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=20))
def test_shares_by_size_are_the_nearest_on_their_grid(sizes: list[int]) -> None:
    found = shares_by_size(sizes)
    assert sum(found) == 1 and min(found) >= Fraction(1, RESOLUTION)
    if min(sizes) * RESOLUTION >= sum(sizes):
        for share, size in zip(found, sizes, strict=True):
            assert abs(share - Fraction(size, sum(sizes))) < Fraction(1, RESOLUTION)
