"""What a model gets to hear of a recording: mono, at its rate, at one loudness, in bounded memory.

Files and arrays go the same way. All of a recording up to five minutes; of a longer one ten
windows of 30 s, evenly spaced from its first second to its last.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from eqst import audio, loudness
from eqst.audio import AudioError

MIN_SECONDS = 1.0
MIN_LUFS = -60.0
MAX_PEAK = 1e12  # integers of 32 bits stored as floats are far under it; it leaves float32 room
MAX_SECONDS = 300.0
WINDOWS = 10
TARGET_LUFS = -23.0
_FADE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Recording:
    """A usable recording, not yet in memory.

    Attributes:
      name: as the user knows it.
      sample_rate: Hz.
      frames: length in samples.
      loudness_lufs: integrated, of the whole recording, all channels.
      mono: (start, frames) -> blocks of [t] mono samples in order.
    """

    name: str
    sample_rate: int
    frames: int
    loudness_lufs: float
    mono: Callable[[int, int], Iterator[np.ndarray]]


def from_file(path: str | os.PathLike) -> Recording:
    """Checks and measures a file in one streaming pass.

    Raises:
      AudioError: as `audio.scan`; shorter than 1 s; silent; DC; below -60 LUFS.
    """
    name = repr(os.fspath(path))
    header = audio.info(path)
    check_usable(name, header.seconds)
    scan = audio.scan(path)
    check_usable(name, scan.info.seconds, scan.loudness_lufs, scan.constant, scan.peak)

    def mono(start: int, frames: int) -> Iterator[np.ndarray]:
        for block_TC in audio.stream(path, start=start, frames=frames):
            yield loudness.weighted_sum(block_TC, scan.mono_weights_C.astype(np.float32))

    return Recording(name, header.sample_rate, scan.info.frames, scan.loudness_lufs, mono)


def from_array(samples: np.ndarray, sample_rate: int, name: str) -> Recording:
    """Checks and measures [samples] or [samples, channels] in memory.

    Raises:
      AudioError: as `audio.as_samples`; shorter than 1 s; silent; DC; below -60 LUFS.
    """
    samples_TC = audio.as_samples(samples, sample_rate, name)
    check_usable(name, len(samples_TC) / sample_rate)
    level = loudness.loudness_lufs(samples_TC, sample_rate)
    constant = audio.is_constant(
        samples_TC.var(axis=0, dtype=np.float64), samples_TC.mean(axis=0, dtype=np.float64)
    )
    peak = float(max(samples_TC.max(), -samples_TC.min()))
    check_usable(name, len(samples_TC) / sample_rate, level, constant, peak)
    mono_T = audio.to_mono(samples_TC)

    def mono(start: int, frames: int) -> Iterator[np.ndarray]:
        yield mono_T[start : start + frames]

    return Recording(name, sample_rate, len(mono_T), level, mono)


def heard(recording: Recording, model_rate: int, *, band_rate: int | None = None) -> np.ndarray:
    """The mono audio that a prediction is made from.

    Args:
      recording: from `from_file` or `from_array`.
      model_rate: Hz of the result.
      band_rate: the lower sample rate of the two recordings that will be compared. Audio of a
        higher rate is first brought down to it: otherwise what one file cannot hold would pass
        for a missing treble. None or a higher rate than either changes nothing.

    Returns:
      [T] float32 at `model_rate`, at -23 LUFS (by the loudness of the whole recording), at most
      five minutes; windows are faded over 20 ms at their ends where there are several.
    """
    rate = recording.sample_rate
    gain = np.float32(10 ** ((TARGET_LUFS - recording.loudness_lufs) / 20))
    spans = windows(recording.frames, rate)
    pieces = []
    for start, frames in spans:
        piece_T = np.concatenate(list(recording.mono(start, frames))).astype(np.float32) * gain
        piece_rate = rate
        if band_rate is not None and band_rate < min(rate, model_rate):
            piece_T, piece_rate = audio.resample(piece_T, rate, band_rate), band_rate
        piece_T = audio.resample(piece_T, piece_rate, model_rate)
        pieces.append(_faded(piece_T, model_rate) if len(spans) > 1 else piece_T)
    return np.concatenate(pieces)


def windows(frames: int, sample_rate: int) -> list[tuple[int, int]]:
    """(start, length) in samples of what is heard of a recording: all, or ten even windows."""
    length = round(MAX_SECONDS / WINDOWS * sample_rate)
    if frames <= round(MAX_SECONDS * sample_rate):
        return [(0, frames)]
    return [(i * (frames - length) // (WINDOWS - 1), length) for i in range(WINDOWS)]


def check_usable(
    name: str,
    seconds: float,
    level_lufs: float | None = None,
    constant: bool = False,
    peak: float = 0.0,
) -> None:
    """Raises AudioError where a recording is too short or (level given) cannot be compared: silent,
    too quiet, an offset without sound, or beyond what any format's samples reach."""
    if seconds < MIN_SECONDS:
        raise AudioError(
            f"{name} lasts {seconds:.2f} s: at least {MIN_SECONDS:g} s are needed, 10 s or more "
            "match better"
        )
    if peak > MAX_PEAK:
        raise AudioError(
            f"{name} has samples up to {peak:.2g}, where full scale is 1: it is damaged, or of "
            "another sample format than its header says: export it again"
        )
    if constant:
        raise AudioError(
            f"{name} holds a constant offset (DC) and no sound: give a recording with sound"
        )
    if level_lufs is None:
        return
    if level_lufs == -np.inf:
        raise AudioError(f"{name} is silent (never above -70 LUFS): give a recording with sound")
    if level_lufs < MIN_LUFS:
        raise AudioError(
            f"{name} is too quiet: {level_lufs:.1f} LUFS, below {MIN_LUFS:g}: give a louder "
            "recording, or raise its level where its noise allows"
        )


def _faded(piece_T: np.ndarray, sample_rate: int) -> np.ndarray:
    """Ends without a jump, so that joining windows makes no click (which is broad-band)."""
    fade_T = np.linspace(0, 1, round(_FADE_SECONDS * sample_rate), dtype=np.float32)
    piece_T = piece_T.copy()
    piece_T[: len(fade_T)] *= fade_T
    piece_T[-len(fade_T) :] *= fade_T[::-1]
    return piece_T
