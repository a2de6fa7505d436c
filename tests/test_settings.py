"""Settings: rounding, preamp, table, and the JSON that other programs read."""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy.signal import sosfreqz

from eqst import biquad, eq, settings
from eqst.files import AudioError

PARAMS = eq.EqParams(
    np.array([80.123456, 700.0, 2500.0, 8000.0]),
    np.array([6.04321, -9.0, 0.0, -4.0]),
    np.array([0.70711, 0.112201845, 10.0, 1.0]),
)


def true_peak_db(params, sample_rate):
    sos = biquad.sos(*params, kinds=eq.KINDS, sample_rate=sample_rate)
    freq_hz = np.concatenate([[0], np.geomspace(1, sample_rate / 2 - 1e-6, 200_000)])
    return 20 * np.log10(np.abs(sosfreqz(sos, freq_hz, fs=sample_rate)[1])).max()


def test_the_json_has_the_keys_that_other_programs_look_for(tmp_path):
    settings.save(tmp_path / "s.json", settings.from_params(PARAMS, 44_100))
    content = json.loads((tmp_path / "s.json").read_text())
    assert list(content) == ["sample_rate", "preamp_db", "bands"]
    assert content["sample_rate"] == 44_100
    assert [band["type"] for band in content["bands"]] == [
        "low_shelf", "peaking", "peaking", "high_shelf",
    ]  # fmt: skip
    assert content["bands"][0] == {
        "type": "low_shelf", "frequency_hz": 80.12, "gain_db": 6.043, "q": 0.7071,
    }  # fmt: skip


def test_what_is_written_is_what_is_read(tmp_path):
    first = settings.from_params(PARAMS, 48_000)
    settings.save(tmp_path / "s.json", first)
    assert settings.load(tmp_path / "s.json") == first
    np.testing.assert_allclose(first.params.freq_hz, PARAMS.freq_hz, atol=0.005)
    np.testing.assert_allclose(first.params.gain_db, PARAMS.gain_db, atol=0.0005)
    np.testing.assert_allclose(first.params.q, PARAMS.q, atol=0.00005)
    with pytest.raises(AudioError, match="exists already"):
        settings.save(tmp_path / "s.json", first, overwrite=False)


@pytest.mark.parametrize("sample_rate", [8000, 44_100, 192_000])
def test_the_preamp_is_the_peak_of_all_bands_together(sample_rate):
    rng = np.random.default_rng(0)
    low, high = np.array([30, 260, 1000, 4000]), np.array([260, 2000, 4000, 16_000])
    for _ in range(20):
        params = eq.EqParams(
            low * (high / low) ** rng.random(4),
            rng.uniform(-10, 10, 4),
            10.0 ** rng.uniform(-0.95, 1, 4),
        )
        params, _ = eq.limit_to_rate(params, sample_rate)
        found = settings.from_params(params, sample_rate)
        peak_db = true_peak_db(found.params, sample_rate)
        # Between grid points the sharpest peak is higher by less than this.
        assert found.preamp_db == pytest.approx(-max(peak_db, 0), abs=0.01)


def test_bands_that_overlap_add_up_and_cuts_need_no_preamp():
    both = eq.EqParams(np.array([100.0, 1500, 1500, 8000]), np.array([0.0, 8, 8, 0]), np.ones(4))
    assert settings.from_params(both, 44_100).preamp_db == pytest.approx(-16, abs=0.01)
    cuts = both._replace(gain_db=-both.gain_db)
    assert settings.from_params(cuts, 44_100).preamp_db == 0


def test_amount_scales_the_gains_in_db():
    for amount in (-2.0, 0.0, 0.5, 2.0):
        scaled = settings.scale(PARAMS, amount)
        np.testing.assert_allclose(scaled.gain_db, PARAMS.gain_db * amount)
        np.testing.assert_array_equal(scaled.freq_hz, PARAMS.freq_hz)
    for amount in (2.01, -3.0, float("nan")):
        with pytest.raises(AudioError, match=r"outside -2 \.\. 2"):
            settings.scale(PARAMS, amount)


def test_the_table_reads_like_a_mixing_desk():
    text = settings.table_text(settings.from_params(PARAMS, 44_100))
    assert text.splitlines()[1].split() == ["Low", "low", "shelf", "80", "Hz", "+6.0", "dB", "0.71"]
    assert [line.split()[0] for line in text.splitlines()] == [
        "band", "Low", "Mid1", "Mid2", "High", "preamp",
    ]  # fmt: skip
    widths = {len(line) for line in text.splitlines()[:5]}
    assert len(widths) == 1 and widths.pop() <= 60


def test_equalizer_apos_text_holds_the_same_equaliser(tmp_path):
    """Read by the grammar of Equalizer APO: a number after each of Fc, Gain and Q."""
    made = settings.from_params(PARAMS, 44_100)
    settings.save(tmp_path / "eq.txt", made)
    text = (tmp_path / "eq.txt").read_text()
    comment, preamp, *filters = text.splitlines()
    assert comment.startswith("#") and text.endswith("\n")
    assert float(re.fullmatch(r"Preamp: (\S+) dB", preamp)[1]) == pytest.approx(made.preamp_db)
    kinds = {"LSC": "low_shelf", "PK": "peaking", "HSC": "high_shelf"}
    pattern = r"Filter (\d): ON (\S+) Fc (\S+) Hz Gain (\S+) dB Q (\S+)"
    read = [re.fullmatch(pattern, line).groups() for line in filters]
    assert [int(number) for number, *_ in read] == [1, 2, 3, 4]
    assert [kinds[kind] for _, kind, *_ in read] == [band.type for band in made.bands]
    numbers = np.array([row[2:] for row in read], float)
    assert not any(re.search(r"\.\d{3}$", word) for row in read for word in row[2:])
    wanted = [[band.frequency_hz, band.gain_db, band.q] for band in made.bands]
    np.testing.assert_allclose(numbers, wanted, atol=5e-5)
    with pytest.raises(AudioError, match="exists already"):
        settings.save(tmp_path / "eq.txt", made, overwrite=False)


def test_equalizer_apos_preamp_covers_the_curve_whatever_a_file_took(tmp_path):
    for params in (PARAMS, PARAMS._replace(gain_db=-np.abs(PARAMS.gain_db))):
        took = dataclasses.replace(settings.from_params(params, 44_100), preamp_db=-0.125)
        settings.save(tmp_path / "eq.txt", took)
        _, preamp, *filters = (tmp_path / "eq.txt").read_text().splitlines()
        read = np.array([np.array(line.split())[[5, 8, 11]] for line in filters], float)
        peak_db = true_peak_db(eq.EqParams(*read.T), 44_100)
        assert -0.01 < float(preamp.split()[1]) + max(0.0, peak_db) <= 1e-3


@pytest.mark.parametrize("name", ["eq.csv", "eq", "eq.json.gz", "eqtxt"])
def test_settings_of_an_unknown_ending_are_refused(tmp_path, name):
    with pytest.raises(AudioError, match=r"settings end in \.json, or for Equalizer APO in \.txt"):
        settings.save(tmp_path / name, settings.from_params(PARAMS, 44_100))
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_settings_say_so_in_one_line(tmp_path):
    good = {
        "sample_rate": 44_100,
        "preamp_db": 0.0,
        "bands": [
            {"type": kind, "frequency_hz": 1000.0, "gain_db": 1.0, "q": 1.0} for kind in eq.KINDS
        ],
    }

    def changed(**changes):
        band = {**good["bands"][0], **changes}
        return {**good, "bands": [band, *good["bands"][1:]]}

    cases = [
        ("{", "is not JSON"),
        ("[1, 2]", "is not a settings file"),
        (
            json.dumps({**good, "bands": good["bands"][:3]}),
            "has bands low_shelf, peaking, peaking:",
        ),
        (json.dumps({"bands": good["bands"]}), "is not a settings file .*sample_rate"),
        (json.dumps(changed(type="notch")), "has bands notch, peaking"),
        (json.dumps(changed(frequency_hz=30_000.0)), "cannot be: frequencies lie above 0"),
        (json.dumps(changed(frequency_hz="high")), "is not a settings file"),
        (json.dumps(changed(q=0.0)), "cannot be"),
        (json.dumps(changed(gain_db=float("inf"))), "cannot be"),
    ]
    (tmp_path / "s.json").write_text(json.dumps(good))
    assert settings.load(tmp_path / "s.json").bands[1].type == "peaking"
    for text, message in cases:
        (tmp_path / "s.json").write_text(text)
        with pytest.raises(AudioError, match=message) as caught:
            settings.load(tmp_path / "s.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(AudioError, match="cannot be read"):
        settings.load(tmp_path / "missing.json")
