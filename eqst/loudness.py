"""Integrated loudness of ITU-R BS.1770-4, at any sample rate, of arrays and of streams."""

import numpy as np

from eqst.files import AudioError

BLOCK_SECONDS = 0.1  # BS.1770 gates 400 ms blocks that overlap by 75 %: four of these
_BLOCK_VALUES = 2**18  # samples times channels held at once: 2 MiB in float64


def block_frames_for(channels: int) -> int:
    """Frames per streamed block: some hundred thousand values, at least 1024 frames."""
    return max(1024, _BLOCK_VALUES // channels)


# The two sections of Recommendation ITU-R BS.1770-4, tables 1 and 2, at 48 kHz: b0 b1 b2 a0 a1 a2.
_K_WEIGHTING_48K = np.array(
    [
        [1.53512485958697, -2.69169618940638, 1.19839281085285]
        + [1.0, -1.69065929318241, 0.73248077421585],
        [1.0, -2.0, 1.0] + [1.0, -1.99004745483398, 0.99007225036621],
    ]
)


def k_weighting_sos(sample_rate: int) -> np.ndarray:
    """The K-weighting filter of BS.1770-4 at any rate, [2, 6] float64 second-order sections.

    The Recommendation gives coefficients at 48 kHz only. Each section is taken back through the
    bilinear map: with w = (1 - 1/z) / (1 + 1/z), its polynomials c0 + c1/z + c2/z^2 are, up to
    (1 + 1/z)^2 / 4, equal to (c0+c1+c2) + 2 (c0-c2) w + (c0-c1+c2) w^2. The natural frequency f0
    of the denominator lies at w = i tan(pi f0 / 48000); scaling w so that f0 keeps its place gives
    the analog prototype at any other rate, and the published numbers at 48 kHz.
    """
    to_w = np.array([[1.0, 1.0, 1.0], [2.0, 0.0, -2.0], [1.0, -1.0, 1.0]])
    from_w = np.linalg.inv(to_w)
    sections = []
    for section in _K_WEIGHTING_48K:
        numerator, denominator = to_w @ section[:3], to_w @ section[3:]
        tangent_48k = np.sqrt(denominator[0] / denominator[2])
        tangent = np.tan(np.arctan(tangent_48k) * 48_000 / sample_rate)
        scale = (tangent_48k / tangent) ** np.arange(3)
        b, a = from_w @ (numerator * scale), from_w @ (denominator * scale)
        sections.append(np.concatenate([b, a]) / a[0])
    return np.stack(sections)


def channel_weights(channels: int) -> np.ndarray:
    """BS.1770-4 weights by channel count, in the channel order of WAV files, [C] float64.

    1.0 for every channel, but 1.41 for the side channels of 5.0 (L R C Ls Rs), 5.1 (L R C LFE Ls
    Rs) and 7.1 (L R C LFE Lb Rb Ls Rs), whose LFE does not count. Other counts (quad, ambisonics,
    stems) say nothing about directions.
    """
    if channels == 5:
        return np.array([1.0, 1.0, 1.0, 1.41, 1.41])
    if channels == 6:
        return np.array([1.0, 1.0, 1.0, 0.0, 1.41, 1.41])
    if channels == 8:
        return np.array([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.41, 1.41])
    return np.ones(channels)


def weighted_sum(samples_TC: np.ndarray, weights_C: np.ndarray) -> np.ndarray:
    """[T] sum over channels, column by column: BLAS takes a dozen times as long for few columns."""
    total_T = samples_TC[:, 0] * weights_C[0]
    for c in range(1, len(weights_C)):
        total_T += samples_TC[:, c] * weights_C[c]
    return total_T


class LoudnessMeter:
    """K-weighted power of audio that arrives in blocks of any size: `push` blocks, then `power`."""

    def __init__(self, channels: int, sample_rate: int):
        self._sos = k_weighting_sos(sample_rate)
        self._state_SKC = np.zeros((len(self._sos), 2, channels))
        self._weights_C = channel_weights(channels)
        self._sample_rate = sample_rate
        self._pending_T = np.zeros(0)  # weighted squares of the 100 ms block that is not full yet
        self._start = 0  # index of the first pending sample
        self._power: list[np.ndarray] = []
        self._blocks = 0

    def push(self, samples_TC: np.ndarray) -> None:
        """Adds the next [t, C] samples."""
        from scipy.signal import sosfilt

        weighted_TC, self._state_SKC = sosfilt(
            self._sos, samples_TC.astype(np.float64), axis=0, zi=self._state_SKC
        )
        flush_denormals(self._state_SKC)
        square_T = weighted_sum(np.square(weighted_TC), self._weights_C)
        self._pending_T = np.concatenate([self._pending_T, square_T])
        # Block j ends before sample (j + 1) rate / 10, rounded down: exact for rates such as 11025.
        full = (self._start + len(self._pending_T)) * 10 // self._sample_rate
        if full > self._blocks:
            edges = np.arange(self._blocks, full + 1) * self._sample_rate // 10 - self._start
            sums = np.add.reduceat(self._pending_T[: edges[-1]], edges[:-1])
            self._power.append(sums / np.diff(edges))
            self._pending_T = self._pending_T[edges[-1] :]
            self._start += int(edges[-1])
            self._blocks = full

    def power(self) -> np.ndarray:
        """[J] mean square of every full 100 ms block so far, weighted sum over channels."""
        return np.concatenate([np.zeros(0), *self._power])


def k_weighted_power(samples_TC: np.ndarray, sample_rate: int) -> np.ndarray:
    """K-weighted mean square of each 100 ms of [T, C] samples, summed over weighted channels.

    Block j covers samples j rate/10 .. (j+1) rate/10 (rounded down); a last part of less than
    100 ms is left out. The filter starts at rest. With `gated_loudness_lufs` any stretch of a
    recording has its loudness from a slice of this: filter once, ask often.

    Returns:
      [J] float64, J = floor(10 T / sample_rate).
    """
    meter = LoudnessMeter(samples_TC.shape[1], sample_rate)
    step = block_frames_for(samples_TC.shape[1])
    for start in range(0, len(samples_TC), step):
        meter.push(samples_TC[start : start + step])
    return meter.power()


def gated_loudness_lufs(power_J: np.ndarray) -> float:
    """Integrated loudness of BS.1770-4 from 100 ms powers.

    400 ms blocks with 75 % overlap, gated at -70 LUFS, then at 10 LU below the loudness of what
    passed. -inf where no block passes -70 LUFS: silence, or as good as silent.

    Args:
      power_J: [J] from `k_weighted_power`, or any run of consecutive entries of it.

    Raises:
      AudioError: fewer than four entries, 400 ms.
    """
    if len(power_J) < 4:
        raise AudioError(
            f"{len(power_J) * BLOCK_SECONDS:.1f} s is too short to have a loudness "
            "(BS.1770 needs 0.4 s): give more audio"
        )
    block_I = (power_J[:-3] + power_J[1:-2] + power_J[2:-1] + power_J[3:]) / 4
    audible_I = block_I[block_I > 10 ** ((-70 + 0.691) / 10)]
    if not len(audible_I):
        return -np.inf
    kept_I = audible_I[audible_I > 0.1 * audible_I.mean()]
    return -0.691 + 10 * float(np.log10(kept_I.mean()))


def loudness_lufs(samples_TC: np.ndarray, sample_rate: int) -> float:
    """Integrated BS.1770-4 loudness of [T, C] samples in LUFS; -inf for silence.

    Raises:
      AudioError: less than 0.4 s.
    """
    return gated_loudness_lufs(k_weighted_power(samples_TC, sample_rate))


def flush_denormals(state: np.ndarray) -> None:
    """Zeroes filter state below -600 dB, in place: a filter ringing out into digital silence ends
    in denormal numbers, on which a processor is many times slower."""
    state[np.abs(state) < 1e-30] = 0.0
