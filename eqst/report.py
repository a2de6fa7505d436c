"""The supplementary page: `python -m eqst.report --workdir=DIR [--workdir=DIR ..] --output=DIR`.

A static site that opens from its folder without network: responses, audio examples, latents,
claims, scenarios, ablation and benchmark tables, all from finished runs. A folder of a sweep counts
as its runs. Examples are of the first db_mel_pm among them, else of the first run.
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import json
import os
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import soundfile
from absl import flags

from eqst import (
    card,
    command,
    corpus,
    evaluate,
    examples,
    findings,
    insights,
    match,
    page,
    record,
    scenarios,
    trials,
)
from eqst.config import Config, as_dict
from eqst.files import AudioError
from eqst.markup import Html, details, missing, section, table, tag

EXAMPLES = 10
INDEX = "index.html"

# By (features.scale, model.comparison) of a model on mel features: its file in configs/, and the seed's name.
VARIANTS = {
    ("linear", "subtract"): ("linear_mel_bl", "Baseline model"),
    ("db", "subtract"): ("db_mel_bl", "Baseline model with dB valued representation"),
    ("db", "learned"): ("db_mel_pm", "Proposed model with dB valued representation"),
}


class Member(NamedTuple):
    """A finished run: a name for people, its folder, its variant (or "pooled"), the model."""

    name: str
    folder: pathlib.Path
    variant: str
    run: trials.Run


class Request(NamedTuple):
    """What the command was asked for; paths may be empty but for the first."""

    workdirs: tuple[str, ...]
    data: str
    manifest: str
    music: str
    triples: str
    results: str
    pairs: int


# ------------------------------------------------------------------------------ what is given


def variant(config: Config) -> str:
    """Which of the paper's three a run is, or "pooled"."""
    key = (config.features.scale, config.model.comparison)
    return VARIANTS[key][0] if config.features.kind == "mel" and key in VARIANTS else "pooled"


def folders(workdir: str) -> list[pathlib.Path]:
    """A run's folder itself, or those of a sweep, its factor `variant` first.

    Raises:
      ValueError: there is no run in it.
    """
    root = pathlib.Path(workdir)
    if not root.is_dir():
        raise ValueError(f"--workdir={workdir} is not a folder: give a run of eqst.train")
    if (root / card.CARD_NAME).is_file():
        return [root]
    found = sorted(path.parent for path in root.rglob(card.CARD_NAME) if (path.parent / "checkpoints").is_dir())
    if not found:
        raise ValueError(
            f"--workdir={workdir} holds no run: give the folder that eqst.train or a sweep wrote to"
        )
    return sorted(found, key=lambda path: (path.relative_to(root).parts[0] != "variant", path))


def members(workdirs: Sequence[str]) -> list[Member]:
    """The first run of every variant, in the order given; the one whose examples are shown first."""
    found: dict[str, Member] = {}
    for workdir in workdirs:
        root = pathlib.Path(workdir)
        for folder in folders(workdir):
            kind = variant(trials.from_card(card.read_card(folder)["config"]))
            if kind not in found:
                name = root.name if folder == root else f"{root.name}/{folder.relative_to(root)}"
                found[kind] = Member(name, folder, kind, trials.open_run(folder))
    return sorted(found.values(), key=lambda member: member.variant != "db_mel_pm")


def default_results() -> str:
    """colab/results of the clone this package lies in, or nothing."""
    folder = pathlib.Path(__file__).resolve().parents[1] / "colab" / "results"
    return str(folder) if folder.is_dir() else ""


def _real(data: Any) -> bool:
    return all(source != "synthetic" for source in data.sources)


# ------------------------------------------------------------------------------ the sections


def build(request: Request, say: examples.Say) -> tuple[str, list[examples.Example]]:
    """The page, and the examples whose audio goes with it.

    Raises:
      ValueError: anything of what was given cannot be used; one line.
    """
    for name in ("data", "music", "triples", "results"):
        folder = getattr(request, name)
        if folder and not pathlib.Path(folder).is_dir():
            raise ValueError(f"--{name}={folder} is not a folder: check the path")
    runs = members(request.workdirs)
    shown = runs[0]
    say(f"runs: {', '.join(member.name for member in runs)}; examples of {shown.name}")
    data, split = evaluate.select(shown.run, request.data, request.manifest, "dev")
    held_out = corpus.open_corpus(data, split, say)
    spec = shown.run.config
    seconds = spec.data.segment_seconds[0]
    made = examples.test(
        shown.run, held_out, pairs=request.pairs, seconds=seconds, seed=spec.evaluation.seed
    )
    say(f"{request.pairs} held-out pairs: shape error {made.shape_db_n.mean():.2f} dB")
    chosen = examples.even_ranks(made.shape_db_n, EXAMPLES)
    matcher = match.Matcher.load(shown.folder)
    speech = examples.of_test(made, chosen)
    music = scenarios.music(pathlib.Path(request.music), matcher, say) if request.music else []
    voices: dict[str, list[examples.Example]] = {}
    if _real(data):
        for kind in ("sibilance", "bass"):
            voices[kind] = scenarios.scenario(kind, held_out, matcher, say)
    triples: list[scenarios.Set] = []
    if request.triples:
        triples = scenarios.of_triples(pathlib.Path(request.triples), matcher, say)
    latents, claims = _insights(runs, made, held_out, say)
    results = findings.read_results(pathlib.Path(request.results)) if request.results else {}
    metrics = {
        member.name: record.read_metrics(member.folder / record.METRICS_NAME)[0]
        for member in runs
        if (member.folder / record.METRICS_NAME).is_file()
    }
    how = _rule(made, shown, split, data)
    parts = [
        ("responses", "Frequency responses", Html(how + findings.responses(made, chosen))),
        ("examples", "Audio examples", _audio(speech, music, seconds)),
        ("latents", "Latent business", latents),
        ("claims", "Take-home claims, measured", claims),
        ("scenarios", "Application scenarios", _scenarios(voices, triples)),
        ("ablation", "Ablation", findings.ablation(_named(results, "ablation"))),
        ("benchmark", "Open benchmark", findings.leaderboard(_named(results, "benchmark_leaderboard"))),
        ("seconds", "Error against seconds", findings.error_against_seconds(results)),
        ("training", "Training curves", findings.training(metrics)),
        ("made", "How this page was made", _provenance(request, runs, data)),
    ]
    every = [*speech, *music]
    every += [x for rows in (*voices.values(), *(one.examples for one in triples)) for x in rows]
    text = page.document(lede=_lede(), facts=_head(shown, made, data), parts=parts, examples=every)
    return text, every


def _named(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any] | None:
    found = [key for key in results if key.split("/")[-1] == name]
    return results[found[0]] if found else None


def _lede() -> Html:
    return tag(
        "p",
        "One recording in, an unrelated reference beside it, and out come the settings of a "
        "four-band equaliser that make the first sound like the second. This page shows what a "
        "trained model predicts: curves, audio, latents and figures, all made by one command from "
        "its run, after the supplementary page of Mimilakis, Bryan and Smaragdis (ICASSP 2020).",
        cls="lede",
    )


def _head(shown: Member, made: examples.Test, data: Any) -> list[tuple[str, Any]]:
    low, high = (examples.np.percentile(made.shape_db_n, q) for q in (10, 90))
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
    return "synthetic talkers" if source == "synthetic" else source


def _rule(made: examples.Test, shown: Member, split: str, data: Any) -> Html:
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


def _audio(
    speech: list[examples.Example], music: list[examples.Example], seconds: float
) -> Html:
    told = (
        "Speech of the pairs above. Processed is the input through the predicted settings; true "
        "EQ is the input through the EQ that the reference has."
    )
    spoken = section(
        "speech", "Speech signals", tag("p", told), page.listening("Speech, held-out pairs", speech), level=3
    )
    if music:
        words = (
            f"The same model, trained on speech of {seconds:g} s, on music of various lengths, with "
            "nothing retrained: neighbouring excerpts of one piece, each pair also with input and "
            "reference swapped. What differs between neighbours is content, not production, so "
            "little equalisation is the right answer."
        )
        played = [x._replace(title=f"Example {n}") for n, x in enumerate(music, start=1)]
        inside: Any = (tag("p", words), page.listening("Music, without a known EQ", played))
        music[:] = played
    else:
        inside = missing("No music was given: name a folder of it by --music.")
    return Html(page.HINT + spoken + section("music", "Music signals", inside, level=3))


def _scenarios(
    voices: dict[str, list[examples.Example]], triples: list[scenarios.Set]
) -> Html:
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
            rows = voices[kind] = [
                x._replace(title=f"Example {n}") for n, x in enumerate(voices[kind], start=1)
            ]
            inside: Any = (tag("p", told), page.listening(title, rows))
        else:
            inside = missing("This needs real recordings of two talkers or more: name a folder of them by --data.")
        parts.append(section(kind, title, inside, level=3))
    if triples:
        inside = [
            tag(
                "p",
                "Input, reference and the paper's own processed audio as brought; ours beside it. "
                "Distances are those of the long-term spectra to the reference's, 64 bands, level "
                "removed. Predicted and judged are the whole files, heard the first "
                f"{scenarios.TRIPLE_SECONDS:g} s. An LTAS fit minimises this very distance, by following content.",
            ),
            _distances(triples),
        ]
        for one in triples:
            inside.append(page.listening(f"Triples: {one.name}", one.examples))
    else:
        inside = missing("No triples (NAME_input, NAME_reference, NAME_estimated) were given: name their folder by --triples.")
    parts.append(section("triples", "Beside the paper's own output", inside, level=3))
    return tag("div", parts)


def _distances(sets: list[scenarios.Set]) -> Html:
    head = ["set", "examples", "untouched", "the paper's output", "processed", "LTAS fit"]
    order = ("untouched", "theirs", "eqst", "ltas_fit")
    rows = [
        [one.name, len(one.examples), *(f"{one.distance_db[x]:.2f}" for x in order)] for one in sets
    ]
    return table("Mean distance to the reference in dB", head, rows)


def _insights(
    runs: list[Member], made: examples.Test, held_out: corpus.Corpus, say: examples.Say
) -> tuple[Html, Html]:
    by_variant = {member.variant: member for member in runs}
    names = [name for name, _ in VARIANTS.values() if name in by_variant]
    if not names:
        sentence = missing("None of the runs is one of the paper's three models: give one by --workdir.")
        return sentence, insights.claims(None)
    points = examples.best_and_worst(made)
    views = []
    for name, title in VARIANTS.values():
        if name in by_variant:
            member = by_variant[name]
            train = corpus.open_corpus(member.run.config.data, "train", say)
            views.append(insights.view(title, member.run, made, points, train))
            say(f"latents of {member.name}")
    lost = [name for name, _ in VARIANTS.values() if name not in by_variant]
    told = (
        "Four test points from the pairs above, chosen by rule: input and reference at "
        f"{examples.LEAST_LUFS:g} LUFS or louder, the two of least and the two of largest shape error "
        "of the model shown. Extracted is what the encoder gives for each recording, fed is what "
        "the predictor gets of both. A coefficient counts as nullified under "
        f"{insights.NULL_SHARE:g} of its own standard deviation over {insights.SPREAD_PAIRS} train pairs."
    )
    parts = [tag("p", told), insights.business(views, made, points)]
    if lost:
        parts.append(missing(f"No run of {', '.join(lost)} was given: add it by --workdir."))
    return tag("div", parts), insights.claims(None)


# ------------------------------------------------------------------------------ provenance


def _provenance(request: Request, runs: list[Member], data: Any) -> Html:
    words = ["python", "-m", "eqst.report"]
    words += [f"--workdir={x}" for x in request.workdirs]
    for name in ("data", "manifest", "music", "triples"):
        if getattr(request, name):
            words.append(f"--{name}={getattr(request, name)}")
    words += [f"--pairs={request.pairs}", "--output=DIR"]
    rows = [
        [x.name, x.variant, f"{x.run.step:,}", x.run.commit[:10], ", ".join(x.run.config.data.sources)]
        for x in runs
    ]
    versions = ", ".join(f"{name} {version}" for name, version in card.versions().items())
    configs = [
        details(
            f"Settings of {x.name}",
            tag("pre", json.dumps(as_dict(x.run.config), indent=1), tabindex="0", role="region", aria_label=f"Settings of {x.name}"),
        )
        for x in runs
    ]
    return tag(
        "div",
        tag("pre", shlex.join(words), id="command", tabindex="0", role="region", aria_label="Command"),
        tag("button", "Copy", type="button", cls="copy", data_copy="command"),
        tag(
            "dl",
            [
                (tag("dt", key), tag("dd", value))
                for key, value in (
                    ("Code", f"commit {card.commit()}"),
                    ("Packages", versions),
                    ("Machine", evaluate.machine()),
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
            tag("pre", findings.BIBTEX, id="bibtex", tabindex="0", role="region", aria_label="BibTeX"),
            tag("button", "Copy BibTeX", type="button", cls="copy", data_copy="bibtex"),
            level=3,
        ),
    )


def _licences(request: Request, data: Any) -> Html:
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
            counts: dict[tuple[str, str], int] = {}
            for row in rows:
                key = (str(pathlib.PurePosixPath(row["path"]).parent), row["licence"])
                counts[key] = counts.get(key) or 0
                counts[key] += 1
            listed = [[folder, licence, count] for (folder, licence), count in sorted(counts.items())]
            inside = table("Recordings that the manifest lists", ["folder", "licence", "files"], listed, first=2)
            parts.append(details("Licences of the recordings", inside))
    elif not all(source == "synthetic" for source in data.sources):
        parts.append(missing("Their licences are not known here: give a --manifest with a column licence."))
    return tag("div", parts)


# ------------------------------------------------------------------------------ writing


def write_site(output: pathlib.Path, text: str, every: Sequence[examples.Example], *, overwrite: bool) -> int:
    """Writes the site into a folder beside `output` and renames it into place; its size in bytes.

    Raises:
      AudioError: as `check_output`; the disk is full.
    """
    check_output(output, overwrite=overwrite)
    try:
        made = pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise AudioError(f"{str(output)!r} cannot be made ({error.strerror}): name another folder") from None
    try:
        made.chmod(0o755)
        for name, content in _files(text, every):
            path = made / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        check_output(output, overwrite=overwrite)  # again: that took a while
        if output.exists():
            old = made.with_name(made.name + "-old")
            os.replace(output, old)
            os.replace(made, output)
            shutil.rmtree(old)
        else:
            os.replace(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return size


def _files(text: str, every: Sequence[examples.Example]) -> Iterator[tuple[str, bytes]]:
    yield INDEX, text.encode()
    for name in ("page.css", "page.js"):
        yield name, page.asset(name).encode()
    shipped: set[str] = set()
    takes = [one for example in every for one in example.takes]
    # What an equaliser made of a clip the page makes again itself: only the clip is sent twice.
    scripted = {one.clip.name for one in takes if one.made_from is None}
    for one in takes:
        clip = one.clip
        if clip.name in shipped:
            continue
        shipped.add(clip.name)
        encoded = io.BytesIO()
        soundfile.write(encoded, clip.samples_T, clip.sample_rate, format="FLAC", subtype="PCM_16")
        yield f"audio/{clip.name}.flac", encoded.getvalue()
        if clip.name in scripted:
            words = base64.b64encode(encoded.getvalue()).decode("ascii")
            yield f"data/{clip.name}.js", f'EQST.put("{clip.name}","{words}");\n'.encode()


def check_output(output: pathlib.Path, *, overwrite: bool) -> None:
    """Raises AudioError where the site may not be written: before work starts, not after it.

    Only a page of this command, or an empty folder, is ever replaced.
    """
    name = repr(str(output))
    if not output.parent.is_dir():
        raise AudioError(f"{name} cannot be made: no folder {str(output.parent)!r}: create it")
    if output.exists() and not output.is_dir():
        raise AudioError(f"{name} is a file: name a folder for the page")
    if output.is_dir() and any(output.iterdir()):
        index = output / INDEX
        ours = index.is_file() and f'content="{page.GENERATOR}"' in index.read_text(errors="replace")
        if not ours:
            raise AudioError(f"{name} holds files that are not such a page: name another folder")
        if not overwrite:
            raise AudioError(f"{name} exists already: choose another name or allow overwriting (--overwrite)")


# ------------------------------------------------------------------------------ the command


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_multi_string("workdir", None, "Finished run, or folder of a sweep; may be repeated.")
    flags.DEFINE_string("output", None, "Folder to make the page in.")
    flags.DEFINE_string("data", "", "Folder of real speech; default: the run's own held-out split.")
    flags.DEFINE_string("manifest", "", "CSV (path, split, perhaps licence) of --data.")
    flags.DEFINE_string("music", "", "Folder of music.")
    flags.DEFINE_string("triples", "", "Folder of NAME_input, NAME_reference, NAME_estimated files.")
    flags.DEFINE_string("results", "", "Folder of results JSON; default: the clone's colab/results.")
    flags.DEFINE_integer("pairs", 96, "Held-out pairs that examples are chosen from.", 10, 10_000)
    flags.DEFINE_bool("overwrite", False, "Replace a page that is already there.")
    flags.mark_flags_as_required(["workdir", "output"])


def main() -> None:
    """The command."""
    options = flags.FLAGS
    say = functools.partial(print, flush=True)
    output = pathlib.Path(options.output)
    check_output(output, overwrite=options.overwrite)
    request = Request(
        tuple(options.workdir),
        options.data,
        options.manifest,
        options.music,
        options.triples,
        options.results or default_results(),
        options.pairs,
    )
    text, every = build(request, say)
    size = write_site(output, text, every, overwrite=options.overwrite)
    say(f"{output / INDEX}: {len(every)} examples, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    command.start("eqst.report", define_flags, main)
