"""Latent business and the take-home claims, as sections of the page."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from eqst import claims, corpus, latents, latentstats, trials
from eqst.webpage import drawing
from eqst.webpage.examples import Test
from eqst.webpage.markup import Html, anchor, details, missing, signed, table, tag

SPREAD_PAIRS = 64  # train pairs for that deviation
FULL_COLOUR = 99.5  # percentile of magnitudes
KINDS = ("extracted, input", "extracted, reference", "fed")


class View(NamedTuple):
    """The latents of one model at the test points.

    Attributes:
      title: of the model.
      points: for each test point the latents [C, M] in the order of KINDS.
      spread: their standard deviation over train pairs, [C, M] each.
    """

    title: str
    points: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
    spread: tuple[np.ndarray, np.ndarray, np.ndarray]


def view(
    title: str, run: trials.Run, made: Test, points: Sequence[int], train: corpus.Corpus
) -> View:
    """Latents of a model at test points, and how far they spread on train pairs (`plain`)."""
    where = np.array(points)
    found = latents.extract_batch(run, made.input_nT[where], made.reference_nT[where])
    heard = claims.hear(
        run,
        train,
        seconds=made.seconds,
        protocol="plain",
        count=SPREAD_PAIRS,
        seed=run.config.evaluation.seed + 1,
    ).latents
    extracted_nL = np.concatenate(heard[:2])
    extracted, fed = (
        latents.as_image(run, latentstats.spread(x).std_L) for x in (extracted_nL, heard.fed_L)
    )
    images = [latents.as_image(run, x) for x in found]
    spread = (extracted, extracted, fed)
    return View(title, list(zip(*images, strict=True)), spread)


def business(views: Sequence[View], made: Test, points: Sequence[int]) -> Html:
    """Images of extracted and fed latents, one colour scale for each model."""
    where = [
        f"{number}: shape error {made.shape_db_n[i]:.2f} dB, {made.lufs_n2[i, 0]:.1f} LUFS input, "
        f"{made.lufs_n2[i, 1]:.1f} LUFS reference, {made.talker_n[i]}"
        for number, i in enumerate(points, start=1)
    ]
    parts = [tag("ol", [tag("li", x.partition(": ")[2]) for x in where], cls="plain")]
    for one in views:
        parts.append(_model(one))
    return tag("div", parts)


def _model(one: View) -> Html:
    every = np.concatenate([np.abs(x).ravel() for point in one.points for x in point])
    limit = max(float(np.percentile(every, FULL_COLOUR)), 1e-9)
    figures, rows = [], []
    for number, point in enumerate(one.points, start=1):
        pictures = []
        for kind, latent_CM, spread_CM in zip(KINDS, point, one.spread, strict=True):
            facts = _facts(latent_CM, spread_CM)
            rows.append([f"{number}, {kind}", *facts.values()])
            said = (
                f"norm {facts['norm']}, nullified {facts['nullified']}, "
                f"range {facts['least']} .. {facts['largest']}"
            )
            words = f"{one.title}, test point {number}, {kind}: {said}."
            picture = drawing.image(drawing.latent_png(latent_CM, limit), words, loading="lazy")
            caption = tag("figcaption", tag("b", f"{number}, {kind}."), f" {said}.")
            pictures.append(tag("figure", picture, caption))
        figures.append(tag("div", pictures, cls="latents"))
    name = f"latents-{anchor(one.title)}"
    head = ["test point, signal", "norm", "nullified", "least", "largest", "deviation"]
    channels, mels = one.points[0][0].shape
    scale = tag(
        "div",
        drawing.image(drawing.scale_png(), "", aria_hidden="true"),
        tag(
            "div", [tag("span", x) for x in (f"\u2212{limit:.3g}", "0", f"{limit:.3g}")], cls="ends"
        ),
        cls="scale",
    )
    return tag(
        "section",
        tag("h3", tag("a", one.title, href=f"#{name}"), id=f"{name}-title"),
        tag(
            "p",
            f"{channels} channels (rows) by {mels} mel bands (columns, low to high). One scale for "
            f"this model: full colour at \u00b1{limit:.3g}, the {FULL_COLOUR:g} % point of its "
            "magnitudes; colour grows with the root of the value.",
        ),
        scale,
        figures,
        details("Numbers", table(f"Latents of {one.title}", head, rows)),
        id=name,
        aria_labelledby=f"{name}-title",
    )


def _facts(latent_CM: np.ndarray, spread_CM: np.ndarray) -> dict[str, str]:
    (nullified,) = latentstats.nullified(latent_CM.reshape(1, -1), spread_CM.ravel())
    return {
        "norm": f"{np.linalg.norm(latent_CM):.3g}",
        "nullified": f"{100 * nullified:.1f} %",
        "least": signed(float(latent_CM.min()), 2),
        "largest": signed(float(latent_CM.max()), 2),
        "deviation": f"{latent_CM.std():.3g}",
    }


# Of every model, in the words of the table: a path into what `claims.measure` gives.
_STATISTICS = (
    ("extracted: nullified, %", 100.0, ("extracted", "nullified")),
    ("fed: nullified, %", 100.0, ("fed", "nullified")),
    ("fed: nullified by the deviation of all, %", 100.0, ("fed", "nullified_whole")),
    ("extracted: sparsity (Hoyer)", 1.0, ("extracted", "sparsity")),
    ("fed: sparsity (Hoyer)", 1.0, ("fed", "sparsity")),
    ("extracted: norm", 1.0, ("extracted", "norm")),
    ("fed: norm", 1.0, ("fed", "norm")),
    ("fed: norm over extracted", 1.0, ("fed", "norm_ratio")),
    ("extracted: 0.1 % point", 1.0, ("extracted", "range", "p0.1")),
    ("extracted: 99.9 % point", 1.0, ("extracted", "range", "p99.9")),
    ("fed: 0.1 % point", 1.0, ("fed", "range", "p0.1")),
    ("fed: 99.9 % point", 1.0, ("fed", "range", "p99.9")),
    ("fed: rms", 1.0, ("fed", "range", "rms")),
    ("fed: dynamic range, dB", 1.0, ("fed", "range", "dynamic_range_db")),
    ("fed: effective dimensions", 1.0, ("fed", "dimensions")),
    ("fed: energy in the mean over pairs, %", 100.0, ("fed", "mean_share")),
    ("sensitivity: curve, dB, for 1 % of fed", 1.0, ("predictor", "percent_db")),
    ("sensitivity: curve, dB, for one deviation", 1.0, ("predictor", "spread_db")),
    ("error, dB", 1.0, ("predictor", "error_db")),
    ("error, dB, fed without its mean", 1.0, ("predictor", "error_centred_db")),
    ("error, dB, half of fed at its mean", 1.0, ("predictor", "error_half_db")),
    ("error, dB, fed at its mean", 1.0, ("predictor", "error_mean_db")),
    ("error, dB, fed of another pair", 1.0, ("predictor", "error_shuffled_db")),
    ("R\u00b2 of the model", 1.0, ("predictor", "r_squared")),
    ("R\u00b2 of a linear readout of fed", 1.0, ("predictor", "probe_fed")),
    ("R\u00b2, extracted difference", 1.0, ("predictor", "probe_difference")),
)


def statistics(stats: Mapping[str, Any]) -> Html:
    """All that was measured of every model for the claims, a column each."""
    models = list(stats["models"].values())
    rows = [
        [name] + [_told(functools.reduce(operator.getitem, path, x), factor) for x in models]
        for name, factor, path in _STATISTICS
    ]
    head = ["statistic"] + [
        x["variant"] + ("" if x["normalised"] else ", raw features") for x in models
    ]
    caption = "Latents and predictor, mean (95 % interval over talkers and pairs)"
    return details("Every statistic of every model", table(caption, head, rows))


def _told(value: Any, factor: float) -> str:
    if not isinstance(value, Mapping):
        return f"{factor * value:.3g}"
    mean, low, high = (f"{factor * value[key]:.3g}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def judged(verdicts: Sequence[Mapping[str, Any]] | None) -> Html:
    """The page's take-home claims, each with what was measured and a verdict."""
    if not verdicts:
        return missing(
            "The claims compare the three models: give a run of each of linear_mel_bl, db_mel_bl "
            "and db_mel_pm by --workdir."
        )
    items = []
    for one in verdicts:
        verdict = str(one["verdict"])
        items.append(
            tag(
                "li",
                tag("p", one["text"]),
                tag("p", tag("b", verdict.capitalize() + "."), f" {one['why']}"),
                tag("p", f"Measured: {one['statistic']}", cls="note"),
                value=one["claim"],
            )
        )
    return tag("ol", items, cls="claims plain")
