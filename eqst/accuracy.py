"""How exact the responses are, measured: `python -m eqst.accuracy --output=DIR`.

A section is a function of (bands, seed) that returns rows: {"what", "worst", "limit", "unit"}, and
what else it has to say. A row fails when its worst value exceeds its limit; None is for the record.
`SECTIONS` lists them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.signal
from absl import flags

from eqst import biquad, command, config, eq, features, files, halfangle, pairs, synthetic

RATES = (8000, 16000, 44100, 48000, 96000, 192000)
RESPONSES = {
    biquad.PEAKING: biquad.peaking_db,
    biquad.LOW_SHELF: biquad.low_shelf_db,
    biquad.HIGH_SHELF: biquad.high_shelf_db,
}
FLOAT32_LIMIT_DB = 5e-5
_CHUNK, _FREQUENCIES = 5000, 48  # bands at once, frequencies for each

Row = dict[str, Any]
Bands = tuple[Any, ...]  # cutoff in Hz, gain in dB and q, float64 arrays


def _float64() -> contextlib.AbstractContextManager:
    """float64 for what is traced inside; JAX before 0.8 has it elsewhere."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # type: ignore[attr-defined,unused-ignore]

    return enable_x64(True)


def _row(what: str, worst: float, limit: float | None, unit: str, **more: Any) -> Row:
    return {"what": what, "worst": worst, "limit": limit, "unit": unit, **more}


def _random_bands(rng: np.random.Generator, rate: float, count: int) -> Bands:
    """Cutoff 20 Hz .. min(20 kHz, 0.49 rate), gain +-15 dB (0 in one of 16), q 0.1 .. 10: [B] each.

    They are float32 numbers in float64 arrays, so that both precisions see the same arguments.
    """
    top_hz = min(20000.0, 0.49 * rate)
    cutoff_hz = 20.0 * (top_hz / 20.0) ** rng.random(count)
    gain_db, q = rng.uniform(-15.0, 15.0, count), 10.0 ** rng.uniform(-1.0, 1.0, count)
    gain_db[::16] = 0.0
    return tuple(np.float64(np.float32(array)) for array in (cutoff_hz, gain_db, q))


def _frequencies(rng: np.random.Generator, rate: float, cutoff_hz_B: np.ndarray) -> np.ndarray:
    """[B, F]: 0 Hz, Nyquist, the cutoff and round it, next to Nyquist, log-uniform elsewhere."""
    count, nyquist_hz = len(cutoff_hz_B), 0.5 * rate
    ends_BF = np.broadcast_to([0.0, nyquist_hz], (count, 2))
    near_BF = cutoff_hz_B[:, None] * np.exp(rng.normal(0.0, 0.6, (count, 12)) ** 3)
    top_BF = nyquist_hz * (1.0 - 10.0 ** rng.uniform(-7.0, -0.5, (count, 6)))
    rest_BF = nyquist_hz * 10.0 ** rng.uniform(-5.0, 0.0, (count, _FREQUENCIES - 21))
    freq_BF = np.concatenate([ends_BF, cutoff_hz_B[:, None], near_BF, top_BF, rest_BF], axis=1)
    return np.minimum(np.float64(np.float32(freq_BF)), nyquist_hz)


def _chunks(seed: int, rate: int, bands: int) -> Iterator[tuple[np.ndarray, Bands]]:
    """Frequencies [B, F] and bands [B, 1] each, in chunks of one size, the last one full too."""
    rng, size = np.random.default_rng([seed, rate]), min(_CHUNK, bands)
    for _ in range(0, bands, size):
        band_B = _random_bands(rng, rate, size)
        yield _frequencies(rng, rate, band_B[0]), tuple(array[:, None] for array in band_B)


def float32_responses(bands: int, seed: int) -> list[Row]:
    """Float32 against the same formula in float64, at the same arguments, for `bands` of each."""
    rows = []
    for kind, response in RESPONSES.items():
        for rate in RATES:
            compiled, worst = jax.jit(functools.partial(response, sample_rate=rate)), 0.0
            for freq_BF, band in _chunks(seed, rate, bands):
                single = np.asarray(compiled(*(np.float32(x) for x in (freq_BF, *band))))
                with _float64():
                    double = np.asarray(compiled(freq_BF, *band))
                worst = max(worst, float(np.max(np.abs(single - double))))
            rows.append(_row(f"{kind} at {rate} Hz, float32", worst, FLOAT32_LIMIT_DB, "dB"))
    return rows


def _coefficients_db(
    kind: str, freq_BF: np.ndarray, band: Bands, rate: int
) -> tuple[np.ndarray, np.ndarray]:
    """The response from float64 coefficients, and how far their rounding can put it off, in dB.

    At low frequencies either polynomial is a small sum of large terms. The bound takes eight
    roundings of the sum of their sizes, against the polynomial itself.
    """
    sections_BS = biquad.sos(*band, kinds=[kind], sample_rate=rate)[:, 0, :]
    delay_BFD = np.exp(-2j * np.pi / rate * freq_BF[..., None] * np.arange(3))
    value_BF, bound_BF = np.zeros_like(freq_BF), np.zeros_like(freq_BF)
    for sign, row_BD in ((1, sections_BS[:, :3]), (-1, sections_BS[:, 3:])):
        polynomial_BF = np.abs(np.einsum("bfd,bd->bf", delay_BFD, row_BD))
        size_B1 = np.abs(row_BD).sum(axis=-1, keepdims=True)
        value_BF += sign * 20.0 * np.log10(polynomial_BF)
        bound_BF += 20.0 / np.log(10.0) * 8 * 2.0**-53 * size_B1 / polynomial_BF
    return value_BF, bound_BF


def float64_coefficients(bands: int, seed: int) -> list[Row]:
    """The formula in float64 against cookbook coefficients in float64, for bands / 10 of each.

    What they differ by is the rounding of the coefficients: `worst` stays inside the bound on it,
    which grows with (rate / cutoff)^2, so that there the formula is the better of the two.
    """
    rows = []
    for kind, response in RESPONSES.items():
        for rate in RATES:
            compiled = jax.jit(functools.partial(response, sample_rate=rate))
            worst, share, where = 0.0, 0.0, {}
            for freq_BF, band in _chunks(seed + 1, rate, max(1, bands // 10)):
                with _float64():
                    formula_BF = np.asarray(compiled(freq_BF, *band))
                coefficients_BF, bound_BF = _coefficients_db(kind, freq_BF, band, rate)
                error_BF = np.abs(formula_BF - coefficients_BF)
                share = max(share, float(np.max(error_BF / (bound_BF + 1e-12))))
                if error_BF.max() > worst:
                    worst = float(error_BF.max())
                    b, f = np.unravel_index(error_BF.argmax(), error_BF.shape)
                    names = ("cutoff_hz", "gain_db", "q")
                    where = {
                        name: float(array[b, 0]) for name, array in zip(names, band, strict=True)
                    }
                    where["freq_hz"] = float(freq_BF[b, f])
            what = f"{kind} at {rate} Hz, float64 - coefficients"
            rows.append(_row(what, worst, None, "dB", where=where))
            rows.append(_row(f"{what}, of their rounding bound", share, 1.0, "times"))
    return rows


def gradients(bands: int, seed: int) -> list[Row]:
    """Float32 derivatives against central differences of the float64 formula, bands / 50 of each.

    By cutoff (dB/Hz), gain (dB/dB) and q (dB), of cascades and of single bands (their two rules):
    the error as a multiple of 1e-3 |g| + 1e-5. Plain autodiff is for the record, but no value may
    be infinite or NaN in it either.
    """
    rows, broken, names = [], 0, ("cascade", "band", "autodiff")
    for kind, response in RESPONSES.items():
        for rate in RATES:
            band_alone = functools.partial(response, sample_rate=rate)
            cascade = functools.partial(_one_band, kind=kind, sample_rate=rate)
            plain = functools.partial(_plain_db, kind, rate)
            derivatives = {
                name: jax.jit(jnp.vectorize(jax.grad(function, (1, 2, 3))))
                for name, function in zip(names, (cascade, band_alone, plain), strict=True)
            }
            worst = dict.fromkeys(derivatives, 0.0)
            for freq_BF, band in _chunks(seed + 2, rate, max(1, bands // 50)):
                expected = _differences(band_alone, freq_BF, band)
                arrays = [np.broadcast_to(np.float32(x), freq_BF.shape) for x in (freq_BF, *band)]
                for name, function in derivatives.items():
                    for measured, reference in zip(function(*arrays), expected, strict=True):
                        finite = np.isfinite(measured)
                        error = np.abs(np.asarray(measured) - reference)[finite]
                        allowed = 1e-3 * np.abs(reference[finite]) + 1e-5
                        worst[name] = max(worst[name], float(np.max(error / allowed, initial=0.0)))
                        broken += int(np.sum(~finite))
            for name in names:
                limit = None if name == "autodiff" else 1.0
                rows.append(_row(f"{kind} at {rate} Hz, {name}", worst[name], limit, "times"))
    return [*rows, _row("values that are not finite", broken, 0, "values")]


def _plain_db(kind: str, rate: int, *arrays: jax.Array) -> jax.Array:
    """One band without a derivative rule of its own, for arrays of one rank."""
    shape = halfangle.SHAPES[kind]
    ratio = halfangle.ratio(halfangle.evaluate(shape, rate, *arrays))
    return 10.0 * jnp.log10(ratio) + (0.5 * shape.s) * arrays[2]


def _one_band(*arrays: jax.Array, kind: str, sample_rate: int) -> jax.Array:
    freq_F, *band = (jnp.reshape(array, (1,)) for array in arrays)
    return biquad.cascade_db(freq_F, *band, kinds=(kind,), sample_rate=sample_rate)[0]


def _differences(response: Callable, freq_BF: np.ndarray, band: Bands) -> list[np.ndarray]:
    """Derivatives [B, F] of a response by cutoff, gain and q: central differences in float64."""
    compiled, slopes = jax.jit(response), []
    with _float64():
        for p, array in enumerate(band):
            step = 1e-5 if p == 1 else 1e-6 * array
            up, down = (
                compiled(freq_BF, *band[:p], moved, *band[p + 1 :])
                for moved in (array + step, array - step)
            )
            slopes.append(np.asarray(up - down) / (2 * step))
    return slopes


def _talker_and_eq(seed: int, number: int, seconds: float) -> tuple[np.ndarray, Any]:
    """A synthetic talker and a random EQ of the paper's table; every fourth has the highest Q."""
    audio_T = synthetic.synthesise(seed, number, seconds, sample_rate=_AUDIO_RATE)
    unit_KP = np.random.default_rng([seed, number]).random((len(eq.KINDS), 3))
    if number % 4 == 0:
        unit_KP[:, 2] = 1.0
    return audio_T, eq.from_unit(eq.PAPER, unit_KP)


_AUDIO_RATE, _TALKERS, _SECONDS, _CONTEXT_SECONDS = 44100, 24, 3.0, 1.5


def host_rendering(bands: int, seed: int) -> list[Row]:
    """The circular FFT filter of pairs against float64 sosfilt over the whole recording.

    The error's power against the filtered segment's, worst of some talkers and segments.
    """
    context, length = (round(x * _AUDIO_RATE) for x in (_CONTEXT_SECONDS, _SECONDS))
    render = jax.jit(
        functools.partial(pairs.filter_circular, sample_rate=_AUDIO_RATE, context=context)
    )
    errors = []
    for number in range(_TALKERS):
        audio_T, params = _talker_and_eq(seed, number, 12.0)
        sos_K6 = biquad.sos(*params, kinds=eq.KINDS, sample_rate=_AUDIO_RATE)
        true_T = scipy.signal.sosfilt(sos_K6, audio_T.astype(np.float64))
        float_params = eq.EqParams(*(np.float32(x) for x in params))
        for start in (0, 4 * _AUDIO_RATE, len(audio_T) - length):
            piece_T = np.zeros(context + length, np.float32)
            begin = max(start - context, 0)
            piece_T[begin - start + context :] = audio_T[begin : start + length]
            wanted_T = true_T[start : start + length]
            error_T = np.asarray(render(piece_T, float_params), np.float64) - wanted_T
            errors.append(10 * np.log10(np.mean(error_T**2) / np.mean(wanted_T**2)))
    return [_row("circular FFT, 3 s after 1.5 s, error", max(errors), -90.0, "dB")]


def device_rendering(bands: int, seed: int) -> list[Row]:
    """STFT power times |H|^2 against the STFT of exactly filtered audio: long-term mel in dB."""
    spec = config.Features()
    context, length = (round(x * _AUDIO_RATE) for x in (_CONTEXT_SECONDS, _SECONDS))

    @jax.jit
    def mel_errors(piece_T: jax.Array, params: eq.EqParams) -> jax.Array:
        exact_T = pairs.filter_circular(piece_T, params, sample_rate=_AUDIO_RATE, context=context)
        powers = [
            features.stft_power(exact_T, spec.window, spec.hop),
            features.equalise_power(
                features.stft_power(piece_T[context:], spec.window, spec.hop), params, _AUDIO_RATE
            ),
        ]
        mel_2M = jnp.stack(
            [jnp.mean(features.mel_power(spec, x, _AUDIO_RATE), axis=0) for x in powers]
        )
        level_2M = 10.0 * jnp.log10(mel_2M + 1e-8 * jnp.mean(mel_2M))
        return jnp.abs(level_2M[1] - level_2M[0])

    errors = []
    for number in range(4 * _TALKERS):
        audio_T, params = _talker_and_eq(seed, number, 6.0)
        piece_T = np.float32(audio_T[: context + length])
        errors.append(
            np.asarray(mel_errors(piece_T, eq.EqParams(*(np.float32(x) for x in params))))
        )
    error_nM, centre_hz_M = np.stack(errors), features.band_centres_hz(spec)
    rows = []
    edges_hz = (0, 80, 130, 260, 500, 1000, 4000, 20000)
    for low_hz, high_hz in zip(edges_hz[:-1], edges_hz[1:], strict=True):
        inside = error_nM[:, (centre_hz_M >= low_hz) & (centre_hz_M < high_hz)]
        what = f"device rendering, mel bands {low_hz} .. {high_hz} Hz, p99"
        median = float(np.median(inside))
        rows.append(_row(what, float(np.percentile(inside, 99)), None, "dB", median=median))
    return rows


SECTIONS: dict[str, Callable[[int, int], list[Row]]] = {
    "float32_responses": float32_responses,
    "float64_coefficients": float64_coefficients,
    "gradients": gradients,
    "host_rendering": host_rendering,
    "device_rendering": device_rendering,
}


def passes(row: Row) -> bool:
    """Whether a row keeps its limit; a NaN does not."""
    return row["limit"] is None or row["worst"] <= row["limit"]


def table(sections: dict[str, list[Row]]) -> str:
    """The sections as text, one line a row."""
    lines = []
    for name, rows in sections.items():
        lines.append(name)
        for row in rows:
            limit = "" if row["limit"] is None else f"limit {row['limit']:.3g}"
            verdict = "" if passes(row) else "FAILS"
            lines.append(
                f"  {row['what']:64s} {row['worst']:10.3g} {row['unit']:6s} {limit} {verdict}"
            )
    return "\n".join(line.rstrip() for line in lines)


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "folder for accuracy.json; it is made", required=True)
    flags.DEFINE_integer("bands", 100_000, "random bands of each kind at each rate", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "of the random bands", lower_bound=0)
    flags.DEFINE_bool("overwrite", False, "replace an accuracy.json that is already there")
    flags.DEFINE_multi_enum("section", None, list(SECTIONS), "only this one (may be repeated)")


def _body() -> None:
    values = flags.FLAGS
    with files.result_folder(values.output, "accuracy.json", overwrite=values.overwrite) as output:
        chosen = values.section or list(SECTIONS)
        sections = {name: SECTIONS[name](values.bands, values.seed) for name in chosen}
        print(table(sections))
        about = {"bands": values.bands, "seed": values.seed, "jax": jax.__version__}
        about["device"] = jax.devices()[0].device_kind
        files.write_json(output / "accuracy.json", {**about, "sections": sections})
    if not all(passes(row) for rows in sections.values() for row in rows):
        sys.exit("eqst.accuracy: a row exceeds its limit (FAILS above)")


if __name__ == "__main__":
    command.start("eqst.accuracy", _define_flags, _body)
