"""Synthetic talkers: who they are. The sound is made by `synthetic`.

A talker is a voice (glottal source, vocal tract, consonants, manner of speaking) and a recording
(room, microphone, noise floor, codec), all drawn from two integers; nothing is recorded.

Sources: vowel formants of men as averaged by Peterson and Barney (1952), rounded; consonant noise,
loci and nasals, Stevens, "Acoustic Phonetics" (1998); higher poles, Fant, "Acoustic Theory of
Speech Production" (1960). The spreads were set by hand until coarse statistics of the audio (mean
and deviation per third of an octave, over talkers and over time) resembled those of recorded
talkers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.interpolate

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
    colours_db_PG: np.ndarray  # fine structure of each phone, vowels first, then consonants
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
    codec_hz: float  # low-pass of a lossy codec; inf: no codec
    codec_floor_db: float  # what a codec leaves out above 4 kHz
    offset: float  # DC, of full scale
    level_db: float  # rms in dBFS


@dataclass(frozen=True)
class Talker:
    """Everything about a synthetic talker that does not change while it speaks."""

    voice: Voice
    recording: Recording


def random_talker(seed: int, talker: int) -> Talker:
    """Draws a talker: the same corpus `seed` and number `talker` (both >= 0), the same talker."""
    rng = np.random.default_rng([seed, talker, 0])
    return Talker(_random_voice(rng), _random_recording(rng))


def random_curve(rng: np.random.Generator, deviation_db: float, octaves: float) -> np.ndarray:
    """A random smooth curve [G] in dB whose values a few `octaves` apart are independent."""
    knots = np.arange(-6.0 - octaves, 5.0 + 2 * octaves, octaves) + octaves * rng.uniform()
    values = rng.normal(0.0, deviation_db, len(knots))
    return scipy.interpolate.make_interp_spline(knots, values, k=3)(GRID_OCTAVES)


def _resonance_db(
    freq_hz: np.ndarray, centre_hz: float | np.ndarray, width_hz: float | np.ndarray
) -> np.ndarray:
    """Level of one formant, 0 dB at DC and -12 dB an octave far above (Fant 1960)."""
    ratio = (freq_hz / centre_hz) ** 2
    return -10.0 * np.log10((1.0 - ratio) ** 2 + ratio * (width_hz / centre_hz) ** 2)


def formant_width_hz(centre_hz: np.ndarray) -> np.ndarray:
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
    width_hz = 1.3 * formant_width_hz(fifth_up_hz)
    high_db_G = _resonance_db(GRID_HZ, fifth_up_hz[:, None], width_hz[:, None]).sum(0)
    hz_G = np.maximum(GRID_HZ, 20.0)
    dip = np.log2(hz_G / (5500.0 * tract**0.7)) / 0.45  # piriform sinuses
    high_db_G -= rng.uniform(2.0, 10.0) * np.exp(-0.5 * dip**2)
    irregular_G = random_curve(rng, 3.0, 0.3) / (1.0 + (4000.0 / hz_G) ** 2)
    phones = len(VOWELS) + len(CONSONANT_ROWS)
    colours_db_PG = np.array([random_curve(rng, 4.5, 0.3) for _ in range(phones)])
    colours_db_PG = (colours_db_PG + random_curve(rng, 1.5, 0.5)) / (1.0 + (2500.0 / hz_G) ** 2)
    rows = CONSONANT_ROWS
    count = len(rows)
    front = tract**0.6 * np.exp(rng.normal(0, 0.1))  # the front cavity follows the tract partly
    zero_hz = tract * rng.uniform(600.0, 1100.0)
    murmur_G = _resonance_db(GRID_HZ, 270.0 * tract, 120.0) * 0.4 - 0.8 * _resonance_db(
        GRID_HZ, zero_hz, 150.0
    )
    murmur_G = np.clip(murmur_G, -25.0, 8.0) - 14.0 / (1.0 + (900.0 / hz_G) ** 2)
    use_V = np.array([row[3] for row in VOWELS.values()]) * rng.gamma(3.0, 1.0, len(VOWELS))
    use_C = np.array([row.weight for row in rows]) * rng.gamma(1.5, 1.0, count)
    noise_C2 = np.array([(row.noise_hz, row.noise_db) for row in rows])
    slopes_C2 = np.array([(row.rise_db, row.fall_db) for row in rows])
    style = str(rng.choice(("sentences", "words", "letters"), p=(0.4, 0.4, 0.2)))
    return Voice(
        f0_hz=f0_hz,
        f0_octaves=float(rng.uniform(0.1, 0.3)),
        tract=tract,
        vowels_V4=tract * np.column_stack([vowels_V3, fourth_V]),
        vowel_weights_V=use_V / use_V.sum(),
        consonant_weights_C=use_C / use_C.sum(),
        noise_hz_C=front * noise_C2[:, 0] * np.exp(rng.normal(0, 0.08, count)),
        noise_db_C=noise_C2[:, 1] + rng.normal(1.5, 3.0) + rng.normal(0, 2.5, count),
        noise_slopes_C2=slopes_C2 * np.exp(rng.normal(0, 0.25, slopes_C2.shape)),
        colours_db_PG=colours_db_PG,
        bandwidth=float(np.exp(rng.normal(0.45, 0.25))),
        high_tract_db_G=high_db_G + irregular_G,
        nasal_db_G=murmur_G + random_curve(rng, 2.0, 0.5),
        glottal_peak=float(rng.uniform(0.7, 1.5)),
        tilt_hz=float(np.exp(rng.normal(np.log(1300.0), 0.5))),
        breath_db=float(rng.normal(-17.0, 4.0)),
        jitter=float(rng.uniform(0.003, 0.015)),
        shimmer=float(rng.uniform(0.02, 0.12)),
        creak=float(rng.uniform(-0.3, 0.25)),
        effort_db=float(rng.uniform(0.5, 4.0) * (2.0 if rng.uniform() < 0.2 else 1.0)),
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
    response_G += random_curve(rng, 2.5, 1.2) + random_curve(rng, 0.8, 0.4)
    presence = (np.log2(hz_G / rng.uniform(2500.0, 7000.0)) / rng.uniform(0.6, 1.3)) ** 2
    response_G += rng.uniform(-1.0, 6.0) * np.exp(-0.5 * presence)
    proximity_db = rng.uniform(0.0, 8.0)
    response_G += proximity_db / (1.0 + (hz_G / rng.uniform(120.0, 300.0)) ** 2)
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
        position_db=float(min(np.exp(rng.normal(-0.9, 1.1)), 4.5)),
        rumble_db=float(rng.uniform(-60, -22)),
        puff_db=float(rng.uniform(-32, 0)),
        floor_colour_db_G=rng.normal(-2.5, 2.0) * GRID_OCTAVES + random_curve(rng, 3.0, 1.0),
        hum_hz=float(rng.choice((50.0, 60.0))),
        hum_db=float(rng.uniform(-65, -35)) if rng.uniform() < 0.25 else SILENT_DB,
        gate_db=float(rng.uniform(-55, -40)) if rng.uniform() < 0.15 else SILENT_DB,
        codec_hz=float(rng.choice((16000.0, rng.uniform(15700, 20000), np.inf), p=(0.3, 0.3, 0.4))),
        codec_floor_db=float(rng.uniform(-95, -68)),
        offset=float(rng.normal(0, 0.004)) if rng.uniform() < 0.1 else 0.0,
        level_db=float(rng.uniform(-34, -18)),
    )
