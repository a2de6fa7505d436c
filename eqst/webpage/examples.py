"""Audio examples of the supplementary page: chosen by rule, and made as they will be heard.

A clip is 16-bit mono audio of at most ten seconds, attenuated where it would pass -1 dBFS. What an
equaliser made of a clip starts from the very samples of that clip, so that settings on the page
turn the one file into the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from eqst import (
    analysis,
    audio,
    biquad,
    corpus,
    eq,
    loudness,
    match,
    metrics,
    render,
    settings,
    trials,
)
from eqst.settings import Settings

PEAK_DBFS = -1.0
FULL_SCALE = 32768.0
LEAST_LUFS = -35.0  # the seed's rule for what is compared

Say = Callable[[str], None]


class Clip(NamedTuple):
    """Audio as written: a name for its file, int16 samples [T], Hz, integrated loudness."""

    name: str
    samples_T: np.ndarray
    sample_rate: int
    lufs: float


class Take(NamedTuple):
    """One thing to listen to in an example.

    Attributes:
      label: "Input", "Reference" and so on.
      clip: what is heard.
      made_from: the clip that an equaliser made this of, or None where it is audio of its own.
      settings: that equaliser with the preamp it took, or None.
    """

    label: str
    clip: Clip
    made_from: Clip | None = None
    settings: Settings | None = None


class Example(NamedTuple):
    """What stands in one row of a table.

    Attributes:
      name: unique on the page, fit for file names and links.
      title: for people.
      note: a line of measured facts.
      takes: input, reference and what was made; in the order of their keys 1, 2, 3 ..
      found: our settings, as the processed take was made with.
    """

    name: str
    title: str
    note: str
    takes: tuple[Take, ...]
    found: Settings


class Test(NamedTuple):
    """Held-out pairs with a known EQ, and the model's answers.

    Attributes:
      seconds: of input and of reference.
      input_nT, reference_nT: the audio the model heard, float32 at the model's rate.
      true, predicted: settings, [n, K] each.
      shape_db_n: shape error of each pair, RMS in dB.
      lufs_n2: loudness of input and reference.
      talker_n: names.
      sample_rate: Hz.
    """

    seconds: float
    input_nT: np.ndarray
    reference_nT: np.ndarray
    true: eq.EqParams
    predicted: eq.EqParams
    shape_db_n: np.ndarray
    lufs_n2: np.ndarray
    talker_n: tuple[str, ...]
    sample_rate: int


# ------------------------------------------------------------------------------ making takes


def take(label: str, name: str, samples_T: np.ndarray, sample_rate: int) -> Take:
    """A take of its own from float samples [T], full scale at 1; attenuated only, never raised."""
    peak = float(np.max(np.abs(samples_T)))
    gain = min(1.0, 10 ** (PEAK_DBFS / 20) / max(peak, 1e-12))
    return Take(label, _clip(name, samples_T * gain, sample_rate))


def equalised(label: str, name: str, source: Clip, params: eq.EqParams) -> Take:
    """What these settings [K] make of a clip; the settings are rounded before they are used."""
    found = settings.from_params(params, source.sample_rate)
    sos_K6 = sections(found)
    rendered_T = render.render(source.samples_T.astype(np.float64) / FULL_SCALE, sos_K6)
    peak_db = 20 * math.log10(max(float(np.max(np.abs(rendered_T))), 1e-12))
    preamp_db = -math.ceil(max(0.0, peak_db - PEAK_DBFS) * 1000) / 1000 + 0.0
    found = dataclasses.replace(found, preamp_db=preamp_db)
    clip = _clip(name, rendered_T * 10 ** (preamp_db / 20), source.sample_rate)
    return Take(label, clip, source, found)


def sections(found: Settings) -> np.ndarray:
    """[K, 6] second-order sections of the bands, float64, without the preamp."""
    return biquad.sos(*found.params, kinds=eq.KINDS, sample_rate=found.sample_rate)


def _clip(name: str, samples_T: np.ndarray, sample_rate: int) -> Clip:
    samples_T = np.asarray(samples_T, np.float64)
    written_T = np.clip(np.round(samples_T * FULL_SCALE), -FULL_SCALE, FULL_SCALE - 1)
    lufs = loudness.loudness_lufs(samples_T[:, None], sample_rate)
    return Clip(name, written_T.astype(np.int16), sample_rate, lufs)


def matched_gains_db(takes: tuple[Take, ...]) -> list[float]:
    """What brings every take to the loudness of the quietest, <= 0; 0 for silence."""
    heard = [x.clip.lufs for x in takes if math.isfinite(x.clip.lufs)]
    return [
        round(min(heard) - x.clip.lufs, 2) + 0.0 if math.isfinite(x.clip.lufs) else 0.0
        for x in takes
    ]


# ------------------------------------------------------------------------------ held-out pairs


def test(
    run: trials.Run, recordings: corpus.Corpus, *, pairs: int, seconds: float, seed: int
) -> Test:
    """The `plain` pairs of a seed, as `evaluate` makes them, with audio kept.

    Raises:
      PairsError: no recording gives a pair of that length.
    """
    trial = trials.run_trial(
        run,
        recordings,
        seconds=seconds,
        protocol="plain",
        count=pairs,
        seed=seed,
        ask_model=True,
        with_evidence=False,
        keep_audio=pairs,
    )
    assert trial.predicted is not None
    rate = recordings.sample_rate
    true = eq.from_unit(eq.table(run.config.eq_table), trial.unit_nKP.astype(np.float64))
    # As the pairs are rendered: at low rates the table reaches beyond what a band can be.
    true, predicted = (eq.limit_to_rate(x, rate)[0] for x in (true, trial.predicted))
    grid_F = eq.curve_grid_hz(rate)
    curves = [
        np.asarray(eq.response_db(x, grid_F, sample_rate=rate), np.float64)
        for x in (predicted, true)
    ]
    lufs = [[loudness.loudness_lufs(x[:, None], rate) for x in pair] for pair in trial.audio]
    return Test(
        seconds,
        np.stack([pair[0] for pair in trial.audio]),
        np.stack([pair[1] for pair in trial.audio]),
        true,
        predicted,
        metrics.curve_errors(*curves)["shape_rmse_db"],
        np.array(lufs),
        tuple(recordings.talker_R[i] for i in trial.talker_n),
        rate,
    )


def even_ranks(error_n: np.ndarray, count: int) -> list[int]:
    """Pairs at even steps of rank, from the least error to the largest, both ends with them."""
    order = np.argsort(error_n, kind="stable")
    count = min(count, len(order))
    return [int(order[round(k)]) for k in np.linspace(0, len(order) - 1, count)]


def best_and_worst(made: Test) -> list[int]:
    """Two pairs of least and two of largest error among those loud enough; fewer of fewer pairs."""
    loud = np.flatnonzero((made.lufs_n2 >= LEAST_LUFS).all(axis=1))
    order = loud[np.argsort(made.shape_db_n[loud], kind="stable")]
    return [int(i) for i in (order if len(order) < 4 else np.r_[order[:2], order[-2:]])]


def one(params: eq.EqParams, i: int) -> eq.EqParams:
    """[K] settings of pair i."""
    return eq.EqParams(*(np.asarray(x, np.float64)[i] for x in params))


def of_test(made: Test, chosen: list[int]) -> list[Example]:
    """An example of each chosen pair, with the truly equalised input beside ours."""
    rows = []
    for number, i in enumerate(chosen, start=1):
        name, rate = f"speech-{number}", made.sample_rate
        rank = int(np.sum(made.shape_db_n < made.shape_db_n[i])) + 1
        heard = take("Input", f"{name}-input", made.input_nT[i], rate)
        takes = (
            heard,
            take("Reference", f"{name}-reference", made.reference_nT[i], rate),
            ours := equalised("Processed", f"{name}-processed", heard.clip, one(made.predicted, i)),
            equalised("True EQ", f"{name}-true", heard.clip, one(made.true, i)),
        )
        note = (
            f"Shape error {made.shape_db_n[i]:.2f} dB, rank {rank} of {len(made.shape_db_n)}; "
            f"{made.seconds:g} s each; talker {made.talker_n[i]}."
        )
        assert ours.settings is not None
        rows.append(Example(name, f"Speech {number}", note, takes, ours.settings))
    return rows


# ------------------------------------------------------------------------------ recordings


def matched(
    name: str,
    title: str,
    input: Take,
    reference: Take,
    matcher: match.Matcher,
    *,
    note: str = "",
    heard: tuple[analysis.Recording, analysis.Recording] | None = None,
    other: Take | None = None,
) -> Example:
    """An example without a true EQ: what the model makes of two takes.

    Args:
      note: what to say of it.
      heard: what the model predicts from; without, it is the takes themselves.
      other: another system's output, to stand beside ours.
    """
    if heard is None:
        heard = _recording(input), _recording(reference)
    params = matcher.match(*heard).settings.params
    ours = equalised("Processed", f"{name}-processed", input.clip, params)
    assert ours.settings is not None
    takes = (input, reference, ours) if other is None else (input, reference, ours, other)
    return Example(name, title, note, takes, ours.settings)


def _recording(one: Take) -> analysis.Recording:
    samples_T = one.clip.samples_T.astype(np.float32) / FULL_SCALE
    return analysis.from_array(samples_T, one.clip.sample_rate, one.label.lower())


def distance_db(heard: Take, reference: Take) -> float:
    """LTAS distance of a take to another in dB: 64 bands, level removed."""
    rate = heard.clip.sample_rate
    one_T, other_T = (
        audio.resample(x.clip.samples_T / FULL_SCALE, x.clip.sample_rate, rate)
        for x in (heard, reference)
    )
    return metrics.ltas_distance_db(one_T, other_T, rate, kind="bands64")


def numbered(rows: list[Example], kind: str) -> list[Example]:
    """The examples with kind and place in its table as titles: no two of a page are alike."""
    return [x._replace(title=f"{kind} {n}") for n, x in enumerate(rows, start=1)]
