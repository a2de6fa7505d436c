"""Evaluation: the same pairs for every method, the truth scores zero, and what is printed."""

import csv
import json

import jax
import numpy as np
import pytest

from eqst import baselines, batches, charts, config, corpus, eq, evaluate, predictor, trials

RATE = 44100


@pytest.fixture(scope="module")
def run(configure):
    """An untrained predictor: what is tested here is the measuring."""
    made = configure(
        {
            "features.kind": "pooled",
            "model.comparison": "direct",
            "model.head": "continuous",
            "model.hidden": 8,
            "model.blocks": 0,
            "evaluation.seconds": (1.0,),
            "evaluation.pairs": 12,
            "evaluation.tune_pairs": 40,
            "evaluation.bootstrap": 50,
        }
    )
    params = predictor.init(made, jax.random.key(0))
    bands = params["predictor"]["enter"]["kernel"].shape[0] // 18
    normalisation = predictor.Normalisation(np.zeros((10, bands)), 10.0 * np.ones((10, bands)))
    return trials.Run(made, params, normalisation, 0, "none")


@pytest.fixture(scope="module")
def recordings(bursts, corpus_of) -> corpus.Corpus:
    return corpus_of([bursts(seed, 5.0, RATE) for seed in range(6)], RATE)


def trial(run, recordings, count, seed=3):
    return trials.run_trial(
        run,
        recordings,
        seconds=1.0,
        protocol="coloured",
        count=count,
        seed=seed,
        ask_model=True,
        keep_audio=2,
    )


def test_pair_k_does_not_depend_on_how_many_are_asked(run, recordings):
    few, more = trial(run, recordings, 5), trial(run, recordings, 11)
    np.testing.assert_array_equal(few.unit_nKP, more.unit_nKP[:5])
    np.testing.assert_array_equal(few.input.power_db, more.input.power_db[:5])
    np.testing.assert_allclose(few.predicted.gain_db, more.predicted.gain_db[:5], atol=1e-5)
    assert len(few.talker_n) == 5 and len(few.audio) == 2


def test_a_pairs_error_does_not_depend_on_the_chunk_it_is_rendered_in(run, recordings, monkeypatch):
    """Every figure is a mean over these, so it is exact for any size of the last chunk."""
    errors = []
    for chunk in (8, 3):
        monkeypatch.setattr(batches, "CHUNK", chunk)
        made = trial(run, recordings, 10)
        true = eq.from_unit(eq.PAPER, made.unit_nKP.astype(np.float64))
        curves = [baselines.settings_curve(x, RATE) for x in (made.predicted, true)]
        error_nF = curves[0] - curves[1]
        errors.append(np.std(error_nF, axis=1))
        assert len(errors[-1]) == len(made.audio) + 8 == 10
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-6)


def test_talkers_come_in_turn(run, recordings):
    talkers = trial(run, recordings, 12).talker_n
    assert np.bincount(talkers).tolist() == [2] * 6


def test_the_true_settings_score_zero_and_a_flat_curve_scores_the_true_curve(run, recordings):
    made = trial(run, recordings, 6)
    true = eq.from_unit(eq.PAPER, made.unit_nKP.astype(np.float64))
    curve_nF = baselines.settings_curve(true, RATE)
    exact = evaluate._figures(baselines.Prediction(curve_nF, true, {}), true, made.talker_n, run)
    assert exact["shape_rmse_db"]["mean"] < 1e-4 and exact["share_within_db"]["1"] == 1.0
    assert exact["log2_freq_error"] < 1e-6
    flat = evaluate._figures(baselines.Prediction(0 * curve_nF, None, {}), true, made.talker_n, run)
    expected = np.std(curve_nF, axis=1).mean()
    np.testing.assert_allclose(flat["shape_rmse_db"]["mean"], expected, rtol=1e-6)


def test_level_changes_nothing_and_recordings_with_themselves_are_compared(run, recordings):
    found = evaluate.properties(run, trial(run, recordings, 3))
    assert found["level_change_rms_db"] < 1e-3
    assert found["pairs"] == 2 and np.isfinite(list(found.values())).all()


@pytest.mark.long
def test_all_baselines_stand_beside_the_model(run, recordings, tmp_path):
    results, errors = evaluate.evaluate(run, recordings, recordings, say=lambda line: None)
    path = tmp_path / "errors.csv"
    path.write_text(evaluate.errors_text(errors))
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for protocol, method in (("plain", "model"), ("coloured", "bayes")):
        own = [row for row in rows if (row["protocol"], row["method"]) == (protocol, method)]
        assert [int(row["pair"]) for row in own] == list(range(12))
        assert {row["talker"] for row in own} == set(recordings.talker_R)
        mean = np.mean([float(row["shape_rmse_db"]) for row in own])
        wanted = results["figures"][protocol]["1 s"][method]["shape_rmse_db"]["mean"]
        assert mean == pytest.approx(wanted, abs=1e-4)
    for protocol in ("plain", "coloured"):
        figures = results["figures"][protocol]["1 s"]
        assert {name for name, _, _ in charts.METHODS} <= set(figures)
        for name, _, _ in charts.METHODS:
            assert figures[name]["shape_rmse_db"]["pairs"] == 12, name
        means = {name: figures[name]["shape_rmse_db"]["mean"] for name, _, _ in charts.METHODS}
        # The paper's grid is finer than anything guessed from a second of noise.
        assert means["oracle_grid"] < 0.5 * means["do_nothing"]
        assert means["oracle"] < 0.5 * means["do_nothing"]
    json.dumps(results)
    text = charts.table_text(results)
    assert "Bayes" in text and "12 pairs, 6 talkers" in text
    charts.error_against_seconds(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_a_folder_trained_on_is_used_by_its_split_and_another_one_whole(run, tmp_path):
    data = config.Data(sources=(f"folder:{tmp_path}",), manifest="m.csv")
    trained = run._replace(config=config.Config(data=data))
    settings = trained.config
    assert evaluate.select(settings, str(tmp_path), "", "dev")[1] == "dev"
    new, split = evaluate.select(settings, str(tmp_path / "other"), "", "dev")
    assert split == "all" and new.manifest == ""
    assert evaluate.select(settings, "", "", "dev") == (data, "dev")


def test_a_talker_may_be_called_anything():
    row = evaluate.ErrorRow("plain", 3.0, 0, 'a "b", c\nd', "model", 1.23456)
    ((head), (found)) = csv.reader(evaluate.errors_text([row]).splitlines(keepends=True))
    assert found == ["plain", "3", "0", 'a "b", c\nd', "model", "1.2346"]
    assert tuple(head) == evaluate.ErrorRow._fields


def given(monkeypatch, run, tmp_path, *options):
    """The command's flags as if these options had been given, and `run` in the workdir."""
    from absl import flags

    values = flags.FlagValues()
    monkeypatch.setattr(evaluate.flags, "FLAGS", values)
    for name in ("workdir", "output", "data", "manifest", "split"):
        flags.DEFINE_string(name, "dev" if name == "split" else "", "", flag_values=values)
    flags.DEFINE_integer("pairs", 0, "", flag_values=values)
    flags.DEFINE_list("seconds", [], "", flag_values=values)
    flags.DEFINE_bool("baselines", True, "", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "", flag_values=values)
    values(["evaluate", f"--output={tmp_path / 'out'}", *options])
    monkeypatch.setattr(evaluate, "open_run", lambda _: run)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--pairs=-5", "evaluation.pairs is -5"),
        ("--seconds=-3", "evaluation.seconds is -3"),
        ("--seconds=three", "--seconds=three: give numbers"),
        ("--split=train", "choose dev or valid"),
    ],
)
def test_a_wrong_option_is_one_line_before_any_work(option, said, run, tmp_path, monkeypatch):
    given(monkeypatch, run, tmp_path, option)
    with pytest.raises(ValueError, match=said):
        evaluate.main()
    assert not list(tmp_path.glob("out/*"))


def test_few_talkers_mean_no_baselines_and_no_figures_mean_no_results(
    run, corpus_of, bursts, tmp_path, monkeypatch, capsys
):
    few = corpus_of([bursts(seed, 2.0, RATE) for seed in range(4)], RATE)
    given(monkeypatch, run, tmp_path)
    monkeypatch.setattr(evaluate.corpus, "open_corpus", lambda *_: few)
    asked = []

    def without_figures(*_, with_baselines, say):
        asked.append(with_baselines)
        return {"figures": {"plain": {}, "coloured": {}}}, []

    monkeypatch.setattr(evaluate, "evaluate", without_figures)
    with pytest.raises(ValueError, match="no pair of 1 s"):
        evaluate.main()
    assert asked == [False] and "here are 4" in capsys.readouterr().out
    assert not list(tmp_path.glob("out/*"))
