"""The latents of any audio: what the encoder extracts, and what the predictor is fed.

    latents.of("runs/a", "mine.wav", "theirs.wav").fed_L

Latents of the mel models are (channels, mel bands) in a row, channel after channel, (20, 128) at
the standard size: `as_image` gives that shape. The `pooled` model has no encoder: its extracted
latents are its normalised statistics, and what it is fed has another length.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import analysis, eq, observe, predictor, trials
from eqst.config import Config


class Latents(NamedTuple):
    """float32 numpy arrays [..., L], one row for each pair.

    Attributes:
      input_L, reference_L: *extracted*: the encoder's latents of both recordings.
      fed_L: *fed*: the comparison's vector, which is all that the predictor gets.
    """

    input_L: np.ndarray
    reference_L: np.ndarray
    fed_L: np.ndarray


def of(
    model: trials.Run | str | os.PathLike[str],
    input: np.ndarray | str | os.PathLike[str],
    reference: np.ndarray | str | os.PathLike[str],
    sample_rate: int | None = None,
) -> Latents:
    """Latents of two recordings of any format, rate, length and level, heard as `match` hears them.

    Args:
      model: a run, or the folder of one (its best checkpoint is taken).
      input, reference: audio files; or arrays [samples] or [samples, channels], full scale at 1.0.
        At least 1 s each; of more than five minutes ten windows of 30 s are heard.
      sample_rate: of the arrays, in Hz; files bring their own.

    Returns:
      Latents of [L] each.

    Raises:
      ValueError: no run there (see `checkpoint.load`); AudioError: unusable audio (see `analysis`),
        or arrays without a sample rate.
    """
    run = model if isinstance(model, trials.Run) else trials.open_run(model)
    rate = run.config.data.sample_rate
    recordings = [
        _recording(sound, sample_rate, name)
        for sound, name in ((input, "input"), (reference, "reference"))
    ]
    band_rate = min(rate, *(recording.sample_rate for recording in recordings))
    heard = [analysis.heard(recording, rate, band_rate=band_rate) for recording in recordings]
    return extract(run, *heard)


def _recording(
    sound: np.ndarray | str | os.PathLike[str], sample_rate: int | None, name: str
) -> analysis.Recording:
    if isinstance(sound, str | os.PathLike):
        return analysis.from_file(sound)
    if sample_rate is None:
        raise analysis.AudioError(f"{name} is an array: say its sample_rate in Hz")
    return analysis.from_array(sound, sample_rate, name)


def extract(run: trials.Run, input_T: np.ndarray, reference_T: np.ndarray) -> Latents:
    """Latents of one pair of mono recordings at the model's rate.

    Args:
      run: the model.
      input_T, reference_T: [T] each, of any lengths from `observe.least_samples` on and any level.

    Returns:
      Latents of [L] each.

    Raises:
      ValueError: fewer samples than one window.
    """
    heard = [observe.listen(run.config, samples_T) for samples_T in (input_T, reference_T)]
    found = _of_heard(run.config, run.params, run.normalisation, *heard)
    return Latents(*(np.asarray(x) for x in found))


def extract_batch(run: trials.Run, input_BT: np.ndarray, reference_BT: np.ndarray) -> Latents:
    """`extract` for many pairs of one length at once: [B, T] in, [B, L] out."""
    found = _of_batch(run.config, run.params, run.normalisation, input_BT, reference_BT)
    return Latents(*(np.asarray(x) for x in found))


@functools.partial(jax.jit, static_argnums=0)
def _of_heard(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    input_XM: jax.Array,
    reference_XM: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    said = predictor.apply(config, params, normalisation, input_XM, reference_XM)
    return said.extracted_input, said.extracted_reference, said.fed


@functools.partial(jax.jit, static_argnums=0)
def _of_batch(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    input_BT: jax.Array,
    reference_BT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    def one(input_T: jax.Array, reference_T: jax.Array) -> tuple:
        heard = [observe.heard(config, samples_T) for samples_T in (input_T, reference_T)]
        return _of_heard(config, params, normalisation, *heard)

    return jax.vmap(one)(input_BT, reference_BT)


class Attribution(NamedTuple):
    """What each mel band of a pair does to the predicted curve, level removed.

    Attributes:
      slope_input_FM, slope_reference_FM: [F, M] the curve's change, to first order, when all frames
        of one band of one recording rise by one unit of the features (1 dB of dB features).
      gradient_input_FM, gradient_reference_FM: [F, M] gradient times input: that slope times the
        band's mean distance from the train mean.
      occluded_M: [M] RMS change of the curve in dB when the band stands at the train mean in both
        recordings.
    """

    slope_input_FM: np.ndarray
    slope_reference_FM: np.ndarray
    gradient_input_FM: np.ndarray
    gradient_reference_FM: np.ndarray
    occluded_M: np.ndarray


def attribution(run: trials.Run, input_T: np.ndarray, reference_T: np.ndarray) -> Attribution:
    """Which mel bands of a pair a prediction rests on, at frequencies `eq.curve_grid_hz`.

    Args:
      run: a mel model.
      input_T, reference_T: [T] mono at the model's rate.

    Raises:
      ValueError: the model has no mel bands.
    """
    if run.config.features.kind != "mel":
        raise ValueError(f"features.kind {run.config.features.kind!r} has no mel bands")
    heard = [observe.listen(run.config, samples_T) for samples_T in (input_T, reference_T)]
    slope_2FM, occluded_M = _attribute(run.config, run.params, run.normalisation, *heard)
    away_2M = [np.mean(x_NM - run.normalisation.mean[None, :], axis=0) for x_NM in heard]
    slopes = np.asarray(slope_2FM)
    gradients = slopes * np.stack(away_2M)[:, None, :]
    return Attribution(slopes[0], slopes[1], gradients[0], gradients[1], np.asarray(occluded_M))


@functools.partial(jax.jit, static_argnums=0)
def _attribute(
    config: Config,
    params: predictor.Params,
    normalisation: predictor.Normalisation,
    input_NM: jax.Array,
    reference_NM: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    freq_hz_F = eq.curve_grid_hz(config.data.sample_rate)

    def settings(rise_2M: jax.Array) -> jax.Array:
        heard = (input_NM + rise_2M[0][None, :], reference_NM + rise_2M[1][None, :])
        return jnp.stack(predictor.predict_heard(config, params, normalisation, *heard))

    def curve(said_PK: jax.Array) -> jax.Array:
        rate = config.data.sample_rate
        return eq.remove_level(eq.response_db(eq.EqParams(*said_PK), freq_hz_F, sample_rate=rate))

    at_rest_2M = jnp.zeros((2, config.features.mel_bands), jnp.float32)
    said_PK = settings(at_rest_2M)
    # In two parts, since the settings are few and the curve's points many.
    curve_FPK, settings_PK2M = jax.jacrev(curve)(said_PK), jax.jacrev(settings)(at_rest_2M)
    slope_2FM = jnp.einsum("fpk,pksm->sfm", curve_FPK, settings_PK2M, precision="highest")

    def occluded(band: jax.Array) -> jax.Array:
        mean_M = jnp.broadcast_to(normalisation.mean, (config.features.mel_bands,))
        away_M = jnp.arange(config.features.mel_bands) == band
        heard = (
            jnp.where(away_M[None, :], mean_M[None, :], x_NM) for x_NM in (input_NM, reference_NM)
        )
        said = predictor.predict_heard(config, params, normalisation, *heard)
        change_F = curve(jnp.stack(said)) - curve(said_PK)
        return jnp.sqrt(jnp.mean(change_F**2))

    return slope_2FM, jax.lax.map(occluded, jnp.arange(config.features.mel_bands), batch_size=8)


def as_image(run: trials.Run, latent_L: np.ndarray) -> np.ndarray:
    """[..., channels, mel bands] of a mel model's latents, as they are drawn.

    Raises:
      ValueError: the model has no such latents.
    """
    config = run.config
    if config.features.kind != "mel":
        raise ValueError(f"features.kind {config.features.kind!r} has no channels by mel bands")
    shape = (config.model.channels, config.features.mel_bands)
    return np.asarray(latent_L).reshape(*np.shape(latent_L)[:-1], *shape)
