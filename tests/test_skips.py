"""The plugin that turns unexpected skips into failures, run by a pytest of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

CASES = {
    "test_module.py": "import pytest\npytest.importorskip('no_such_module')\n",
    "test_cases.py": """
import pytest

@pytest.fixture
def recordings():
    pytest.skip("no recordings")

@pytest.mark.skipif(True, reason="of another platform")
def test_marked(): ...

def test_fixture(recordings): ...

def test_inside():
    pytest.skip("in its body")

def test_expected():
    pytest.skip("needs an accelerator: this is a CPU")

@pytest.mark.xfail(reason="known")
def test_known():
    raise AssertionError

def test_good(): ...
""",
}


@pytest.mark.parametrize(
    "workers, strict", [((), False), ((), True), (("-n", "2", "--dist=loadfile"), True)]
)
def test_unexpected_skips_fail(
    tmp_path: Path, repo: Path, workers: tuple[str, ...], strict: bool, monkeypatch
) -> None:
    for name, text in CASES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(repo / "tests"))
    monkeypatch.setenv("EQST_NO_SKIPS", "1" if strict else "")
    # A file that cannot be collected keeps the others from running only where there are no workers.
    options = ["-p", "skips", "-c", "/dev/null", "--continue-on-collection-errors", *workers]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    summary = done.stdout.splitlines()[-1]
    if not strict:
        assert done.returncode == 0, done.stdout
        assert "1 passed, 5 skipped, 1 xfailed" in summary
        return
    assert done.returncode == 1, done.stdout
    # pytest calls what fails before a test's body an error: a module, a marker, a fixture.
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 3 errors" in summary
    reasons = ("could not import", "of another platform", "no recordings", "in its body")
    for reason in reasons:
        assert f"unexpected skip (EQST_NO_SKIPS is set): {reason}" in done.stdout
