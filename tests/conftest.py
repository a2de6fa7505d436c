"""Settings every test shares. JAX must be configured before anything starts a backend."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# The suite is for CPU unless a person says otherwise; child processes inherit these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets in capitals otherwise

# Much of the suite's time is compilation, and much of it of the same programs. Each worker keeps
# its own: JAX does not lock these files.
COMPILED = tempfile.mkdtemp(prefix="eqst-tests-compiled-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import bucket as buckets  # noqa: E402 (tests/bucket.py)
import jax  # noqa: E402 (the lines above come first on purpose)

jax.config.update("jax_num_cpu_devices", 4)  # so that shardings mean something
jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] + [B, F] is always a mistake here

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import skips  # noqa: E402 (tests/skips.py)
from scipy.signal import lfilter  # noqa: E402

from eqst import audio, config, corpus  # noqa: E402

REPO = Path(__file__).resolve().parents[1]
LONG_TIMEOUT_SECONDS = 1200

# Files go to the workers whole and in this order, so that none is left with a long one at the end.
SLOWEST_FIRST = (
    "test_processes",
    "test_slurm_real",
    "test_interruption",
    "test_recipes",
    "test_train",
    "test_notebooks",
    "test_sweep",
    "test_report",
    "test_tasks",
    "test_benchmark",
    "test_evaluate",
    "test_bayes",
    "test_storage",
    "test_replicas",
    "test_units",
    "test_shared_corpus",
    "test_calls",
    "test_speed",
)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The repository's root."""
    return REPO


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real recordings, beside the clone or at $EQST_SHARED; skips where there are none."""
    folder = Path(os.environ["EQST_SHARED"]) if "EQST_SHARED" in os.environ else None
    if folder is None:
        folder = REPO.parent / "shared" / "data"
    if not (folder / "manifest.csv").is_file():
        pytest.skip(f"no real recordings: {folder}/manifest.csv is absent (set EQST_SHARED)")
    return folder


@pytest.fixture(scope="session")
def configure():
    """A function from dotted settings to a checked Config: configure({"train.steps": 5})."""

    def make(changes: dict) -> config.Config:
        values = config.as_dict(config.Config())
        for key, value in changes.items():
            *groups, name = key.split(".")
            group = values
            for part in groups:
                group = group[part]
            assert name in group, key
            group[name] = value
        return config.from_dict(values)

    return make


@pytest.fixture(scope="session")
def bursts():
    """A function (seed, seconds, rate) -> [T] float32: noise with a slope, in bursts and pauses."""

    def make(seed: int, seconds: float, rate: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        samples = round(seconds * rate)
        noise_T = lfilter([1.0], [1.0, -0.9], rng.standard_normal(samples))
        level = rng.choice([0.0, 0.05, 0.4, 1.0], size=samples // (rate // 4) + 2)
        times = np.arange(samples) / (rate // 4)
        envelope_T = np.interp(times, np.arange(len(level)), level)
        floor_T = 1e-5 * rng.standard_normal(samples)
        return (0.05 * noise_T * envelope_T + floor_T).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def corpus_of():
    """A function (sounds, rate) -> Corpus in memory, made without eqst's stores."""

    def make(sounds: list[np.ndarray], rate: int) -> corpus.Corpus:
        powers, gains, pieces = [], [], []
        for samples_T in sounds:
            power_J = audio.k_weighted_power(samples_T[:, None], rate)
            gain = 10.0 ** ((-23.0 - audio.gated_loudness_lufs(power_J)) / 20.0)
            powers.append(power_J * gain**2)
            gains.append(gain)
            pieces.append(np.round(samples_T * 32768.0).astype(np.int16))
        length_R = np.array([len(x) for x in pieces], np.int64)
        return corpus.Corpus(
            sample_rate=rate,
            talker_R=tuple(f"talker{i}" for i in range(len(sounds))),
            store_R=np.zeros(len(sounds), np.int32),
            start_R=np.concatenate([[0], np.cumsum(length_R)[:-1]]),
            length_R=length_R,
            gain_R=np.array(gains, np.float32),
            weight_R=np.full(len(sounds), 1.0 / len(sounds)),
            power_R=tuple(powers),
            samples=(np.concatenate(pieces),),
        )

    return make


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[str], Path]]:
    """A function from mount options to a small disk; called again it changes the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        options = f"remount,{options}" if mounted else options
        words = ["mount", "-t", "tmpfs", "-o", options, "eqst-test", str(folder)]
        try:
            subprocess.run(words, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("needs root to mount a small disk")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> buckets.Bucket:
    """A bucket that is a folder, in place of what gs:// leads to."""

    def put(owner, name, value):
        by_item = isinstance(owner, dict)
        (monkeypatch.setitem if by_item else monkeypatch.setattr)(owner, name, value)

    made = buckets.install(tmp_path / "cloud", put)
    buckets.arrays_in_npz(put)
    return made


@pytest.fixture(scope="module")
def browser():
    """A Chromium of the machine, driven by playwright; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs a browser: install the distribution's chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright (extra [dev]) is missing")
    with api.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield launched
        launched.close()


def pytest_configure(config: pytest.Config) -> None:
    """The plugin that fails skips is ours to register: it lies beside this file."""
    config.pluginmanager.register(skips)


def pytest_unconfigure() -> None:
    """The end of a worker."""
    shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slowest files come first; long tests get a longer limit unless they name their own."""
    rank = {name: i - len(SLOWEST_FIRST) for i, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: rank[item.path.stem] if item.path.stem in rank else 0)
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_SECONDS))
