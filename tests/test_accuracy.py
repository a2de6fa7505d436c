"""`python -m eqst.accuracy` on few bands: its limits are kept, and it notices what does not."""

import json
import subprocess
import sys

import numpy as np
import pytest

from eqst import accuracy


@pytest.mark.parametrize(
    "section", [accuracy.float32_responses, accuracy.float64_coefficients, accuracy.gradients]
)
def test_sections_keep_their_limits(section, monkeypatch):
    monkeypatch.setattr(accuracy, "RATES", (44100,))
    rows = section(1000, 1)
    assert len(rows) >= 3 and all(accuracy.passes(row) for row in rows)


def test_rows_fail_above_their_limit_and_on_nan():
    def row(worst, limit):
        return {"what": "x", "worst": worst, "limit": limit, "unit": "dB"}

    assert accuracy.passes(row(1.0, 1.0)) and accuracy.passes(row(9.0, None))
    assert not accuracy.passes(row(1.1, 1.0)) and not accuracy.passes(row(np.nan, 1.0))
    assert "FAILS" in accuracy.table({"one": [row(2.0, 1.0)]})


@pytest.mark.long
def test_command_writes_its_report(tmp_path):
    output = tmp_path / "new"
    command = [sys.executable, "-m", "eqst.accuracy", f"--output={output}", "--bands=20"]
    done = subprocess.run(
        [*command, "--section=float32_responses"], capture_output=True, text=True, check=True
    )
    report = json.loads((output / "accuracy.json").read_text())
    rows = report["sections"]["float32_responses"]
    assert report["bands"] == 20 and len(rows) == 18
    assert all(0 < row["worst"] <= 5e-5 for row in rows)
    assert "peaking at 44100 Hz" in done.stdout
