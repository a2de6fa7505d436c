"""The comparison of speeds runs, whatever rivals are installed, and says what it measured; times
are nobody's business here."""

import json

import numpy as np
import pytest

from eqst import charts, contests, eq, rivals, speed, throughput
from eqst.timing import Size, in_turns, process, target, timings

TINY = Size(rounds=2, equalisers=2, batch=2, talkers=2, steps=3, file_seconds=11.0, hour_seconds=60)


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
        process([contests.sys.executable, "-c", "import no_such_module"], {})


def test_device_steps_are_timed_with_their_features_and_their_cost(tmp_path):
    size = TINY._replace(device_batches=(2, 4), device_steps=2, compile_threads=2)
    made = throughput.device_steps(size, lambda _: None)
    names = [row["what"] for row in made.rows]
    assert "db_mel_pm, batch 4" in names and "pooled, 8 members of batch 2" in names
    for row in made.rows:
        assert row["milliseconds"] > row["features_milliseconds"] > 0
        assert np.isfinite([row["loss_first"], row["loss_last"]]).all()
    assert made.targets == []  # of large batches


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
@pytest.mark.parametrize("name", [x for x in contests.SECTIONS if x != "responses"])
def test_every_section_runs(name, tmp_path):
    found = contests.SECTIONS[name](TINY, lambda _: None)
    charts.speed({"sections": {name: found._asdict()}}, tmp_path / "picture.png")
    assert speed.table({name: found}).startswith(f"{name}: ")
    assert found.rows and all(
        np.isfinite(value) and value >= 0
        for row in found.rows
        for key, value in row.items()
        if key != "what"
    )
