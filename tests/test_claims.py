"""Statistics of latents against closed forms, and verdicts against statistics made for them."""

import copy
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eqst import claims, eq, latentstats, predictor, trials

RATE = 44100


def gaussian(rows: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, size))


# Statistics of vectors


def test_nullified_counts_by_each_coefficients_own_deviation():
    std_L = np.array([1.0, 100.0, 1e-6, 0.0, 0.0])
    rows_nL = np.array([[0.9e-3, 0.05, 2e-9, 0.0, 1e-20], [-1.1e-3, -0.2, 0.5e-9, 0.0, 3.0]])
    np.testing.assert_allclose(latentstats.nullified(rows_nL, std_L), [3 / 5, 2 / 5])


def test_nullified_finds_the_share_that_was_zeroed_and_what_chance_adds():
    rows_nL = 7.0 * gaussian(40, 5000)
    away_L = np.arange(5000) < 1500
    zeroed_nL = np.where(away_L[None, :], 0.0, rows_nL)
    share_n = latentstats.nullified(zeroed_nL, latentstats.spread(rows_nL).std_L)
    chance = math.erf(1e-3 / math.sqrt(2.0))
    assert latentstats.GAUSSIAN_NULLIFIED == pytest.approx(chance, rel=1e-4)
    np.testing.assert_allclose(share_n.mean(), 0.3 + 0.7 * chance, atol=1e-4)


def test_norm_and_sparsity_of_known_vectors():
    size = 400
    one_hot_L, equal_L = np.eye(size)[3] * 5.0, np.full(size, -0.2)
    block_L = np.where(np.arange(size) < 100, 2.0, 0.0)
    rows_nL = np.stack([one_hot_L, equal_L, block_L, np.zeros(size)])
    np.testing.assert_allclose(latentstats.norms(rows_nL), [5.0, 4.0, 20.0, 0.0])
    # A quarter of equal magnitudes: l1 / l2 = sqrt(100), so (20 - 10) / 19.
    np.testing.assert_allclose(latentstats.sparsity(rows_nL), [1.0, 0.0, 10 / 19, 1.0], atol=1e-12)
    many = latentstats.sparsity(gaussian(50, 2560))
    expected = (1 - math.sqrt(2 / math.pi)) * math.sqrt(2560) / (math.sqrt(2560) - 1)
    np.testing.assert_allclose(many.mean(), expected, atol=5e-3)


def test_numeric_range_of_known_values():
    rows_nL = np.arange(1001.0).reshape(7, 143) - 500.0
    found = latentstats.numeric_range(rows_nL)
    assert (found["min"], found["p0.1"], found["p50"]) == (-500.0, -499.0, 0.0)
    assert (found["p99.9"], found["max"]) == (pytest.approx(499.0), 500.0)
    assert found["rms"] == pytest.approx(math.sqrt(500 * 501 / 3))
    assert found["dynamic_range_db"] == pytest.approx(20 * math.log10(500 / 250), abs=0.01)
    # The median and the 99.9th percentile of |z|: 0.6745 and 3.2905.
    normal = latentstats.numeric_range(gaussian(200, 2000))
    assert normal["dynamic_range_db"] == pytest.approx(20 * math.log10(3.2905 / 0.6745), abs=0.1)
    mostly_zero = np.zeros((10, 100))
    mostly_zero[:, :2] = 3.0
    assert latentstats.numeric_range(mostly_zero)["dynamic_range_db"] == latentstats.MOST_DB
    assert latentstats.numeric_range(np.zeros((2, 2)))["dynamic_range_db"] == 0.0


@pytest.mark.parametrize(("rows", "size"), [(4000, 12), (300, 900)])
def test_participation_ratio_counts_equal_directions(rows, size):
    """k orthogonal directions of equal variance count k; unequal ones what the formula says."""
    basis_kL = np.linalg.qr(gaussian(size, 5, seed=1))[0].T
    source_nk = np.linalg.qr(gaussian(rows, 6, seed=2) - gaussian(rows, 6, seed=2).mean(0))[0]
    source_nk = np.linalg.qr(source_nk - source_nk.mean(axis=0))[0][:, :5]
    flat = latentstats.participation_ratio(10.0 + source_nk @ basis_kL)
    assert flat == pytest.approx(5.0, rel=1e-6)
    scale_k = np.array([3.0, 2.0, 1.0, 1.0, 0.0])
    steep = latentstats.participation_ratio((source_nk * scale_k) @ basis_kL)
    assert steep == pytest.approx((9 + 4 + 1 + 1) ** 2 / (81 + 16 + 1 + 1), rel=1e-6)
    assert latentstats.participation_ratio(np.ones((rows, size))) == 0.0


def test_mean_share_has_no_bias_from_few_rows():
    """Over many small samples its mean is the true share, 0 and 0.25 here."""
    for mean, share in ((0.0, 0.0), (1.0 / math.sqrt(3.0), 0.25)):
        found = [latentstats.mean_share(mean + gaussian(8, 50, seed)) for seed in range(400)]
        np.testing.assert_allclose(np.mean(found), share, atol=4e-3)
    assert latentstats.mean_share(np.zeros((3, 4))) == 0.0
    assert latentstats.mean_share(np.ones((3, 4))) == pytest.approx(1.0)


def test_linear_probe_reads_what_is_linear_and_nothing_else():
    """Noiseless linear labels, labels of which half the variance is noise, and noise alone."""
    source_nL, source_mL = gaussian(600, 40, 1), gaussian(500, 40, 2)
    weight_LF = gaussian(40, 12, 3)
    noise_n, noise_m = gaussian(600, 12, 4), gaussian(500, 12, 5)
    signal_n, signal_m = source_nL @ weight_LF, source_mL @ weight_LF
    train_nL, test_mL = (
        np.concatenate([1e-3 * x + 5.0, np.full((len(x), 3), 7.0)], axis=1)  # three are dead
        for x in (source_nL, source_mL)
    )
    probe = latentstats.linear_probe
    assert probe(train_nL, signal_n, test_mL, signal_m) == pytest.approx(1.0, abs=1e-4)
    size = np.sqrt(np.mean(signal_n**2))
    half = probe(train_nL, signal_n + size * noise_n, test_mL, signal_m + size * noise_m)
    # 40 of 600 rows are used up: the readout errs by 40 / 560 of the noise besides the noise.
    assert half == pytest.approx(0.5 * (1 - 40 / 560), abs=0.03)
    assert abs(probe(train_nL, noise_n, test_mL, noise_m)) < 0.03
    flat_nL = np.ones((600, 40))
    assert abs(probe(flat_nL, noise_n, np.ones((500, 40)), noise_m)) < 0.03


def test_sensitivity_of_a_linear_predictor_is_its_jacobian():
    """Against the closed form, and the change by 1 % against perturbing at random."""
    rng = np.random.default_rng(3)
    read_PL, draw_FP = rng.standard_normal((4, 90)), rng.standard_normal((30, 4)) + 1.0
    std_L, fed_nL = rng.uniform(0.0, 2.0, 90), rng.standard_normal((21, 90)) * 3.0
    found = latentstats.sensitivity(
        lambda fed_L: jnp.asarray(read_PL, jnp.float32) @ fed_L + 3.0,
        lambda said_P: jnp.asarray(draw_FP, jnp.float32) @ said_P,
        fed_nL,
        std_L,
        at_once=8,
    )
    slope_FL = draw_FP @ read_PL
    slope_FL -= slope_FL.mean(axis=0)
    spread_db = np.sqrt(np.mean(np.sum((slope_FL * std_L) ** 2, axis=1)))
    np.testing.assert_allclose(found.spread_db_n, np.full(21, spread_db), rtol=1e-5)
    step_mL = rng.standard_normal((20000, 90))
    step_mL *= 0.01 * np.linalg.norm(fed_nL[5]) / np.linalg.norm(step_mL, axis=1, keepdims=True)
    measured = np.sqrt(np.mean((step_mL @ slope_FL.T) ** 2))
    np.testing.assert_allclose(found.percent_db_n[5], measured, rtol=0.02)


# Runs


def small_run(configure, scale: str, comparison: str, raw: bool = False) -> trials.Run:
    config = configure(
        {
            "features.scale": scale,
            "model.comparison": comparison,
            "model.channels": 2,
            "features.mel_bands": 16,
            "model.hidden": 8,
            "model.blocks": 0,
        }
    )
    params = predictor.init(config, jax.random.key(0))
    params["predictor"]["head"]["kernel"] *= 1000.0  # untrained, it says nearly the same of all
    mean, std = (0.0, 1.0) if raw else (-20.0, 15.0) if scale == "db" else (1.0, 3.0)
    normalisation = predictor.Normalisation(
        np.full(16, mean, np.float32), np.full(16, std, np.float32)
    )
    return trials.Run(config, params, normalisation, 4, "none")


@pytest.fixture(scope="module")
def measured(configure, corpus_of, bursts):
    """Statistics of two untrained networks."""
    runs = {
        "bl": small_run(configure, "db", "subtract"),
        "pm/0": small_run(configure, "db", "learned"),
    }
    sounds = [bursts(seed, 4.0, RATE) for seed in range(8)]
    lines: list[str] = []
    stats = claims.measure(
        runs,
        corpus_of(sounds[:4], RATE),
        corpus_of(sounds[4:], RATE),
        pairs=12,
        seconds=1.0,
        protocol="plain",
        seed=3,
        say=lines.append,
    )
    assert len(lines) == 2 and "latents of bl: " in lines[0]
    return runs, stats


@pytest.fixture(scope="module")
def heard(measured, corpus_of, bursts):
    """Latents of the pairs that the first network was measured on: test, train."""
    runs, _ = measured
    return [
        claims.hear(
            runs["bl"],
            corpus_of([bursts(seed, 4.0, RATE) for seed in seeds], RATE),
            seconds=1.0,
            protocol="plain",
            count=12,
            seed=number,
        )
        for seeds, number in ((range(4), 3), (range(4, 8), 4))
    ]


def test_figures_of_a_run_are_those_of_its_latents(measured, heard):
    _, stats = measured
    test, train = (x.latents for x in heard)
    model = stats["models"]["bl"]
    assert (model["variant"], model["normalised"], model["step"]) == ("db_mel_bl", True, 4)
    np.testing.assert_allclose(test.fed_L, test.reference_L - test.input_L, atol=1e-6)
    expected = np.mean(np.abs(test.fed_L) <= 1e-3 * train.fed_L.std(axis=0))
    assert model["fed"]["nullified"]["mean"] == pytest.approx(expected)
    norm_n = np.linalg.norm(test.fed_L, axis=1)
    square_n = (np.sum(test.input_L**2, 1) + np.sum(test.reference_L**2, 1)) / 2
    ratio = np.mean(norm_n / np.sqrt(square_n))
    assert model["fed"]["norm_ratio"]["mean"] == pytest.approx(ratio, rel=1e-5)
    both = np.concatenate([test.input_L, test.reference_L])
    assert model["extracted"]["range"]["max"] == both.max()
    assert model["extracted"]["coefficients"] == model["fed"]["coefficients"] == 32
    assert stats["talkers"] == 4 and stats["pairs"] == 12


def test_errors_with_and_without_what_is_fed(measured, heard):
    """Counted by hand from what the predictor says; the probe of a subtraction is one probe."""
    runs, stats = measured
    for name in runs:
        figures = stats["models"][name]["predictor"]
        assert figures["error_mean_db"]["mean"] > 0
        assert figures["percent_db"]["mean"] > 0 and figures["spread_db"]["mean"] > 0
    test, train = heard
    fed_nL, mean_L = test.latents.fed_L, train.latents.fed_L.mean(axis=0)
    feeds = {
        "error_db": fed_nL,
        "error_centred_db": fed_nL - mean_L,
        "error_mean_db": np.tile(mean_L, (len(fed_nL), 1)),
        "error_shuffled_db": fed_nL[[-1, *range(len(fed_nL) - 1)]],
    }
    errors = {}
    for name, rows_nL in feeds.items():
        one_F = [
            eq.response_db(
                predictor.settings_of_fed(runs["bl"].config, runs["bl"].params, row_L),
                eq.curve_grid_hz(RATE),
                sample_rate=RATE,
            )
            for row_L in rows_nL
        ]
        away_nF = np.asarray(one_F, float) - test.curve_nF
        errors[name] = np.mean(np.sqrt(np.var(away_nF, axis=1)))
        found = stats["models"]["bl"]["predictor"][name]["mean"]
        assert found == pytest.approx(errors[name], abs=1e-3), name
    assert len({round(x, 3) for x in errors.values()}) == 4
    assert stats["models"]["bl"]["predictor"]["probe_fed"] == pytest.approx(
        stats["models"]["bl"]["predictor"]["probe_difference"], abs=1e-3
    )
    pair = stats["proposed_less_baseline"]
    assert [row["normalised"] for row in pair] == [True]
    errors = [stats["models"][x]["predictor"]["error_db"]["mean"] for x in ("pm/0", "bl")]
    assert pair[0]["error_db"]["mean"] == pytest.approx(errors[0] - errors[1], abs=1e-6)


def test_paired_differences_are_of_the_means_over_seeds():
    """Talkers differ much, the models by 0.2 for every pair: the interval has no width."""
    talker_n = np.repeat(np.arange(5), 4)
    base_n = 3.0 * talker_n

    def row(variant: str, normalised: bool, shift: float):
        return variant, normalised, {"error_db": base_n + shift, "nullified": 0.1 * base_n}

    found = claims._differences(
        [
            row("db_mel_pm", True, -0.5),
            row("db_mel_bl", True, 0.0),
            row("db_mel_pm", True, 0.1),
            row("db_mel_bl", False, 7.0),
            row("other", True, 9.0),
        ],
        talker_n,
        seed=1,
    )
    assert [x["normalised"] for x in found] == [True]
    assert found[0]["error_db"] == pytest.approx({"mean": -0.2, "low": -0.2, "high": -0.2})
    assert found[0]["nullified"] == pytest.approx({"mean": 0.0, "low": 0.0, "high": 0.0})


def test_fed_alone_decides_the_error(measured, corpus_of, bursts):
    """The error from fed vectors is that of the whole network on the same pairs."""
    runs, stats = measured
    recordings = corpus_of([bursts(seed, 4.0, RATE) for seed in range(4)], RATE)
    options = dict(seconds=1.0, protocol="plain", count=12, seed=3, ask_model=True)
    trial = trials.run_trial(runs["pm/0"], recordings, with_evidence=False, **options)
    true = eq.from_unit(eq.PAPER, trial.unit_nKP.astype(np.float64))
    grid_hz = eq.curve_grid_hz(RATE)
    curves = [
        np.asarray(eq.response_db(x, grid_hz, sample_rate=RATE)) for x in (true, trial.predicted)
    ]
    expected = np.std(curves[0] - curves[1], axis=1).mean()
    found = stats["models"]["pm/0"]["predictor"]["error_db"]["mean"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_run_of_another_kind_is_measured_and_not_judged(configure):
    assert claims.variant(small_run(configure, "linear", "learned").config) == "other"
    pooled = configure({"features.kind": "pooled", "model.comparison": "direct"})
    assert claims.variant(pooled) == "other"
    assert not claims.is_normalised(small_run(configure, "db", "learned", raw=True).normalisation)


def test_too_few_pairs_are_refused(configure, corpus_of, bursts):
    recordings = corpus_of([bursts(1, 4.0, RATE)], RATE)
    with pytest.raises(ValueError, match="^pairs=7: statistics need 8 pairs or more$"):
        claims.measure({}, recordings, recordings, pairs=7, seconds=1.0, protocol="plain", seed=0)


# Verdicts


def spot(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": 0.95 * mean, "high": 1.05 * mean}


def model(variant: str, *, normalised: bool = True, **changes: float) -> dict:
    """Figures of a run for which all five claims hold, but for what is changed."""
    sound = {
        "linear_mel_bl": (0.4, 0.05, 0.05),
        "db_mel_bl": (0.02, 0.5, 0.7),
        "db_mel_pm": (0.0005, 0.6, 0.5),
    }[variant]  # nullified, norm ratio, half the extent
    share, ratio, reach = sound
    values = {
        "share": share,
        "ratio": ratio,
        "reach": reach,
        "rms": 0.3,
        "width": 20.0,
        "mean_share": 0.4 if variant == "db_mel_pm" else 0.01,
    } | changes
    return {
        "variant": variant,
        "normalised": normalised,
        "fed": {
            "nullified": spot(values["share"]),
            "norm_ratio": spot(values["ratio"]),
            "mean_share": values["mean_share"],
            "range": {
                "p0.1": -values["reach"],
                "p99.9": values["reach"],
                "rms": values["rms"],
                "dynamic_range_db": values["width"],
            },
        },
        "extracted": {"nullified": spot(0.001), "range": {"p0.1": 0.0, "p99.9": 3.0}},
        "predictor": {
            "error_db": spot(2.0),
            "error_centred_db": spot(2.5),
            "probe_fed": 0.5,
            "probe_difference": 0.4,
        },
    }


def statistics(*models: dict, less: float = -0.01, gain: float = -0.1) -> dict:
    bound = {"low": -0.001, "high": 0.001}
    kinds = sorted({x["normalised"] for x in models})
    return {
        "nullified_by_chance": latentstats.GAUSSIAN_NULLIFIED,
        "models": {str(i): x for i, x in enumerate(models)},
        "proposed_less_baseline": [
            {
                "normalised": kind,
                **{
                    key: {"mean": value, **{k: value + x for k, x in bound.items()}}
                    for key, value in (("nullified", less), ("error_db", gain))
                },
            }
            for kind in kinds
        ],
    }


def all_three(**changes: float) -> list[dict]:
    return [model(name, **changes) for name in ("linear_mel_bl", "db_mel_bl", "db_mel_pm")]


def given(stats: dict) -> list[str]:
    return [row["verdict"] for row in claims.verdicts(stats)]


def test_every_claim_can_be_confirmed_and_refuted():
    linear, bl, pm = all_three()
    good = statistics(linear, model("db_mel_bl", reach=0.7), pm)
    assert given(good) == ["confirmed"] * 5
    rows = claims.verdicts(good)
    assert [row["claim"] for row in rows] == [1, 2, 3, 4, 5]
    assert "40.00 % (38.00-42.00)" in rows[1]["why"] and "14 times" in rows[2]["why"]
    bad = statistics(
        model("linear_mel_bl", share=0.001, ratio=1.4, reach=5.0),
        model("db_mel_bl", share=0.001, ratio=1.4),
        model("db_mel_pm", rms=1e-4, width=90.0),
        less=0.02,
        gain=0.1,
    )
    assert given(bad) == ["refuted"] * 5


@pytest.mark.parametrize(
    ("claim", "stats"),
    [
        (1, lambda: statistics(*all_three()[:1], model("db_mel_bl", ratio=1.0), all_three()[2])),
        (2, lambda: statistics(model("linear_mel_bl", ratio=0.3), *all_three()[1:])),
        (2, lambda: statistics(model("linear_mel_bl", share=0.09), *all_three()[1:])),
        (3, lambda: statistics(model("linear_mel_bl", reach=0.1), *all_three()[1:])),
        (3, lambda: statistics(all_three()[0], model("db_mel_bl", share=8e-4), all_three()[2])),
        (4, lambda: statistics(*all_three()[:2], model("db_mel_pm", width=41.0))),
        (4, lambda: statistics(*all_three()[:2], model("db_mel_pm", reach=101.0))),
        (5, lambda: statistics(*all_three(), gain=0.0005)),
        (5, lambda: statistics(*all_three(), less=0.0)),
        (5, lambda: statistics(*all_three()[:2], model("db_mel_pm", mean_share=0.04))),
    ],
)
def test_what_fails_one_test_of_a_rule_is_partly_confirmed(claim, stats):
    assert given(stats())[claim - 1] == "partly"


def test_seeds_are_judged_together_by_their_widest_bounds():
    seeds = [model("linear_mel_bl", ratio=0.05), model("linear_mel_bl", ratio=0.18)]
    rows = claims.verdicts(statistics(*seeds, *all_three()[1:]))
    assert rows[1]["verdict"] == "partly"  # 0.115 in the mean
    assert "0.12 (0.05 to 0.19)" in rows[1]["why"] or "0.11 (0.05 to 0.19)" in rows[1]["why"]


def test_raw_runs_are_judged_apart():
    raw = [copy.deepcopy(x) | {"normalised": False} for x in all_three()]
    both = statistics(model("linear_mel_bl", ratio=0.5, share=0.01), *all_three()[1:], *raw)
    row = claims.verdicts(both)[1]
    assert row["verdict"] == "partly"
    assert "Normalised features, refuted: " in row["why"] and "Raw ones, confirmed: " in row["why"]
    assert claims.verdicts(statistics(*all_three(), raw[0])) == claims.verdicts(
        statistics(*all_three())
    )
    assert claims.verdicts(statistics(*raw))[1]["why"].startswith("Raw features: ")


def test_verdicts_need_all_three_variants():
    with pytest.raises(ValueError, match="measured: db_mel_bl, linear_mel_bl$"):
        claims.verdicts(statistics(*all_three()[:2]))
