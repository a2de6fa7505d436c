"""Applying an EQ to audio: arrays of any shape, and files of any length in constant memory.

Time-domain second-order sections in float64, in the file's own rate, container and sample format,
with no sample more or less than the input has, and no clipping that the caller is not told about.
"""

import concurrent.futures
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile

from eqst import audio, biquad, eq
from eqst.audio import AudioError, AudioInfo
from eqst.files import native
from eqst.loudness import flush_denormals

Item = TypeVar("Item")

CLIP_POLICIES = ("preamp", "float")
PEAK_TARGET_DBFS = -0.1  # where the peak lands when a file has to be attenuated
_RIFF_BYTES = 2**32 - 2**16  # what a 32-bit RIFF size can hold, with room for headers and tags

# libsndfile's containers by file extension; the first is the one for input of another container.
CONTAINERS = {
    ".wav": ("WAV", "WAVEX", "RF64"),
    ".wave": ("WAV", "WAVEX", "RF64"),
    ".rf64": ("RF64",),
    ".w64": ("W64",),
    ".flac": ("FLAC",),
    ".ogg": ("OGG",),
    ".oga": ("OGG",),
    ".opus": ("OGG",),
    ".mp3": ("MP3",),
    ".aif": ("AIFF",),
    ".aiff": ("AIFF",),
    ".caf": ("CAF",),
    ".au": ("AU",),
}
_TAGGED = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF", "CAF")  # can hold title, artist..
_BITS = {"PCM_S8": 8, "PCM_U8": 8, "PCM_16": 16, "PCM_24": 24, "PCM_32": 32}
_FLOATS = ("FLOAT", "DOUBLE")
_LOSSY = ("VORBIS", "OPUS", "MPEG_LAYER_III")
_LOSSY_COMPRESSION = 0.1  # 0 best .. 1 smallest: decoding and encoding again should cost little
# What takes the place of a sample format that the output's container lacks, best first. Codecs in
# blocks (ADPCM, GSM) would change the number of samples, and ALAC as libsndfile 1.2 writes it
# reads back wrong: they become plain PCM. A decoded lossy file has no bit depth; 24 lose nothing.
_SUBSTITUTES = {
    "PCM_S8": ("PCM_S8", "PCM_U8", "PCM_16"),
    "PCM_U8": ("PCM_U8", "PCM_S8", "PCM_16"),
    "PCM_16": ("PCM_16",),
    "PCM_24": ("PCM_24",),
    "PCM_32": ("PCM_32", "PCM_24"),
    "FLOAT": ("FLOAT", "PCM_24"),
    "DOUBLE": ("DOUBLE", "FLOAT", "PCM_24"),
    "ULAW": ("ULAW", "PCM_16"),
    "ALAW": ("ALAW", "PCM_16"),
    "VORBIS": ("VORBIS", "PCM_24"),
    "OPUS": ("OPUS", "PCM_24"),
    "MPEG_LAYER_III": ("MPEG_LAYER_III", "PCM_24"),
    "ALAC_20": ("PCM_24",),
    "ALAC_24": ("PCM_24",),
    "ALAC_32": ("PCM_32",),
}


@dataclasses.dataclass(frozen=True)
class RenderReport:
    """What `render_file` did.

    Attributes:
      output: the file written.
      sample_rate, channels, frames: as in the input, all three.
      format, subtype: libsndfile's names of what was written.
      input_peak_dbfs: largest sample of the input, -inf for digital silence.
      peak_dbfs: largest sample after the EQ and before the preamp; above 0 is over full scale.
      preamp_db: gain applied so that nothing clips, <= 0; 0 where nothing had to be done.
      limited_K: [K] which bands' frequencies were brought down to 0.45 of the sample rate.
    """

    output: Path
    sample_rate: int
    channels: int
    frames: int
    format: str
    subtype: str
    input_peak_dbfs: float
    peak_dbfs: float
    preamp_db: float
    limited_K: tuple[bool, ...]


def render(samples: np.ndarray, sos_K6: np.ndarray) -> np.ndarray:
    """Filters audio through a cascade of second-order sections, starting from rest.

    Args:
      samples: [T] or [T, C] float32 or float64.
      sos_K6: [K, 6] sections from `biquad.sos` at the rate of the samples.

    Returns:
      The same shape and dtype; the arithmetic is float64. Nothing is clipped or scaled.
    """
    from scipy.signal import sosfilt

    return sosfilt(sos_K6, samples.astype(np.float64), axis=0).astype(samples.dtype)


def render_file(
    input: str | os.PathLike,
    output: str | os.PathLike,
    params: eq.EqParams,
    *,
    overwrite: bool = False,
    clip: str = "preamp",
    block_frames: int | None = None,
) -> RenderReport:
    """Applies an EQ to a whole file, in constant memory.

    The container is that of the output's extension; the sample format is the input's where that
    container has it (a 24-bit FLAC gives a 24-bit WAV), else the nearest that loses nothing the
    input has, where there is one. Rounding to integers is to nearest, without dither: a flat EQ
    gives the input's samples back bit by bit. Lossy files are encoded again, near best quality.
    Title, artist and the like are kept where the container can hold them. WAV files beyond 4 GB
    become RF64. The output appears whole or not at all.

    Args:
      input: any file that `audio.open_audio` accepts.
      output: file to write; its extension is one of `CONTAINERS`.
      params: the EQ, [K] each, for the file's own rate (see `eq.refit`); frequencies above 0.45
        of it are limited to that, and reported.
      overwrite: replace an existing output.
      clip: what happens where the filtered audio exceeds full scale, which float files cannot.
        "preamp": the whole file is attenuated so that its peak is -0.1 dBFS, by no more.
        "float": a float WAV (or AIFF, CAF, W64, AU) is written, with no gain at all.
      block_frames: frames per block; None chooses.

    Returns:
      RenderReport.

    Raises:
      AudioError: input that cannot be read; an output that is the input (by any name or link),
        exists already, has an unknown extension, cannot hold the input's channels or rate, or
        cannot be written; an unknown policy.
    """
    if clip not in CLIP_POLICIES:
        raise AudioError(f"clip policy {clip!r}: choose one of {', '.join(CLIP_POLICIES)}")
    source = audio.info(input)
    container, subtype = output_format(source, output, clip)
    if os.path.exists(output) and os.path.samefile(input, output):
        raise AudioError(f"{os.fspath(output)!r} is the input itself: name another output")
    audio.check_target(output, overwrite=overwrite)
    params, limited_K = eq.limit_to_rate(params, source.sample_rate)
    sos_K6 = biquad.sos(
        params.freq_hz, params.gain_db, params.q, kinds=eq.KINDS, sample_rate=source.sample_rate
    )

    def write(temporary: Path) -> RenderReport:
        measured = _write_pass(source, temporary, container, subtype, sos_K6, 0.0, block_frames)
        preamp_db = 0.0
        if not measured.fits:
            preamp_db = PEAK_TARGET_DBFS - _dbfs(measured.peak)
            _write_pass(source, temporary, container, subtype, sos_K6, preamp_db, block_frames)
        written = soundfile.info(native(temporary))
        if (written.frames, written.channels) != (measured.frames, source.channels):
            raise AudioError(
                f"{os.fspath(output)!r}: {container} {subtype} kept {written.frames} of "
                f"{measured.frames} samples: name a .wav or .flac output"
            )
        return RenderReport(
            output=Path(output),
            sample_rate=source.sample_rate,
            channels=source.channels,
            frames=measured.frames,
            format=container,
            subtype=subtype,
            input_peak_dbfs=_dbfs(measured.input_peak),
            peak_dbfs=_dbfs(measured.peak),
            preamp_db=preamp_db,
            limited_K=tuple(bool(limited) for limited in np.asarray(limited_K)),
        )

    return audio.write_atomically(output, write, overwrite=overwrite)


def output_format(source: AudioInfo, output: str | os.PathLike, clip: str) -> tuple[str, str]:
    """libsndfile's container and sample format for rendering `source` to `output`.

    Raises:
      AudioError: unknown extension, or one that cannot hold what the policy or input asks for.
    """
    suffix = Path(output).suffix.lower()
    if suffix not in CONTAINERS:
        raise AudioError(
            f"{os.fspath(output)!r}: unknown extension {suffix!r}: end it in {' '.join(CONTAINERS)}"
        )
    choices = CONTAINERS[suffix]
    container = source.format if source.format in choices else choices[0]
    available = soundfile.available_subtypes(container)
    if clip == "float":
        wanted: tuple[str, ...] = ("DOUBLE",) if source.subtype == "DOUBLE" else ("FLOAT",)
    else:
        same = source.format == container
        listed = _SUBSTITUTES[source.subtype] if source.subtype in _SUBSTITUTES else ("PCM_16",)
        wanted = tuple(name for name in listed if same or name not in _LOSSY)
    if suffix == ".opus":
        available = {"OPUS": ""}
    found = [name for name in wanted if name in available]
    if not found and clip == "float":
        raise AudioError(
            f"{os.fspath(output)!r}: {container} has no float samples: name a .wav output, or "
            "let the file be attenuated (--clip=preamp)"
        )
    if not found:  # lossy containers, from anything else
        found = [name for name in _LOSSY if name in available] or ["PCM_16"]
    size = source.frames * source.channels * (8 if found[0] == "DOUBLE" else 4)
    if found[0] in _BITS:
        size = source.frames * source.channels * _BITS[found[0]] // 8
    if size > _RIFF_BYTES and container in ("WAV", "WAVEX"):
        container = "RF64"
    if size > _RIFF_BYTES and container in ("AIFF", "AU"):
        raise AudioError(
            f"{os.fspath(output)!r}: {size / 2**30:.1f} GiB are more than {container} holds (4): "
            "name a .wav, .w64 or .caf output"
        )
    return container, found[0]


@dataclasses.dataclass(frozen=True)
class _Measured:
    frames: int
    input_peak: float
    peak: float
    fits: bool  # the sample format can hold every sample


def _write_pass(
    source: AudioInfo,
    temporary: Path,
    container: str,
    subtype: str,
    sos_K6: np.ndarray,
    preamp_db: float,
    block_frames: int | None,
) -> _Measured:
    """Filters the whole file once, writing as long as everything fits; measures to the end.

    Most files fit, so that one pass both measures and writes them; the others take a second.
    """
    gain = 10 ** (preamp_db / 20)
    low, high = _sample_range(subtype)
    frames, input_peak, least, most = 0, 0.0, 0.0, 0.0
    try:
        with _create(source, temporary, container, subtype) as out:
            for block_TC, filtered_TC in _ahead(_filtered(source.path, sos_K6, block_frames)):
                filtered_TC *= gain
                frames += len(block_TC)
                input_peak = max(input_peak, float(block_TC.max()), -float(block_TC.min()))
                least = min(least, float(filtered_TC.min()))
                most = max(most, float(filtered_TC.max()))
                if low <= least and most <= high:
                    out.write(_quantised(filtered_TC, subtype))
    except soundfile.SoundFileError as error:
        raise AudioError(
            f"cannot write {source.channels} channels at {source.sample_rate} Hz as {container} "
            f"{subtype} ({str(error).strip()}; {_free_mb(temporary)} MB are free there): make "
            "room, or name a .wav or .flac output"
        ) from None
    return _Measured(frames, input_peak, max(-least, most), low <= least and most <= high)


def _free_mb(path: Path) -> int:
    return shutil.disk_usage(path.parent).free // 10**6


def _create(
    source: AudioInfo, temporary: Path, container: str, subtype: str
) -> soundfile.SoundFile:
    out = soundfile.SoundFile(
        native(temporary),
        "w",
        samplerate=source.sample_rate,
        channels=source.channels,
        format=container,
        subtype=subtype,
        compression_level=_LOSSY_COMPRESSION if subtype in _LOSSY else None,
    )
    if container in _TAGGED:
        with audio.open_audio(source.path) as original:
            tags = original.copy_metadata()
        for name, text in tags.items():
            if text and name != "software":  # libsndfile names itself there
                setattr(out, name, text)
    return out


def _filtered(
    path: Path, sos_K6: np.ndarray, block_frames: int | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of [t, C] float64 blocks, as read and filtered; the filter runs on between blocks."""
    from scipy.signal import sosfilt

    state_K2C = None
    for block_TC in audio.stream(path, dtype="float64", block_frames=block_frames):
        if state_K2C is None:
            state_K2C = np.zeros((len(sos_K6), 2, block_TC.shape[1]))
        filtered_TC, state_K2C = sosfilt(sos_K6, block_TC, axis=0, zi=state_K2C)
        flush_denormals(state_K2C)
        yield block_TC, filtered_TC


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in a thread while the one before it is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _sample_range(subtype: str) -> tuple[float, float]:
    """Least and largest value that the sample format takes without clipping."""
    if subtype in _FLOATS:
        return -np.inf, np.inf
    if subtype in _BITS:
        half_step = 2.0 ** -_BITS[subtype]  # what rounding to nearest still brings into range
        return -1.0 - half_step, 1.0 - half_step
    return -1.0, 1.0


def _quantised(samples_TC: np.ndarray, subtype: str) -> np.ndarray:
    """Samples as soundfile should get them: integers rounded by us, since libsndfile truncates."""
    if subtype not in _BITS:
        return samples_TC
    bits = _BITS[subtype]
    top = 2.0 ** (bits - 1)
    steps_TC = np.clip(np.rint(samples_TC * top), -top, top - 1)
    # libsndfile takes the upper bits of a 32-bit integer.
    return (steps_TC * 2.0 ** (32 - bits)).astype(np.int32)


def _dbfs(peak: float) -> float:
    return 20 * float(np.log10(peak)) if peak > 0 else -np.inf
