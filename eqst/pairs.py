"""What example k of seed s is: which two segments, which EQ, and how the EQ is put on them.

`draw` is a pure function of (seed, k): it runs on the host for tf.data and inside the jitted step
for the resident path, and gives the same pairs in both. So a run resumes exactly without any
iterator state, and the global batch does not depend on the number of processes or devices.
The functions act on one example and are vmapped at the edge.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eqst import biquad, eq
from eqst.corpus import HOPS_PER_SECOND, Corpus

# Slots of the uniform numbers that make an example; their order is part of what (s, k) means.
RECORDING, INPUT, REFERENCE, COIN, OTHER = range(5)
# Uniform numbers of the augmentation (see `observe`), after those five.
AUGMENT = 33
# Rows of an Index are numbered by int32.
MAX_ROWS = np.iinfo(np.int32).max


class PairsError(ValueError):
    """Recordings no pair can be made of: one line with the reason."""


class Index(NamedTuple):
    """The starts a segment of one length may have, as arrays `draw` can use inside jit.

    All starts are multiples of 100 ms. Rows lie recording after recording; a row stands here only
    if its segment is loud enough and has a partner that does not overlap it.

    Attributes:
      hop_V: [V] start of the row's segment, in hops of 100 ms.
      before_V: [V] number of the recording's rows that end before this one begins.
      after_V: [V] the first of the recording's rows (counted from 0) that begins after it ends.
      first_R, count_R: [R] where a recording's rows lie.
      recording_R: [R] its number in the corpus.
      cumulative_R: [R] running sum of the recordings' probabilities.
    """

    hop_V: jax.Array | np.ndarray
    before_V: jax.Array | np.ndarray
    after_V: jax.Array | np.ndarray
    first_R: jax.Array | np.ndarray
    count_R: jax.Array | np.ndarray
    recording_R: jax.Array | np.ndarray
    cumulative_R: jax.Array | np.ndarray


class Plan(NamedTuple):
    """One example, before any audio is touched.

    Rows point into Index, recordings into the corpus; starts are in hops of 100 ms. `label` and
    `colour` are positions in the unit cube; the colour's gains are 0 dB (0.5) where there is none.
    `augment_A` is uniform numbers.
    """

    input_row: jax.Array
    reference_row: jax.Array
    input_recording: jax.Array
    reference_recording: jax.Array
    input_hop: jax.Array
    reference_hop: jax.Array
    label_KP: jax.Array
    colour_KP: jax.Array
    augment_A: jax.Array


def first_sample(hop: Any, sample_rate: int) -> Any:
    """The sample at which a hop begins: hop rate / 10, rounded down.

    This is where `audio.k_weighted_power` begins its blocks, at rates such as 11025 too. The
    product is taken apart because it would leave 32 bits after 81 minutes at 44.1 kHz.

    Args:
      hop: number of the hop, an int or an array of int32.
      sample_rate: in Hz, static.
    """
    whole, rest = divmod(sample_rate, HOPS_PER_SECOND)
    return hop * whole + hop * rest // HOPS_PER_SECOND


def hops_covering(samples: int, sample_rate: int) -> int:
    """The least number of hops whose samples, wherever they begin, are no fewer than these."""
    return -(-samples * HOPS_PER_SECOND // sample_rate)


def segment_loudness(power_J: np.ndarray, blocks: int) -> np.ndarray:
    """Gated loudness of every segment of `blocks` hops (BS.1770: 400 ms blocks, 75 % overlap).

    Args:
      power_J: [J] K-weighted mean square of each 100 ms.
      blocks: segment length in hops, >= 4.

    Returns:
      [J - blocks + 1] LUFS; -inf where every block is under the absolute gate of -70 LUFS.
    """
    if len(power_J) < blocks:
        return np.zeros(0)
    window_J = np.convolve(power_J, np.full(4, 0.25), "valid")
    windows_SW = np.lib.stride_tricks.sliding_window_view(window_J, blocks - 3)
    # A recording of hours has millions of blocks in its segments: some thousand starts at a time.
    mean_S = np.concatenate(
        [
            _gated_means(windows_SW[begin : begin + 4096])
            for begin in range(0, len(windows_SW), 4096)
        ]
    )
    with np.errstate(divide="ignore"):
        return -0.691 + 10.0 * np.log10(mean_S)


def _gated_means(windows_SW: np.ndarray) -> np.ndarray:
    """[S] mean of each row's powers that pass both gates of BS.1770; 0 where none does."""

    def mean(mask_SW: np.ndarray) -> np.ndarray:
        return np.sum(windows_SW * mask_SW, axis=1) / np.maximum(mask_SW.sum(axis=1), 1)

    loud_SW = windows_SW > 10.0 ** ((-70.0 + 0.691) / 10.0)
    relative_S = 0.1 * mean(loud_SW)
    return mean(loud_SW & (windows_SW > relative_S[:, None]))


def build_index(
    corpus: Corpus, seconds: float, min_loudness_lufs: float
) -> tuple[Index, tuple[str, ...]]:
    """Every start that `draw` may use for segments of this length.

    Returns:
      the index, and one line for each recording that gives no pair, saying why.

    Raises:
      PairsError: no recording gives a pair, or there are more starts than can be numbered.
    """
    rate, length = corpus.sample_rate, round(seconds * corpus.sample_rate)
    blocks = hops_covering(length, rate)
    columns: dict[str, list] = {name: [] for name in Index._fields}
    skipped, rows = [], 0
    for recording, power_J in enumerate(corpus.power_R):
        hop_S = np.flatnonzero(segment_loudness(power_J, blocks) >= min_loudness_lufs)
        before_S = np.searchsorted(hop_S, hop_S - blocks, side="right")
        after_S = np.searchsorted(hop_S, hop_S + blocks, side="left")
        partners_S = before_S + len(hop_S) - after_S
        if not np.any(partners_S > 0):
            have = corpus.length_R[recording] / rate
            reason = f"no two separate segments of {seconds:g} s at {min_loudness_lufs:g} LUFS"
            skipped.append(f"{corpus.talker_R[recording]}: {reason} in {have:.1f} s")
            continue
        # Rows without a partner fall out; being a partner is mutual, so those left keep theirs.
        keep_S = partners_S > 0
        kept_before = np.concatenate([[0], np.cumsum(keep_S)])
        columns["hop_V"].append(hop_S[keep_S])
        columns["before_V"].append(kept_before[before_S][keep_S])
        columns["after_V"].append(kept_before[after_S][keep_S])
        columns["first_R"].append(rows)
        columns["count_R"].append(int(keep_S.sum()))
        columns["recording_R"].append(recording)
        columns["cumulative_R"].append(corpus.weight_R[recording])
        rows += int(keep_S.sum())
        if rows > MAX_ROWS:
            raise PairsError(
                f"the corpus of {corpus.seconds() / 3600:,.0f} hours has more than {MAX_ROWS:,} "
                f"starts for segments of {seconds:g} s, one each 100 ms, which is all that an "
                f"index can number ({MAX_ROWS / HOPS_PER_SECOND / 3600:,.0f} hours): take fewer "
                "hours a run, in several sets"
            )
    if rows == 0:
        raise PairsError(f"no pair of {seconds:g} s segments in any recording; {skipped[0]}")
    weight_R = np.array(columns["cumulative_R"])
    arrays = {name: np.concatenate(columns[name]) for name in ("hop_V", "before_V", "after_V")}
    arrays |= {name: np.array(columns[name]) for name in ("first_R", "count_R", "recording_R")}
    arrays = {name: array.astype(np.int32) for name, array in arrays.items()}
    return Index(**arrays, cumulative_R=cumulative(weight_R)), tuple(skipped)


def cumulative(weight_R: np.ndarray) -> np.ndarray:
    """[R] float32 `Index.cumulative_R` of weights; what weighs 0 is never drawn.

    Raises:
      PairsError: nothing weighs anything.
    """
    total_R = np.cumsum(weight_R)
    if total_R[-1] <= 0:
        raise PairsError("none of the recordings to draw from gives a pair: take more talkers")
    return (total_R / total_R[-1]).astype(np.float32)


def _pick(uniform: jax.Array, count: jax.Array) -> jax.Array:
    """floor(uniform * count), kept below count against rounding."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


def draw(
    seed: int | jax.Array | np.ndarray,
    k: jax.Array,
    index: Index,
    *,
    protocol: str,
    different_recordings: bool = False,
    turn: bool = False,
) -> Plan:
    """Example k of a seed.

    Args:
      seed: of the run; 0 <= seed < 2**31.
      k: [] int, the example's number; any k at any time (random access).
      index: from `build_index`.
      protocol: "plain", "coloured", or "mixed" (a fair coin for each example).
      different_recordings: the reference comes from another recording.
      turn: take recordings in turn (k modulo their number), as evaluation does, instead of by
        their weights.

    Returns:
      the Plan; labels and colours are uniform in the unit cube (design section 3).

    Raises:
      PairsError: the two shall be of different recordings, and there is one only.
    """
    index = Index(*(jnp.asarray(x) for x in index))
    key = jax.random.fold_in(jax.random.key(seed), k)
    bands, parameters = len(eq.KINDS), len(eq.PARAMETERS)
    head = OTHER + 1 + AUGMENT
    u = jax.random.uniform(key, (head + 2 * bands * parameters,), jnp.float32)
    count = index.first_R.shape[0]
    by_weight = jnp.minimum(
        jnp.searchsorted(index.cumulative_R, u[RECORDING], side="right"), count - 1
    )
    own = jnp.where(turn, k % count, by_weight).astype(jnp.int32)
    first, rows = index.first_R[own], index.count_R[own]
    input_row = first + _pick(u[INPUT], rows)
    before, after = index.before_V[input_row], index.after_V[input_row]
    partner = _pick(u[REFERENCE], before + rows - after)
    reference_row = first + jnp.where(partner < before, partner, partner - before + after)
    other = own
    if different_recordings:
        if count < 2:
            raise PairsError(
                "data.different_recordings needs 2 recordings that give pairs, there is 1: add "
                "recordings or set it to False"
            )
        other = (own + 1 + _pick(u[OTHER], jnp.asarray(count - 1))) % count
        reference_row = index.first_R[other] + _pick(u[REFERENCE], index.count_R[other])
    label_KP, colour_KP = u[head:].reshape(2, bands, parameters)
    coin = {"plain": 0.0, "coloured": 1.0, "mixed": 0.5}[protocol]
    colour_KP = jnp.where(u[COIN] < coin, colour_KP, without_gain(colour_KP))
    return Plan(
        input_row,
        reference_row,
        index.recording_R[own],
        index.recording_R[other],
        index.hop_V[input_row],
        index.hop_V[reference_row],
        label_KP,
        colour_KP,
        u[OTHER + 1 : head],
    )


def without_gain(unit_KP: jax.Array) -> jax.Array:
    """The same place in the unit cube with every gain at 0 dB."""
    return unit_KP.at[..., 1].set(0.5)


def settings(table: eq.EqTable, unit_KP: jax.Array, sample_rate: int) -> eq.EqParams:
    """What stands at a place of the unit cube, at this rate: frequencies held to 0.45 of it."""
    return eq.limit_to_rate(eq.from_unit(table, unit_KP), sample_rate)[0]


def concatenate(first: eq.EqParams, second: eq.EqParams) -> eq.EqParams:
    """Two EQs in a row as one cascade: [..., K1] and [..., K2] -> [..., K1 + K2]."""
    return eq.EqParams(
        *(jnp.concatenate([a, b], axis=-1) for a, b in zip(first, second, strict=True))
    )


def filter_circular(
    samples_T: jax.Array, params: eq.EqParams, *, sample_rate: int, context: int
) -> jax.Array:
    """A segment filtered exactly, by one circular FFT over its context and itself.

    The filter's ring runs round the circle into the context, which is thrown away. With 1.5 s of
    context the error on speech, against a filter over the whole recording, was at most -108 dB of
    the segment's peak for 150 random pairs of the paper's table, and -110 dB for its worst single
    EQ (low shelf, 30 Hz, +10 dB, Q 10). Colour and label both in that corner: -68 dB; -99 dB with
    2 s of context.

    Args:
      samples_T: [context + T] the segment with what came before it in the recording.
      params: [K] or [2 K] bands, kinds repeating as in `eq.KINDS`.
      sample_rate: in Hz, static.
      context: samples of context at the front, static.

    Returns:
      [T] float32.
    """
    length = samples_T.shape[-1]
    freq_hz_F = jnp.asarray(np.fft.rfftfreq(length, 1.0 / sample_rate), jnp.float32)
    kinds = eq.KINDS * (params.freq_hz.shape[-1] // len(eq.KINDS))
    response_F = biquad.cascade_complex(
        freq_hz_F, params.freq_hz, params.gain_db, params.q, kinds=kinds, sample_rate=sample_rate
    )
    spectrum_F = jnp.fft.rfft(samples_T) * response_F
    return jnp.fft.irfft(spectrum_F, length)[context:]


def render(
    input_T: jax.Array,
    reference_T: jax.Array,
    plan: Plan,
    *,
    table: eq.EqTable,
    protocol: str,
    sample_rate: int,
    context: int,
) -> tuple[jax.Array, jax.Array]:
    """The two recordings of a pair, filtered exactly.

    Args:
      input_T, reference_T: [context + T] dry audio.
      plan, table, protocol: what to put on it; in "plain" the input is not even transformed.

    Returns:
      input_T, reference_T: [T] each: the colour is on both, the label on the reference alone.
    """
    label = settings(table, plan.label_KP, sample_rate)
    if protocol == "plain":
        input_T, on_reference = input_T[context:], label
    else:
        colour = settings(table, plan.colour_KP, sample_rate)
        input_T = filter_circular(input_T, colour, sample_rate=sample_rate, context=context)
        on_reference = concatenate(colour, label)
    reference_T = filter_circular(
        reference_T, on_reference, sample_rate=sample_rate, context=context
    )
    return input_T, reference_T


def fetch_stored(
    corpus: Corpus, plan: Plan, seconds: float, context_seconds: float
) -> tuple[np.ndarray, ...]:
    """The dry audio of a batch of plans as it is stored, read on the host.

    Args:
      plan: leaves with a leading batch axis [B], numpy.

    Returns:
      input_BT, reference_BT: int16 [B, context + T], zeros before a recording's start; then
        input_B, reference_B: float32, what brings each to -23 LUFS.
    """
    rate = corpus.sample_rate
    context, length = round(context_seconds * rate), round(seconds * rate)

    def read(recording_B: np.ndarray, hop_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        out_BT = np.empty((len(recording_B), context + length), np.int16)
        for b, (recording, start) in enumerate(zip(recording_B, hop_B, strict=True)):
            begin = first_sample(int(start), rate) - context
            out_BT[b] = corpus.stored(int(recording), begin, context + length)
        return out_BT, np.array([corpus.scale(int(r)) for r in recording_B], np.float32)

    input_BT, input_B = read(np.asarray(plan.input_recording), np.asarray(plan.input_hop))
    reference_BT, reference_B = read(
        np.asarray(plan.reference_recording), np.asarray(plan.reference_hop)
    )
    return input_BT, reference_BT, input_B, reference_B


def fetch(
    corpus: Corpus, plan: Plan, seconds: float, context_seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """`fetch_stored` at -23 LUFS: input_BT, reference_BT, float32 [B, context + T]."""
    input_BT, reference_BT, *scales = fetch_stored(corpus, plan, seconds, context_seconds)
    input_B, reference_B = scales
    return input_BT * input_B[:, None], reference_BT * reference_B[:, None]
