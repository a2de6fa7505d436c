"""The wheel: what it holds, and that it works alone, in an environment made for it.

The environment is what `pip install eqst` gives, at the pinned versions: no extras, no clone. Some
600 MB come from the registry, or from pip's cache.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import numpy as np
import pytest
import soundfile

from eqst import biquad, eq, render, settings

pytestmark = pytest.mark.long

# What pip says where the registry cannot be reached.
OFFLINE = ("NewConnectionError", "Failed to establish a new connection", "name resolution")


def clean_environment() -> dict[str, str]:
    """This process's, without what would lead Python to the clone."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def pip(python: str | Path, *arguments: str | Path) -> None:
    """Runs pip; skips where there is no registry, fails with its last lines where it fails."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    text = done.stdout + done.stderr
    if done.returncode != 0 and any(sign in text for sign in OFFLINE):
        pytest.skip("the package registry cannot be reached")
    assert done.returncode == 0, text[-3000:]


@pytest.fixture(scope="module")
def wheel(repo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--wheel-dir", folder, repo)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(repo: Path, wheel: Path) -> Iterator[Path]:
    """The Python of a fresh environment that holds the wheel and what it depends on."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own would keep 1.5 GB, three times
        command = [sys.executable, "-m", "venv", folder]
        subprocess.run(command, check=True, env=clean_environment())
        python = Path(folder, "bin", "python")
        pip(python, "install", "--constraint", repo / "launch" / "constraints.txt", wheel)
        yield python


def test_it_holds_the_package_and_nothing_else(repo: Path, wheel: Path) -> None:
    if not (repo / ".git").exists():
        pytest.skip("not a git clone: there is no list of the package's files")
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "eqst"]
    done = subprocess.run(listing, cwd=repo, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        metadata = message_from_bytes(archive.read("eqst-0.1.0.dist-info/METADATA"))
    own = {f"eqst-0.1.0.dist-info/{x}" for x in ("METADATA", "WHEEL", "RECORD")}
    assert names == set(done.stdout.split()) | own | {"eqst-0.1.0.dist-info/licenses/eqst/LICENSE"}
    needed = {"LICENSE", "py.typed", "match.py", "weights/default.json", "weights/default.npz"}
    assert {f"eqst/{x}" for x in needed} <= names

    wanted = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["dependencies"]
    plain = [x for x in metadata.get_all("Requires-Dist") if "extra ==" not in x]
    assert len(plain) == len(wanted)
    assert not [x for x in plain if x.startswith(("tensorflow", "matplotlib", "pytest"))]
    assert metadata["License-Expression"] == "Apache-2.0"


FACTS = """
import importlib.util, json, sys
import soundfile
import eqst
from eqst import synthetic

extras = ("tensorflow", "tensorflow_datasets", "array_record", "matplotlib", "pytest")
found = [name for name in extras if importlib.util.find_spec(name)]
for talker, name in enumerate(("input", "reference")):
    samples_T = synthetic.synthesise(2**31, talker, 5.0)
    soundfile.write(f"{name}.wav", samples_T, 44100, "PCM_16")
print(json.dumps({"file": eqst.__file__, "prefix": sys.prefix, "extras": found}))
"""


def test_it_matches_two_files_alone(installed: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        done = subprocess.run(
            [str(installed), "-W", "error", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=clean_environment(),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    facts = json.loads(run("-c", FACTS).splitlines()[-1])
    assert Path(facts["file"]).is_relative_to(facts["prefix"])
    assert Path(facts["file"]).parts[-3:] == ("site-packages", "eqst", "__init__.py")
    assert facts["extras"] == []

    files = ("--input=input.wav", "--reference=reference.wav", "--output=output.wav")
    run("-m", "eqst.match", *files, "--settings=settings.json")
    names = {"input.wav", "reference.wav", "output.wav", "settings.json"}
    assert {path.name for path in tmp_path.iterdir()} == names

    content = json.loads((tmp_path / "settings.json").read_text())
    assert set(content) == {"sample_rate", "preamp_db", "bands"}
    assert content["sample_rate"] == 44100 and -10 < content["preamp_db"] <= 0
    assert [band["type"] for band in content["bands"]] == list(eq.KINDS)
    assert any(abs(band["gain_db"]) > 0.1 for band in content["bands"])  # trained weights
    for band, bounds in zip(content["bands"], eq.PAPER.bands, strict=True):
        assert bounds.freq_low_hz <= band["frequency_hz"] <= bounds.freq_high_hz

    # The audio is the input through what the file of settings says, to a step of its 16 bits.
    found = settings.load(tmp_path / "settings.json")
    sos_K6 = biquad.sos(*found.params, kinds=eq.KINDS, sample_rate=44100)
    input_T, _ = soundfile.read(tmp_path / "input.wav")
    output_T, rate = soundfile.read(tmp_path / "output.wav")
    expected_T = render.render(input_T, sos_K6) * 10 ** (found.preamp_db / 20)
    assert rate == 44100 and soundfile.info(tmp_path / "output.wav").subtype == "PCM_16"
    np.testing.assert_allclose(output_T, expected_T, rtol=1e-4, atol=1.01 / 2**16)
