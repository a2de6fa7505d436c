"""Recordings without a known EQ, for the page: music, sibilance, muddy bass, triples.

Everything is chosen by a rule that the page states, from what the recordings measure.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np

from eqst import analysis, audio, corpus, layouts, match, metrics, pairs, triples
from eqst.webpage.examples import Example, Say, Take, distance_db, matched, numbered, take

# Seconds of input and of reference, neighbours in one piece: each pair is heard both ways round.
MUSIC_SECONDS = ((3.0, 5.0), (4.0, 7.0), (6.0, 6.0), (5.0, 9.0), (10.0, 8.0))
SCENARIO_SECONDS = 5.0
TRIPLE_SECONDS = 6.0  # of a triple that are heard; it is judged as a whole
PAIRS = 4

# What makes a voice annoying: a band's level above that of another, Hz.
SIBILANCE = ((5000.0, 10000.0), (300.0, 3000.0))
BASS = ((100.0, 300.0), (500.0, 3000.0))


class Voice(NamedTuple):
    """The loudest stretch of one recording, and what it measures in dB."""

    talker: str
    samples_T: np.ndarray
    sibilance_db: float
    bass_db: float


# ------------------------------------------------------------------------------ music


class Excerpt(NamedTuple):
    """Two stretches of one file, of these lengths, the second right after the first."""

    path: pathlib.Path
    seconds: tuple[float, float]


def excerpts(folder: pathlib.Path) -> list[Excerpt]:
    """A file for each of MUSIC_SECONDS, in even steps of their names' order, of those long enough.

    Raises:
      ValueError: no audio in the folder is long enough for any of them; a file cannot be read.
    """
    left = {
        path: audio.info(path).seconds
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in layouts.EXTENSIONS and path.is_file()
    }
    found: dict[int, Excerpt] = {}
    # The longest first, so that no long file goes to a short excerpt that another would do for.
    for number in sorted(range(len(MUSIC_SECONDS)), key=lambda n: -sum(MUSIC_SECONDS[n])):
        lengths = MUSIC_SECONDS[number]
        fit = [path for path, seconds in left.items() if seconds >= sum(lengths)]
        if fit:
            path = fit[int(len(fit) * (number + 0.5) / len(MUSIC_SECONDS))]
            del left[path]
            found[number] = Excerpt(path, lengths)
    if not found:
        raise ValueError(
            f"--music={folder} has no audio file of {sum(MUSIC_SECONDS[0]):g} s or more: give "
            "longer ones"
        )
    return [found[number] for number in sorted(found)]


def music(chosen: list[Excerpt], matcher: match.Matcher, say: Say) -> list[Example]:
    """Two examples of each excerpt: its parts as input and reference, and the other way round."""
    rows: list[Example] = []
    for number, excerpt in enumerate(chosen, start=1):
        name = f"music-{number}"
        rows += _both_ways(name, *_neighbours(name, excerpt), matcher)
        say(f"music: {len(rows)} of {2 * len(chosen)}")
    return numbered(rows, "Music")


def _neighbours(name: str, excerpt: Excerpt) -> tuple[Take, Take, str]:
    """Both parts, from the middle of the piece, and what they are."""
    path, lengths = excerpt
    info = audio.info(path)
    rate = info.sample_rate
    counts = [round(x * rate) for x in lengths]
    frames = min(sum(counts), info.frames)
    sound = audio.read(path, start=(info.frames - frames) // 2, frames=frames)
    samples_T = audio.to_mono(sound.samples_TC)
    first = take("Input", f"{name}-a", samples_T[: counts[0]], rate)
    second = take("Reference", f"{name}-b", samples_T[counts[0] :], rate)
    about = f"{path.parent.name}/{path.stem}, {lengths[0]:g} s and the {lengths[1]:g} s after them"
    return first, second, about


def _both_ways(
    name: str, first: Take, second: Take, about: str, matcher: match.Matcher
) -> list[Example]:
    """The same two recordings as input and reference, and the other way round."""
    swapped = second._replace(label="Input"), first._replace(label="Reference")
    return [
        _told(matched(f"{name}-there", "", first, second, matcher), about),
        _told(matched(f"{name}-back", "", *swapped, matcher), f"{about}; swapped"),
    ]


def _told(example: Example, about: str) -> Example:
    heard, reference, ours = example.takes
    before, after = (distance_db(x, reference) for x in (heard, ours))
    return example._replace(
        note=f"{about}. Distance of the spectrum to the reference's: {before:.1f} dB untouched, "
        f"{after:.1f} dB processed."
    )


# ------------------------------------------------------------------------------ scenarios


def voices(recordings: corpus.Corpus) -> list[Voice]:
    """The loudest stretch of every recording that has one of the length, measured."""
    rate = recordings.sample_rate
    length = round(SCENARIO_SECONDS * rate)
    found = []
    for number, talker in enumerate(recordings.talker_R):
        power_J = recordings.power_R[number]
        hops = pairs.hops_covering(length, rate)
        if len(power_J) < hops:
            continue
        mean_J = np.convolve(power_J, np.full(hops, 1.0 / hops), "valid")
        start = int(pairs.first_sample(int(np.argmax(mean_J)), rate))
        samples_T = recordings.segment(number, start, length).astype(np.float64)
        measures = [_tilt_db(samples_T, rate, *bands) for bands in (SIBILANCE, BASS)]
        found.append(Voice(talker, samples_T, *measures))
    return found


def _tilt_db(
    samples_T: np.ndarray,
    rate: int,
    high_hz: tuple[float, float],
    against_hz: tuple[float, float],
) -> float:
    """Mean level of the third octaves in one range above that in another."""
    level_M = metrics.ltas_db(samples_T, rate)
    centre_hz_M = 1000 * 2.0 ** ((np.arange(len(level_M)) - 13) / 3)

    def mean(span_hz: tuple[float, float]) -> float:
        inside_M = (centre_hz_M >= span_hz[0]) & (centre_hz_M <= span_hz[1])
        return float(level_M[inside_M].mean())

    return mean(high_hz) - mean(against_hz)


def choose(found: list[Voice], measure: str, count: int) -> tuple[list[Voice], list[Voice]]:
    """(the most annoying by `measure`, as many that are the most usual of the others).

    Usual: least distance from the medians of both measures. Fewer than `count` each where there
    are fewer than twice as many voices.
    """
    count = min(count, len(found) // 2)
    order = sorted(found, key=lambda x: (-getattr(x, measure), x.talker))
    worst, others = order[:count], order[count:]
    middle = np.median([(x.sibilance_db, x.bass_db) for x in found], axis=0)

    def unusual(x: Voice) -> tuple[float, str]:
        return float(np.hypot(*(np.array([x.sibilance_db, x.bass_db]) - middle))), x.talker

    return worst, sorted(others, key=unusual)[:count]


def scenario(
    kind: str, recordings: corpus.Corpus, matcher: match.Matcher, say: Say
) -> list[Example]:
    """Up to four pairs of an annoying and a usual voice, each both ways round.

    Args:
      kind: "sibilance" or "bass".
      recordings: of real speech.
    """
    measure = f"{kind}_db"
    worst, usual = choose(voices(recordings), measure, PAIRS)
    rows: list[Example] = []
    for number, (bad, good) in enumerate(zip(worst, usual, strict=True), start=1):
        name, rate = f"{kind}-{number}", recordings.sample_rate
        about = (
            f"{bad.talker} ({getattr(bad, measure):+.1f} dB) and "
            f"{good.talker} ({getattr(good, measure):+.1f} dB)"
        )
        first = take("Input", f"{name}-a", bad.samples_T, rate)
        second = take("Reference", f"{name}-b", good.samples_T, rate)
        rows += _both_ways(name, first, second, about, matcher)
        say(f"{kind}: {len(rows)} of {2 * len(worst)}")
    return numbered(rows, kind.capitalize())


# ------------------------------------------------------------------------------ triples


class Set(NamedTuple):
    """The triples of one kind: examples, and the mean distance of each answer in dB."""

    name: str
    examples: list[Example]
    distance_db: dict[str, float]


def of_triples(found: list[triples.Triple], matcher: match.Matcher, say: Say) -> list[Set]:
    """The paper's triples by set: its processed audio beside ours, some seconds of each.

    Predictions and distances are made of the whole files, as `eqst.triples` does.

    Raises:
      AudioError: a file cannot be used.
    """
    sets: dict[str, list[tuple[Example, dict[str, float]]]] = {}
    for done, triple in enumerate(found, start=1):
        distances = triples.judge(triple, matcher)["bands64"]
        example = _triple(f"triple-{done}", triple, matcher, distances)
        sets.setdefault(triple.group, []).append((example, distances))
        say(f"triples: {done} of {len(found)}")
    return [
        Set(
            group,
            [example for example, _ in rows],
            {x: float(np.mean([distances[x] for _, distances in rows])) for x in triples.ANSWERS},
        )
        for group, rows in sets.items()
    ]


def _triple(
    name: str, triple: triples.Triple, matcher: match.Matcher, distances: dict[str, float]
) -> Example:
    takes = []
    for label, path in (
        ("Input", triple.input),
        ("Reference", triple.reference),
        ("Paper", triple.other),
    ):
        info = audio.info(path)
        frames = min(info.frames, round(TRIPLE_SECONDS * info.sample_rate))
        samples_T = audio.to_mono(audio.read(path, frames=frames).samples_TC)
        takes.append(take(label, f"{name}-{label.lower()}", samples_T, info.sample_rate))
    note = (
        f"Distance of the spectrum to the reference's: {distances['untouched']:.1f} dB untouched, "
        f"{distances['eqst']:.1f} dB processed, {distances['theirs']:.1f} dB the paper's, "
        f"{distances['ltas_fit']:.1f} dB an LTAS fit."
    )
    heard = analysis.from_file(triple.input), analysis.from_file(triple.reference)
    return matched(
        name, triple.name, takes[0], takes[1], matcher, note=note, heard=heard, other=takes[2]
    )
