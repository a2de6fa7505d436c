"""The page in a real browser, from its folder: what loads, sounds, answers keys, and can be read.

The site is of made-up examples (tones, whose clicks can be told from their own slope) through the
very modules that write the page. Needs the distribution's Chromium, which launch/test.sh --all
installs where it may; driven by playwright.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eqst import biquad, eq, settings
from eqst.webpage import examples, findings, insights, page, site
from eqst.webpage.markup import tag

RATE = 44100
TONE_HZ, TONE_RMS_PEAK = 100.0, 0.4
SLOPE = TONE_RMS_PEAK * 2 * np.pi * TONE_HZ / RATE  # largest step of the tone's own
NASTY = 'a "b" <script>alert(1)</script> & \u2028 </title>'


def settings_of(rng: np.random.Generator, count: int) -> eq.EqParams:
    return eq.from_unit(eq.PAPER, rng.uniform(0.2, 0.8, (count, 4, 3)))


def tone(seconds: float, phase: float = 0.0) -> np.ndarray:
    return TONE_RMS_PEAK * np.sin(
        2 * np.pi * TONE_HZ * np.arange(round(seconds * RATE)) / RATE + phase
    )


def example(name: str, title: str, sound_T: np.ndarray, other_T: np.ndarray) -> examples.Example:
    heard = examples.take("Input", f"{name}-input", sound_T, RATE)
    params = examples.one(settings_of(np.random.default_rng(len(name)), 1), 0)
    takes = (
        heard,
        examples.take("Reference", f"{name}-reference", other_T, RATE),
        examples.equalised("Processed", f"{name}-processed", heard.clip, params),
    )
    return examples.Example(name, title, f"A note of {NASTY}.", takes, takes[2].settings)


def held_out(count: int) -> examples.Test:
    rng = np.random.default_rng(3)
    audio_nT = rng.standard_normal((count, RATE)).astype(np.float32)
    true, predicted = settings_of(rng, count), settings_of(rng, count)
    error = rng.uniform(0.5, 5.0, count)
    lufs = np.full((count, 2), -20.0)
    return examples.Test(
        1.0, audio_nT, audio_nT, true, predicted, error, lufs, (NASTY,) * count, RATE
    )


def ablation() -> dict:
    interval = {"mean": 2.1, "low": 1.9, "high": 2.3}
    base = {"level": "grid", "base": True, "seeds": 5, "figures": {"plain 3 s": interval}}
    change = {"mean": -0.1, "low": -0.2, "high": 0.05, "p": 0.2}
    other = base | {"level": NASTY, "base": False, "differences": {"plain 3 s": change}}
    return {
        "columns": ["plain 3 s"],
        "budget": "4,000 steps",
        "data": "synthetic",
        "tables": {"head": [base, other]},
    }


def evaluated() -> dict:
    def row(mean: float) -> dict:
        return {"shape_rmse_db": {"mean": mean, "low": mean - 0.2, "high": mean + 0.2}}

    lengths = {"1 s": 3.0, "3 s": 2.0, "10 s": 1.5}
    by_length = {
        x: {"model": row(y), "do_nothing": row(3.8), "bayes": row(y)} for x, y in lengths.items()
    }
    return {"figures": {"plain": by_length, "coloured": by_length}}


def board() -> dict:
    figures = {"speech": {"mean": 2.0, "low": 1.8, "high": 2.2}}
    row = {"method": NASTY, "kind": "model", "figures": figures, "seconds_per_pair": 0.02}
    score = {"pairs": 100, "differing_pairs": 0}
    return {
        "headline": "speech",
        "tasks": [{"name": "speech", "about": NASTY, "pairs": 100}],
        "leaderboard": [row],
        "methods": {NASTY: {"scores": {"speech": score}}},
    }


def whole_page() -> tuple[str, list[examples.Example]]:
    rng = np.random.default_rng(0)
    noise_T = 0.05 * rng.standard_normal(2 * RATE)
    every = [
        example("tone", f"Tone {NASTY}", tone(2.0), tone(1.5, 1.0)),
        example("noise", "Noise", noise_T, noise_T[::-1]),
    ]
    made = held_out(8)
    latents = [tuple(rng.standard_normal((20, 128)) for _ in range(3)) for _ in range(4)]
    view = insights.View("Baseline model", latents, (np.ones((20, 128)),) * 3)
    verdict = {"claim": 1, "text": NASTY, "statistic": "3 %", "verdict": "partly", "why": "so"}
    metrics = {
        "a run": [{"step": 10 * k, "shape_db": 4.0 / k, "valid_shape_db": 5.0 / k} for k in (1, 2)]
    }
    parts = [
        ("responses", "Frequency responses", findings.responses(made, range(8))),
        ("examples", "Audio examples", tag("div", page.HINT, page.listening("Tones", every))),
        ("latents", "Latent business", insights.business([view], made, [0, 1, 2, 3])),
        ("claims", "Claims", insights.judged([verdict])),
        ("ablation", "Ablation", findings.ablation(ablation())),
        ("benchmark", "Benchmark", findings.leaderboard(board())),
        (
            "seconds",
            "Error against seconds",
            findings.error_against_seconds({"db_mel_pm": evaluated()}),
        ),
        ("training", "Training", findings.training(metrics)),
    ]
    facts = [("Model", NASTY)]
    return page.document(lede=tag("p", NASTY), facts=facts, parts=parts, examples=every), every


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("site") / "page"
    text, every = whole_page()
    site.write_site(output, text, every, figures={}, overwrite=False)
    return output


@pytest.fixture
def open_page(browser, folder):
    """A function (options of a context) -> the page, opened; in the end nothing went wrong."""
    opened, wrong = [], []

    def watch(shown) -> None:
        shown.on("console", lambda x: wrong.append(x.text) if x.type == "error" else None)
        shown.on("pageerror", lambda x: wrong.append(str(x)))
        allowed = ("file:", "data:", "blob:")
        shown.on("request", lambda x: None if x.url.startswith(allowed) else wrong.append(x.url))

    def make(**options):
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | options))
        opened.append(context)
        shown = context.new_page()
        watch(shown)
        shown.goto((folder / site.INDEX).as_uri())
        return shown

    yield make
    for context in opened:
        context.close()
    assert wrong == []


def until(shown, expression: str) -> None:
    """Waits for a JavaScript expression; playwright's own waiting would need eval in the page."""
    for _ in range(200):
        if shown.evaluate(expression):
            return
        shown.wait_for_timeout(50)
    raise AssertionError(f"never true: {expression}")


def group(shown, name: str = "tone"):
    return shown.locator(f'fieldset[data-example="{name}"]')


PLAY_ALL = """async () => {
  const times = [];
  for (const audio of document.querySelectorAll("audio")) {
    audio.muted = true;
    if (audio.readyState < 3) {
      const ready = new Promise((resolve, reject) => {
        audio.oncanplay = resolve;
        audio.onerror = () => reject(new Error(audio.src));
      });
      audio.preload = "auto";
      await ready;
    }
    await audio.play();
    await new Promise((resolve) => {
      audio.ontimeupdate = () => audio.currentTime > 0 && resolve();
    });
    times.push([audio.duration, audio.getAttribute("aria-label")]);
    audio.pause();
  }
  return times;
}"""

# What a screen reader calls players, landmarks and groups.
NAMES = """() => ["audio", "[role=region], section[aria-labelledby]", "fieldset.compare"].map(
  (selector) => Array.from(document.querySelectorAll(selector)).map((x) =>
    x.getAttribute("aria-label")
    || (document.getElementById(x.getAttribute("aria-labelledby")) || x.querySelector("legend"))
      .textContent))"""


def test_every_player_loads_and_plays(open_page):
    shown = open_page()
    played = shown.evaluate(PLAY_ALL)
    assert [round(x[0], 2) for x in played] == [2.0, 1.5, 2.0, 2.0, 2.0, 2.0]
    for names in shown.evaluate(NAMES):
        assert names and len(set(names)) == len(names)


def test_what_the_page_renders_is_what_scipy_renders(open_page, folder):
    """The spectrum of an impulse-like noise through the page's filters, to 1e-4 dB of float64."""
    shown = open_page()
    found = shown.evaluate(
        "EQST.samplesOf(EQST.groups.noise).then((x) => x.map((y) => Array.from(y)))"
    )
    files = [f"noise-{x}" for x in ("input", "reference", "processed")]
    for name, samples in zip(files, found, strict=True):
        written_T, rate = soundfile.read(folder / "audio" / f"{name}.flac")
        assert rate == RATE
        np.testing.assert_allclose(
            samples, written_T, atol=1.6 / 2**15
        )  # decoders scale by 2^15 or 2^15 - 1
    facts = shown.evaluate("EQST.groups.noise")
    bands = facts["settings"]["bands"]
    values = [np.array([band[key] for band in bands]) for key in ("frequency_hz", "gain_db", "q")]
    np.testing.assert_array_equal(
        facts["takes"][2]["sos"], biquad.sos(*values, kinds=eq.KINDS, sample_rate=RATE)
    )
    from scipy.signal import sosfilt

    gain = 10 ** (facts["takes"][2]["preamp_db"] / 20)
    expected_T = gain * sosfilt(np.array(facts["takes"][2]["sos"]), np.array(found[0]))
    difference = np.abs(np.fft.rfft(found[2]) - np.fft.rfft(expected_T))
    assert 8.686 * np.max(difference / np.median(np.abs(np.fft.rfft(expected_T)))) < 1e-3
    level_db = 20 * np.log10(np.linalg.norm(found[2]) / np.linalg.norm(expected_T))
    assert abs(level_db) < 1e-4


# Runs on the audio thread, so that a busy machine cannot tear what it measures.
TAP = """
class Tap extends AudioWorkletProcessor {
  constructor() {
    super();
    this.last = 0; this.jump = 0; this.peak = 0;
    this.port.onmessage = () => {
      this.port.postMessage([this.jump, this.peak]);
      this.jump = 0; this.peak = 0;
    };
  }
  process(inputs) {
    for (const value of inputs[0][0] || []) {
      this.jump = Math.max(this.jump, Math.abs(value - this.last));
      this.peak = Math.max(this.peak, Math.abs(value));
      this.last = value;
    }
    return true;
  }
}
registerProcessor("tap", Tap);
"""


def test_switching_makes_no_click_and_keeps_the_loudness(open_page):
    shown = open_page(bypass_csp=True)  # for the worklet that listens, not for the page
    here = group(shown)
    here.locator(".play").click()
    until(shown, "EQST.contexts.size > 0 && document.querySelector('.play[data-running=true]')")
    shown.evaluate(
        """async (code) => {
          const {context, output} = EQST.contexts.get(44100);
          await context.audioWorklet.addModule("data:text/javascript," + encodeURIComponent(code));
          window.tap = new AudioWorkletNode(context, "tap");
          output.connect(window.tap).connect(context.destination);
          window.ask = () => new Promise((resolve) => {
            window.tap.port.onmessage = (event) => resolve(event.data);
            window.tap.port.postMessage(0);
          });
        }""",
        TAP,
    )
    facts = shown.evaluate("EQST.groups.tone.takes")
    peaks, quietest = [], min(x["match_db"] for x in facts)
    assert max(x["match_db"] for x in facts) == 0.0 > quietest
    for number in (1, 2, 3):
        shown.keyboard.press(str(number))
        shown.wait_for_timeout(150)
        shown.evaluate("ask()")
        shown.wait_for_timeout(250)
        peaks.append(shown.evaluate("ask()")[1])
    assert max(peaks) / min(peaks) < 1.05  # tones of one frequency: as loud is as high
    shown.evaluate("ask()")
    for step in range(40):  # slow and fast, some within the ramp of the one before
        shown.keyboard.press(str(1 + step % 3))
        shown.wait_for_timeout(5 if step % 4 else 60)
    here.locator("input[type=checkbox]").click()
    here.locator(".play").focus()
    seek = here.locator("input[type=range]")
    for key in ("ArrowRight", "ArrowLeft"):
        shown.keyboard.press(key)
        shown.wait_for_timeout(80)
    for step in range(24):  # dragged, and switched before the dragged-to place has begun
        seek.evaluate(
            "(x, at) => { x.value = at; x.dispatchEvent(new Event('input')); }", 0.2 + 0.05 * step
        )
        if step % 5 == 0:
            shown.keyboard.press(str(1 + step % 3))
        shown.wait_for_timeout(10)
    jump, peak = shown.evaluate("ask()")
    alone = []
    for _ in range(2):  # the second time, the one that is chosen is told again to be heard alone
        shown.wait_for_timeout(300)
        shown.evaluate("ask()")
        shown.wait_for_timeout(250)
        alone.append(shown.evaluate("ask()")[1])
        shown.keyboard.press(str(1 + 20 % 3))
    assert alone[0] == pytest.approx(alone[1], rel=0.02) and alone[0] > 0.05
    loudest = max(1.0, *(10 ** (x["match_db"] / 20) for x in facts)) * 10 ** (1 / 20)
    assert peak > 0.1
    assert jump < 1.25 * SLOPE * max(loudest, peak / TONE_RMS_PEAK), (jump, SLOPE, peak)
    shown.keyboard.press("Space")
    shown.wait_for_timeout(300)
    shown.evaluate("ask()")
    shown.wait_for_timeout(100)
    assert shown.evaluate("ask()")[1] == 0.0


def test_keys_play_switch_and_move(open_page):
    shown = open_page()
    here = group(shown)
    play, seek, said = (
        here.locator(".play"),
        here.locator("input[type=range]"),
        here.locator("output"),
    )
    play.focus()
    shown.keyboard.press("Space")
    until(shown, "document.querySelector('.play').dataset.running === 'true'")
    assert play.inner_text() == "Pause" and said.inner_text().startswith("Input")
    shown.keyboard.press("3")
    assert said.inner_text().startswith("Processed")
    assert here.locator("input[type=radio]").nth(2).is_checked()
    shown.keyboard.press("Space")
    assert play.get_attribute("data-running") == "false"
    before = float(seek.input_value())
    shown.keyboard.press("ArrowRight")
    expected = min(before + 1.0, 1.99)
    assert float(seek.input_value()) == pytest.approx(expected, abs=0.02)
    assert seek.get_attribute("aria-valuetext") == f"{expected:.1f} of 2.0 seconds"
    here.locator("input[type=radio]").nth(2).focus()
    shown.keyboard.press("ArrowLeft")  # among the takes arrows choose
    assert here.locator("input[type=radio]").nth(1).is_checked()
    assert said.inner_text().startswith("Reference")
    shown.keyboard.press("9")  # there is no ninth
    assert here.locator("input[type=radio]").nth(1).is_checked()
    other = group(shown, "noise")
    play.click()
    other.locator(".play").click()  # one at a time
    until(shown, "document.querySelectorAll('.play[data-running=true]').length === 1")
    assert play.get_attribute("data-running") == "false"


def test_settings_are_copied_and_processed_audio_is_saved(open_page, folder):
    shown = open_page(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    here = shown.locator("#tone")
    here.locator("summary").click()
    here.get_by_role("button", name="Copy as text").click()
    until(shown, "document.querySelector('#tone .copy').textContent === 'Copied'")
    facts = shown.evaluate("EQST.groups.tone.settings")
    lines = shown.evaluate("navigator.clipboard.readText()").splitlines()
    bands = tuple(settings.Band(**band) for band in facts["bands"])
    safe_db = settings.safe_preamp_db(settings.Settings(44_100, 0.0, bands))
    assert lines[0] == "# for 44100 Hz" and lines[1] == f"Preamp: {safe_db:.4f} dB"
    words = lines[2].split()
    assert words[:4] == ["Filter", "1:", "ON", "LSC"] and len(lines) == 6
    assert float(words[5]) == facts["bands"][0]["frequency_hz"]
    here.get_by_role("button", name="Copy as JSON").click()
    until(shown, "document.querySelectorAll('#tone .copy')[1].textContent === 'Copied'")
    assert json.loads(shown.evaluate("navigator.clipboard.readText()")) == facts
    with shown.expect_download() as waiting:
        here.get_by_role("button", name="Download").click()
    assert waiting.value.suggested_filename == "tone-processed.wav"
    saved_T, rate = soundfile.read(io.BytesIO(Path(waiting.value.path()).read_bytes()))
    written_T, _ = soundfile.read(folder / "audio" / "tone-processed.flac")
    assert rate == RATE
    np.testing.assert_allclose(saved_T, written_T, atol=2.1 / 2**15)


def test_every_figure_says_what_it_shows_in_numbers(open_page):
    shown = open_page()
    figures = shown.evaluate(
        """() => Array.from(document.querySelectorAll("svg[role=img]")).map((x) =>
          x.getAttribute("aria-labelledby").split(" ")
            .map((id) => document.getElementById(id).textContent))"""
    )
    assert len(figures) == 8 * 5 + 2 + 1
    assert all(title.strip() and any(c.isdigit() for c in words) for title, words in figures)
    unnamed = shown.evaluate(
        """() => Array.from(document.querySelectorAll("svg")).filter((x) =>
          x.getAttribute("role") !== "img" && x.getAttribute("aria-hidden") !== "true").length"""
    )
    assert unnamed == 0
    images = shown.evaluate(
        """() => Array.from(document.querySelectorAll("img")).map((x) =>
          [x.alt, x.getAttribute("aria-hidden"), x.complete && x.naturalWidth])"""
    )
    assert len(images) == 13
    assert all(hidden or ("norm" in alt and "nullified" in alt) for alt, hidden, _ in images)
    with_data = shown.evaluate(
        """() => Array.from(document.querySelectorAll(".example-figure, figure.training"))
          .every((x) => x.querySelector("details table tbody tr"))"""
    )
    assert with_data
    structure = shown.evaluate(
        """() => {
          const ids = Array.from(document.querySelectorAll("[id]")).map((x) => x.id);
          const headings = Array.from(document.querySelectorAll("h1,h2,h3,h4"));
          const levels = headings.map((x) => +x.tagName[1]);
          const broken = Array.from(document.querySelectorAll('a[href^="#"]'))
            .filter((x) => !document.getElementById(x.getAttribute("href").slice(1))).length;
          const lang = document.documentElement.lang;
          return {same: ids.length - new Set(ids).size, levels, broken, lang};
        }"""
    )
    levels = structure.pop("levels")
    assert structure == {"same": 0, "broken": 0, "lang": "en"}
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.className") == "skip"
    shown.keyboard.press("Enter")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.getElementById('main').contains(document.activeElement)")


def test_names_are_shown_as_they_are(open_page):
    shown = open_page()
    assert NASTY.replace("\u2028", " ") in shown.locator("dd").first.inner_text().replace(
        "\u2028", " "
    )
    assert shown.evaluate("document.querySelectorAll('main script').length") == 0


# Contrast of WCAG 2.2 of every text against the background behind it, and the smallest of all.
CONTRAST = """() => {
  const parse = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (x) => {
    for (; x; x = x.parentElement) {
      const c = parse(getComputedStyle(x).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
  };
  const worst = {text: [99], line: [99]};
  const judge = (kind, x, colour) => {
    const [a, b] = [light(parse(colour)), light(behind(x))].sort((p, q) => q - p);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[kind][0]) worst[kind] = [ratio, x.outerHTML.slice(0, 120)];
  };
  document.querySelectorAll("details").forEach((x) => { x.open = true; });
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const x = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim()) continue;
    if (x.closest("script, noscript, title, desc")) continue;
    const style = getComputedStyle(x);
    judge("text", x, x.closest("svg") ? style.fill : style.color);
  }
  const lines = document.querySelectorAll("svg .line");
  lines.forEach((x) => judge("line", x, getComputedStyle(x).stroke));
  return worst;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out(open_page, scheme):
    shown = open_page(color_scheme=scheme)
    worst = shown.evaluate(CONTRAST)
    assert worst["text"][0] >= 4.5, worst
    assert worst["line"][0] >= 3.0, worst
    dark = sum(
        map(int, shown.evaluate("getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)"))
    )
    assert (dark < 200) == (scheme == "dark")


@pytest.mark.parametrize("width", [320, 360, 800, 1500])
def test_no_width_scrolls_sideways(open_page, width):
    shown = open_page(viewport={"width": width, "height": 800})
    shown.evaluate("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
    wide = shown.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert wide[0] <= wide[1]
    small = shown.evaluate(
        """() => Array.from(document.querySelectorAll("svg[role=img]")).map((x) =>
          13 * x.getBoundingClientRect().width / x.viewBox.baseVal.width)"""
    )
    assert min(small) >= 10.0
    targets = shown.evaluate(
        """() => Array.from(document.querySelectorAll("button, fieldset label, summary, nav a"))
          .map((x) => [x.getBoundingClientRect().height, x.outerHTML.slice(0, 80)])
          .sort((a, b) => a[0] - b[0])[0]"""
    )
    assert targets[0] >= 24, targets


def test_paper_gets_everything_but_the_players(open_page):
    shown = open_page(reduced_motion="reduce")
    assert shown.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    shown.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    shown.emulate_media(media="print", color_scheme="dark")
    assert shown.locator("details:not([open])").count() == 0
    assert not shown.locator("audio").first.is_visible() and not group(shown).is_visible()
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ink = shown.evaluate(
        "getComputedStyle(document.querySelector('h1')).color.match(/[0-9]+/g).map(Number)"
    )
    assert max(ink[:3]) < 60
    shown.evaluate("window.dispatchEvent(new Event('afterprint'))")
    assert shown.locator("details[open]").count() == 0
    assert len(shown.pdf()) > 10_000


def test_it_reads_without_scripts(open_page):
    shown = open_page(java_script_enabled=False)
    assert shown.locator("noscript").count() == 1
    assert not group(shown).is_visible() and shown.locator("audio").first.is_visible()
