"""Settings every test shares. JAX must be configured before anything starts a backend."""

import os
from pathlib import Path

# The suite is for CPU unless a person says otherwise; child processes inherit these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow greets in capitals otherwise

import jax

jax.config.update("jax_num_cpu_devices", 4)  # so that shardings mean something
jax.config.update("jax_numpy_rank_promotion", "raise")  # [B] + [B, F] is always a mistake here

import pytest  # noqa: E402 (the lines above come first on purpose)

REPO = Path(__file__).resolve().parents[1]
LONG_TIMEOUT_SECONDS = 1200


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests get a longer limit unless they name their own."""
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_SECONDS))
