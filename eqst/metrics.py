"""What is measured, on the host in numpy: curves, settings, audio, and how figures are summed up.

Curves are responses in dB on `eq.curve_grid_hz`. *Shape* errors have the mean over the grid removed
from the error: the overall gain of an equaliser cannot be observed, because both recordings are
brought to one loudness first. Nothing here knows a model.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from eqst.eq import EqParams

AUDIBLE_GAIN_DB = 1.0  # under this gain a band's frequency and Q are not identifiable
FLOOR_DB = -80.0  # power floor relative to the mean frame power, as for the features
STFT_WINDOWS_S = (512 / 44_100, 1024 / 44_100, 2048 / 44_100)  # scaled with the rate


class Interval(NamedTuple):
    """Summary of one figure over pairs: mean, median, 90th percentile and a 95 % interval."""

    mean: float
    median: float
    p90: float
    low: float  # bootstrap interval of the mean, 2.5 %
    high: float  # 97.5 %
    pairs: int


# --- curves and settings -------------------------------------------------------------------------


def curve_errors(predicted_nF: np.ndarray, true_nF: np.ndarray) -> dict[str, np.ndarray]:
    """Errors of n response curves in dB, each [n] (or [...] for [..., F] input).

    `shape_*` have the mean over the grid removed from the error, `absolute_*` have not; for each
    of them RMSE, MAE and largest absolute error over the grid.

    Raises:
      ValueError: if the shapes differ or a value is not finite.
    """
    predicted_nF, true_nF = np.asarray(predicted_nF, float), np.asarray(true_nF, float)
    if predicted_nF.shape != true_nF.shape:
        raise ValueError(f"curves of shape {predicted_nF.shape} and {true_nF.shape} do not match")
    error_nF = predicted_nF - true_nF
    if not np.isfinite(error_nF).all():
        raise ValueError(f"{np.sum(~np.isfinite(error_nF))} curve points are not finite")
    shape_nF = error_nF - error_nF.mean(axis=-1, keepdims=True)
    figures = {}
    for name, e_nF in (("shape", shape_nF), ("absolute", error_nF)):
        figures[f"{name}_rmse_db"] = np.sqrt(np.mean(e_nF**2, axis=-1))
        figures[f"{name}_mae_db"] = np.mean(np.abs(e_nF), axis=-1)
        figures[f"{name}_max_db"] = np.max(np.abs(e_nF), axis=-1)
    return figures


def octave_errors(
    predicted_nF: np.ndarray, true_nF: np.ndarray, freq_hz_F: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Level-free RMSE per octave: (lower edges [O] in Hz, errors [n, O] in dB).

    Octaves start at the first grid point; the last one may be shorter. The level removed is the
    mean error over the whole grid, so the octaves' mean squares add up to the shape error's.
    """
    error_nF = np.asarray(predicted_nF, float) - np.asarray(true_nF, float)
    error_nF = error_nF - error_nF.mean(axis=-1, keepdims=True)
    octave_F = np.floor(np.log2(freq_hz_F / freq_hz_F[0]) + 1e-9).astype(int)
    octaves = np.unique(octave_F)
    columns = [np.sqrt(np.mean(error_nF[..., octave_F == o] ** 2, axis=-1)) for o in octaves]
    return freq_hz_F[0] * 2.0**octaves, np.stack(columns, axis=-1)


def shares_within(values_n: np.ndarray, bounds_db: tuple[float, ...] = (1.0, 2.0, 3.0)) -> dict:
    """Share of pairs whose error is at most each bound: {bound: share in 0 .. 1}."""
    return {bound: float(np.mean(np.asarray(values_n) <= bound)) for bound in bounds_db}


def parameter_errors(predicted: EqParams, true: EqParams) -> dict[str, np.ndarray]:
    """Absolute errors of settings per band, [n, K] each, NaN where they mean nothing.

    `gain_db` everywhere; `log2_freq` (octaves) and `log2_q` only where the true gain reaches 1 dB,
    since a flat band has no frequency. `gain_active_db` is the gain error under the same mask.
    """
    gain_db = np.abs(np.asarray(predicted.gain_db, float) - np.asarray(true.gain_db, float))
    active = np.abs(np.asarray(true.gain_db, float)) >= AUDIBLE_GAIN_DB

    def octaves(a, b):
        return np.abs(np.log2(np.asarray(a, float) / np.asarray(b, float)))

    return {
        "gain_db": gain_db,
        "gain_active_db": np.where(active, gain_db, np.nan),
        "log2_freq": np.where(active, octaves(predicted.freq_hz, true.freq_hz), np.nan),
        "log2_q": np.where(active, octaves(predicted.q, true.q), np.nan),
    }


def band_curve_errors(predicted_nKF: np.ndarray, true_nKF: np.ndarray) -> dict[str, np.ndarray]:
    """RMSE of each band's own curve in dB, [n, K]: `shape_rmse_db` and `absolute_rmse_db`."""
    errors = curve_errors(predicted_nKF, true_nKF)
    return {name: errors[name] for name in ("shape_rmse_db", "absolute_rmse_db")}


# --- audio ---------------------------------------------------------------------------------------


def _frames_power(audio_T: np.ndarray, length: int) -> np.ndarray:
    """Power spectrogram [N, F] of a mono signal: Hann frames of `length`, a quarter apart."""
    audio_T = np.asarray(audio_T, np.float64)
    if audio_T.ndim != 1:
        raise ValueError(f"audio measures take mono audio [T], got shape {audio_T.shape}")
    if audio_T.size < length:
        audio_T = np.pad(audio_T, (0, length - audio_T.size))
    frames_NT = np.lib.stride_tricks.sliding_window_view(audio_T, length)[:: length // 4]
    spectrum_NF = np.fft.rfft(frames_NT * np.hanning(length + 1)[:-1], axis=1)
    power_NF = spectrum_NF.real**2 + spectrum_NF.imag**2
    if not power_NF.sum() > 0 or not np.isfinite(power_NF.sum()):
        raise ValueError("audio measures need audio that is finite and not silent")
    return power_NF


def _frame_length(seconds: float, sample_rate: float) -> int:
    return 2 ** round(np.log2(seconds * sample_rate))


def _box_bands(edge_hz_M: np.ndarray, length: int, sample_rate: float) -> np.ndarray:
    """Band averages over rfft bins, [M, F]; bands that hold no bin or cross Nyquist are dropped."""
    freq_hz = np.arange(length // 2 + 1) * sample_rate / length
    inside_MF = (freq_hz >= edge_hz_M[:-1, None]) & (freq_hz < edge_hz_M[1:, None])
    inside_MF &= (edge_hz_M[1:] <= sample_rate / 2)[:, None]
    kept_MF = inside_MF[inside_MF.any(axis=1)].astype(float)
    return kept_MF / kept_MF.sum(axis=1, keepdims=True)


@lru_cache(maxsize=16)
def _ltas_bands(kind: str, sample_rate: float) -> tuple[int, np.ndarray]:
    if kind == "third_octave":
        # base-2 exact centres 50 Hz .. 16 kHz; bins of 5.4 Hz, finer than the lowest band
        length = _frame_length(8192 / 44_100, sample_rate)
        edge_hz_M = 1000 * 2.0 ** ((np.arange(-13, 14) - 0.5) / 3)
    elif kind == "bands64":
        length = _frame_length(4096 / 44_100, sample_rate)
        edge_hz_M = 400 * np.expm1(np.linspace(np.log1p(20 / 400), np.log1p(20_000 / 400), 65))
    else:
        raise ValueError(f"LTAS bands are third_octave or bands64, not {kind!r}")
    return length, _box_bands(edge_hz_M, length, sample_rate)


def ltas_db(audio_T: np.ndarray, sample_rate: float, *, kind: str = "third_octave") -> np.ndarray:
    """Long-term average spectrum in dB, [M]: mean power over Hann frames and over each band.

    `third_octave`: 26 bands at 1000 * 2^(k/3) Hz, 50 Hz .. 16 kHz, 186 ms frames. `bands64`: 64
    bands of equal width on log(1 + f / 400 Hz), 20 Hz .. 20 kHz, 93 ms frames. Bands above
    Nyquist are left out. A floor 80 dB under the mean power keeps digital silence finite.
    """
    length, weight_MF = _ltas_bands(kind, float(sample_rate))
    power_F = _frames_power(audio_T, length).mean(axis=0)
    return 10 * np.log10(weight_MF @ power_F + power_F.mean() * 10 ** (FLOOR_DB / 10))


def ltas_distance_db(
    audio_T: np.ndarray,
    other_T: np.ndarray,
    sample_rate: float,
    *,
    kind: str = "third_octave",
) -> float:
    """RMS over bands of the difference of two LTAS in dB, their mean difference removed."""
    difference_M = ltas_db(audio_T, sample_rate, kind=kind) - ltas_db(
        other_T, sample_rate, kind=kind
    )
    return float(np.std(difference_M))


@lru_cache(maxsize=8)
def _mel_matrix(length: int, sample_rate: float, bands: int = 128) -> np.ndarray:
    """Triangular mel bands (2595 log10(1 + f / 700)), 20 Hz .. 20 kHz, [M, F], rows sum to 1."""
    low, high = 2595 * np.log10(1 + np.array([20.0, 20_000.0]) / 700)
    mel = np.linspace(low, high, bands + 2)
    point_hz = 700 * (10 ** (mel / 2595) - 1)
    freq_hz = np.arange(length // 2 + 1) * sample_rate / length
    # a narrow low band reaches at least one bin to each side
    below = np.maximum(point_hz[1:-1] - point_hz[:-2], sample_rate / length)[:, None]
    above = np.maximum(point_hz[2:] - point_hz[1:-1], sample_rate / length)[:, None]
    offset_MF = freq_hz - point_hz[1:-1, None]
    weight_MF = np.maximum(0.0, 1.0 - np.abs(offset_MF) / np.where(offset_MF < 0, below, above))
    weight_MF = weight_MF[point_hz[2:] <= sample_rate / 2]
    return weight_MF / weight_MF.sum(axis=1, keepdims=True)


def mel_distance_db(audio_T: np.ndarray, target_T: np.ndarray, sample_rate: float) -> float:
    """RMS difference of two time-aligned log-mel spectrograms in dB, their mean removed.

    128 mel bands, 46 ms Hann frames, floor 80 dB under each signal's own mean power.

    Raises:
      ValueError: if the two signals differ in length.
    """
    _check_aligned(audio_T, target_T)
    length = _frame_length(2048 / 44_100, sample_rate)
    weight_MF = _mel_matrix(length, float(sample_rate))
    log_mel = []
    for signal_T in (audio_T, target_T):
        power_NF = _frames_power(signal_T, length)
        floor = power_NF.mean() * 10 ** (FLOOR_DB / 10)
        log_mel.append(10 * np.log10(power_NF @ weight_MF.T + floor))
    return float(np.std(log_mel[0] - log_mel[1]))


def stft_distance(audio_T: np.ndarray, target_T: np.ndarray, sample_rate: float) -> float:
    """Multi-resolution STFT distance of two time-aligned signals brought to equal RMS.

    Spectral convergence ||A - B|| / ||B|| plus the mean absolute difference of natural log
    magnitudes, averaged over Hann windows of 512, 1024 and 2048 samples at 44.1 kHz (scaled to
    the nearest power of two at other rates), hop a quarter, floor 80 dB under the target's mean
    power. The form of Yamamoto, Song and Kim, Parallel WaveGAN (ICASSP 2020); level-free here,
    which the paper's is not.

    Raises:
      ValueError: if the two signals differ in length.
    """
    _check_aligned(audio_T, target_T)
    audio_T, target_T = np.asarray(audio_T, float), np.asarray(target_T, float)
    audio_T = audio_T * np.sqrt(np.sum(target_T**2) / max(np.sum(audio_T**2), 1e-30))
    distances = []
    for seconds in STFT_WINDOWS_S:
        length = _frame_length(seconds, sample_rate)
        power_NF, target_NF = _frames_power(audio_T, length), _frames_power(target_T, length)
        floor = target_NF.mean() * 10 ** (FLOOR_DB / 10)
        amp_NF, target_amp_NF = np.sqrt(power_NF + floor), np.sqrt(target_NF + floor)
        convergence = np.linalg.norm(amp_NF - target_amp_NF) / np.linalg.norm(target_amp_NF)
        distances.append(convergence + np.mean(np.abs(np.log(amp_NF / target_amp_NF))))
    return float(np.mean(distances))


def spectral_centroid_hz(audio_T: np.ndarray, sample_rate: float) -> float:
    """Centre of gravity of the long-term magnitude spectrum (root of mean power), in Hz."""
    length = _frame_length(2048 / 44_100, sample_rate)
    amp_F = np.sqrt(_frames_power(audio_T, length).mean(axis=0))
    return float(amp_F @ (np.arange(amp_F.size) * sample_rate / length) / amp_F.sum())


def centroid_difference_hz(audio_T: np.ndarray, other_T: np.ndarray, sample_rate: float) -> float:
    """Absolute difference of two signals' spectral centroids, in Hz; level-free."""
    centroids = [spectral_centroid_hz(signal, sample_rate) for signal in (audio_T, other_T)]
    return abs(centroids[0] - centroids[1])


def _check_aligned(audio_T: np.ndarray, target_T: np.ndarray) -> None:
    if np.shape(audio_T) != np.shape(target_T):
        raise ValueError(
            f"signals of shape {np.shape(audio_T)} and {np.shape(target_T)} are not time-aligned"
        )


# --- summing up ----------------------------------------------------------------------------------


def summarise(
    values_n: np.ndarray, talker_n: np.ndarray, seed: int, *, resamples: int = 2000
) -> Interval:
    """Mean, median, 90th percentile, and a bootstrap 95 % interval of the mean.

    Pairs of one talker are not independent, so each resample draws talkers with replacement and
    then pairs within each drawn talker (two-stage bootstrap). NaN values (a setting that means
    nothing for its pair) are dropped first; with nothing left all figures are NaN.

    Args:
      values_n: [n] one figure per pair.
      talker_n: [n] talker identity of each pair, any integers or strings.
      seed: of the resampling; the same seed gives the same interval.
      resamples: number of bootstrap draws.

    Raises:
      ValueError: if the two arrays do not have the same length.
    """
    values_n, talker_n = np.asarray(values_n, float), np.asarray(talker_n)
    if values_n.ndim != 1 or values_n.shape != talker_n.shape:
        raise ValueError(f"values {values_n.shape} and talkers {talker_n.shape} must both be [n]")
    kept_n = ~np.isnan(values_n)
    values_n, talker_n = values_n[kept_n], talker_n[kept_n]
    if values_n.size == 0:
        return Interval(*(float("nan"),) * 5, pairs=0)
    means_R = resampled_means(values_n, talker_n, seed, resamples)
    low, high = np.percentile(means_R, [2.5, 97.5])
    return Interval(
        mean=float(values_n.mean()),
        median=float(np.median(values_n)),
        p90=float(np.percentile(values_n, 90)),
        low=float(low),
        high=float(high),
        pairs=int(values_n.size),
    )


class Difference(NamedTuple):
    """How two methods differ on the same pairs: mean of a - b, 95 % interval, and p."""

    mean: float
    low: float
    high: float
    p: float  # two-sided: twice the smaller share of resamples on one side of 0, at most 1
    pairs: int


def paired_difference(
    a_n: np.ndarray, b_n: np.ndarray, talker_n: np.ndarray, seed: int, *, resamples: int = 2000
) -> Difference:
    """The mean difference of two methods' figures, pair by pair.

    Resampled as in `summarise`, talkers and then pairs, both methods on the same ones. Pairs where
    either figure is NaN are dropped; with nothing left all figures are NaN.

    Args:
      a_n, b_n: [n] one figure per pair of each method, the same pairs in the same order.
      talker_n: [n] talker identity of each pair.
      seed: of the resampling.
      resamples: number of bootstrap draws; p is no smaller than 2 / resamples.

    Raises:
      ValueError: if the arrays do not have the same length.
    """
    a_n, b_n, talker_n = np.asarray(a_n, float), np.asarray(b_n, float), np.asarray(talker_n)
    if not (a_n.ndim == 1 and a_n.shape == b_n.shape == talker_n.shape):
        raise ValueError(f"figures {a_n.shape}, {b_n.shape}, talkers {talker_n.shape}: want [n]")
    kept_n = ~(np.isnan(a_n) | np.isnan(b_n))
    if not kept_n.any():
        return Difference(*(float("nan"),) * 4, pairs=0)
    difference_n = (a_n - b_n)[kept_n]
    means_R = resampled_means(difference_n, talker_n[kept_n], seed, resamples)
    low, high = np.percentile(means_R, [2.5, 97.5])
    beyond = float(np.minimum(np.mean(means_R <= 0), np.mean(means_R >= 0)))
    return Difference(
        mean=float(difference_n.mean()),
        low=float(low),
        high=float(high),
        p=min(1.0, 2.0 * max(beyond, 1.0 / resamples)),
        pairs=int(kept_n.sum()),
    )


def resampled_means(
    values_n: np.ndarray, talker_n: np.ndarray, seed: int, resamples: int
) -> np.ndarray:
    """[R] means over resampled talkers and then pairs of each."""
    groups = [values_n[talker_n == talker] for talker in np.unique(talker_n)]
    rng = np.random.default_rng(seed)
    # A drawn talker enters the mean by the sum of its resampled pairs: those sums are made talker
    # by talker, one for each time a resample drew it.
    drawn_RG = rng.integers(len(groups), size=(resamples, len(groups)))
    sums_R, counts_R = np.zeros(resamples), np.zeros(resamples)
    for index, group in enumerate(groups):
        times_R = (drawn_RG == index).sum(axis=1)
        owner = np.repeat(np.arange(resamples), times_R)
        picks = rng.integers(group.size, size=(owner.size, group.size))
        np.add.at(sums_R, owner, group[picks].sum(axis=1))
        counts_R += times_R * group.size
    return sums_R / counts_R
