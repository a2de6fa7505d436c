"""Synthetic talkers: full-band speech-like audio from two integers, and nothing recorded.

A talker is a voice (glottal source, vocal tract, fricatives, manner of speaking) and a recording (room,
microphone, noise floor, codec), all drawn from (seed, talker). The audio is a source-filter synthesis in
frames of 8 ms: pitch pulses and white noise are each multiplied, frame by frame, by a smooth envelope
on `GRID_HZ`, and overlap-added. It does not try to be intelligible. It tries to have the statistics
that matter when equalisers are estimated from speech: how long-term spectra differ between talkers,
how two short excerpts of one talker differ, and how levels in each band are distributed over time.

Sources: source-filter theory and higher-pole behaviour, Fant, "Acoustic Theory of Speech Production"
(1960); vowel formants of men as averaged by Peterson and Barney (1952), rounded; glottal spectra,
Doval, d'Alessandro, Henrich, "The spectrum of glottal flow models" (2006); consonant spectra and
loci, Stevens, "Acoustic Phonetics" (1998). The spreads were set by hand until coarse statistics (mean
and deviation per third of an octave) resembled those of recorded talkers.
"""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.interpolate
import scipy.ndimage
import scipy.signal

HOP_S = 0.008  # frame step; the analysis window is twice as long
SILENT_DB = -90.0
# Envelopes live on this grid: 30 Hz apart where formants are narrow, then 2.8 % apart, to 24 kHz.
GRID_HZ = np.concatenate([np.arange(0.0, 1200.0, 30.0), np.geomspace(1200.0, 24000.0, 110)])
GRID_OCTAVES = np.log2(np.maximum(GRID_HZ, 20.0) / 1000.0)

# Formants F1, F2, F3 of men in Hz, and how often languages use the vowel (rough).
VOWELS = {
    "i": (270, 2290, 3010, 1.2),
    "I": (390, 1990, 2550, 0.8),
    "e": (430, 2050, 2600, 1.0),
    "E": (530, 1840, 2480, 0.8),
    "ae": (660, 1720, 2410, 0.6),
    "a": (730, 1250, 2440, 1.8),
    "A": (710, 1090, 2440, 0.6),
    "O": (570, 840, 2410, 0.6),
    "o": (450, 850, 2400, 1.0),
    "U": (440, 1020, 2240, 0.5),
    "u": (300, 870, 2240, 0.9),
    "schwa": (500, 1400, 2450, 1.0),
    "er": (490, 1350, 1690, 0.3),
    "y": (280, 1850, 2200, 0.2),
}


class Consonant(NamedTuple):
    """One consonant of a man: how it is made, its noise, and the formants it pulls the tract to."""

    manner: str  # fricative, plosive, affricate, nasal, approximant or aspirate
    voice_db: float  # level of the pitch pulses against a vowel
    noise_hz: float  # peak of the noise
    rise_db: float  # slope below the peak, dB an octave
    fall_db: float  # slope above the peak, dB an octave
    noise_db: float  # level of the noise against a vowel
    f1_hz: float
    f2_hz: float
    f3_hz: float
    seconds: float
    weight: float  # how often it is used


CONSONANTS = {
    "s": Consonant("fricative", SILENT_DB, 6300, 14, 3, -11, 320, 1750, 2600, 0.110, 6.0),
    "z": Consonant("fricative", -14, 6300, 14, 3, -17, 280, 1750, 2600, 0.080, 2.0),
    "sh": Consonant("fricative", SILENT_DB, 3300, 14, 4, -11, 320, 1900, 2500, 0.110, 1.5),
    "zh": Consonant("fricative", -14, 3300, 14, 4, -17, 280, 1900, 2500, 0.080, 0.4),
    "f": Consonant("fricative", SILENT_DB, 7500, 3, 2, -23, 320, 1000, 2300, 0.100, 2.0),
    "v": Consonant("fricative", -12, 7500, 2, 3, -30, 280, 1000, 2300, 0.065, 2.0),
    "th": Consonant("fricative", SILENT_DB, 7000, 3, 3, -27, 320, 1400, 2600, 0.095, 0.8),
    "x": Consonant("fricative", SILENT_DB, 1800, 9, 7, -19, 400, 1600, 2400, 0.100, 0.8),
    "h": Consonant("aspirate", SILENT_DB, 1500, 3, 6, -18, 500, 1500, 2500, 0.070, 2.0),
    "p": Consonant("plosive", SILENT_DB, 1000, 2, 5, -22, 300, 900, 2300, 0.080, 3.0),
    "b": Consonant("plosive", -22, 900, 2, 6, -26, 250, 900, 2300, 0.065, 2.5),
    "t": Consonant("plosive", SILENT_DB, 4500, 7, 5, -15, 300, 1750, 2600, 0.075, 5.0),
    "d": Consonant("plosive", -22, 4000, 7, 6, -20, 250, 1750, 2600, 0.060, 4.0),
    "k": Consonant("plosive", SILENT_DB, 2000, 8, 6, -16, 300, 1900, 2300, 0.080, 4.0),
    "g": Consonant("plosive", -22, 1900, 8, 7, -21, 250, 1900, 2300, 0.060, 2.0),
    "ch": Consonant("affricate", SILENT_DB, 3600, 12, 6, -12, 300, 1900, 2500, 0.120, 1.2),
    "ts": Consonant("affricate", SILENT_DB, 6300, 13, 3, -12, 300, 1750, 2600, 0.120, 0.5),
    "m": Consonant("nasal", -5, 1000, 3, 6, SILENT_DB, 270, 1000, 2200, 0.075, 4.0),
    "n": Consonant("nasal", -5, 1000, 3, 6, SILENT_DB, 270, 1500, 2500, 0.065, 6.0),
    "ng": Consonant("nasal", -6, 1000, 3, 6, SILENT_DB, 270, 2000, 2500, 0.080, 1.5),
    "l": Consonant("approximant", -4, 1000, 3, 6, SILENT_DB, 360, 1200, 2700, 0.065, 4.0),
    "r": Consonant("approximant", -5, 1000, 3, 6, SILENT_DB, 400, 1300, 1750, 0.060, 5.0),
    "w": Consonant("approximant", -5, 1000, 3, 6, SILENT_DB, 300, 700, 2200, 0.070, 2.0),
    "j": Consonant("approximant", -5, 1000, 3, 6, SILENT_DB, 280, 2200, 2900, 0.065, 2.0),
}
CONSONANT_ROWS = tuple(CONSONANTS.values())


@dataclass(frozen=True)
class Voice:
    """The person: frequencies in Hz, levels in dB against an average vowel, curves on `GRID_HZ`."""

    f0_hz: float  # middle of the pitch range
    f0_octaves: float  # standard deviation of the pitch
    tract: float  # formant scale, 1 for an average man, larger for a shorter tract
    vowels_V4: np.ndarray  # F1 .. F4 in Hz
    vowel_weights_V: np.ndarray
    consonant_weights_C: np.ndarray
    noise_hz_C: np.ndarray  # peak of each consonant's noise
    noise_db_C: np.ndarray
    noise_slopes_C2: np.ndarray  # rise and fall, dB an octave
    noise_colour_db_G: np.ndarray  # what this mouth adds to every front noise
    bandwidth: float  # scale of all formant bandwidths
    high_tract_db_G: np.ndarray  # fifth and higher formants, and their irregularity
    nasal_db_G: np.ndarray  # what an open nose does to the tract
    glottal_peak: float  # glottal formant over f0; low for a long open phase
    tilt_hz: float  # corner of the second -6 dB an octave of the source
    breath_db: float  # aspiration noise during voicing
    jitter: float
    shimmer: float
    creak: float  # probability that an utterance ends an octave lower
    effort_db: float  # deviation of effort between utterances
    style: str  # "sentences", "words" or "letters"
    syllable_s: float  # vowel duration
    pause_s: float
    breaths: float  # probability of an audible breath in a pause


@dataclass(frozen=True)
class Recording:
    """The room and the chain: levels in dB against the mean power of the speech."""

    response_db_G: np.ndarray  # microphone, position, preamplifier
    reverb_s: float  # time to -60 dB
    reverb_db: float  # tail against direct sound
    reflections: np.ndarray  # [R, 2] delay in s, gain
    floor_db: float
    floor_colour_db_G: np.ndarray
    position_db: float  # deviation of the response between takes, as the mouth or the gain moves
    rumble_db: float  # unsteady noise below 80 Hz
    puff_db: float  # breath of plosives blowing on the microphone
    hum_hz: float
    hum_db: float
    gate_db: float  # quieter than this becomes digital silence; SILENT_DB: no gate
    codec_hz: float  # low-pass of a lossy codec; inf: none
    offset: float  # DC, of full scale
    level_db: float  # rms in dBFS


@dataclass(frozen=True)
class Talker:
    """Everything about a synthetic talker that does not change while it speaks."""

    voice: Voice
    recording: Recording


def random_talker(seed: int, talker: int) -> Talker:
    """Draws talker number `talker` (>= 0) of the corpus `seed` (>= 0). The same numbers, the same talker."""
    rng = np.random.default_rng([seed, talker, 0])
    return Talker(_random_voice(rng), _random_recording(rng))


def synthesise(seed: int, talker: int, seconds: float, sample_rate: int = 44100) -> np.ndarray:
    """Lets one synthetic talker speak.

    Args:
      seed: the corpus, >= 0.
      talker: the talker's number in the corpus, >= 0; any number, there is no last one.
      seconds: duration, > 0. Another duration is another performance of the same talker.
      sample_rate: samples per second, 16000 .. 48000.

    Returns:
      [T] float32 mono in (-1, 1), T = round(seconds * sample_rate); equal arguments, equal audio.

    Raises:
      ValueError: for a negative seed or talker, no duration, or a rate out of range.
    """
    if seed < 0 or talker < 0:
        raise ValueError(f"seed and talker must be >= 0, got {seed} and {talker}")
    if not 16000 <= sample_rate <= 48000:
        raise ValueError(
            f"sample_rate must be 16000 .. 48000 Hz for a synthetic talker, got {sample_rate}"
        )
    samples = round(seconds * sample_rate)
    if samples < 1:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    who = random_talker(seed, talker)
    rng = np.random.default_rng([seed, talker, 1])
    dry_T = _speak(who, rng, samples, sample_rate)
    return _record(who.recording, rng, dry_T, sample_rate)


# ---------------------------------------------------------------------------------- drawing a talker


def _curve(rng: np.random.Generator, deviation_db: float, octaves: float) -> np.ndarray:
    """A random smooth curve [G] in dB whose values a few `octaves` apart are independent."""
    knots = np.arange(-6.0 - octaves, 5.0 + 2 * octaves, octaves) + octaves * rng.uniform()
    values = rng.normal(0.0, deviation_db, len(knots))
    return scipy.interpolate.make_interp_spline(knots, values, k=3)(GRID_OCTAVES)


def _resonance_db(freq_hz, centre_hz, width_hz):
    """Level of one formant, 0 dB at DC and -12 dB an octave far above (Fant 1960)."""
    ratio = (freq_hz / centre_hz) ** 2
    return -10.0 * np.log10((1.0 - ratio) ** 2 + ratio * (width_hz / centre_hz) ** 2)


def _formant_width_hz(centre_hz):
    """Typical bandwidth of a formant: wall and radiation losses, growing with frequency."""
    return 50.0 + 35.0 * (500.0 / centre_hz) ** 2 + 26.0 * (centre_hz / 1000.0) ** 1.35


def _random_voice(rng: np.random.Generator) -> Voice:
    kind = rng.choice(3, p=(0.43, 0.42, 0.15))  # man, woman, child or squeaky
    f0_hz = float((120.0, 200.0, 265.0)[kind] * 2.0 ** np.clip(rng.normal(0.0, 0.2), -0.5, 0.5))
    tract = float((1.0, 1.16, 1.3)[kind] * np.exp(np.clip(rng.normal(0.0, 0.045), -0.1, 0.1)))
    base_V3 = np.array([row[:3] for row in VOWELS.values()], float)
    spread = rng.normal(0.88, 0.1)  # size of the vowel space around its centre
    centre = np.log((500.0, 1450.0, 2450.0))
    vowels_V3 = np.exp(
        centre + spread * (np.log(base_V3) - centre) + rng.normal(0, 0.05, base_V3.shape)
    )
    fourth_V = np.maximum(3500.0 * np.exp(rng.normal(0, 0.06)), vowels_V3[:, 2] + 400.0)
    # Above F4 a tube resonates every c / 2L, here 1 kHz in a man; real mouths are irregular there.
    fifth_up_hz = tract * (np.arange(4500.0, 60000.0, 1000.0) + rng.normal(0, 120.0, 56))
    width_hz = 1.3 * _formant_width_hz(fifth_up_hz)
    high_db_G = _resonance_db(GRID_HZ, fifth_up_hz[:, None], width_hz[:, None]).sum(0)
    dip = np.log2(np.maximum(GRID_HZ, 20.0) / (5000.0 * tract**0.7)) / 0.35  # piriform sinuses
    high_db_G -= rng.uniform(0.0, 8.0) * np.exp(-0.5 * dip**2)
    irregular_G = _curve(rng, 2.5, 0.35) / (1.0 + (2500.0 / np.maximum(GRID_HZ, 20.0)) ** 2)
    rows = CONSONANT_ROWS
    count = len(rows)
    front = tract**0.6 * np.exp(rng.normal(0, 0.1))  # the front cavity follows the tract partly
    zero_hz = tract * rng.uniform(600.0, 1100.0)
    murmur_G = _resonance_db(GRID_HZ, 270.0 * tract, 120.0) * 0.4 - 0.8 * _resonance_db(
        GRID_HZ, zero_hz, 150.0
    )
    murmur_G = np.clip(murmur_G, -25.0, 8.0) - 14.0 / (
        1.0 + (900.0 / np.maximum(GRID_HZ, 20.0)) ** 2
    )
    use_V = np.array([row[3] for row in VOWELS.values()]) * rng.gamma(1.5, 1.0, len(VOWELS))
    use_C = np.array([row.weight for row in rows]) * rng.gamma(1.5, 1.0, count)
    slopes_C2 = np.array([(row.rise_db, row.fall_db) for row in rows])
    style = str(rng.choice(("sentences", "words", "letters"), p=(0.4, 0.4, 0.2)))
    return Voice(
        f0_hz=f0_hz,
        f0_octaves=float(rng.uniform(0.1, 0.3)),
        tract=tract,
        vowels_V4=tract * np.column_stack([vowels_V3, fourth_V]),
        vowel_weights_V=use_V / use_V.sum(),
        consonant_weights_C=use_C / use_C.sum(),
        noise_hz_C=np.array([r.noise_hz for r in rows])
        * front
        * np.exp(rng.normal(0, 0.08, count)),
        noise_db_C=np.array([r.noise_db for r in rows])
        + rng.normal(0, 3.0)
        + rng.normal(0, 2.5, count),
        noise_slopes_C2=slopes_C2 * np.exp(rng.normal(0, 0.25, slopes_C2.shape)),
        noise_colour_db_G=_curve(rng, 2.0, 0.5),
        bandwidth=float(np.exp(rng.normal(0.45, 0.25))),
        high_tract_db_G=high_db_G + irregular_G,
        nasal_db_G=murmur_G + _curve(rng, 2.0, 0.5),
        glottal_peak=float(rng.uniform(0.7, 1.5)),
        tilt_hz=float(np.exp(rng.normal(np.log(1300.0), 0.5))),
        breath_db=float(rng.normal(-17.0, 4.0)),
        jitter=float(rng.uniform(0.003, 0.015)),
        shimmer=float(rng.uniform(0.02, 0.12)),
        creak=float(rng.uniform(-0.3, 0.25)),
        effort_db=float(rng.uniform(0.5, 4.0) * (2.0 if rng.uniform() < 0.15 else 1.0)),
        style=style,
        syllable_s=float(rng.uniform(0.06, 0.14) * (1.0 if style == "sentences" else 1.6)),
        pause_s=float(rng.uniform(0.25, 0.7)),
        breaths=float(rng.uniform(0, 0.7) * (rng.uniform() < 0.5)),
    )


def _random_recording(rng: np.random.Generator) -> Recording:
    hz_G = np.maximum(GRID_HZ, 20.0)
    cut_hz, order = rng.uniform(40.0, 160.0), rng.choice((1, 2, 3))
    response_G = -10.0 * np.log10(1.0 + (cut_hz / hz_G) ** (2 * order))
    response_G += rng.normal(0.0, 1.0) * GRID_OCTAVES
    response_G += _curve(rng, 2.5, 1.2) + _curve(rng, 1.2, 0.4)
    presence = (np.log2(hz_G / rng.uniform(2500.0, 7000.0)) / rng.uniform(0.4, 1.2)) ** 2
    response_G += rng.uniform(0.0, 7.0) * np.exp(-0.5 * presence)
    response_G += rng.uniform(0.0, 8.0) / (
        1.0 + (hz_G / rng.uniform(120.0, 300.0)) ** 2
    )  # proximity
    if rng.uniform() < 0.4:  # a dull capsule or an old chain
        response_G -= 10.0 * np.log10(
            1.0 + (hz_G / rng.uniform(5000.0, 16000.0)) ** rng.choice((2, 4))
        )
    reflections = rng.integers(0, 7)
    delays_s = rng.uniform(0.0008, 0.025, reflections)
    gains = rng.normal(0, 1, reflections) * 10 ** (rng.uniform(-26, -10) / 20)
    floor_db = float(
        rng.choice(
            (rng.uniform(-50, -34), rng.uniform(-70, -50), rng.uniform(-95, -70)),
            p=(0.35, 0.45, 0.2),
        )
    )
    return Recording(
        response_db_G=response_G,
        reverb_s=float(np.exp(rng.uniform(np.log(0.08), np.log(0.7)))),
        reverb_db=float(rng.uniform(-32.0, -6.0)),
        reflections=np.column_stack([delays_s, gains]),
        floor_db=floor_db,
        position_db=float(min(np.exp(rng.normal(-1.0, 1.0)), 4.0)),
        rumble_db=float(rng.uniform(-60, -22)),
        puff_db=float(rng.uniform(-35, -5)),
        floor_colour_db_G=rng.normal(-2.5, 2.0) * GRID_OCTAVES + _curve(rng, 3.0, 1.0),
        hum_hz=float(rng.choice((50.0, 60.0))),
        hum_db=float(rng.uniform(-65, -35)) if rng.uniform() < 0.25 else SILENT_DB,
        gate_db=float(rng.uniform(-55, -40)) if rng.uniform() < 0.15 else SILENT_DB,
        codec_hz=float(rng.choice((16000.0, rng.uniform(15700, 20000))))
        if rng.uniform() < 0.55
        else np.inf,
        offset=float(rng.normal(0, 0.004)) if rng.uniform() < 0.1 else 0.0,
        level_db=float(rng.uniform(-34, -18)),
    )


# ---------------------------------------------------------------------------------------- the script


class Piece(NamedTuple):
    """A stretch of steady targets: what the voice aims at for `seconds`. Levels in dB, as in `Voice`."""

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
    take: int = 0  # which position at the microphone
    puff: float = 0.0  # air blown at the microphone, 0 .. 1


def _consonant(
    voice: Voice, rng, which: int, vowel_4, f0_octaves: float, effort_db: float, long: float
):
    """The pieces of one consonant before or after a vowel; `long` stretches it."""
    row = CONSONANT_ROWS[which]
    locus_3 = voice.tract * np.array((row.f1_hz, row.f2_hz, row.f3_hz))
    formants = vowel_4.copy()
    formants[:3] = locus_3 ** (0.7, 0.6, 0.6) * vowel_4[:3] ** (0.3, 0.4, 0.4)  # coarticulation
    seconds = long * row.seconds * np.exp(rng.normal(0, 0.25))
    noise_db = voice.noise_db_C[which] + rng.normal(0, 3.0) + 0.7 * effort_db
    rise_db, fall_db = voice.noise_slopes_C2[which]
    noise = {
        "noise_db": noise_db,
        "noise_hz": voice.noise_hz_C[which]
        * np.exp(rng.normal(0, 0.06))
        * (vowel_4[1] / (1450 * voice.tract)) ** 0.1,
        "rise_db": rise_db,
        "fall_db": fall_db,
    }
    steady = (formants, f0_octaves, effort_db)
    if row.manner == "fricative":
        return [Piece(seconds, *steady, voice_db=row.voice_db, **noise)]
    if row.manner == "aspirate":
        return [Piece(seconds, vowel_4, f0_octaves, effort_db, breath_db=noise_db)]
    if row.manner in ("nasal", "approximant"):
        nasal = float(row.manner == "nasal")
        return [
            Piece(
                seconds,
                *steady,
                voice_db=row.voice_db + rng.normal(0, 1.5),
                breath_db=voice.breath_db,
                nasal=nasal,
            )
        ]
    closed = Piece(0.6 * seconds, *steady, voice_db=row.voice_db)
    if row.manner == "affricate":
        return [closed, Piece(0.7 * seconds, *steady, **noise)]
    burst = Piece(
        rng.uniform(0.008, 0.02),
        *steady,
        puff=rng.uniform(),
        **(noise | {"noise_db": noise_db + 4.0}),
    )
    if row.voice_db > SILENT_DB:
        return [closed, burst]
    return [closed, burst, Piece(rng.uniform(0.01, 0.06), *steady, breath_db=noise_db - 4.0)]


def _syllable(
    voice: Voice, rng, f0_octaves: float, effort_db: float, stress_db: float, long: float
):
    """Pieces of consonant(s), vowel, consonant(s); in letter style sometimes a consonant alone."""
    vowel_4 = voice.vowels_V4[rng.choice(len(VOWELS), p=voice.vowel_weights_V)]
    vowel_4 = vowel_4 * np.exp(rng.normal(0, 0.04, 4))
    alone = voice.style == "letters" and rng.uniform() < 0.35

    def consonant(long):
        which = rng.choice(len(CONSONANT_ROWS), p=voice.consonant_weights_C)
        return _consonant(voice, rng, which, vowel_4, f0_octaves, effort_db, long)

    if alone:
        return consonant(rng.uniform(1.5, 4.0))
    seconds = long * voice.syllable_s * np.exp(rng.normal(0, 0.3))
    level_db = stress_db + rng.normal(0, 1.5)
    vowel = Piece(
        seconds,
        vowel_4,
        f0_octaves,
        effort_db,
        voice_db=level_db,
        breath_db=voice.breath_db + 0.5 * level_db,
        nasal=0.25 * (rng.uniform() < 0.15),
    )
    before = consonant(1.0) if rng.uniform() < 0.85 else []
    after = consonant(1.0) if rng.uniform() < 0.35 else []
    return [*before, vowel, *after]


def _script(voice: Voice, rng: np.random.Generator, seconds: float) -> list[Piece]:
    """Utterances and pauses, until `seconds` are filled."""
    neutral_4 = voice.tract * np.array((500.0, 1450.0, 2450.0, 3500.0))
    pieces = [Piece(rng.uniform(0.0, 0.2), neutral_4, 0.0, 0.0)]
    spoken_s, take = 0.0, 0
    low, high = {"sentences": (4, 18), "words": (1, 4), "letters": (1, 2)}[voice.style]
    while spoken_s < seconds:
        count = rng.integers(low, high + 1)
        effort_db = rng.normal(0, voice.effort_db)
        start, fall = (
            rng.normal(0.1, 0.35) * voice.f0_octaves,
            rng.normal(1.6, 0.8) * voice.f0_octaves,
        )
        start += 0.04 * effort_db
        new = []
        for place in range(count):
            done = place / count
            stress_db = rng.normal(0, 2.5) - 5.0 * done**3
            f0 = (
                start
                + fall * (0.5 - done)
                + voice.f0_octaves * rng.normal(0, 0.7)
                + 0.02 * stress_db
            )
            last = place == count - 1
            f0 -= 0.9 * (last and rng.uniform() < voice.creak)
            long = 1.5 if last else 1.0
            new += _syllable(voice, rng, f0, effort_db, stress_db, long)
        quiet_s = voice.pause_s * np.exp(rng.normal(0, 0.4))
        rest = (neutral_4, new[-1].f0_octaves, 0.0)
        if rng.uniform() < voice.breaths:
            new += [
                Piece(0.6 * quiet_s, *rest),
                Piece(rng.uniform(0.15, 0.4), *rest, breath_db=rng.normal(-30, 4)),
            ]
        new.append(Piece(quiet_s, *rest))
        take += int(rng.uniform() < 0.4)
        pieces += [piece._replace(take=take) for piece in new]
        spoken_s += sum(piece.seconds for piece in new)
    return pieces


# ------------------------------------------------------------------------------- speech in dry frames


def _smooth(track_N, frames: int):
    """Moving average of a track [N, ...] over an odd number of frames, Hann weighted."""
    kernel = np.hanning(frames + 2)[1:-1]
    return scipy.ndimage.convolve1d(track_N, kernel / kernel.sum(), axis=0, mode="nearest")


def _drift(rng, count: int, frames: int):
    """Slow random track [N] of unit variance."""
    track_N = _smooth(rng.normal(size=count + 4 * frames), frames)
    return (track_N / track_N.std())[2 * frames : 2 * frames + count]


@cache
def _to_bins(sample_rate: int, size: int):
    """Matrices [G, F] from levels in dB on the grid to dB on FFT bins, and to minimum phase in radians."""
    bins_hz = np.fft.rfftfreq(size, 1.0 / sample_rate)
    to_level_GF = np.array([np.interp(bins_hz, GRID_HZ, unit) for unit in np.eye(len(GRID_HZ))])
    cepstrum = np.fft.irfft(to_level_GF * (np.log(10.0) / 20.0), size)
    cepstrum[:, 1 : size // 2] *= 2.0
    cepstrum[:, size // 2 + 1 :] = 0.0
    to_phase_GF = np.fft.rfft(cepstrum, size).imag
    return to_level_GF.astype(np.float32), to_phase_GF.astype(np.float32)


def _pulses(voice: Voice, rng, f0_hz_N, hop: int, samples: int, sample_rate: int):
    """Pitch pulses [T] with jitter and shimmer; unit mean power, spectrally flat to near Nyquist."""
    f0_hz_T = np.interp(np.arange(samples), hop * np.arange(len(f0_hz_N)), f0_hz_N)
    cycles_T = np.cumsum(f0_hz_T / sample_rate)
    marks = np.interp(np.arange(1.0, cycles_T[-1]), cycles_T, np.arange(samples))
    period = sample_rate / np.interp(marks, np.arange(samples), f0_hz_T)
    marks = marks + period * voice.jitter * rng.normal(size=len(marks))
    height = np.sqrt(period) * np.exp(voice.shimmer * rng.normal(size=len(marks)))
    first = np.floor(marks).astype(int) - 7
    place = first[:, None] + np.arange(16)
    offset = place - marks[:, None]
    shape = np.sinc(offset) * np.cos(np.pi * offset / 17.0) ** 2  # fractional delay, windowed
    keep = (place >= 0) & (place < samples)
    weights = (height[:, None] * shape)[keep]
    return np.bincount(place[keep], weights, minlength=samples).astype(np.float32)


def _frames(signal_T, count: int, hop: int, size: int):
    """Spectra [N, F] of Hann frames two hops long centred on n * hop; they overlap-add to the signal."""
    window = scipy.signal.get_window("hann", 2 * hop).astype(np.float32)
    padded = np.concatenate([np.zeros(hop, np.float32), signal_T, np.zeros(3 * hop, np.float32)])
    view = np.lib.stride_tricks.sliding_window_view(padded, 2 * hop)[::hop][:count]
    return scipy.fft.rfft(view * window, size)


def _envelopes(who: Talker, track, mean_bins_G):
    """Levels [N, G] in dB of what multiplies the pulses and of what multiplies the noise."""
    voice = who.voice
    freq_G = GRID_HZ.astype(np.float32)
    formants_N4 = track["formants_hz"]
    ratio = np.ones((len(formants_N4), len(freq_G)), np.float32)
    for centre_N in formants_N4.T:
        width_N = voice.bandwidth * _formant_width_hz(centre_N)
        square_NG = (freq_G / centre_N[:, None]) ** 2
        ratio *= (1.0 - square_NG) ** 2 + square_NG * ((width_N / centre_N) ** 2)[:, None]
    tract_NG = -10.0 * np.log10(ratio) + voice.high_tract_db_G.astype(np.float32)
    tract_NG += track["nasal"][:, None] * voice.nasal_db_G.astype(np.float32)
    # Glottal flow derivative: +6 dB an octave to the glottal formant, -6 above, -12 above the tilt corner.
    effort_N = track["effort_db"]
    below_NG = freq_G / (voice.glottal_peak * track["f0_hz"])[:, None]
    tilt_N = voice.tilt_hz * 2.0 ** (effort_N / 4.0)
    source_NG = -10.0 * np.log10((0.03 + below_NG**2) ** -1 + below_NG**2 + 0.5)
    source_NG -= 10.0 * np.log10(1.0 + (freq_G / tilt_N[:, None]) ** 2)
    voiced_NG = tract_NG + source_NG
    loud = track["voice"] > 0.5 * track["voice"].max()
    level_N = 10.0 * np.log10(10.0 ** (voiced_NG / 10.0) @ mean_bins_G)
    # Half of what the tract gives open vowels over close ones, speakers take back.
    level_N = 0.5 * (level_N + level_N[loud].mean())
    voiced_NG += (20.0 * np.log10(track["voice"]) + effort_N - level_N)[:, None]
    # Noise made at the glottis passes the tract; noise made at the front has its own shape.
    above_G = freq_G**2 / (freq_G**2 + 700.0**2) * (1.0 + (freq_G / 8000.0) ** 2)
    breath_NG = 10.0 ** (tract_NG / 10.0) * above_G
    breath_NG *= ((track["breath"] ** 2) / (breath_NG @ mean_bins_G).mean())[:, None]
    octaves_NG = np.log2(np.maximum(freq_G, 20.0)) - np.log2(track["noise_hz"])[:, None]
    slope_NG = np.where(octaves_NG < 0, track["rise_db"][:, None], -track["fall_db"][:, None])
    front_NG = (
        slope_NG * (np.sqrt(octaves_NG**2 + 0.09) - 0.3) * np.sign(octaves_NG) * np.sign(slope_NG)
    )
    front_NG = -np.abs(front_NG) + voice.noise_colour_db_G.astype(np.float32)
    front_NG = 10.0 ** (np.maximum(front_NG, -45.0) / 10.0)
    front_NG *= (track["noise"] ** 2 / (front_NG @ mean_bins_G))[:, None]
    return voiced_NG, breath_NG + front_NG


def _speak(who: Talker, rng: np.random.Generator, samples: int, sample_rate: int) -> np.ndarray:
    """Dry speech and acoustic noise floor [T]; mean power about that of a vowel of level 0 dB."""
    hop = round(HOP_S * sample_rate)
    size = 1 << (4 * hop).bit_length()
    count = -(-samples // hop) + 1
    pieces = _script(who.voice, rng, samples / sample_rate)
    ends_s = np.cumsum([piece.seconds for piece in pieces])
    which_N = np.minimum(np.searchsorted(ends_s, np.arange(count) * HOP_S), len(pieces) - 1)

    def held(field):
        return np.array([getattr(piece, field) for piece in pieces], np.float32)[which_N]

    track = {
        "formants_hz": np.exp(_smooth(np.log(held("formants_hz")), 9)),
        "f0_hz": who.voice.f0_hz * 2.0 ** _smooth(held("f0_octaves"), 21),
        "effort_db": _smooth(held("effort_db"), 9),
        "nasal": _smooth(held("nasal"), 5),
        "noise_hz": held("noise_hz"),
        "rise_db": held("rise_db"),
        "fall_db": held("fall_db"),
    }
    for name in ("voice", "breath", "noise"):
        track[name] = _smooth(10.0 ** (held(name + "_db") / 20.0), 3)
    track["f0_hz"] = np.clip(track["f0_hz"] * 2.0 ** (0.01 * _drift(rng, count, 15)), 60.0, 500.0)
    to_level_GF, to_phase_GF = _to_bins(sample_rate, size)
    mean_bins_G = to_level_GF.mean(1)
    voiced_NG, noise_NG = _envelopes(who, track, mean_bins_G)
    takes = held("take").astype(int)
    position_UG = np.array(
        [_curve(rng, who.recording.position_db, 1.0) for _ in range(takes.max() + 1)], np.float32
    )
    voiced_NG += position_UG[takes]
    noise_NG *= 10.0 ** (position_UG[takes] / 10.0)
    speech_power = (10.0 ** (voiced_NG / 10.0) @ mean_bins_G).mean() + (
        noise_NG @ mean_bins_G
    ).mean()
    floor_G = 10.0 ** (who.recording.floor_colour_db_G / 10.0)
    floor_G *= speech_power * 10.0 ** (who.recording.floor_db / 10.0) / (floor_G @ mean_bins_G)
    rumble_G = 1.0 / (1.0 + (GRID_HZ / 50.0) ** 5)
    rumble_G *= speech_power / (rumble_G @ mean_bins_G)
    unsteady_N = 10.0 ** (0.4 * _drift(rng, count, 201))
    unsteady_N = 10.0 ** (who.recording.rumble_db / 10.0) * unsteady_N
    unsteady_N += 10.0 ** (who.recording.puff_db / 10.0) * _smooth(held("puff"), 7)
    steady_N = 10.0 ** (0.2 * _drift(rng, count, 201))
    noise_NG += np.outer(steady_N, floor_G) + np.outer(unsteady_N, rumble_G)
    noise_NG = noise_NG.astype(np.float32)
    pulses_T = _pulses(who.voice, rng, track["f0_hz"], hop, samples, sample_rate)
    hiss_T = rng.standard_normal(samples, np.float32)
    voiced_NG = np.maximum(voiced_NG, -120.0).astype(np.float32)
    amp_NF = np.exp((voiced_NG * np.float32(np.log(10) / 20)) @ to_level_GF)
    phase_NF = voiced_NG @ to_phase_GF
    spectrum_NF = _frames(pulses_T, count, hop, size) * amp_NF
    spectrum_NF *= np.cos(phase_NF) + 1j * np.sin(phase_NF)
    spectrum_NF += _frames(hiss_T, count, hop, size) * (np.sqrt(noise_NG) @ to_level_GF)
    frames_NT = scipy.fft.irfft(spectrum_NF, size)
    out_T = np.zeros((count - 1) * hop + size, np.float32)
    for index, frame in enumerate(frames_NT):
        out_T[index * hop : index * hop + size] += frame
    return out_T[hop : hop + samples]


# ----------------------------------------------------------------------------------------- recording


def _record(recording: Recording, rng: np.random.Generator, dry_T, sample_rate: int) -> np.ndarray:
    """Room, microphone, hum, codec, gate and level."""
    samples = len(dry_T)
    size = 4096
    level_GF, phase_GF = _to_bins(sample_rate, size)
    response = np.exp(
        np.log(10) / 20 * recording.response_db_G @ level_GF
        + 1j * (recording.response_db_G @ phase_GF)
    )
    bins_hz = np.fft.rfftfreq(size, 1.0 / sample_rate)
    if recording.codec_hz < 0.5 * sample_rate:
        response *= 10.0 ** (-4.0 * np.clip((bins_hz - recording.codec_hz) / 300.0, 0.0, 1.0))
    filter_T = np.fft.irfft(response)
    room_T = np.zeros(round(max(recording.reverb_s, 0.03) * sample_rate))
    time_s = np.arange(len(room_T)) / sample_rate
    tail_T = rng.normal(size=len(room_T)) * 10.0 ** (-3.0 * time_s / recording.reverb_s)
    tail_T = scipy.signal.lfilter([1.0], [1.0, -0.5], tail_T) * (time_s > 0.002)  # walls are dull
    room_T += tail_T * 10.0 ** (recording.reverb_db / 20.0) / np.sqrt((tail_T**2).sum())
    room_T[0] += 1.0
    for delay_s, gain in recording.reflections:
        room_T[round(delay_s * sample_rate)] += gain
    filter_T = scipy.signal.oaconvolve(room_T, filter_T).astype(np.float32)
    wet_T = scipy.signal.oaconvolve(dry_T, filter_T)[:samples]
    rms = np.sqrt(np.mean(wet_T**2) + 1e-20)
    time_s = np.arange(samples) / sample_rate
    if recording.hum_db > SILENT_DB:
        for harmonic, height in zip((1, 2, 3, 5), (1.0, 0.5, 0.4, 0.2), strict=True):
            wave = np.sin(2 * np.pi * recording.hum_hz * harmonic * time_s)
            wet_T += rms * np.sqrt(2.0) * 10.0 ** (recording.hum_db / 20.0) * height * wave
    if recording.gate_db > SILENT_DB:
        wet_T *= _gate(wet_T / rms, recording.gate_db, sample_rate)
    gain = 10.0 ** (recording.level_db / 20.0) / rms
    gain = min(gain, 0.97 / (np.abs(wet_T).max() + 1e-9))
    return (gain * wet_T + recording.offset).astype(np.float32)


def _gate(wet_T, gate_db: float, sample_rate: int):
    """Gain 0 .. 1 [T] of a noise gate that closes after 50 ms under the threshold."""
    step = round(0.01 * sample_rate)
    blocks = -(-len(wet_T) // step)
    level_N = np.pad(wet_T, (0, blocks * step - len(wet_T))).reshape(blocks, step)
    open_N = (level_N**2).mean(1) > 10.0 ** (gate_db / 10.0)
    open_N = scipy.ndimage.maximum_filter1d(open_N.astype(np.float32), 11)
    return np.interp(np.arange(len(wet_T)), (np.arange(blocks) + 0.5) * step, open_N)
