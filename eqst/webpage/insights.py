"""Latent business and the take-home claims, as sections of the page."""

from __future__ import annotations

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
