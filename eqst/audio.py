"""Audio files and arrays: reading, checking, resampling, mono.

Reads whatever libsndfile reads, at 8 to 192 kHz and any channel count. Long files are streamed in
blocks, so nothing here needs memory that grows with the length of a recording, except `read`.
Every mistake a user can make ends in one `AudioError` line: the value, the bound, the way out.
"""

import contextlib
import dataclasses
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

from eqst import files
from eqst.files import AudioError, check_target, write_atomically, write_json, write_text
from eqst.loudness import (
    LoudnessMeter,
    block_frames_for,
    gated_loudness_lufs,
    k_weighted_power,
    loudness_lufs,
    weighted_sum,
)

# What callers need of audio is under this one name, wherever it is defined.
__all__ = [
    "AudioError",
    "AudioInfo",
    "AudioScan",
    "LoudnessMeter",
    "Sound",
    "as_samples",
    "block_frames_for",
    "check_target",
    "gated_loudness_lufs",
    "info",
    "is_constant",
    "k_weighted_power",
    "loudness_lufs",
    "mono_weights",
    "open_audio",
    "read",
    "resample",
    "scan",
    "stream",
    "to_mono",
    "write_atomically",
    "write_json",
    "write_text",
]

SAMPLE_RATE_LOW, SAMPLE_RATE_HIGH = 8_000, 192_000
_UNKNOWN_FRAMES = 2**62  # libsndfile's answer where a header has no length
# A data chunk's size in libsndfile's log of a header, the length of the whole file there, and the
# size from which on it stands for "not known yet" (written through a pipe). Some programs count
# the header as data.
_DATA_BYTES = re.compile(r"^\s*(?:data|ssnd|data size)\s*:\s*(\d+)\b", re.IGNORECASE | re.MULTILINE)
_FILE_BYTES = re.compile(r"^Length : (\d+)$", re.MULTILINE)
_UNKNOWN_BYTES, _SLACK_BYTES = 2**31 - 2**12, 1024
# An encoder's delay and padding make the length in an MP3 header uncertain by a few MPEG frames.
_MPEG_SLACK_FRAMES = 4 * 1152


class Sound(NamedTuple):
    """Audio in memory: [T, C] samples with full scale at 1.0, and their rate in Hz."""

    samples_TC: np.ndarray
    sample_rate: int


@dataclasses.dataclass(frozen=True)
class AudioInfo:
    """What a file's header says; `format` and `subtype` are libsndfile's names."""

    path: Path
    sample_rate: int
    channels: int
    frames: int
    format: str
    subtype: str

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate


@dataclasses.dataclass(frozen=True)
class AudioScan:
    """What one pass over a whole file tells (see `scan`).

    Attributes:
      info: the header, with `frames` replaced by the number that could be read.
      peak: largest absolute sample, 1.0 is full scale.
      power_J: [J] K-weighted mean square per 100 ms (see `k_weighted_power`).
      mono_weights_C: [C] the channel weights that make the file mono (see `mono_weights`).
      constant: nothing but an offset (see `is_constant`).
    """

    info: AudioInfo
    peak: float
    power_J: np.ndarray
    mono_weights_C: np.ndarray
    constant: bool

    @property
    def loudness_lufs(self) -> float:
        return gated_loudness_lufs(self.power_J)


# ---- files


def open_audio(path: str | os.PathLike) -> soundfile.SoundFile:
    """Opens a file for reading, with every failure as one AudioError line.

    Raises:
      AudioError: missing, a folder, not a regular file, unreadable, empty, not audio that
        libsndfile knows, no samples, or a rate outside 8 to 192 kHz.
    """
    name = repr(os.fspath(path))
    try:
        status = os.stat(path)
    except OSError as error:
        raise AudioError(f"{name} cannot be opened ({error.strerror}): check the path") from None
    if stat.S_ISDIR(status.st_mode):
        raise AudioError(f"{name} is a folder: name one audio file in it")
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{name} is not a regular file: save the audio to a file first")
    if status.st_size == 0:
        raise AudioError(f"{name} is empty (0 bytes): copy or export it again")
    if not os.access(path, os.R_OK):
        raise AudioError(f"{name} may not be read (permission denied): change its permissions")
    try:
        with files.muted_stderr():  # libmpg123 comments on whatever it takes for an MP3
            file = soundfile.SoundFile(files.native(path))
    # TypeError is soundfile's answer to header-less formats, which it knows by their extension.
    except (soundfile.SoundFileError, TypeError) as error:
        # What looks like an MP3 and is none "does not exist", says libsndfile; it does.
        reason = _one_line(error).removeprefix(f"Error opening {files.native(path)!r}: ")
        reason = "unknown content" if "does not exist" in reason else reason
        raise AudioError(
            f"{name} is not audio that libsndfile reads ({reason}): convert it to WAV or FLAC "
            "first, for example with ffmpeg"
        ) from None
    rate = file.samplerate
    if not SAMPLE_RATE_LOW <= rate <= SAMPLE_RATE_HIGH:
        file.close()
        raise AudioError(
            f"{name} has a sample rate of {rate} Hz, outside {SAMPLE_RATE_LOW} .. "
            f"{SAMPLE_RATE_HIGH} Hz: resample it first"
        )
    if file.frames >= _UNKNOWN_FRAMES:
        file.close()
        raise AudioError(
            f"{name} does not say how long it is (written through a pipe?): write it to a file "
            "again, for example with ffmpeg or flac"
        )
    said, there = _data_bytes(file)
    if there + _SLACK_BYTES < said < _UNKNOWN_BYTES:
        file.close()
        raise AudioError(
            f"{name} is cut short: its header says {said} bytes of audio, the file has {there}: "
            "copy or export it again"
        )
    if file.frames == 0:
        file.close()
        raise AudioError(f"{name} holds no samples (0 frames): export it again")
    return file


def _data_bytes(file: soundfile.SoundFile) -> tuple[int, int]:
    """Bytes of samples by the header (0: it does not say), and bytes of the whole file.

    libsndfile shortens the former to what is there, and says so in its log alone.
    """
    said, there = (pattern.findall(file.extra_info) for pattern in (_DATA_BYTES, _FILE_BYTES))
    return max(map(int, said), default=0), max(map(int, there), default=0)


def info(path: str | os.PathLike) -> AudioInfo:
    """Header of an audio file. Raises AudioError as `open_audio` does."""
    with open_audio(path) as file:
        return _info(file, path)


def read(
    path: str | os.PathLike, *, start: int = 0, frames: int | None = None, dtype: str = "float32"
) -> Sound:
    """Reads a file, or a part of it, into memory.

    Args:
      path: any file libsndfile reads, 8 to 192 kHz.
      start: first frame, 0 <= start < frames in the file.
      frames: how many; None reads to the end.
      dtype: "float32" or "float64"; integers are scaled so that full scale is 1.0.

    Returns:
      Sound: [T, C] samples and the file's sample rate.

    Raises:
      AudioError: as `open_audio` and `stream`, or a part outside the file.
    """
    with open_audio(path) as file:
        total, sample_rate = file.frames, file.samplerate
    if start < 0 or start >= total or (frames is not None and not 0 < frames <= total - start):
        raise AudioError(
            f"{os.fspath(path)!r}: frames {start} .. {start + (frames or 0)} lie outside the "
            f"file's 0 .. {total}: ask for less"
        )
    blocks = list(stream(path, start=start, frames=frames, dtype=dtype))
    return Sound(np.concatenate(blocks), sample_rate)


def stream(
    path: str | os.PathLike,
    *,
    start: int = 0,
    frames: int | None = None,
    block_frames: int | None = None,
    dtype: str = "float32",
) -> Iterator[np.ndarray]:
    """Yields a file as consecutive [t, C] blocks; the memory does not depend on its length.

    Args:
      path: any file libsndfile reads, 8 to 192 kHz.
      start: first frame.
      frames: how many frames in all; None goes to the end.
      block_frames: frames per block; None takes about 4 MiB of float64, whatever the channels.
      dtype: "float32" or "float64"; full scale is 1.0.

    Raises:
      AudioError: as `open_audio`; a NaN or infinite sample; data that stop before the header's
        length or that cannot be decoded.
    """
    name = repr(os.fspath(path))
    with open_audio(path) as file:
        rate, total = file.samplerate, file.frames
        muted = files.muted_stderr if file.format == "MP3" else contextlib.nullcontext
        block_frames = block_frames or block_frames_for(file.channels)
        wanted = total - start if frames is None else frames
        position, end = start, start + wanted
        try:
            if start:
                with muted():
                    file.seek(start)
            while position < end:
                with muted():
                    block_TC = file.read(min(block_frames, end - position), dtype, always_2d=True)
                if not len(block_TC):
                    break
                _check_finite(block_TC, name, rate, offset=position)
                position += len(block_TC)
                yield block_TC
        except soundfile.SoundFileError as error:
            raise AudioError(
                f"{name} is damaged: it cannot be decoded after {position / rate:.2f} of "
                f"{total / rate:.2f} s ({_one_line(error)}): copy or export it again"
            ) from None
        slack = _MPEG_SLACK_FRAMES if file.format == "MP3" else 0
        if position == start or position + slack < end:
            raise AudioError(
                f"{name} is cut short: it ends after {position / rate:.2f} of the "
                f"{total / rate:.2f} s in its header: copy or export it again"
            )


def scan(path: str | os.PathLike) -> AudioScan:
    """One streaming pass over a whole file: true length, peak, loudness power, mono weights.

    Raises:
      AudioError: as `stream`.
    """
    header = info(path)
    meter = LoudnessMeter(header.channels, header.sample_rate)
    frames, peak = 0, 0.0
    sum_C, gram_CC = np.zeros(header.channels), np.zeros((header.channels, header.channels))
    for block_TC in stream(path):
        meter.push(block_TC)
        sum_C, gram_CC = sum_C + _sum(block_TC), gram_CC + _gram(block_TC)
        frames += len(block_TC)
        peak = max(peak, float(block_TC.max()), -float(block_TC.min()))
    covariance_CC = _covariance(sum_C, gram_CC, frames)
    return AudioScan(
        info=dataclasses.replace(header, frames=frames),
        peak=peak,
        power_J=meter.power(),
        mono_weights_C=mono_weights(covariance_CC),
        constant=is_constant(np.diag(covariance_CC), sum_C / frames),
    )


# ---- arrays


def as_samples(samples: Any, sample_rate: int, name: str = "audio") -> np.ndarray:
    """Checks an array of audio from a caller and gives it as [T, C] floats.

    Args:
      samples: [samples] or [samples, channels], real floats with full scale at 1.0.
      sample_rate: Hz, 8000 .. 192000.
      name: what to call the array in an error.

    Returns:
      [T, C], float64 for float64 input, else float32. A view where possible.

    Raises:
      AudioError: wrong rank, integers, no samples, more channels than samples, a rate that is
        no whole number or out of bounds, NaN or infinity.
    """
    array = np.asarray(samples)
    if not isinstance(sample_rate, (int, np.integer)):
        raise AudioError(f"{name}: sample rate {sample_rate!r}: give a whole number of Hz")
    if not SAMPLE_RATE_LOW <= sample_rate <= SAMPLE_RATE_HIGH:
        raise AudioError(
            f"{name}: sample rate {sample_rate} Hz is outside {SAMPLE_RATE_LOW} .. "
            f"{SAMPLE_RATE_HIGH} Hz: resample it first"
        )
    if array.ndim not in (1, 2):
        raise AudioError(f"{name}: shape {array.shape}: give [samples] or [samples, channels]")
    if not np.issubdtype(array.dtype, np.floating):
        raise AudioError(f"{name}: dtype {array.dtype}: give floats with full scale at 1.0")
    if array.size == 0:
        raise AudioError(f"{name}: shape {array.shape} holds no samples")
    samples_TC = array.reshape(len(array), -1)
    if samples_TC.shape[1] > samples_TC.shape[0]:
        raise AudioError(
            f"{name}: shape {array.shape} has more channels than samples: transpose it to "
            "[samples, channels]"
        )
    if samples_TC.dtype not in (np.float32, np.float64):
        samples_TC = samples_TC.astype(np.float32)
    _check_finite(samples_TC, name, sample_rate, offset=0)
    return samples_TC


def mono_weights(covariance_CC: np.ndarray) -> np.ndarray:
    """Channel weights of the mono mix: the mean of all channels, or the loudest channel alone.

    The mean of C unrelated channels has 1/C of their mean power. Where it has less than a tenth
    of that, the channels cancel (one wire of a stereo pair swapped, say): the mean would then be
    what the channels do not share, so the channel of most power stands for the recording.

    Args:
      covariance_CC: [C, C] covariance of the channels: power, without constant offsets.

    Returns:
      [C] float64 weights that sum to 1.
    """
    channels, variance_C = len(covariance_CC), np.diag(covariance_CC)
    if covariance_CC.mean() < 0.1 * variance_C.mean() / channels:  # the mean's variance, that is
        return np.eye(channels)[int(np.argmax(variance_C))]
    return np.full(channels, 1.0 / channels)


def is_constant(variance_C: npt.ArrayLike, mean_C: npt.ArrayLike) -> bool:
    """Whether all there is is an offset: sound 90 dB under it is its dither or rounding.

    The jump at its start passes for loudness, so that a meter alone does not tell.
    """
    offset = float(np.sum(np.square(mean_C)))
    return offset > 0 and float(np.sum(variance_C)) <= 1e-9 * offset


def to_mono(samples_TC: np.ndarray) -> np.ndarray:
    """Mono mix of [T, C] samples, [T]: the mean, or the loudest channel (see `mono_weights`)."""
    if samples_TC.shape[1] == 1:
        return samples_TC[:, 0]
    step = block_frames_for(samples_TC.shape[1])
    blocks = [samples_TC[start : start + step] for start in range(0, len(samples_TC), step)]
    sum_C = np.sum([_sum(block_TC) for block_TC in blocks], axis=0)
    gram_CC = np.sum([_gram(block_TC) for block_TC in blocks], axis=0)
    weights_C = mono_weights(_covariance(sum_C, gram_CC, len(samples_TC)))
    return weighted_sum(samples_TC, weights_C.astype(samples_TC.dtype))


def _sum(block_TC: np.ndarray) -> np.ndarray:
    # Column by column, as in `weighted_sum`.
    return np.array([channel_T.sum(dtype=np.float64) for channel_T in block_TC.T])


def _gram(block_TC: np.ndarray) -> np.ndarray:
    wide_TC = block_TC.astype(np.float64)
    return wide_TC.T @ wide_TC


def _covariance(sum_C: np.ndarray, gram_CC: np.ndarray, frames: int) -> np.ndarray:
    return gram_CC / frames - np.outer(sum_C, sum_C) / frames**2


def resample(
    samples: np.ndarray, from_rate: int, to_rate: int, *, quality: str = "VHQ"
) -> np.ndarray:
    """Changes the sample rate of [T] or [T, C] samples by soxr, linear phase.

    Args:
      samples: [T] or [T, C] float32 or float64.
      from_rate: Hz of the samples.
      to_rate: Hz wanted.
      quality: soxr's recipe, "VHQ" (pass band to 0.95, stop band beyond -170 dB) or "HQ".

    Returns:
      round(T * to_rate / from_rate) samples of the same dtype; the samples themselves where the
      rates agree.
    """
    if from_rate == to_rate:
        return samples
    import soxr

    result = soxr.resample(samples, from_rate, to_rate, quality=quality)
    length = round(len(samples) * to_rate / from_rate)
    if len(result) < length:  # soxr rounds the length its own way, by one sample
        padding = [(0, length - len(result))] + [(0, 0)] * (result.ndim - 1)
        result = np.pad(result, padding)
    return result[:length]


def _info(file: soundfile.SoundFile, path: str | os.PathLike) -> AudioInfo:
    return AudioInfo(
        Path(path), file.samplerate, file.channels, file.frames, file.format, file.subtype
    )


def _check_finite(samples_TC: np.ndarray, name: str, sample_rate: int, *, offset: int) -> None:
    # The sum of finite samples is finite (float64), and costs a fraction of np.isfinite().all().
    with np.errstate(all="ignore"):  # infinities of both signs, and NaNs of every kind
        if np.isfinite(samples_TC.sum(dtype=np.float64)):
            return
    bad_T = ~np.isfinite(samples_TC).all(axis=1)
    if bad_T.any():
        seconds = (offset + int(np.argmax(bad_T))) / sample_rate
        raise files.NotFiniteError(
            f"{name} holds samples that are not numbers (NaN or infinite; {int(bad_T.sum())} or "
            f"more, the first at {seconds:.3f} s): repair or export it again"
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
