"""The comparison of speeds runs, whatever rivals are installed, and says what it measured; times
are nobody's business here."""

import json
import sys

import numpy as np
import pytest

from eqst import charts, eq, rivals, scaling, speed, throughput
from eqst.timing import Size, in_turns, process, target, timings

TINY = Size(
    rounds=2, equalisers=2, batch=2, talkers=2, steps=3, file_seconds=11.0, hour_seconds=60,
    devices=2, members=2, device_batches=(2, 4), device_steps=2,
)  # fmt: skip


def test_timings_are_in_turns_and_relative_to_the_first():
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    seconds = in_turns(functions, 2, settle_seconds=0.0)
    assert "".join(calls) == "ab" + 2 * (11 * "a" + 11 * "b")
    assert all(len(values) == 20 for values in seconds.values())
    made = timings({"a": np.array([1.0, 1.0]), "b": np.array([3.0, 3.0])}, x={"a": 5, "b": 6})
    assert [row["ratio"] for row in made] == [1.0, 3.0] and made[1]["x"] == 6
    assert made[1]["milliseconds"] == made[1]["p10"] == made[1]["p90"] == 3000.0


def test_targets_are_kept_or_missed_and_nan_is_missed():
    assert target("x", 2.0, least=1.0)["kept"] and not target("x", 2.0, most=1.0)["kept"]
    assert not target("x", np.nan, most=1.0)["kept"]


@pytest.mark.parametrize(
    "form", [rivals.complex_db, rivals.complex_unrolled_db, rivals.fft_db], ids=lambda f: f.__name__
)
def test_rivals_in_jax_are_the_same_equaliser(form):
    """To what float32 coefficients are good for: they are rivals, not straw men."""
    import jax

    unit_BKP = jax.random.uniform(jax.random.key(3), (6, len(eq.KINDS), 3))
    bands, freq_hz_F = eq.from_unit(eq.PAPER, unit_BKP), np.linspace(0, 22050, 257)
    got_BF = jax.vmap(lambda *x: form(*x, freq_hz_F=freq_hz_F, sample_rate=44100))(*bands)
    np.testing.assert_allclose(got_BF, rivals.scipy_db(bands, freq_hz_F, 44100), atol=0.5)


def test_a_process_that_fails_is_said():
    with pytest.raises(ValueError, match="failed: .*ModuleNotFoundError"):
        process([sys.executable, "-c", "import no_such_module"], {})


@pytest.mark.long
def test_device_steps_are_timed_with_their_features_and_their_cost(monkeypatch):
    cases = throughput._cases(TINY)
    names = [case.what for case in cases]
    assert "db_mel_pm, batch 4" in names and "pooled, 8 members of batch 2" in names
    # A program of each kind: each takes seconds to compile.
    kinds = ("batch 2", "exact rendering", "steps a call", "pooled, 8 members of batch 2")
    chosen = [next(case for case in cases if case.what.endswith(kind)) for kind in kinds]
    monkeypatch.setattr(throughput, "_cases", lambda _: chosen)
    made = throughput.device_steps(TINY, lambda _: None)
    assert [row["what"] for row in made.rows] == [case.what for case in chosen]
    for row in made.rows:
        assert row["milliseconds"] > row["features_milliseconds"] > 0
        assert np.isfinite([row["loss_first"], row["loss_last"]]).all()
    assert made.targets == []  # of large batches
    assert speed.table({"device_steps": made}).startswith("device_steps: ")


@pytest.mark.long
def test_responses_are_written_as_json_table_and_picture(tmp_path, capsys):
    speed.run(str(tmp_path / "out"), ["responses"], TINY, overwrite=False)
    content = json.loads((tmp_path / "out" / "speed.json").read_text())
    rows = content["sections"]["responses"]["rows"]
    error = {row["what"]: row["worst_error_db"] for row in rows if "worst_error_db" in row}
    assert error["EQST, value"] < 5e-5
    for name in ("complex coefficients (JAX)", "FFT of coefficients (JAX)"):
        assert error[f"{name}, value"] > 10 * error["EQST, value"]  # of two EQs; 1e4 of many
    assert (tmp_path / "out" / "speed.png").stat().st_size > 5000
    assert "target: scipy, value" in capsys.readouterr().out
    with pytest.raises(ValueError, match="exists already"):
        speed.run(str(tmp_path / "out"), ["responses"], TINY, overwrite=False)


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [x for x in speed.SECTIONS if x not in ("responses", "replicas", "device_steps")]
)
def test_every_section_runs(name, tmp_path):
    found = speed.SECTIONS[name](TINY, lambda _: None)
    charts.speed({"sections": {name: found._asdict()}}, tmp_path / "picture.png")
    assert speed.table({name: found}).startswith(f"{name}: ")
    assert found.rows and all(
        np.isfinite(value) and value >= 0
        for row in found.rows
        for key, value in row.items()
        if key != "what"
    )


def test_what_is_compared_with_one_device_has_its_batch():
    """Every case on more devices has a reference of the same model and batch on one."""
    each = {"pooled": 32, "db_mel_pm": 4}
    alone = {(x.recipe, x.batch) for x in scaling._cases(1, 8, each)}
    labels = [scaling._label(x, 1, each[x.recipe] * np.array([1, 8])) for x in
              scaling._cases(1, 8, each)]  # fmt: skip
    assert (
        labels[0] == "pooled, 1 device, weak 32" and labels[1] == "pooled, 1 device, reference 64"
    )
    for devices in (2, 4, 8):
        cases = scaling._cases(devices, 8, each)
        assert {(x.recipe, x.batch) for x in cases} <= alone
        assert {x.fsdp for x in cases if x.recipe == "pooled"} == {1, devices}
        batches = {x.batch for x in cases if x.recipe == "pooled"}
        assert batches == {32 * devices, 256}
        assert len(set(cases)) == len(cases)
    both = scaling._label(scaling.Case("pooled", 8, 256, 8), 4, np.array([32, 256]))
    assert both == "pooled, 4 processes, fsdp 8, weak and strong 256"


def test_a_child_that_fails_is_said():
    with pytest.raises(ValueError, match="a child that times steps failed: .*fsdp=2 does not"):
        scaling._in_children([scaling.Case("pooled", 1, 2, 2)], 1, 1, 1)


@pytest.mark.long
def test_runs_as_one_program_are_compared_with_the_same_runs_alone():
    said: list[str] = []
    rows = scaling.contest("pooled", TINY, said.append)
    assert [row["what"].partition(" runs ")[2] for row in rows] == [
        "as one program",
        "one after the other",
        "two at a time",
    ]
    assert rows[0]["ratio"] == rows[0]["step_ratio"] == 1.0
    assert all(np.isfinite(x) and x > 0 for row in rows for k, x in row.items() if k != "what")
    assert sum(line.startswith("replicas: ") for line in said) == 3
