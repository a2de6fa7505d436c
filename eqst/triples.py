"""Real triples without a known EQ: `python -m eqst.triples --data=FOLDER --output=DIR`.

A triple is three files of one folder: NAME_input, NAME_reference (or _target), and what another
system made of them, NAME_estimated (or _processed); a set is the triples of one folder that share
the kind of name. Each answer is judged by its LTAS distance to the reference, level removed,
beside the untouched input and the LTAS fit, which minimises just that.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from eqst import analysis, audio, biquad, command, eq, evaluate, match, metrics, render
from eqst.evidence import band_hz, evidence
from eqst.files import result_folder, write_json, write_text

REFERENCE, OTHER = ("reference", "target"), ("estimated", "processed")
KINDS = ("bands64", "third_octave")
ANSWERS = ("untouched", "theirs", "eqst", "ltas_fit")


class Triple(NamedTuple):
    """One example; `other` is the other system's output."""

    group: str
    name: str
    input: pathlib.Path
    reference: pathlib.Path
    other: pathlib.Path


def find(folder: pathlib.Path) -> list[Triple]:
    """Every triple under a folder, by set.

    Raises:
      ValueError: there is none, or the folder is none.
    """
    if not folder.is_dir():
        raise ValueError(f"--data={folder} is not a folder: give one of NAME_input.. files")
    triples = []
    for path in sorted(folder.rglob("*_input.*")):
        stem = path.stem.removesuffix("_input")

        def beside(
            endings: tuple[str, ...], stem: str = stem, path: pathlib.Path = path
        ) -> pathlib.Path | None:
            choices = [path.with_name(f"{stem}_{ending}{path.suffix}") for ending in endings]
            return next((choice for choice in choices if choice.exists()), None)

        reference, other = beside(REFERENCE), beside(OTHER)
        if reference is not None and other is not None:
            kind = stem.rstrip("0123456789").rstrip("_")
            group = str(path.parent.relative_to(folder) / kind)
            triples.append(Triple(group, stem, path, reference, other))
    if not triples:
        raise ValueError(
            f"{folder}: no NAME_input, NAME_reference, NAME_estimated files in it: name them so"
        )
    return triples


def judge(triple: Triple, matcher: match.Matcher) -> dict[str, dict[str, float]]:
    """LTAS distance to the reference of each answer, in dB, by kind of LTAS.

    Raises:
      AudioError: a file cannot be read, is too short, silent or too quiet.
    """
    paths = (triple.input, triple.reference, triple.other)
    sounds = [audio.read(path) for path in paths]
    for path, sound in zip(paths, sounds, strict=True):
        analysis.from_array(sound.samples_TC, sound.sample_rate, repr(str(path)))
    rate = sounds[0].sample_rate
    input_T, reference_T, other_T = (
        audio.resample(audio.to_mono(sound.samples_TC), sound.sample_rate, rate).astype(np.float64)
        for sound in sounds
    )
    found = matcher.predict(input_T, reference_T, rate).params
    here, there = evidence(input_T, rate), evidence(reference_T, rate)
    curve_M = np.asarray(eq.remove_level(there.power_db - here.power_db))
    fitted = eq.fit_curve(curve_M[None], band_hz(rate), table=eq.PAPER, sample_rate=rate)
    fitted = eq.EqParams(*(np.asarray(values)[0] for values in fitted))

    def equalised(params: eq.EqParams) -> np.ndarray:
        sos_K6 = biquad.sos(
            params.freq_hz, params.gain_db, params.q, kinds=eq.KINDS, sample_rate=rate
        )
        return render.render(input_T, sos_K6)

    answers = (input_T, other_T, equalised(found), equalised(fitted))
    return {
        kind: {
            name: metrics.ltas_distance_db(answer_T, reference_T, rate, kind=kind)
            for name, answer_T in zip(ANSWERS, answers, strict=True)
        }
        for kind in KINDS
    }


def run(
    triples: list[Triple], matcher: match.Matcher, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Distances per example and their means per set."""
    examples: list[dict[str, Any]] = []
    for done, triple in enumerate(triples, start=1):
        examples.append({"set": triple.group, "name": triple.name, **judge(triple, matcher)})
        say(f"{done} of {len(triples)}: {triple.group}, {triple.name}")
    groups = sorted({triple.group for triple in triples})
    sets = {
        group: {
            kind: {
                name: float(np.mean([x[kind][name] for x in examples if x["set"] == group]))
                for name in ANSWERS
            }
            for kind in KINDS
        }
        for group in groups
    }
    return {"sets": sets, "examples": examples}


def table_text(results: dict[str, Any]) -> str:
    """Distances by set and by example (64 bands), then the sets with 1/3-octave bands."""
    head = "".join(f"{name:>12}" for name in ANSWERS)
    lines = []
    for kind in KINDS:
        lines.append(f"LTAS distance to the reference in dB, {kind}".ljust(46) + head)
        for group, by_kind in results["sets"].items():
            lines.append(f"  {group}".ljust(46) + _row(by_kind[kind]))
            if kind == KINDS[0]:
                for x in results["examples"]:
                    if x["set"] == group:
                        lines.append(f"    {x['name']}".ljust(46) + _row(x[kind]))
        lines.append("")
    return "\n".join(lines)


def _row(values: dict[str, float]) -> str:
    return "".join(f"{values[name]:>12.2f}" for name in ANSWERS)


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_string("workdir", None, "Run of eqst.train; without, the packaged weights.")
    flags.DEFINE_string("data", None, "Folder of triples.")
    flags.DEFINE_string("output", None, "Folder for triples.json and triples.txt.")
    flags.DEFINE_bool("overwrite", False, "Replace results that are already there.")
    flags.mark_flags_as_required(["data", "output"])


def main() -> None:
    """The command."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    names = ("triples.json", "triples.txt")
    with result_folder(options.output, *names, overwrite=options.overwrite) as output:
        triples = find(pathlib.Path(options.data))
        results = run(triples, match.Matcher.load(options.workdir), say)
        about = {"command": command.line("eqst.triples"), "machine": evaluate.machine()}
        write_json(output / names[0], {**about, **results})
        write_text(output / names[1], table_text(results))
    say("\n" + table_text(results))


if __name__ == "__main__":
    command.start("eqst.triples", define_flags, main)
