"""The supplementary page as a document: its frame, and tables of examples with players."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Sequence
from typing import Any

from eqst.settings import equalizer_apo_text
from eqst.webpage.examples import Example, Take, matched_gains_db, sections
from eqst.webpage.markup import Html, data, details, section, signed, tag

TITLE = "One-shot EQ style transfer: supplementary page"
GENERATOR = "eqst.report"

# Nothing but the page's own files may be loaded, and nothing sent anywhere.
POLICY = (
    "default-src 'none'; script-src 'self' file:; style-src 'self' file:; "
    "img-src 'self' file: data:; media-src 'self' file: blob:; connect-src 'none'; "
    "form-action 'none'; base-uri 'none'"
)


def document(
    *,
    lede: Html,
    facts: Sequence[tuple[str, Any]],
    parts: Sequence[tuple[str, str, Html]],
    examples: Sequence[Example],
) -> str:
    """The whole page.

    Args:
      lede: what the page is, in a paragraph or two.
      facts: names and values, for the head of the page.
      parts: id, title and content of the sections, in order.
      examples: those that have players.
    """
    contents = [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts]
    pairs = [(tag("dt", key), tag("dd", value)) for key, value in facts]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", name="description", content="Predicted equalisers: responses, audio, latents."),
        tag("title", TITLE),
        tag("link", rel="icon", href="data:,"),
        tag("link", rel="stylesheet", href="page.css"),
    )
    top = tag("header", tag("h1", TITLE), lede, tag("dl", pairs, cls="facts"))
    nav = tag(
        "nav",
        tag("h2", "Contents", id="contents-title"),
        tag("ol", contents),
        cls="contents",
        aria_labelledby="contents-title",
    )
    main = tag("main", [section(*part) for part in parts], id="main", tabindex="-1")
    body = tag(
        "body",
        tag("a", "Skip to the content", href="#main", cls="skip"),
        tag("div", top, tag("div", nav, main, cls="body"), cls="frame"),
        data("examples-data", {example.name: _facts(example) for example in examples}),
        tag("script", src="page.js"),
    )
    return "<!doctype html>\n" + tag("html", head, body, lang="en") + "\n"


def asset(name: str) -> str:
    """A file of eqst/webpage/assets as text."""
    return (
        importlib.resources.files("eqst.webpage")
        .joinpath("assets", name)
        .read_text(encoding="utf-8")
    )


def _facts(example: Example) -> dict[str, Any]:
    """What the script needs to know of an example."""
    takes = []
    gains = matched_gains_db(example.takes)
    for one, gain_db in zip(example.takes, gains, strict=True):
        facts: dict[str, Any] = {"label": one.label, "clip": one.clip.name, "match_db": gain_db}
        if one.made_from is not None and one.settings is not None:
            facts["from"] = one.made_from.name
            facts["preamp_db"] = one.settings.preamp_db
            facts["sos"] = sections(one.settings).tolist()
        takes.append(facts)
    clip = example.takes[0].clip
    return {
        "rate": clip.sample_rate,
        "seconds": len(clip.samples_T) / clip.sample_rate,
        "takes": takes,
        "settings": dataclasses.asdict(example.found),
    }


# ------------------------------------------------------------------------------ listening


HINT = Html(
    '<p class="hint screen">Keys inside a comparison: <kbd>space</kbd> plays and pauses, '
    "<kbd>1</kbd> <kbd>2</kbd> <kbd>3</kbd> .. switch, <kbd>←</kbd> <kbd>→</kbd> choose among the "
    "takes or, elsewhere, move by a second. Everything in a comparison runs on one clock and is "
    "turned down to the loudness (BS.1770) of its quietest take. The players beside it play the "
    'files as they are.</p><noscript><p class="missing">Comparisons, downloads and copying need '
    "scripts, which are off; the players work without.</p></noscript>"
)


def listening(caption: str, examples: Sequence[Example]) -> Html:
    """A table of examples: a player for every take, and a comparison of them below."""
    labels = [one.label for one in max((x.takes for x in examples), key=len)]
    roles = {"role": "columnheader", "scope": "col"}
    headings = [tag("th", label, **roles) for label in ("Example", *labels)]
    body = [_rows(example, len(labels) + 1) for example in examples]
    return tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", headings, role="row"), role="rowgroup"),
        body,
        cls="listen",
        role="table",
    )


def _rows(example: Example, columns: int) -> Html:
    title = tag("a", example.title, href=f"#{example.name}")
    cells = [_player(example, one) for one in example.takes]
    cells += [tag("td", role="cell")] * (columns - 1 - len(example.takes))
    first = tag("tr", tag("th", title, scope="row", role="rowheader"), cells, role="row")
    below = tag("p", example.note, cls="note"), _comparison(example), _settings(example)
    second = tag("tr", tag("td", below, colspan=columns, role="cell"), role="row")
    return tag("tbody", first, second, id=example.name, role="rowgroup")


def _player(example: Example, one: Take) -> Html:
    label = f"{example.title}, {one.label}"
    address = f"audio/{one.clip.name}.flac"
    player = tag("audio", controls=True, preload="metadata", src=address, aria_label=label)
    return tag("td", player, data_label=one.label, role="cell")


def _comparison(example: Example) -> Html:
    choices = [
        tag(
            "label",
            tag("input", type="radio", name=f"{example.name}-take", checked=number == 1),
            tag("kbd", number),
            " ",
            one.label,
        )
        for number, one in enumerate(example.takes, start=1)
    ]
    clip = example.takes[0].clip
    seconds = len(clip.samples_T) / clip.sample_rate
    return tag(
        "fieldset",
        tag("legend", f"Compare: {example.title}"),
        tag(
            "div",
            tag("button", "Play", type="button", cls="play", data_running="false"),
            tag("span", choices, cls="choices"),
            tag(
                "input",
                type="range",
                min="0",
                max=f"{seconds:.2f}",
                step="0.01",
                value="0",
                aria_label="Position",
                aria_valuetext=f"0.0 of {seconds:.1f} seconds",
            ),
        ),
        tag(
            "div",
            tag("label", tag("input", type="checkbox", checked=True), " equal loudness"),
            tag("output", role="status", cls="said"),
            tag("button", "Download processed (WAV)", type="button", cls="save"),
        ),
        cls="compare",
        data_example=example.name,
        hidden=True,
    )


def _settings(example: Example) -> Html:
    found, name = example.found, f"{example.name}-settings"
    bands = ", ".join(f"{x.frequency_hz:.0f} Hz {signed(x.gain_db)} dB" for x in found.bands)
    return details(
        f"Settings: {bands}",
        tag(
            "pre",
            equalizer_apo_text(found),
            id=name,
            tabindex="0",
            role="region",
            aria_label=f"Settings: {example.title}",
        ),
        tag("button", "Copy as text", type="button", cls="copy", data_copy=name),
        tag("button", "Copy as JSON", type="button", cls="copy", data_json=example.name),
    )
