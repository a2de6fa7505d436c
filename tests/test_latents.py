"""Latents of any audio: the same from arrays, files, folders and batches, and what they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from eqst import checkpoint, eq, latents, observe, predictor, trials
from eqst.audio import AudioError
from eqst.checkpoint import Checkpoints
from eqst.config import as_dict

RATE = 44100
SMALL = {"model.channels": 3, "features.mel_bands": 16, "model.hidden": 8, "model.blocks": 1}


def make_run(configure, comparison: str) -> trials.Run:
    """An untrained small predictor, its features brought near unit size."""
    config = configure({**SMALL, "model.comparison": comparison})
    params = predictor.init(config, jax.random.key(1))
    normalisation = predictor.Normalisation(
        np.full(16, -20.0, np.float32), np.full(16, 15.0, np.float32)
    )
    return trials.Run(config, params, normalisation, 0, "none")


@pytest.fixture(scope="module")
def learned(configure) -> trials.Run:
    return make_run(configure, "learned")


@pytest.fixture(scope="module")
def pair(bursts) -> tuple[np.ndarray, np.ndarray]:
    return bursts(1, 2.0, RATE), bursts(2, 1.5, RATE)


def test_extracted_latents_are_the_encoders_and_fed_is_what_decides(learned, pair):
    """Against the encoder written out, and the settings of `fed` alone against the network's."""
    found = latents.extract(learned, *pair)
    layers = learned.params["encoder"]["layers"]
    for samples_T, latent_L in zip(pair, found, strict=False):
        x_NMC = observe.heard(learned.config, jnp.asarray(samples_T))[..., None]
        x_NMC = (x_NMC + 20.0) / 15.0
        for i, stride in enumerate(learned.config.model.stride_time):
            x_NMC = jax.lax.conv_general_dilated(
                x_NMC[None],
                layers[str(i)]["kernel"],
                (stride, 1),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )[0]
            x_NMC = x_NMC + layers[str(i)]["bias"][None, None]
            x_NMC = jnp.where(x_NMC > 0, x_NMC, 0.01 * x_NMC)
        expected_CM = np.asarray(x_NMC.mean(0)).T
        np.testing.assert_allclose(
            latents.as_image(learned, latent_L), expected_CM, rtol=1e-4, atol=1e-5
        )
    whole = predictor.predict_audio(
        learned.config, learned.params, learned.normalisation, *map(jnp.asarray, pair)
    )
    alone = predictor.settings_of_fed(learned.config, learned.params, jnp.asarray(found.fed_L))
    for one, other in zip(alone, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_subtraction_feeds_the_difference(configure, pair):
    found = latents.extract(make_run(configure, "subtract"), *pair)
    np.testing.assert_allclose(found.fed_L, found.reference_L - found.input_L, atol=1e-6)
    assert found.fed_L.dtype == np.float32 and found.fed_L.shape == (48,)


def test_batches_give_what_pairs_give(learned, bursts):
    sounds_BT = np.stack([bursts(seed, 1.0, RATE) for seed in range(6)])
    batch = latents.extract_batch(learned, sounds_BT[:3], sounds_BT[3:])
    for i in range(3):
        one = latents.extract(learned, sounds_BT[i], sounds_BT[3 + i])
        for whole, single in zip(batch, one, strict=True):
            assert whole.shape == (3, 48)
            np.testing.assert_allclose(whole[i], single, rtol=1e-4, atol=1e-5)


def test_level_does_not_matter(learned, pair):
    louder = latents.extract(learned, 8.0 * pair[0], 0.125 * pair[1])
    for one, other in zip(latents.extract(learned, *pair), louder, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_attribution_is_what_moving_or_masking_a_band_does(learned, pair):
    """Against finite differences of one band, and a prediction from features with one masked."""
    # An untrained head hardly answers to anything; this one does, so that rounding is small.
    params = jax.tree.map(np.array, learned.params)
    params["predictor"]["head"]["kernel"] *= 300.0
    learned = learned._replace(params=params)
    found = latents.attribution(learned, *pair)
    heard = [np.array(observe.listen(learned.config, samples_T)) for samples_T in pair]

    def curve(input_NM: np.ndarray, reference_NM: np.ndarray) -> np.ndarray:
        said = predictor.predict_heard(
            learned.config, learned.params, learned.normalisation, input_NM, reference_NM
        )
        grid_hz = eq.curve_grid_hz(RATE)
        exact = eq.EqParams(*(np.asarray(x, np.float64) for x in said))
        return np.asarray(eq.remove_level(eq.response_db(exact, grid_hz, sample_rate=RATE)))

    for side, slope_FM in enumerate((found.slope_input_FM, found.slope_reference_FM)):
        band = 5 + side  # in steps that no leaky ReLU turns within
        moved = [[x.copy() for x in heard] for _ in range(2)]
        moved[0][side][:, band] += 0.01
        moved[1][side][:, band] -= 0.01
        expected_F = (curve(*moved[0]) - curve(*moved[1])) / 0.02
        assert np.abs(expected_F).max() > 0.01
        error = np.abs(slope_FM[:, band] - expected_F).max()
        assert error < 0.02 * np.abs(expected_F).max()
    away = np.mean(heard[1][:, 3]) + 20.0  # the train mean is -20
    np.testing.assert_allclose(
        found.gradient_reference_FM[:, 3], away * found.slope_reference_FM[:, 3], rtol=1e-4
    )
    masked = [x.copy() for x in heard]
    for x_NM in masked:
        x_NM[:, 9] = -20.0
    expected = np.sqrt(np.mean((curve(*masked) - curve(*heard)) ** 2))
    np.testing.assert_allclose(found.occluded_M[9], expected, rtol=0.01, atol=1e-4)
    assert found.occluded_M.shape == (16,)


@pytest.fixture
def workdir(learned, tmp_path):
    """The run on disk, as training leaves it."""
    params = {"network": learned.params, "normalisation": learned.normalisation._asdict()}
    with Checkpoints(tmp_path / "run") as saved:
        saved.save_best(7, params, 1.0)
    card = {
        "config": as_dict(learned.config),
        "normalisation": learned.normalisation._asdict(),
        "band_table": eq.PAPER.name,
    }
    checkpoint.write_card(tmp_path / "run", card)
    return tmp_path / "run"


def test_one_call_takes_arrays_files_runs_and_folders(learned, workdir, pair, tmp_path):
    """Stereo files at a level of their own say what the mono arrays say."""
    expected = latents.of(learned, *pair, RATE)
    np.testing.assert_allclose(expected.fed_L, latents.extract(learned, *pair).fed_L, atol=1e-3)
    paths = []
    for i, samples_T in enumerate(pair):
        paths.append(tmp_path / f"{i}.wav")
        stereo_TC = np.stack([0.5 * samples_T] * 2, axis=1)
        soundfile.write(paths[-1], stereo_TC, RATE, subtype="FLOAT")
    found = latents.of(workdir, *paths)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_mistakes_are_told_in_one_line(learned, pair, tmp_path, configure):
    with pytest.raises(AudioError, match="^input is an array: say its sample_rate in Hz$"):
        latents.of(learned, *pair)
    with pytest.raises(AudioError, match="no_such"):
        latents.of(learned, tmp_path / "no_such.wav", tmp_path / "no_such.wav")
    with pytest.raises(checkpoint.CheckpointError, match="there is no folder"):
        latents.of(tmp_path / "nowhere", *pair, RATE)
    with pytest.raises(ValueError, match="do not fill a window of 2048"):
        latents.extract(learned, pair[0][:1000], pair[1])
    pooled = {"features.kind": "pooled", "model.comparison": "direct"}
    other = learned._replace(config=configure(pooled))
    with pytest.raises(ValueError, match="'pooled' has no channels by mel bands"):
        latents.as_image(other, np.zeros(48))
    with pytest.raises(ValueError, match="'pooled' has no mel bands"):
        latents.attribution(other, *pair)
