"""The supplementary page: `python -m eqst.report --workdir=DIR [--workdir=DIR ..] --output=DIR`.

A static site that opens from its folder without network: responses, audio examples, latents,
claims, scenarios, ablation and benchmark tables, all from finished runs. A folder of a sweep counts
as its runs. Examples are of the first db_mel_pm among them, else of the first run.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import flags

from eqst import card, command, corpus, evaluate, match, triples
from eqst.config import Data
from eqst.webpage import chapters, examples, findings, material, page, scenarios, site
from eqst.webpage.markup import Html
from eqst.webpage.material import Request

EXAMPLES = 10


def _real(data: Data) -> bool:
    return all(source != "synthetic" for source in data.sources)


class Built(NamedTuple):
    """The page, the examples whose audio goes with it, and figures by the name of their file."""

    text: str
    examples: list[examples.Example]
    figures: dict[str, dict[str, Any]]


def build(request: Request, say: examples.Say) -> Built:
    """The page and what goes with it.

    Raises:
      ValueError: anything of what was given cannot be used; one line.
    """
    for name in ("data", "music", "triples", "results"):
        folder = getattr(request, name)
        if folder and not pathlib.Path(folder).is_dir():
            raise ValueError(f"--{name}={folder} is not a folder: check the path")
    chosen_music = scenarios.excerpts(pathlib.Path(request.music)) if request.music else []
    found = triples.find(pathlib.Path(request.triples)) if request.triples else []
    runs = material.members(request.workdirs, say)
    shown = runs[0]
    say(f"runs: {', '.join(member.name for member in runs)}; examples of {shown.name}")
    data, split = evaluate.select(shown.run.config, request.data, request.manifest, "dev")
    held_out = corpus.open_corpus(data, split, say)
    # Before the work: the run's own recordings may be on another machine.
    train = chapters.train_talkers(shown.run.config, request, say)
    spec = shown.run.config
    seconds = spec.data.segment_seconds[0]
    made = examples.test(
        shown.run, held_out, pairs=request.pairs, seconds=seconds, seed=spec.evaluation.seed
    )
    say(f"{request.pairs} held-out pairs: shape error {made.shape_db_n.mean():.2f} dB")
    chosen = examples.even_ranks(made.shape_db_n, EXAMPLES)
    matcher = match.Matcher.load(shown.folder)
    speech = examples.of_test(made, chosen)
    music = scenarios.music(chosen_music, matcher, say)
    voices: dict[str, list[examples.Example]] = {}
    if _real(data):
        for kind in ("sibilance", "bass"):
            voices[kind] = scenarios.scenario(kind, held_out, matcher, say)
    sets = scenarios.of_triples(found, matcher, say)
    latents = chapters.latent_business(runs, made, train, say)
    claims, measured = chapters.take_home(runs, held_out, train, request, say)
    results = findings.read_results(pathlib.Path(request.results)) if request.results else {}
    metrics = {member.name: card.metrics_of(member.folder) for member in runs}
    how = chapters.rule(made, shown, split, data)
    parts = [
        ("responses", "Frequency responses", Html(how + findings.responses(made, chosen))),
        ("examples", "Audio examples", chapters.audio(speech, music, spec.data.segment_seconds)),
        ("latents", "Latent business", latents),
        ("claims", "Take-home claims, measured", claims),
        ("scenarios", "Application scenarios", chapters.applications(voices, sets)),
        ("ablation", "Ablation", _of(results, findings.ablation, "ablation", "sweep")),
        (
            "benchmark",
            "Open benchmark",
            _of(results, findings.leaderboard, "benchmark_leaderboard", "leaderboard"),
        ),
        ("seconds", "Error against seconds", findings.error_against_seconds(results)),
        ("training", "Training curves", findings.training(metrics)),
        ("made", "How this page was made", chapters.provenance(request, runs, data)),
    ]
    every = [*speech, *music]
    every += [x for rows in (*voices.values(), *(one.examples for one in sets)) for x in rows]
    text = page.document(
        lede=chapters.lede(), facts=chapters.head(shown, made, data), parts=parts, examples=every
    )
    return Built(text, every, {chapters.CLAIMS: measured} if measured else {})


def _of(
    results: dict[str, dict[str, Any]], show: Callable[[dict[str, Any] | None], Html], *names: str
) -> Html:
    """What the first of the files of these names shows, in whatever folder.

    Raises:
      ValueError: it is not such a file.
    """
    found = [key for key in results if key.split("/")[-1] in names]
    try:
        return show(results[found[0]] if found else None)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"--results: {found[0]}.json is none of this version ({error!r}): make it anew"
        ) from None


# ------------------------------------------------------------------------------ the command


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_multi_string(
        "workdir", None, "Finished run, or folder of a sweep; may be repeated."
    )
    flags.DEFINE_string("output", None, "Folder to make the page in.")
    flags.DEFINE_string("data", "", "Folder of real speech; default: the run's own held-out split.")
    flags.DEFINE_string("manifest", "", "CSV (path, split, perhaps licence) of --data.")
    flags.DEFINE_string("music", "", "Folder of music.")
    flags.DEFINE_string(
        "triples", "", "Folder of NAME_input, NAME_reference, NAME_estimated files."
    )
    flags.DEFINE_string(
        "results", "", "Folder of results JSON; default: the clone's colab/results."
    )
    flags.DEFINE_integer("pairs", 400, "Held-out pairs: examples and claims.", 10, 10_000)
    flags.DEFINE_bool("overwrite", False, "Replace a page that is already there.")
    flags.mark_flags_as_required(["workdir", "output"])


def main() -> None:
    """The command."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    output = pathlib.Path(options.output)
    site.check_output(output, overwrite=options.overwrite)
    request = Request(
        tuple(options.workdir),
        options.data,
        options.manifest,
        options.music,
        options.triples,
        options.results or material.default_results(),
        options.pairs,
    )
    made = build(request, say)
    size = site.write_site(
        output, made.text, made.examples, figures=made.figures, overwrite=options.overwrite
    )
    say(f"{output / site.INDEX}: {len(made.examples)} examples, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    command.start("eqst.report", define_flags, main)
