"""The sound of synthetic talkers: what they say, how it sounds, how it is recorded.

A source-filter synthesis in frames of 8 ms: pitch pulses and white noise are multiplied, frame by
frame, by smooth envelopes on `talkers.GRID_HZ`, and overlap-added, some 100 times faster than real
time on one core. It does not try to be intelligible. It tries to have the statistics that matter
when equalisers are estimated: how the long-term spectra of talkers differ, how two short excerpts
of one talker differ, and how the levels of each band are distributed over time.

Sources: source-filter theory, Fant, "Acoustic Theory of Speech Production" (1960); glottal
spectra, Doval et al., "The spectrum of glottal flow models" (2006). Phonetics: see `talkers`.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.ndimage
import scipy.signal

from eqst.talkers import (
    CONSONANT_ROWS,
    GRID_HZ,
    SILENT_DB,
    VOWELS,
    Recording,
    Talker,
    Voice,
    formant_width_hz,
    random_curve,
    random_talker,
)

HOP_S = 0.008  # frame step; the analysis window is twice as long
DB_TO_NEPER = np.float32(np.log(10.0) / 20.0)
Rng = np.random.Generator


def synthesise(
    seed: int, talker: int, seconds: float, sample_rate: int = 44100, *, exact: bool = False
) -> np.ndarray:
    """Lets one synthetic talker speak.

    Args:
      seed: the corpus, >= 0.
      talker: the talker's number in the corpus, >= 0; any number, there is no last one.
      seconds: duration, > 0. Another duration is another performance of the same talker.
      sample_rate: samples per second, 16000 .. 48000.
      exact: float64 throughout, in twice the time: rounded to 16 bits the audio is then the same
        on other processors. In float32 a few samples in 10,000 differ by one, as numpy and BLAS
        choose their kernels by processor.

    Returns:
      [T] float32 mono in (-1, 1), T = round(seconds * sample_rate); equal arguments, equal audio.

    Raises:
      ValueError: for a negative seed or talker, no duration, or a rate out of range.
    """
    if seed < 0 or talker < 0:
        raise ValueError(f"seed and talker must be >= 0, got {seed} and {talker}")
    if not 16000 <= sample_rate <= 48000:
        raise ValueError(f"sample_rate of a talker must be 16000 .. 48000 Hz, got {sample_rate}")
    samples = round(seconds * sample_rate)
    if samples < 1:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    who = random_talker(seed, talker)
    rng = np.random.default_rng([seed, talker, 1])
    dry_T = _speak(who, rng, samples, sample_rate, np.float64 if exact else np.float32)
    return _record(who.recording, rng, dry_T, sample_rate).astype(np.float32)


class Piece(NamedTuple):
    """Steady targets: what the voice aims at for `seconds`. Levels in dB, as in `Voice`."""

    seconds: float
    formants_hz: np.ndarray  # F1 .. F4
    f0_octaves: float  # above Voice.f0_hz
    effort_db: float
    voice_db: float = SILENT_DB
    breath_db: float = SILENT_DB
    noise_db: float = SILENT_DB
    noise_hz: float = 3000.0
    rise_db: float = 6.0
    fall_db: float = 6.0
    nasal: float = 0.0
    phone: int = 0  # row of Voice.colours_db_PG
    take: int = 0  # which position at the microphone
    puff: float = 0.0  # air blown at the microphone, 0 .. 1


def _consonant(voice: Voice, rng: Rng, vowel: Piece, long: float) -> list[Piece]:
    """The pieces of a random consonant beside the vowel; `long` stretches it."""
    which = int(rng.choice(len(CONSONANT_ROWS), p=voice.consonant_weights_C))
    row = CONSONANT_ROWS[which]
    locus_3 = voice.tract * np.array((row.f1_hz, row.f2_hz, row.f3_hz))
    near = vowel.formants_hz
    formants = near.copy()
    formants[:3] = locus_3 ** (0.7, 0.6, 0.6) * near[:3] ** (0.3, 0.4, 0.4)  # coarticulation
    seconds = long * row.seconds * np.exp(rng.normal(0, 0.25))
    noise_db = voice.noise_db_C[which] + rng.normal(0, 3.0) + 0.7 * vowel.effort_db
    quiet = Piece(seconds, formants, vowel.f0_octaves, vowel.effort_db)
    bend = (near[1] / (1450.0 * voice.tract)) ** 0.1  # rounded lips lower the noise too
    rise_db, fall_db = voice.noise_slopes_C2[which]
    hiss = quiet._replace(
        noise_db=noise_db,
        noise_hz=voice.noise_hz_C[which] * np.exp(rng.normal(0, 0.06)) * bend,
        rise_db=rise_db,
        fall_db=fall_db,
        phone=len(VOWELS) + which,
    )
    if row.manner == "fricative":
        return [hiss._replace(voice_db=row.voice_db)]
    if row.manner == "aspirate":
        return [quiet._replace(formants_hz=near, breath_db=noise_db)]
    if row.manner in ("nasal", "approximant"):
        level_db = row.voice_db + rng.normal(0, 1.5)
        nasal = float(row.manner == "nasal")
        return [quiet._replace(voice_db=level_db, breath_db=voice.breath_db, nasal=nasal)]
    closed = quiet._replace(seconds=0.6 * seconds, voice_db=row.voice_db)
    if row.manner == "affricate":
        return [closed, hiss._replace(seconds=0.7 * seconds)]
    burst_s = rng.uniform(0.008, 0.02)
    burst = hiss._replace(seconds=burst_s, puff=rng.uniform(), noise_db=noise_db + 4.0)
    if row.voice_db > SILENT_DB:
        return [closed, burst]
    breath_s = rng.uniform(0.01, 0.06)
    return [closed, burst, quiet._replace(seconds=breath_s, breath_db=noise_db - 4.0)]


def _syllable(
    voice: Voice, rng: Rng, f0_octaves: float, effort_db: float, stress_db: float, long: float
) -> list[Piece]:
    """Pieces of consonant, vowel, consonant; in letter style sometimes a consonant alone."""
    phone = int(rng.choice(len(VOWELS), p=voice.vowel_weights_V))
    formants = voice.vowels_V4[phone] * np.exp(rng.normal(0, 0.04, 4))
    vowel = Piece(0.0, formants, f0_octaves, effort_db, phone=phone)
    if voice.style == "letters" and rng.uniform() < 0.35:
        return _consonant(voice, rng, vowel, rng.uniform(1.5, 4.0))
    seconds = long * voice.syllable_s * np.exp(rng.normal(0, 0.3))
    level_db = stress_db + rng.normal(0, 1.5)
    vowel = vowel._replace(
        seconds=seconds / 3.0,
        voice_db=level_db,
        breath_db=voice.breath_db + 0.5 * level_db,
        nasal=0.25 * (rng.uniform() < 0.15),
    )
    # Pitch and loudness move within the syllable, more in a long last one; formants drift a little.
    glide = 0.6 * voice.f0_octaves * (rng.normal(0.2, 0.6) + (long > 1.0))
    first = vowel._replace(f0_octaves=f0_octaves + glide, voice_db=level_db - 1.5)
    third = vowel._replace(
        f0_octaves=f0_octaves - glide,
        voice_db=level_db - rng.uniform(1.0, 5.0) * long,
        formants_hz=formants * np.exp(rng.normal(0, 0.08, 4)),
    )
    before = _consonant(voice, rng, vowel, 1.0) if rng.uniform() < 0.85 else []
    after = _consonant(voice, rng, vowel, 1.0) if rng.uniform() < 0.35 else []
    return [*before, first, vowel, third, *after]


def _script(voice: Voice, rng: Rng, seconds: float) -> list[Piece]:
    """Utterances and pauses, until `seconds` are filled."""
    neutral_4 = voice.tract * np.array((500.0, 1450.0, 2450.0, 3500.0))
    pieces = [Piece(rng.uniform(0.0, 0.2), neutral_4, 0.0, 0.0)]
    spoken_s, take = 0.0, 0
    low, high = {"sentences": (4, 18), "words": (1, 4), "letters": (1, 2)}[voice.style]
    while spoken_s < seconds:
        count = rng.integers(low, high + 1)
        effort_db = rng.normal(0, voice.effort_db)
        start = rng.normal(0.1, 0.25) * voice.f0_octaves + 0.03 * effort_db
        fall = rng.normal(1.6, 0.8) * voice.f0_octaves
        new: list[Piece] = []
        for place in range(count):
            done = place / count
            stress_db = rng.normal(0, 2.5) - 5.0 * done**3
            accent = voice.f0_octaves * rng.normal(0, 0.7) + 0.02 * stress_db
            f0 = start + fall * (0.5 - done) + accent
            last = place == count - 1
            f0 -= 0.9 * (last and rng.uniform() < voice.creak)
            long = 1.5 if last else 1.0
            new += _syllable(voice, rng, f0, effort_db, stress_db, long)
        quiet_s = voice.pause_s * np.exp(rng.normal(0, 0.4))
        rest = Piece(quiet_s, neutral_4, new[-1].f0_octaves, 0.0)
        if rng.uniform() < voice.breaths:
            breath_s = rng.uniform(0.15, 0.4)
            breath = rest._replace(seconds=breath_s, breath_db=rng.normal(-30, 4))
            new += [rest._replace(seconds=0.6 * quiet_s), breath]
        new.append(rest)
        take += int(rng.uniform() < 0.4)
        pieces += [piece._replace(take=take) for piece in new]
        spoken_s += sum(piece.seconds for piece in new)
    return pieces


def _smooth(track_N: np.ndarray, frames: int) -> np.ndarray:
    """Moving average of a track [N, ...] over an odd number of frames, Hann weighted."""
    kernel = np.hanning(frames + 2)[1:-1]
    return scipy.ndimage.convolve1d(track_N, kernel / kernel.sum(), axis=0, mode="nearest")


def _drift(rng: Rng, count: int, frames: int) -> np.ndarray:
    """Slow random track [N] of unit variance."""
    track_N = _smooth(rng.normal(size=count + 4 * frames), frames)
    return (track_N / track_N.std())[2 * frames : 2 * frames + count]


@cache
def _to_bins(sample_rate: int, size: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Matrices [G, F] from dB on the grid to dB on FFT bins, and to minimum phase in radians.

    Minimum phase is linear in the level (Hilbert transform, here by the folded real cepstrum).
    """
    bins_hz = np.fft.rfftfreq(size, 1.0 / sample_rate)
    to_level_GF = np.array([np.interp(bins_hz, GRID_HZ, unit) for unit in np.eye(len(GRID_HZ))])
    cepstrum = np.fft.irfft(to_level_GF * (np.log(10.0) / 20.0), size)
    cepstrum[:, 1 : size // 2] *= 2.0
    cepstrum[:, size // 2 + 1 :] = 0.0
    to_phase_GF = np.fft.rfft(cepstrum, size).imag
    return to_level_GF.astype(dtype), to_phase_GF.astype(dtype)


def _pulses(
    voice: Voice, rng: Rng, f0_hz_N: np.ndarray, hop: int, samples: int, sample_rate: int
) -> np.ndarray:
    """Pitch pulses [T] with jitter and shimmer; mean power 1, flat to near Nyquist."""
    f0_hz_T = np.interp(np.arange(samples), hop * np.arange(len(f0_hz_N)), f0_hz_N)
    cycles_T = np.cumsum(f0_hz_T / sample_rate)
    marks = np.interp(np.arange(1.0, cycles_T[-1]), cycles_T, np.arange(samples))
    period = sample_rate / np.interp(marks, np.arange(samples), f0_hz_T)
    marks = marks + period * voice.jitter * rng.normal(size=len(marks))
    height = np.sqrt(period) * np.exp(voice.shimmer * rng.normal(size=len(marks)))
    place = np.floor(marks).astype(int)[:, None] + np.arange(-7, 9)
    offset = place - marks[:, None]
    shape = np.sinc(offset) * np.cos(np.pi * offset / 17.0) ** 2  # fractional delay, windowed
    shape[(place < 0) | (place >= samples)] = 0.0
    place = np.clip(place, 0, samples - 1).ravel()
    return np.bincount(place, (height[:, None] * shape).ravel(), samples)


def _frames(signal_T: np.ndarray, count: int, hop: int, size: int) -> np.ndarray:
    """Spectra [N, F] of Hann frames two hops long, centred on n * hop."""
    window = scipy.signal.get_window("hann", 2 * hop).astype(signal_T.dtype)
    padded = np.pad(signal_T, (hop, 3 * hop))
    view = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[::hop][:count]
    return scipy.fft.rfft(view * window, size)


def _overlap_add(spectrum_NF: np.ndarray, hop: int, size: int, samples: int) -> np.ndarray:
    """The inverse of `_frames` [T]; multiplying the spectra before it filters the signal."""
    frames_NT = scipy.fft.irfft(spectrum_NF, size)
    out_T = np.zeros((len(frames_NT) - 1) * hop + size, frames_NT.dtype)
    for index, frame in enumerate(frames_NT):
        out_T[index * hop : index * hop + size] += frame
    return out_T[hop : hop + samples]


def _envelopes(
    voice: Voice, track: dict[str, np.ndarray], mean_bins_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Level [N, G] in dB of the filter of the pulses, and power [N, G] of that of the noise."""
    dtype = track["formants_hz"].dtype
    freq_G = GRID_HZ.astype(dtype)
    ratio = np.ones((len(track["formants_hz"]), len(freq_G)), dtype)
    for centre_N in track["formants_hz"].T:
        width_N = voice.bandwidth * formant_width_hz(centre_N)
        square_NG = (freq_G / centre_N[:, None]) ** 2
        ratio *= (1.0 - square_NG) ** 2 + square_NG * ((width_N / centre_N) ** 2)[:, None]
    tract_NG = -10.0 * np.log10(ratio) + voice.high_tract_db_G.astype(dtype)
    colour_NG = voice.colours_db_PG.astype(dtype)[track["phone"]]
    tract_NG += colour_NG + track["nasal"][:, None] * voice.nasal_db_G.astype(dtype)
    # The derivative of the glottal flow rises 6 dB an octave to the glottal formant, then falls
    # by 6, and by 12 above the tilt corner, which effort raises.
    effort_N = track["effort_db"]
    below_NG = freq_G / (voice.glottal_peak * track["f0_hz"])[:, None]
    tilt_N = voice.tilt_hz * 2.0 ** (effort_N / 4.0)
    source_NG = -10.0 * np.log10((0.03 + below_NG**2) ** -1 + below_NG**2 + 0.5)
    source_NG -= 10.0 * np.log10(1.0 + (freq_G / tilt_N[:, None]) ** 2)
    voiced_NG = tract_NG + source_NG
    loud = track["voice"] > 0.5 * track["voice"].max()
    level_N = 10.0 * np.log10(10.0 ** (voiced_NG / 10.0) @ mean_bins_G)
    # Speakers take back half of what the tract gives open vowels over close ones.
    level_N = 0.5 * (level_N + level_N[loud].mean())
    voiced_NG += (20.0 * np.log10(track["voice"]) + effort_N - level_N)[:, None]
    # Noise made at the glottis passes the tract; noise made at the front has its own shape.
    above_G = freq_G**2 / (freq_G**2 + 700.0**2) * (1.0 + (freq_G / 7000.0) ** 2)
    breath_NG = 10.0 ** (tract_NG / 10.0) * above_G
    breath_NG *= ((track["breath"] ** 2) / (breath_NG @ mean_bins_G).mean())[:, None]
    octaves_NG = np.log2(np.maximum(freq_G, 20.0)) - np.log2(track["noise_hz"])[:, None]
    slope_NG = np.where(octaves_NG < 0, track["rise_db"][:, None], track["fall_db"][:, None])
    front_NG = colour_NG - slope_NG * (np.sqrt(octaves_NG**2 + 0.09) - 0.3)  # rounded at the peak
    front_NG = 10.0 ** (np.maximum(front_NG, -45.0) / 10.0)
    front_NG *= (track["noise"] ** 2 / (front_NG @ mean_bins_G))[:, None]
    return voiced_NG, breath_NG + front_NG


def _floor(
    recording: Recording, rng: Rng, puff_N: np.ndarray, mean_bins_G: np.ndarray
) -> np.ndarray:
    """Power [N, G] of the noise of the place against that of the speech: hiss, rumble and puffs."""
    hiss_G = 10.0 ** (recording.floor_colour_db_G / 10.0)
    hiss_G /= hiss_G @ mean_bins_G
    rumble_G = 1.0 / (1.0 + (GRID_HZ / 50.0) ** 5)
    rumble_G /= rumble_G @ mean_bins_G
    rumble_N = 10.0 ** (0.1 * recording.rumble_db + 0.5 * _drift(rng, len(puff_N), 201))
    rumble_N += 10.0 ** (0.1 * recording.puff_db) * _smooth(puff_N, 7)
    hiss_N = 10.0 ** (0.1 * recording.floor_db + 0.2 * _drift(rng, len(puff_N), 201))
    return np.outer(hiss_N, hiss_G) + np.outer(rumble_N, rumble_G)


def _speak(
    who: Talker, rng: Rng, samples: int, sample_rate: int, dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """Dry speech and the noise of the place [T]; a vowel has a mean power of about 1."""
    hop = round(HOP_S * sample_rate)
    size = 1 << (4 * hop).bit_length()
    count = -(-samples // hop) + 1
    pieces = _script(who.voice, rng, samples / sample_rate)
    ends_s = np.cumsum([piece.seconds for piece in pieces])
    which_N = np.minimum(np.searchsorted(ends_s, np.arange(count) * HOP_S), len(pieces) - 1)

    def held(field: str) -> np.ndarray:
        return np.array([getattr(piece, field) for piece in pieces], dtype)[which_N]

    track = {
        "formants_hz": np.exp(_smooth(np.log(held("formants_hz")), 9)),
        "f0_hz": who.voice.f0_hz * 2.0 ** _smooth(held("f0_octaves"), 21),
        "effort_db": _smooth(held("effort_db"), 9),
        "nasal": _smooth(held("nasal"), 5),
        "phone": held("phone").astype(int),
    }
    track |= {name: held(name) for name in ("noise_hz", "rise_db", "fall_db")}
    for name in ("voice", "breath", "noise"):
        track[name] = _smooth(10.0 ** (held(name + "_db") / 20.0), 3)
    track["f0_hz"] = np.clip(track["f0_hz"] * 2.0 ** (0.01 * _drift(rng, count, 15)), 60.0, 500.0)
    if dtype is np.float64:
        # Cycles are summed over the whole recording: the last bit of a pitch would grow.
        track["f0_hz"] = np.round(track["f0_hz"], 6)
    to_level_GF, to_phase_GF = _to_bins(sample_rate, size, np.dtype(dtype))
    mean_bins_G = to_level_GF.mean(1)
    voiced_NG, noise_NG = _envelopes(who.voice, track, mean_bins_G)
    takes = held("take").astype(int)
    takes_db = [random_curve(rng, who.recording.position_db, 1.0) for _ in range(takes.max() + 1)]
    position_NG = np.array(takes_db, dtype)[takes]
    voiced_NG = np.maximum(voiced_NG + position_NG, -120.0).astype(dtype)
    noise_NG *= 10.0 ** (position_NG / 10.0)
    speech_power = ((10.0 ** (voiced_NG / 10.0) + noise_NG) @ mean_bins_G).mean()
    noise_NG += speech_power * _floor(who.recording, rng, held("puff"), mean_bins_G)
    noise_NG = noise_NG.astype(dtype)
    pulses_T = _pulses(who.voice, rng, track["f0_hz"], hop, samples, sample_rate).astype(dtype)
    hiss_T = rng.standard_normal(samples, np.float32).astype(dtype)
    amp_NF = np.exp((voiced_NG * DB_TO_NEPER) @ to_level_GF)
    phase_NF = voiced_NG @ to_phase_GF
    spectrum_NF = _frames(pulses_T, count, hop, size) * amp_NF
    spectrum_NF *= np.cos(phase_NF) + 1j * np.sin(phase_NF)
    spectrum_NF += _frames(hiss_T, count, hop, size) * (np.sqrt(noise_NG) @ to_level_GF)
    return _overlap_add(spectrum_NF, hop, size, samples)


def _record(recording: Recording, rng: Rng, dry_T: np.ndarray, sample_rate: int) -> np.ndarray:
    """Room, microphone, hum, codec, gate and level."""
    samples = len(dry_T)
    level_GF, phase_GF = _to_bins(sample_rate, 4096, dry_T.dtype)
    cut_db_G = np.clip((GRID_HZ - recording.codec_hz) / 5.0, 0.0, 80.0)  # 80 dB within 400 Hz
    response_db_G = recording.response_db_G - cut_db_G
    response = np.exp(DB_TO_NEPER * response_db_G @ level_GF + 1j * (response_db_G @ phase_GF))
    filter_T = np.fft.irfft(response)
    room_T = np.zeros(round(max(recording.reverb_s, 0.03) * sample_rate))
    time_s = np.arange(len(room_T)) / sample_rate
    tail_T = rng.normal(size=len(room_T)) * 10.0 ** (-3.0 * time_s / recording.reverb_s)
    tail_T = scipy.signal.lfilter([1.0], [1.0, -0.5], tail_T) * (time_s > 0.002)  # walls are dull
    room_T += tail_T * 10.0 ** (recording.reverb_db / 20.0) / np.sqrt((tail_T**2).sum())
    room_T[0] += 1.0
    for delay_s, gain in recording.reflections:
        room_T[round(delay_s * sample_rate)] += gain
    filter_T = scipy.signal.oaconvolve(room_T, filter_T).astype(dry_T.dtype)
    wet_T = scipy.signal.oaconvolve(dry_T, filter_T)[:samples]
    rms = np.sqrt(np.mean(wet_T**2) + 1e-20)
    if recording.hum_db > SILENT_DB:
        time_s = np.arange(samples) / sample_rate
        for harmonic, height in zip((1, 2, 3, 5), (1.0, 0.5, 0.4, 0.2), strict=True):
            wave = np.sin(2 * np.pi * recording.hum_hz * harmonic * time_s)
            wet_T += rms * np.sqrt(2.0) * 10.0 ** (recording.hum_db / 20.0) * height * wave
    if recording.gate_db > SILENT_DB:
        wet_T *= _gate(wet_T / rms, recording.gate_db, sample_rate)
    if recording.codec_hz < np.inf:
        wet_T = _codec(wet_T.astype(dry_T.dtype), recording.codec_floor_db)
    gain = min(10.0 ** (recording.level_db / 20.0) / rms, 0.97 / (np.abs(wet_T).max() + 1e-9))
    return gain * wet_T + recording.offset


def _gate(wet_T: np.ndarray, gate_db: float, sample_rate: int) -> np.ndarray:
    """Gain 0 .. 1 [T] of a noise gate that opens and closes 50 ms around what is loud enough."""
    step = round(0.01 * sample_rate)
    blocks = -(-len(wet_T) // step)
    level_N = np.pad(wet_T, (0, blocks * step - len(wet_T))).reshape(blocks, step)
    open_N = (level_N**2).mean(1) > 10.0 ** (gate_db / 10.0)
    open_N = scipy.ndimage.maximum_filter1d(open_N.astype(np.float32), 11)
    return np.interp(np.arange(len(wet_T)), (np.arange(blocks) + 0.5) * step, open_N)


def _codec(wet_T: np.ndarray, floor_db: float) -> np.ndarray:
    """A lossy codec leaves out treble bands that are too weak to hear, block by block."""
    hop, width = 512, 16
    spectrum_NF = _frames(wet_T, -(-len(wet_T) // hop) + 1, hop, 2 * hop)
    power_NB = (np.abs(spectrum_NF[:, :-1]) ** 2).reshape(len(spectrum_NF), -1, width).sum(2)
    total_N1 = power_NB.sum(1, keepdims=True)
    band_B = np.arange(power_NB.shape[1])
    # Hearing needs more level towards the top, and more under a loud bass.
    least_B = 10.0 ** ((floor_db + 0.7 * np.maximum(band_B - 10, 0)) / 10.0)
    keep_NB = (power_NB > least_B * np.maximum(total_N1, total_N1.mean())) | (band_B < 6)
    spectrum_NF[:, :-1] *= np.repeat(keep_NB, width, axis=1)
    return _overlap_add(spectrum_NF, hop, 2 * hop, len(wet_T))
