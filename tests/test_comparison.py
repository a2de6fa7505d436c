"""Comparisons over seeds, talkers and pairs, against closed forms and simulation."""

import math

import numpy as np
import pytest
import scipy.stats

from eqst import comparison, metrics
from eqst.comparison import SeedNoise


def Level(seeds, error_SP, talker_P, pairs="", kind="db") -> comparison.Level:  # noqa: N802
    return comparison.Level(seeds, error_SP, talker_P, pairs, kind)


def test_seed_noise_is_the_pooled_standard_deviation() -> None:
    groups = [np.array([1.0, 2.0, 4.0]), np.array([7.0]), np.array([0.5, 0.1])]
    found = comparison.seed_noise(groups)
    squares = 2 * np.var(groups[0], ddof=1) + 1 * np.var(groups[2], ddof=1)
    assert found.freedom == 3
    assert found.deviation == pytest.approx(math.sqrt(squares / 3), rel=1e-12)
    assert comparison.seed_noise([np.array([1.0])]) == SeedNoise(0.0, 0)


def test_bootstrap_of_equal_talkers_has_the_spread_of_their_means() -> None:
    """Talkers whose pairs are all alike leave the spread of drawing talkers: sd / sqrt(G)."""
    talker_means = np.random.default_rng(0).normal(2.0, 0.5, 40)
    value_P, talker_P = np.repeat(talker_means, 5), np.repeat(np.arange(40), 5)
    means_R = metrics.resampled_means(value_P, talker_P, 1, 4000)
    assert means_R.mean() == pytest.approx(talker_means.mean(), abs=0.01)
    assert means_R.std() == pytest.approx(talker_means.std() / math.sqrt(40), rel=0.06)


def test_bootstrap_weighs_talkers_by_their_pairs() -> None:
    value_P = np.array([1.0, 1.0, 1.0, 5.0])
    means_R = metrics.resampled_means(value_P, np.array(["a", "a", "a", "b"]), 0, 500)
    # Both, or one of them twice: 2, 1 and 5 are all there can be.
    assert set(np.round(means_R, 9)) == {1.0, 2.0, 5.0}


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Seeds, talkers and pairs drawn afresh 300 times: 95 % intervals hold the mean 90 to 99 %."""
    rng = np.random.default_rng(3)
    held = 0
    for trial in range(300):
        talker_P = np.repeat(np.arange(25), 8)
        content_P = np.repeat(rng.normal(0, 0.3, 25), 8) + rng.normal(0, 0.5, 200)
        seeds_S = rng.normal(0, 0.1, 4)
        error_SP = 2.0 + content_P + seeds_S[:, None]
        noise = SeedNoise(float(np.std(rng.normal(0, 0.1, 31), ddof=1)), 30)
        x = comparison.interval(error_SP, talker_P, noise, seed=trial)
        held += x["low"] <= 2.0 <= x["high"]
    assert 0.90 <= held / 300 <= 0.99


def test_gaps_are_of_common_seeds_and_the_same_pairs() -> None:
    talker_P = np.array(["a", "a", "b"])
    base = Level((0, 1, 2), np.arange(9.0).reshape(3, 3), talker_P)
    level = Level((2, 0), np.full((2, 3), 10.0), talker_P)
    np.testing.assert_array_equal(
        comparison.gaps(level, base), [[10 - 6, 10 - 7, 10 - 8], [10 - 0, 10 - 1, 10 - 2]]
    )
    with pytest.raises(ValueError, match="seeds and pairs that both have"):
        comparison.gaps(Level((5,), np.zeros((1, 3)), talker_P), base)
    with pytest.raises(ValueError, match="seeds and pairs that both have"):
        comparison.gaps(Level((0,), np.zeros((1, 3)), np.array(["a", "b", "b"])), base)


def test_holm_by_hand() -> None:
    # Sorted 0.01, 0.03, 0.04: times 3, 2, 1, never falling.
    assert comparison.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert comparison.holm([0.9, 0.8]) == [1.0, 1.0]
    assert comparison.holm([]) == []


def test_p_is_the_paired_t_test_where_one_level_is_compared() -> None:
    """Pooled over one comparison the noise is that comparison's own: scipy's paired t-test."""
    rng = np.random.default_rng(5)
    talker_P = np.repeat(np.arange(10), 4)
    base = Level((0, 1, 2, 3, 4), rng.normal(2, 0.3, (5, 40)), talker_P)
    level = Level((0, 1, 2, 3, 4), base.error_SP + rng.normal(0.05, 0.3, (5, 40)), talker_P)
    tables = comparison.tables({"x": {"base": {"c": base}, "other": {"c": level}}})
    wanted = scipy.stats.ttest_rel(level.error_SP.mean(axis=1), base.error_SP.mean(axis=1))
    found = tables["x"][1]["differences"]["c"]
    assert found["p"] == pytest.approx(wanted.pvalue, rel=1e-9)
    assert found["p_holm"] == found["p"]
    assert found["mean"] == pytest.approx(level.error_SP.mean() - base.error_SP.mean())
    assert "c" not in tables["x"][0]["differences"]


def test_what_is_not_comparable_is_shown_and_not_compared() -> None:
    talker_P = np.array(["a", "a", "b", "b"])
    base = Level((0, 1), np.array([[1.0, 2, 3, 4], [1.1, 2.2, 3, 4]]), talker_P)
    rows = {
        "base": {"c": base},
        "other labels": {"c": base._replace(error_SP=base.error_SP + 1, pairs="practical")},
        "other seeds": {"c": base._replace(seeds=(2, 3))},
        "same": {"c": base._replace(error_SP=base.error_SP + 1)},
    }
    table = comparison.tables({"f": rows})["f"]
    assert [list(row["differences"]) for row in table] == [[], [], [], ["c"]]
    assert all("c" in row["figures"] for row in table)


def test_kinds_that_vary_otherwise_have_their_own_noise() -> None:
    rng = np.random.default_rng(5)
    talker_P = np.repeat(np.arange(10), 4)

    def level(scale: float, kind: str, seeds: int = 5) -> dict[str, comparison.Level]:
        noise_S = scale * rng.standard_normal(seeds)
        errors = np.full((seeds, 40), 2.0) + noise_S[:, None]
        return {"c": Level(tuple(range(seeds)), errors, talker_P, kind=kind)}

    rows = {"db": level(0.01, "db"), "more": level(0.01, "db"), "one": level(0.01, "db", 1)}
    rows |= {"linear": level(0.5, "linear"), "odd": level(0.1, "odd", 1)}
    table = {row["level"]: row for row in comparison.tables({"f": rows})["f"]}
    width = {
        name: row["differences"]["c"]["high"] - row["differences"]["c"]["low"]
        for name, row in table.items()
        if name != "db"
    }
    assert width["more"] < width["one"] < 0.3 < width["linear"]
    assert width["odd"] > 0.3  # nothing is known of its kind, so it has the noise of all


def test_a_level_of_one_seed_gets_the_noise_of_the_others() -> None:
    rng = np.random.default_rng(8)
    talker_P = np.repeat(np.arange(10), 4)

    def level(seeds: tuple[int, ...], shift: float) -> dict[str, comparison.Level]:
        noise_S = rng.normal(0, 0.2, len(seeds))
        return {
            "c": Level(seeds, np.full((len(seeds), 40), 2.0) + shift + noise_S[:, None], talker_P)
        }

    rows = {"base": level((0, 1, 2), 0), "many": level((0, 1, 2), 0), "one": level((0,), 0)}
    tables = comparison.tables({"f": rows})["f"]
    one, many = (tables[i]["differences"]["c"] for i in (2, 1))
    # No talker or pair differs, so the width is the seeds' alone. Of one seed: of two runs that
    # share nothing, by the deviation of both levels; of three: by the deviation of the gaps.
    means = [rows[name]["c"].error_SP.mean(axis=1) for name in ("base", "many")]
    own = math.sqrt(sum(np.var(x, ddof=1) for x in means) / 2)
    gap = np.std(means[1] - means[0], ddof=1)
    for x, deviation, freedom in ((one, math.sqrt(2) * own, 4), (many, gap / math.sqrt(3), 2)):
        wanted = 2 * deviation * scipy.stats.t.ppf(0.975, freedom)
        assert x["high"] - x["low"] == pytest.approx(wanted, rel=0.1)
    t = abs(one["mean"]) / (math.sqrt(2) * own)
    assert one["p"] == pytest.approx(2 * scipy.stats.t.sf(t, 4), rel=1e-6)
    text = comparison.table_text({"f": tables}, ["c", "absent"])
    assert "one (1)" in text and f"{one['mean']:+.2f}" in text
