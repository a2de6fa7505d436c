"""The sections of the page in words: what its players and figures show, how it was chosen."""

from __future__ import annotations

import collections
import csv
import dataclasses
import json
import pathlib
import shlex
from typing import Any

import numpy as np

from eqst import card, claims, corpus, evaluate, latentstats
from eqst.config import Config, Data, as_dict
from eqst.webpage import examples, findings, insights, page, scenarios
from eqst.webpage.markup import Html, details, missing, section, table, tag
from eqst.webpage.material import TITLES, Member, Request, default_results, of_variants

CLAIMS = "claims"  # the file of what is measured for them


def lede() -> Html:
    return tag(
        "p",
        "One recording in, an unrelated reference beside it, and out come the settings of a "
        "four-band equaliser that make the first sound like the second. This page shows what a "
        "trained model predicts: curves, audio, latents and figures, made by one command from its "
        "run, after the supplementary page of Mimilakis, Bryan and Smaragdis (ICASSP 2020). "
        "Ablation, benchmark and error against seconds are of stored results, of whatever models "
        "these name.",
        cls="lede",
    )


def head(shown: Member, made: examples.Test, data: Data) -> list[tuple[str, Any]]:
    low, high = (np.percentile(made.shape_db_n, q) for q in (10, 90))
    return [
        ("Model", f"{shown.variant}, step {shown.run.step:,}, commit {shown.run.commit[:10]}"),
        (
            "Held-out error",
            f"{made.shape_db_n.mean():.2f} dB shape RMSE on {len(made.shape_db_n)} pairs of "
            f"{made.seconds:g} s (10 to 90 % of them {low:.2f} to {high:.2f} dB)",
        ),
        ("Recordings", ", ".join(_short_source(x) for x in data.sources)),
        ("Privacy", "The page loads its own files only; nothing leaves your machine."),
    ]


def _short_source(source: str) -> str:
    """A source without the way to it."""
    kind, _, place = source.partition(":")
    return {
        "synthetic": "synthetic talkers",
        "folder": pathlib.PurePath(place).name,
        "tfds": place,
    }[kind]


def rule(made: examples.Test, shown: Member, split: str, data: Data) -> Html:
    count = len(made.shape_db_n)
    who = "talkers that the model was not trained on" if split == "dev" else "the folder's talkers"
    return tag(
        "p",
        f"Pairs of {made.seconds:g} s from {who}: two segments of one recording, a random EQ on "
        f"the one that becomes the reference (protocol plain, seed "
        f"{shown.run.config.evaluation.seed}). Of {count} such pairs those at even steps of rank "
        "stand here, from the least error to the largest, so that neither the best nor the worst "
        "is left out. The error that counts is the shape's: its level, which cannot be heard "
        "between recordings, is removed.",
    )


def audio(
    speech: list[examples.Example], music: list[examples.Example], seconds: tuple[float, ...]
) -> Html:
    told = (
        "Speech of the pairs above. Processed is the input through the predicted settings; true "
        "EQ is the input through the EQ that the reference has."
    )
    spoken = section(
        "speech",
        "Speech signals",
        tag("p", told),
        page.listening("Speech, held-out pairs", speech),
        level=3,
    )
    if music:
        lengths = " and ".join(f"{x:g}" for x in seconds)
        words = (
            f"The same model, trained on speech of {lengths} s, on music of various lengths, "
            "with nothing retrained: neighbouring excerpts of one piece, each pair also with input "
            "and reference swapped. What differs between neighbours is content, not production, so "
            "little equalisation is the right answer."
        )
        inside: Any = (tag("p", words), page.listening("Music, without a known EQ", music))
    else:
        inside = missing("No music was given: name a folder of it by --music.")
    return Html(page.HINT + spoken + section("music", "Music signals", inside, level=3))


def applications(voices: dict[str, list[examples.Example]], triples: list[scenarios.Set]) -> Html:
    low, high = scenarios.SIBILANCE[0], scenarios.BASS[0]
    about = {
        "sibilance": (
            "Annoying high sibilance",
            f"the level of {low[0] / 1000:g} to {low[1] / 1000:g} kHz against "
            f"{scenarios.SIBILANCE[1][0]:g} to {scenarios.SIBILANCE[1][1]:g} Hz",
        ),
        "bass": (
            "Muddy bass",
            f"the level of {high[0]:g} to {high[1]:g} Hz against "
            f"{scenarios.BASS[1][0]:g} to {scenarios.BASS[1][1]:g} Hz",
        ),
    }
    parts = []
    for kind, (title, measure) in about.items():
        if kind in voices and voices[kind]:
            told = (
                f"The {len(voices[kind]) // 2} recordings in which {measure} is highest (third "
                f"octaves, loudest {scenarios.SCENARIO_SECONDS:g} s), each against one of the most "
                "usual voices, those nearest to the medians of sibilance and bass; and the other "
                "way round. The measure stands in brackets."
            )
            inside: Any = (tag("p", told), page.listening(title, voices[kind]))
        else:
            inside = missing(
                "This needs real recordings of two talkers or more: name their folder by --data."
            )
        parts.append(section(kind, title, inside, level=3))
    if triples:
        inside = [
            tag(
                "p",
                "Input, reference and the paper's own processed audio as brought; ours beside it. "
                "Distances are those of the long-term spectra to the reference's, 64 bands, level "
                "removed. Predicted and judged are the whole files, heard the first "
                f"{scenarios.TRIPLE_SECONDS:g} s. An LTAS fit minimises this very distance, by "
                "following content.",
            ),
            _distances(triples),
        ]
        for one in triples:
            inside.append(page.listening(f"Triples: {one.name}", one.examples))
    else:
        inside = missing(
            "No triples (NAME_input, NAME_reference, NAME_estimated) were given: name their "
            "folder by --triples."
        )
    parts.append(section("triples", "Beside the paper's own output", inside, level=3))
    return tag("div", parts)


def _distances(sets: list[scenarios.Set]) -> Html:
    head = ["set", "examples", "untouched", "the paper's output", "processed", "LTAS fit"]
    order = ("untouched", "theirs", "eqst", "ltas_fit")
    rows = [
        [one.name, len(one.examples), *(f"{one.distance_db[x]:.2f}" for x in order)] for one in sets
    ]
    return table("Mean distance to the reference in dB", head, rows)


def train_talkers(config: Config, request: Request, say: examples.Say) -> corpus.Corpus:
    """Train talkers that a latent's spread is measured on: those of --data where its manifest has
    some (the run's own may be on another machine), else the run's own."""
    if request.data and request.manifest:
        chosen, _ = evaluate.select(config, request.data, request.manifest, "train")
        try:
            # Of those alone that the run may have been trained on.
            only = config.data.permissive_only
            chosen = dataclasses.replace(chosen, folds=0, valid_share=0.0, permissive_only=only)
            return corpus.open_corpus(chosen, "train", say)
        except corpus.CorpusError:
            say(f"{request.manifest} has no train talkers: the run's own are taken")
    return corpus.open_corpus(config.data, "train", say)


def latent_business(
    runs: list[Member], made: examples.Test, train: corpus.Corpus, say: examples.Say
) -> Html:
    """Extracted and fed latents of the paper's models among the runs."""
    there = of_variants(runs)
    if not there:
        return missing(
            "None of the runs is one of the paper's three models: give one by --workdir."
        )
    points = examples.best_and_worst(made)
    views = []
    for name, member in there.items():
        views.append(insights.view(TITLES[name], member.run, made, points, train))
        say(f"latents of {member.name}")
    lost = [name for name in TITLES if name not in there]
    told = (
        "Four test points from the pairs above, chosen by rule: input and reference at "
        f"{examples.LEAST_LUFS:g} LUFS or louder, the two of least and the two of largest shape "
        "error of the model shown. Extracted is what the encoder gives for each recording, fed is "
        "what the predictor gets of both. A coefficient counts as nullified at "
        f"{latentstats.NULLIFIED:g} of its own standard deviation or less, that over "
        f"{insights.SPREAD_PAIRS} train pairs."
    )
    parts = [tag("p", told), insights.business(views, made, points)]
    if lost:
        parts.append(missing(f"No run of {', '.join(lost)} was given: add it by --workdir."))
    return tag("div", parts)


def take_home(
    runs: list[Member],
    held_out: corpus.Corpus,
    train: corpus.Corpus,
    request: Request,
    say: examples.Say,
) -> tuple[Html, dict[str, Any]]:
    """The five claims of the seed, measured on all held-out pairs and judged; and every figure of
    it (nothing where a model is missing)."""
    kinds = [[x for x in runs if x.variant in TITLES and x.raw == raw] for raw in (False, True)]
    chosen = [member for kind in kinds if len(kind) == len(TITLES) for member in kind]
    if not chosen:
        return insights.judged(None), {}
    shown = runs[0].run.config
    stats = claims.measure(
        {member.name: member.run for member in chosen},
        held_out,
        train,
        pairs=request.pairs,
        seconds=shown.data.segment_seconds[0],
        protocol="plain",
        seed=shown.evaluation.seed,
        say=say,
    )
    kinds_told = {(False,): "with", (True,): "without", (False, True): "with and without"}
    of_kind = kinds_told[tuple(sorted({x.raw for x in chosen}))]
    told = (
        f"Each claim of the paper's page, turned into statistics over {stats['pairs']} pairs of "
        f"{stats['talkers']} held-out talkers, one run for each model ({of_kind} normalised "
        "features), and judged by rules fixed before these models were measured (eqst.verdict). "
        "Brackets are 95 % intervals over talkers and pairs. "
    )
    judged = claims.verdicts(stats)
    link = tag("a", "Every figure as JSON", href=f"data/{CLAIMS}.json")
    facts = {"commit": card.commit(), "machine": evaluate.machine(), **stats, "verdicts": judged}
    parts = (tag("p", told, link, "."), insights.judged(judged), insights.statistics(stats))
    return tag("div", parts), facts


def provenance(request: Request, runs: list[Member], data: Data) -> Html:
    words = ["python", "-m", "eqst.report"]
    words += [f"--workdir={x}" for x in request.workdirs]
    for name in ("data", "manifest", "music", "triples"):
        if getattr(request, name):
            words.append(f"--{name}={getattr(request, name)}")
    if request.results not in ("", default_results()):  # which is a path of this machine
        words.append(f"--results={request.results}")
    words += [f"--pairs={request.pairs}", "--output=DIR"]
    rows = [
        [
            x.name,
            x.variant,
            f"{x.run.step:,}" + (f" ({x.left:,} to go)" if x.left > 0 else ""),
            x.run.commit[:10],
            ", ".join(map(_short_source, x.run.config.data.sources)),
        ]
        for x in runs
    ]
    versions = ", ".join(f"{name} {version}" for name, version in card.versions().items())
    configs = [
        details(
            f"Settings of {x.name}",
            tag(
                "pre",
                json.dumps(as_dict(x.run.config), indent=1),
                tabindex="0",
                role="region",
                aria_label=f"Settings of {x.name}",
            ),
        )
        for x in runs
    ]
    return tag(
        "div",
        tag(
            "pre",
            shlex.join(words),
            id="command",
            tabindex="0",
            role="region",
            aria_label="Command",
        ),
        tag("button", "Copy", type="button", cls="copy", data_copy="command"),
        tag(
            "dl",
            [
                (tag("dt", key), tag("dd", value))
                for key, value in (
                    ("Code", f"commit {card.commit()}"),
                    ("Packages", versions),
                    ("Machine", evaluate.machine()),
                    ("Stored results", _results_told(request.results)),
                )
            ],
            cls="facts",
        ),
        table("Runs", ["run", "variant", "step", "commit", "trained on"], rows, first=5),
        configs,
        section("data", "Data and licences", _licences(request, data), level=3),
        section(
            "cite",
            "Cite",
            tag(
                "pre",
                findings.BIBTEX,
                id="bibtex",
                tabindex="0",
                role="region",
                aria_label="BibTeX",
            ),
            tag("button", "Copy BibTeX", type="button", cls="copy", data_copy="bibtex"),
            level=3,
        ),
    )


def _results_told(results: str) -> str:
    if not results:
        return "none"
    return "colab/results of EQST's clone" if results == default_results() else results


def _licences(request: Request, data: Data) -> Html:
    parts = [
        tag("p", f"Examples: {', '.join(_short_source(x) for x in data.sources)}."),
        tag(
            "p",
            "The code and this page are under Apache-2.0; recordings keep the licences of their "
            "makers, and processed audio is derived from them.",
        ),
    ]
    manifest = data.manifest
    if manifest:
        with open(pathlib.Path(manifest).expanduser(), newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if rows and {"licence", "path"} <= set(rows[0]):
            places = [(str(pathlib.PurePosixPath(x["path"]).parent), x["licence"]) for x in rows]
            counts = collections.Counter(places)
            listed = [
                [folder, licence, count] for (folder, licence), count in sorted(counts.items())
            ]
            inside = table(
                "Recordings that the manifest lists",
                ["folder", "licence", "files"],
                listed,
                first=2,
            )
            parts.append(details("Licences of the recordings", inside))
    elif not all(source == "synthetic" for source in data.sources):
        parts.append(
            missing("Their licences are not known here: give a --manifest with a column licence.")
        )
    return tag("div", parts)
