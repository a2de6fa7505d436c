"""The supplementary page from a trained run: what stands on it, made alike twice, mistakes."""

import collections
import copy
import dataclasses
import hashlib
import html.parser
import itertools
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from absl import flags
from test_page_browser import NAMES, PLAY_ALL

from eqst import (
    biquad,
    checkpoint,
    command,
    config,
    eq,
    loudness,
    metrics,
    predictor,
    report,
    trials,
)
from eqst.webpage import drawing, examples, findings, insights, markup, material, scenarios, site

RATE = 16000
TINY = {
    "data.sample_rate": RATE,
    "data.synthetic_talkers": 6,
    "data.synthetic_seconds": 8.0,
    "data.segment_seconds": (1.0,),
    "data.context_seconds": 0.5,
    "data.dev_share": 0.4,
    "features.window": 512,
    "features.hop": 512,
    "features.high_hz": 8000.0,
    "features.mel_bands": 16,
    "model.channels": 2,
    "model.hidden": 8,
    "model.blocks": 0,
    "train.steps": 2,
}
VARIANTS = {
    "db_mel_bl": {"model.comparison": "subtract"},
    "linear_mel_bl": {"features.scale": "linear", "model.comparison": "subtract"},
    "db_mel_pm": {},
}
PAIRS = 12


def silent(_: str) -> None:
    """Takes progress lines and keeps nothing."""


def leave_run(workdir: Path, made: config.Config) -> None:
    """What training leaves, but for the training."""
    network = predictor.init(made, jax.random.key(0))
    normal = made.features.normalise
    normalisation = {
        "mean": np.full(16, -30.0 if normal else 0.0, np.float32),
        "scale": np.full(16, 9.0 if normal else 1.0, np.float32),
    }
    facts = {key: x.tolist() for key, x in normalisation.items()}
    table = dataclasses.asdict(eq.PAPER)
    checkpoint.write_card(
        workdir, {"config": config.as_dict(made), "normalisation": facts, "band_table": table}
    )
    with checkpoint.Checkpoints(workdir) as saved:
        saved.save_best(2, {"network": network, "normalisation": normalisation}, 3.0)
    rows = [{"step": k, "shape_db": 4.0 - k, "valid_shape_db": 4.5 - k} for k in (1, 2)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def runs(configure, tmp_path_factory) -> Path:
    """A folder of the three models, with normalised features and raw ones, as a sweep leaves it,
    but for their training."""
    folder = tmp_path_factory.mktemp("sweep")
    for (name, changes), raw in itertools.product(VARIANTS.items(), (False, True)):
        cache = {"data.cache_dir": str(folder / ".cache"), "features.normalise": not raw}
        workdir = folder / ("without" if raw else "variant") / name / "0"
        leave_run(workdir, configure(TINY | cache | changes))
    return folder


@pytest.fixture(scope="module")
def given(bursts, runs, tmp_path_factory) -> dict[str, str]:
    """Folders of made-up speech, music, triples and results."""
    root = tmp_path_factory.mktemp("given")
    for talker in range(8):
        path = root / "speech" / f"talker <{talker}>" / "a.wav"
        path.parent.mkdir(parents=True)
        soundfile.write(path, bursts(talker, 7.0, RATE), RATE)
    rows = [f"speech/talker <{talker}>/a.wav,dev,CC0-1.0" for talker in range(8)]
    (root / "manifest.csv").write_text("path,split,licence\n" + "\n".join(rows) + "\n")
    (root / "music").mkdir()
    for piece, seconds in enumerate((20.0, 12.0, 12.5, 8.5)):
        samples_T = bursts(piece + 20, seconds, RATE)
        soundfile.write(root / "music" / f"p{piece}.flac", np.stack([samples_T] * 2, 1), RATE)
    (root / "triples").mkdir()
    for role, seed in (("input", 30), ("reference", 31), ("estimated", 30)):
        soundfile.write(root / "triples" / f"ex1_{role}.wav", bursts(seed, 7.0, 44100), 44100)
    (root / "results").mkdir()
    interval = {"mean": 2.0, "low": 1.9, "high": 2.1}
    figures = {"plain": {"1 s": {"model": {"shape_rmse_db": interval}}}}
    (root / "results" / "some.json").write_text(json.dumps({"figures": figures}))
    (root / "results" / "broken.json").write_text("{")
    paths = {name: str(root / name) for name in ("music", "triples", "results")}
    return paths | {"data": str(root / "speech"), "manifest": str(root / "manifest.csv")}


def ask(runs: Path, **given: str) -> material.Request:
    empty = dict.fromkeys(("data", "manifest", "music", "triples", "results"), "")
    return material.Request((str(runs),), pairs=PAIRS, **(empty | given))


def proposal(runs: Path) -> Path:
    return runs / "variant" / "db_mel_pm" / "0"


@pytest.fixture(scope="module")
def made(runs, given) -> report.Built:
    """A page of one model with recordings and results."""
    return report.build(ask(proposal(runs), **(given | {"triples": ""})), silent)


class Parsed(html.parser.HTMLParser):
    """Tags that are open at the end, every attribute by tag, and text by section."""

    void = {"br", "img", "input", "link", "meta"}

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen, self.wrong = [], [], []
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.seen.append((name, dict(attributes)))
        if name not in self.void:
            self.open.append(name)

    def handle_endtag(self, name):
        if not self.open or self.open.pop() != name:
            self.wrong.append(name)


def part(text: str, name: str) -> str:
    """The HTML from one section's beginning to that of the next of the contents."""
    begin = text.index(f'<section id="{name}"')
    rest = text[begin:]
    return rest[: rest.index("</section>")]


@pytest.mark.long
def test_it_has_every_section_of_the_seed_and_closes_its_tags(runs, given):
    text, every, measured = report.build(ask(runs, **given), silent)
    parsed = Parsed(text)
    assert parsed.open == [] and parsed.wrong == []
    names = [attributes.get("id") for name, attributes in parsed.seen if name == "section"]
    wanted = ["responses", "examples", "speech", "music", "latents", "claims", "scenarios"]
    wanted += [
        "sibilance",
        "bass",
        "triples",
        "ablation",
        "benchmark",
        "seconds",
        "training",
        "made",
    ]
    assert [name for name in names if name in wanted] == wanted
    figures = [a for name, a in parsed.seen if a.get("class") == "example-figure"]
    assert len(figures) == 10
    counts = {
        kind: sum(x.name.startswith(kind) for x in every)
        for kind in ("speech", "music", "sibilance", "bass", "triple")
    }
    # four files: four of the five pairs of excerpts
    assert counts == {"speech": 10, "music": 8, "sibilance": 8, "bass": 8, "triple": 1}
    players = [a["src"] for name, a in parsed.seen if name == "audio"]
    assert len(players) == 4 * 10 + 3 * 24 + 4
    assert part(text, "latents-baseline-model").count("<img") == 4 * 3 + 1
    assert "talker &lt;" in text and "talker <" not in text.replace('"', "")
    assert "No ablation.json was given" in part(text, "ablation")
    assert part(text, "claims").count("<li") == 5 and "Measured:" in part(text, "claims")
    assert "with and without normalised features" in part(text, "claims")
    assert {x["normalised"] for x in measured["claims"]["models"].values()} == {True, False}
    assert [x["claim"] for x in measured["claims"]["verdicts"]] == [1, 2, 3, 4, 5]
    assert 'href="data/claims.json"' in part(text, "claims")
    assert "CC0-1.0" in part(text, "data")
    sources = [a[key] for _, a in parsed.seen for key in ("src", "href") if key in a]
    assert not [x for x in sources if re.match(r"(https?:|//|/)", x)]


def test_what_is_absent_says_what_to_give(runs):
    text, every, figures = report.build(ask(proposal(runs)), silent)
    assert figures == {}
    assert len(every) == 10
    for name, option in (
        ("music", "--music"),
        ("sibilance", "--data"),
        ("bass", "--data"),
        ("triples", "--triples"),
        ("claims", "--workdir"),
        ("ablation", "--results"),
        ("benchmark", "--results"),
        ("seconds", "--results"),
    ):
        found = part(text, name)
        assert 'class="missing"' in found and option in found, name
    assert "No run of linear_mel_bl, db_mel_bl was given" in text


def test_a_built_page_opens_plays_and_has_a_name_for_everything(made, browser, tmp_path):
    site.write_site(
        tmp_path / "page", made.text, made.examples, figures=made.figures, overwrite=False
    )
    shown, wrong = browser.new_page(), []
    shown.on("console", lambda x: wrong.append(x.text) if x.type == "error" else None)
    shown.on("pageerror", lambda x: wrong.append(str(x)))
    shown.goto((tmp_path / "page" / site.INDEX).as_uri())
    played = shown.evaluate(PLAY_ALL)
    assert len(played) == sum(len(x.takes) for x in made.examples) > 60
    for names in shown.evaluate(NAMES):
        assert len(names) > 10
        assert [x for x, times in collections.Counter(names).items() if times > 1] == []
    shown.close()
    assert wrong == []


def test_made_twice_it_is_the_same_and_its_files_are_what_it_says(runs, given, made, tmp_path):
    again = report.build(ask(proposal(runs), **(given | {"triples": ""})), silent)
    assert again[0] == made[0]
    sums = []
    for name, (text, every, figures) in (("a", made), ("b", again)):
        size = site.write_site(tmp_path / name, text, every, figures=figures, overwrite=False)
        files = {
            str(path.relative_to(tmp_path / name)): path.read_bytes()
            for path in sorted((tmp_path / name).rglob("*"))
            if path.is_file()
        }
        assert size == sum(map(len, files.values())) < 60e6
        sums.append({key: hashlib.sha256(value).hexdigest() for key, value in files.items()})
    assert sums[0] == sums[1]
    text, every, _ = made
    facts = json.loads(re.search(r'id="examples-data">(.*?)</script>', text)[1])
    assert set(facts) == {x.name for x in every}
    for example in every:
        for one, said in zip(example.takes, facts[example.name]["takes"], strict=True):
            assert f"audio/{said['clip']}.flac" in sums[0]
            if "from" not in said:
                assert f"data/{said['clip']}.js" in sums[0]
                continue
            source_T, _ = soundfile.read(tmp_path / "a" / "audio" / f"{said['from']}.flac")
            heard_T, rate = soundfile.read(tmp_path / "a" / "audio" / f"{said['clip']}.flac")
            sos_K6 = biquad.sos(*one.settings.params, kinds=eq.KINDS, sample_rate=rate)
            from scipy.signal import sosfilt

            expected_T = sosfilt(sos_K6, source_T) * 10 ** (said["preamp_db"] / 20)
            np.testing.assert_allclose(heard_T, expected_T, atol=0.51 / 2**15)
            assert np.abs(heard_T).max() <= 10 ** (-1 / 20) + 1e-4
            np.testing.assert_array_equal(said["sos"], sos_K6)


def test_speech_is_chosen_evenly_and_judged_right(runs, made):
    text, every, _ = made
    speech = [x for x in every if x.name.startswith("speech")]
    ranks = [int(re.search(r"rank (\d+) of 12", x.note)[1]) for x in speech]
    assert ranks == [1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    grid_F = eq.curve_grid_hz(RATE)
    for example in speech:
        ours, true = (x.settings.params for x in example.takes[2:])
        curves = [np.asarray(eq.response_db(x, grid_F, sample_rate=RATE)) for x in (ours, true)]
        said = float(re.search(r"Shape error (\S+) dB", example.note)[1])
        assert said == pytest.approx(np.std(curves[0] - curves[1]), abs=0.02)


def test_music_pairs_are_neighbours_and_come_both_ways(made):
    music = [x for x in made[1] if x.name.startswith("music")]
    for there, back in zip(music[::2], music[1::2], strict=True):
        assert there.takes[0].clip is back.takes[1].clip
        assert there.takes[1].clip is back.takes[0].clip
        assert (there.takes[0].label, back.takes[0].label) == ("Input", "Input")
        assert "swapped" in back.note and "swapped" not in there.note
    lengths = {len(x.takes[0].clip.samples_T) / RATE for x in music}
    assert lengths == {10.0, 8.0, 6.0, 4.0, 7.0, 3.0, 5.0}


def test_equal_loudness_only_turns_down(made):
    for example in made[1]:
        gains = examples.matched_gains_db(example.takes)
        assert max(gains) == 0.0
        levels = [
            loudness.loudness_lufs(
                (x.clip.samples_T / 2**15 * 10 ** (gain / 20))[:, None], x.clip.sample_rate
            )
            for x, gain in zip(example.takes, gains, strict=True)
        ]
        assert max(levels) - min(levels) < 0.05


def test_scenarios_take_the_most_annoying_and_the_most_usual():
    rng = np.random.default_rng(1)
    found = [
        scenarios.Voice(f"t{k}", np.zeros(4), float(a), float(b))
        for k, (a, b) in enumerate(rng.normal(size=(20, 2)))
    ]
    worst, usual = scenarios.choose(found, "bass_db", 4)
    least = min(x.bass_db for x in worst)
    assert sum(x.bass_db >= least for x in found) == 4
    assert not {x.talker for x in worst} & {x.talker for x in usual}
    few = scenarios.choose(found[:5], "sibilance_db", 4)
    assert [len(x) for x in few] == [2, 2]


def test_sibilance_and_bass_are_levels_of_bands():
    """Noise whose band is raised by 12 dB measures 12 dB more."""
    rng = np.random.default_rng(0)
    spectrum_F = np.fft.rfft(rng.standard_normal(5 * 44100))
    freq_hz_F = np.fft.rfftfreq(5 * 44100, 1 / 44100)
    for raised, against in (scenarios.SIBILANCE, scenarios.BASS):
        inside_F = (freq_hz_F > raised[0] / 1.13) & (freq_hz_F < raised[1] * 1.13)
        louder_F = spectrum_F * np.where(inside_F, 10 ** (12 / 20), 1.0)
        tilts = [
            scenarios._tilt_db(np.fft.irfft(x), 44100, raised, against)
            for x in (spectrum_F, louder_F)
        ]
        assert tilts[1] - tilts[0] == pytest.approx(12.0, abs=0.3)


def test_the_sweeps_variants_come_first_and_the_proposal_is_shown(runs):
    found = material.members([str(runs)])
    assert [x.variant for x in found] == ["db_mel_pm", "db_mel_bl", "linear_mel_bl"] * 2
    assert [x.raw for x in found] == [False] * 3 + [True] * 3
    shown = material.of_variants(found)
    assert list(shown) == list(material.TITLES) and not any(x.raw for x in shown.values())
    assert found[0].name == f"{runs.name}/variant/db_mel_pm/0"
    first = material.members([str(runs / "variant" / "linear_mel_bl" / "0")])
    assert [x.variant for x in first] == ["linear_mel_bl"]


def test_a_run_in_training_is_left_out_of_a_sweep_and_taken_by_itself(runs, tmp_path):
    half, whole = (tmp_path / "sweep" / "variant" / name / "0" for name in ("db_mel_pm", "other"))
    shutil.copytree(proposal(runs), half)
    (half / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    said: list[str] = []
    with pytest.raises(ValueError, match="no run there is finished"):
        material.members([str(tmp_path / "sweep")], said.append)
    assert len(said) == 1 and "1 steps of its training to go: left out" in said[0]
    assert [x.left for x in material.members([str(half)], said.append)] == [1]
    (half / "metrics.jsonl").unlink()  # one that has just begun
    assert [x.left for x in material.members([str(half)], said.append)] == [2]
    shutil.copytree(proposal(runs), whole)
    found = material.members([str(tmp_path / "sweep")], said.append)
    assert [(x.folder, x.left) for x in found] == [(whole, 0)]


def test_runs_of_two_sample_rates_are_not_compared(runs, configure, tmp_path):
    """Each hears at its own rate: the same samples would be another pitch to it."""
    other = tmp_path / "other" / "0"
    leave_run(other, configure(TINY | VARIANTS["db_mel_bl"] | {"data.sample_rate": 2 * RATE}))
    with pytest.raises(ValueError, match="runs of one sample rate can be compared, not"):
        material.members([str(proposal(runs)), str(other)])


def test_what_is_stored_is_shown_in_its_own_order(repo):
    """The ablation, the leaderboard and the errors against seconds of this repository."""
    results = findings.read_results(repo / "colab" / "results")
    board = results["benchmark_leaderboard"]
    shown = findings.leaderboard(board)
    methods = re.findall(r'<th scope="row">([^<]+)</th>', shown)
    assert methods == [row["method"] for row in board["leaderboard"]]
    assert methods[-1].startswith("oracle")
    assert findings.MARKS in shown and "~" not in shown.replace(findings.MARKS, "")
    asked = copy.deepcopy(board)
    asked["methods"][methods[0]]["scores"][board["headline"]] |= {"pairs": 2, "differing_pairs": 1}
    mean = board["leaderboard"][0]["figures"][board["headline"]]["mean"]
    assert f"{mean:.2f} (" in shown and re.search(
        rf"{mean:.2f} \([^<]+\)\*~<", findings.leaderboard(asked)
    )
    table = findings.ablation(results["ablation"])
    for factor, levels in results["ablation"]["tables"].items():
        assert (f"Factor: {factor}<" in table) == (len(levels) > 1)
    seconds = findings.error_against_seconds(results)
    assert "db_mel_pm_dev" in seconds and "pooled_mixed_dev" in seconds


def test_a_folder_of_exported_weights_is_taken_as_well(repo):
    found = material.members([str(repo / "colab" / "weights")])
    assert found[0].variant == "db_mel_pm" and found[0].name == "weights/db_mel_pm"
    assert {x.variant for x in found} == {"db_mel_pm", "db_mel_bl", "linear_mel_bl"}


def test_nullified_coefficients_are_counted_against_their_own_spread():
    latent_CM = np.array([[1.0, 0.5e-3, -0.5e-3, 0.0]])
    spread_CM = np.array([[1.0, 1.0, 0.1, 1.0]])
    facts = insights._facts(latent_CM, spread_CM)
    assert facts["nullified"] == "50.0 %" and facts["norm"] == "1"


def test_latents_are_drawn_pixel_by_pixel(tmp_path):
    values_CM = np.array([[0.0, 1.0, -1.0], [5.0, -5.0, 0.25]])
    (tmp_path / "a.png").write_bytes(drawing.latent_png(values_CM, 1.0))
    from matplotlib.image import imread

    pixels = np.round(255 * imread(tmp_path / "a.png")).astype(int)
    assert pixels.shape == (2, 3, 3)
    assert pixels[0, 0].min() > 235  # near white
    assert (pixels[0, 1] == pixels[1, 0]).all() and (pixels[0, 2] == pixels[1, 1]).all()
    assert pixels[0, 1, 0] > 150 > pixels[0, 1, 2] and pixels[0, 2, 2] > 120 > pixels[0, 2, 0]
    halfway = (pixels[0, 0] + pixels[0, 1]) / 2  # the root of a quarter
    np.testing.assert_allclose(pixels[1, 2], halfway, atol=1)


@pytest.mark.parametrize(
    ("low", "high", "ends"), [(-9.0, 9.0, (-10, 10)), (0.0, 3.7, (0, 4)), (2.0, 3.0, (2, 3))]
)
def test_axes_end_on_ticks_around_the_data(low, high, ends):
    axis = drawing.even_axis("x", low, high, steps=4)
    assert axis.low <= low and axis.high >= high
    assert (axis.ticks[0], axis.ticks[-1]) == (axis.low, axis.high)
    assert (axis.low, axis.high) == ends
    assert 2 <= len(axis.ticks) <= 8


def test_markup_escapes_whatever_is_not_markup():
    nasty = "</script><b a='\"'>&"
    made = markup.tag("p", nasty, [markup.tag("i", 3), None], title=nasty, hidden=True, lang=None)
    assert made == (
        '<p title="&lt;/script&gt;&lt;b a=&#x27;&quot;&#x27;&gt;&amp;" hidden>'
        "&lt;/script&gt;&lt;b a=&#x27;&quot;&#x27;&gt;&amp;<i>3</i></p>"
    )
    held = markup.data("x", {"a": nasty})
    inside = held[held.index(">") + 1 : held.rindex("</")]
    assert "<" not in inside and json.loads(inside) == {"a": nasty}


def test_distances_are_those_of_the_metrics(bursts):
    takes = [examples.take("Input", f"c{k}", bursts(k, 2.0, RATE), RATE) for k in (1, 2)]
    floats = [x.clip.samples_T / 2**15 for x in takes]
    expected = metrics.ltas_distance_db(*floats, RATE, kind="bands64")
    assert examples.distance_db(*takes) == pytest.approx(expected)


# ------------------------------------------------------------------------------ the command


def call(words: list[str], monkeypatch) -> tuple[int, str]:
    """Runs the command as its `__main__` does: exit code, and what it would end stderr with."""
    monkeypatch.setattr(sys, "argv", ["eqst.report", *words])
    monkeypatch.setattr(command, "keep_compiled", lambda: None)
    before = set(flags.FLAGS)
    try:
        command.start("eqst.report", report.define_flags, report.main)
        return 0, ""
    except SystemExit as end:
        return (end.code, "") if isinstance(end.code, int) else (1, str(end.code))
    finally:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def listing(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def test_mistakes_end_in_one_line_and_write_nothing(runs, given, tmp_path, monkeypatch):
    workdir, output = f"--workdir={runs}", f"--output={tmp_path / 'page'}"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    before = listing(tmp_path)
    cases = [
        ([output], "--workdir missing"),
        ([workdir], "--output missing"),
        (["--workdir=/nowhere", output], "is not a folder: give a run"),
        ([f"--workdir={tmp_path / 'empty'}", output], "holds no run"),
        ([workdir, "--output=/nowhere/page"], "no folder '/nowhere': create it"),
        ([workdir, f"--output={tmp_path / 'full'}", "--overwrite"], "are not such a page"),
        ([workdir, f"--output={tmp_path / 'file'}"], "is a file: name a folder"),
        ([workdir, output, "--music=/nowhere"], "--music=/nowhere is not a folder"),
        ([workdir, output, "--pairs=3"], "--pairs=3"),
        ([workdir, output, f"--music={given['results']}"], "has no audio file of 8 s or more"),
        ([workdir, output, f"--triples={given['music']}"], "name them so"),
        ([workdir, output, f"--data={given['results']}"], "no audio file"),
    ]
    for words, expected in cases:
        code, line = call([*words], monkeypatch)
        assert code == 1 and expected in line and len(line.splitlines()) == 1, (words, line)
        assert line.startswith("eqst.report: ")
    assert listing(tmp_path) == before


def test_a_page_is_replaced_only_when_asked_and_only_a_page(runs, made, tmp_path, monkeypatch):
    words = [
        f"--workdir={proposal(runs)}",
        f"--output={tmp_path / 'page'}",
        f"--pairs={PAIRS}",
        f"--results={tmp_path}",
    ]
    assert call(words, monkeypatch) == (0, "")
    assert "Frequency responses" in (tmp_path / "page" / site.INDEX).read_text()
    code, line = call(words, monkeypatch)
    assert code == 1 and "exists already" in line
    (tmp_path / "page" / "stale.txt").write_text("old")
    monkeypatch.setattr(report, "build", lambda *_: made)
    assert call([*words, "--overwrite"], monkeypatch) == (0, "")
    assert (tmp_path / "page" / site.INDEX).read_text() == made[0]
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    assert not (tmp_path / "page" / "stale.txt").exists()


def test_a_full_disk_leaves_the_old_page(made, tmp_path, monkeypatch):
    text, every, _ = made
    site.write_site(tmp_path / "page", text, every[:1], figures={"a": {"b": 1}}, overwrite=False)
    before = listing(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(site.soundfile, "write", full)
    with pytest.raises(OSError, match="No space"):
        site.write_site(tmp_path / "page", text, every, figures={}, overwrite=True)
    assert listing(tmp_path) == before
    assert (tmp_path / "page" / site.INDEX).read_text() == text


def test_the_model_shown_is_the_model_heard(runs, made):
    """Settings of the music examples are what the matcher of that run says of those clips."""
    from eqst import match

    run = material.members([str(proposal(runs))])[0]
    assert isinstance(run.run, trials.Run)
    matcher = match.Matcher.load(run.folder)
    example = next(x for x in made[1] if x.name.startswith("music"))
    floats = [x.clip.samples_T.astype(np.float32) / 2**15 for x in example.takes[:2]]
    expected = matcher.predict(*floats, RATE)
    assert example.found.bands == expected.bands
