"""The Siamese predictor: encoder -> extracted latents -> comparison -> fed latents -> settings.

The only importer of flax. Modules are Flax NNX inside; outside there are two pure functions,
`init` (a plain tree of arrays) and `apply` (one pair of recordings, vmapped at the edge).
Layer counts, kernels and widths of the paper are unknown: those here are ours (design section 4).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from eqst import card, eq, observe, pooled
from eqst.config import Config

Params = dict[str, Any]

# Of the `direct` comparison's standardised numbers, softly.
CLIP = 4.0


class Prediction(NamedTuple):
    """What the network says of one pair.

    Attributes:
      unit_KP: [K, 3] settings in the unit cube (frequency, gain, Q).
      logits: one [K, size] array per parameter (grid head), or () (continuous head).
      extracted_input, extracted_reference: encoder's latents ([2560] at the standard size).
      fed: the comparison's vector, what the MLP is fed.
    """

    unit_KP: jax.Array
    logits: tuple[jax.Array, ...]
    extracted_input: jax.Array
    extracted_reference: jax.Array
    fed: jax.Array


class Normalisation(NamedTuple):
    """Fixed affine map of the features, measured on train: (x - mean) / scale.

    Each is [M] for mel frames, [S + 1, M] for pooled statistics and seconds."""

    mean: jax.Array
    scale: jax.Array


def _strided_conv(x_NMC: jax.Array, kernel_XYCD: jax.Array, stride: int) -> jax.Array:
    """Convolution over (time, mel), 'SAME' padding, strided in time: [ceil(N / stride), M, D]."""
    frames, taps = x_NMC.shape[0], kernel_XYCD.shape[0]
    out = -(-frames // stride)
    before = max((out - 1) * stride + taps - frames, 0) // 2

    def conv(x_NMC: jax.Array, kernel_XYCD: jax.Array, stride: int, padding: Any) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x_NMC[None],
            kernel_XYCD,
            (stride, 1),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )[0]

    def whole(x_NMC: jax.Array, kernel_XYCD: jax.Array) -> jax.Array:
        return conv(x_NMC, kernel_XYCD, stride, "SAME")

    def phases(x_NMC: jax.Array, kernel_XYCD: jax.Array) -> jax.Array:
        """The same as a sum over every stride-th tap and frame, so that no gradient is dilated."""
        mel = kernel_XYCD.shape[1]
        x_NMC = jnp.pad(x_NMC, ((before, taps + stride), (0, 0), (0, 0)))
        parts = []
        for phase in range(min(stride, taps)):
            kernel = kernel_XYCD[phase::stride]
            part_NMC = x_NMC[phase::stride][: out + kernel.shape[0] - 1]
            parts.append(conv(part_NMC, kernel, 1, ((0, 0), ((mel - 1) // 2, mel // 2))))
        return functools.reduce(jnp.add, parts)

    # XLA's CPU backend takes nine times as long for the input's gradient of a strided convolution
    # as for the convolution itself; the first layer's input has no gradient.
    if stride == 1 or x_NMC.shape[-1] == 1:
        return whole(x_NMC, kernel_XYCD)
    return jax.lax.platform_dependent(x_NMC, kernel_XYCD, cpu=phases, default=whole)


def _patch_product(x_NMC: jax.Array, kernel_XYCD: jax.Array, stride: int) -> jax.Array:
    """`_strided_conv` as one product of patches and kernel.

    Where every example has a kernel of its own, a convolution becomes one in groups, which a GPU
    and a CPU take 10 and 4 times as long for as for that of a shared kernel; this is a product of
    matrices either way. With a shared kernel it is as fast on a GPU and half as fast on a CPU.
    """
    frames, bands, _ = x_NMC.shape
    taps, mel, channels, outputs = kernel_XYCD.shape
    out = -(-frames // stride)
    pad = max((out - 1) * stride + taps - frames, 0)
    x_NMC = jnp.pad(x_NMC, ((pad // 2, pad - pad // 2), ((mel - 1) // 2, mel // 2), (0, 0)))
    last = (out - 1) * stride + 1
    patch_NMP = jnp.concatenate(
        [x_NMC[x : x + last : stride, y : y + bands] for x in range(taps) for y in range(mel)],
        axis=-1,
    )
    kernel_PD = kernel_XYCD.reshape(taps * mel * channels, outputs)
    return (patch_NMP.reshape(-1, kernel_PD.shape[0]) @ kernel_PD).reshape(out, bands, outputs)


class _Encoder(nnx.Module):
    """2-D CNN over (time, mel), strided in time alone, averaged over time."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        sizes = [1] + [model.channels] * len(model.stride_time)
        self.dtype = jnp.bfloat16 if model.bfloat16 else jnp.float32
        self.strides = model.stride_time
        self.layers = nnx.List(
            nnx.Conv(sizes[i], sizes[i + 1], (time, mel), rngs=rngs)
            for i, (time, mel) in enumerate(zip(model.kernel_time, model.kernel_mel, strict=True))
        )

    def __call__(self, x_NM: jax.Array, own_kernels: bool) -> jax.Array:
        convolve = _patch_product if own_kernels else _strided_conv
        x_NMC = x_NM[..., None].astype(self.dtype)
        for layer, stride in zip(self.layers, self.strides, strict=True):
            assert layer.bias is not None  # nnx.Conv leaves it out only when told to
            kernel, bias = (x[...].astype(self.dtype) for x in (layer.kernel, layer.bias))
            x_NMC = jax.nn.leaky_relu(convolve(x_NMC, kernel, stride) + bias[None, None])
        # [20, 128] in a row, channel after channel, as in the seed's figures.
        return jnp.mean(x_NMC.astype(jnp.float32), axis=0).T.reshape(-1)


class _Comparison(nnx.Module):
    """The learned comparison: from both latents of a mel band to a signed vector of its size."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        channels = config.model.channels
        self.channels = channels
        self.first = nnx.Linear(2 * channels, 4 * channels, rngs=rngs)
        self.second = nnx.Linear(4 * channels, channels, rngs=rngs)

    def __call__(self, a_L: jax.Array, b_L: jax.Array) -> jax.Array:
        both_MC = jnp.concatenate([x.reshape(self.channels, -1).T for x in (a_L, b_L)], axis=-1)
        return self.second(jax.nn.leaky_relu(self.first(both_MC))).T.reshape(-1)


class _Predictor(nnx.Module):
    """Residual MLP and one linear head for all parameters."""

    def __init__(self, config: Config, fed: int, outputs: int, rngs: nnx.Rngs):
        model = config.model
        self.enter = nnx.Linear(fed, model.hidden, rngs=rngs)
        self.norms = nnx.List(nnx.LayerNorm(model.hidden, rngs=rngs) for _ in range(model.blocks))
        self.blocks = nnx.List(
            nnx.Linear(model.hidden, model.hidden, rngs=rngs) for _ in range(model.blocks)
        )
        self.head = nnx.Linear(
            model.hidden, outputs, kernel_init=nnx.initializers.normal(1e-2), rngs=rngs
        )
        self.dropout = model.dropout

    def __call__(self, fed: jax.Array, key: jax.Array | None) -> jax.Array:
        x_H = self.enter(fed)
        for i, (norm, block) in enumerate(zip(self.norms, self.blocks, strict=True)):
            y_H = block(jax.nn.gelu(norm(x_H)))
            if key is not None and self.dropout > 0:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - self.dropout, y_H.shape)
                y_H = jnp.where(keep, y_H / (1 - self.dropout), 0.0)
            x_H = x_H + y_H
        return self.head(jax.nn.gelu(x_H))


class _Network(nnx.Module):
    """Encoder, comparison and predictor of one variant."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model, spec = config.model, config.features
        outputs = 3 * len(eq.KINDS)
        if model.head == "grid":
            outputs = len(eq.KINDS) * sum(eq.grid_sizes(eq.table(config.eq_table)))
        self.comparison_kind = model.comparison
        if model.comparison == "direct":  # of pooled statistics
            bands = len(pooled.centres_hz(spec, config.data.sample_rate))
            fed = 2 * (2 + len(pooled.QUANTILES)) * bands + 1
        else:
            fed = model.channels * spec.mel_bands
            self.encoder = _Encoder(config, rngs)
        if model.comparison == "learned":
            self.comparison = _Comparison(config, rngs)
        self.predictor = _Predictor(config, fed, outputs, rngs)

    def __call__(
        self,
        input_XM: jax.Array,
        reference_XM: jax.Array,
        length: jax.Array | None,
        key: jax.Array | None,
        own_kernels: bool,
    ) -> tuple[jax.Array, ...]:
        if length is not None:
            a_L, b_L = input_XM[:-1].reshape(-1), reference_XM[:-1].reshape(-1)
            # A statistic far out (another gate, another floor) must not rule the rest.
            fed = CLIP * jnp.tanh(jnp.concatenate([b_L - a_L, (a_L + b_L) / 2]) / CLIP)
            fed = jnp.concatenate([fed, length[None]])
        else:
            a_L, b_L = (self.encoder(x, own_kernels) for x in (input_XM, reference_XM))
            fed = b_L - a_L if self.comparison_kind == "subtract" else self.comparison(a_L, b_L)
        return self.predictor(fed, key), a_L, b_L, fed


def _length(config: Config, input_seconds: jax.Array, reference_seconds: jax.Array) -> jax.Array:
    """[] How much evidence there is: octaves of the lengths' harmonic mean, 0 in the middle of what
    training heard and held to it. (Variances of the two recordings' content add: 1/a + 1/b.)"""
    low, high = min(config.data.segment_seconds), max(config.data.segment_seconds)
    seconds = 2.0 / (1.0 / input_seconds + 1.0 / reference_seconds)
    return jnp.log2(jnp.clip(seconds, low, high)) - 0.5 * math.log2(low * high)


@functools.cache
def _structure(config: Config) -> Any:
    """The network's graph without its arrays."""
    abstract = nnx.eval_shape(lambda: _Network(config, nnx.Rngs(0)))
    return nnx.split(abstract)[0]


def init(config: Config, key: jax.Array) -> Params:
    """Fresh parameters: a plain nested dict of float32 arrays, all its keys strings."""
    network = _Network(config, nnx.Rngs(key))
    return _named(nnx.to_pure_dict(nnx.state(network)))


def _named(tree: dict[Any, Any]) -> Params:
    """The tree with string keys: layers are numbered, and a checkpoint loads with strings."""
    return {str(k): _named(x) if isinstance(x, dict) else x for k, x in tree.items()}


def normalisation_shape(config: Config) -> Normalisation:
    """The normalisation of these settings, with shapes and dtypes in place of arrays."""
    samples = round(max(config.data.segment_seconds) * config.data.sample_rate)
    seen = jax.eval_shape(
        functools.partial(observe.heard, config), jax.ShapeDtypeStruct((samples,), jnp.float32)
    )
    shape = seen.shape[1:] if config.features.kind == "mel" else seen.shape
    leaf: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
    return Normalisation(leaf, leaf)


def check_params(config: Config, params: dict[str, Any], source: str) -> None:
    """Whether what a checkpoint holds is a network of these settings, with its normalisation.

    Raises:
      ValueError: it is another one's, or has a number that is not finite.
    """
    wanted = _shapes(
        {
            "network": jax.eval_shape(functools.partial(init, config), jax.random.key(0)),
            "normalisation": normalisation_shape(config)._asdict(),
        }
    )
    found = _shapes(params)
    for name in sorted(set(wanted) | set(found)):
        here, there = (shapes[name] if name in shapes else None for shapes in (wanted, found))
        if here != there:
            raise ValueError(
                f"{source}: its checkpoint is another model's: {name} is {there or 'absent'} there,"
                f" {here or 'absent'} by the settings: take the checkpoint that belongs to them"
            )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise ValueError(f"{source}: a parameter is not finite: take another run, or train anew")


def _shapes(tree: dict[str, Any]) -> dict[str, str]:
    """[3, 4] and the like, by path; whatever floats a file stores."""
    return {name: str(list(leaf.shape)) for name, leaf in card.named_leaves(tree).items()}


def _decode(config: Config, outputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Head outputs -> unit cube; a grid head's expectation under its softmax (differentiable)."""
    bands = len(eq.KINDS)
    if config.model.head == "continuous":
        return jax.nn.sigmoid(outputs).reshape(bands, 3), ()
    table = eq.table(config.eq_table)
    splits = np.cumsum(eq.grid_sizes(table))[:-1]
    logits = tuple(jnp.split(outputs.reshape(bands, -1), splits, axis=-1))
    unit = [
        jnp.sum(jax.nn.softmax(logit, axis=-1) * jnp.asarray(grid, jnp.float32)[None], axis=-1)
        for logit, grid in zip(logits, eq.grid_units(table), strict=True)
    ]
    return jnp.stack(unit, axis=-1), logits


def apply(
    config: Config,
    params: Params,
    normalisation: Normalisation,
    input_XM: jax.Array,
    reference_XM: jax.Array,
    key: jax.Array | None = None,
    *,
    own_kernels: bool = False,
) -> Prediction:
    """Settings for one pair of feature arrays.

    Args:
      config: static.
      params: from `init`.
      normalisation: of the features.
      input_XM, reference_XM: features from `observe`: [N, M] frames (any number) or [S + 1, M]
        statistics and seconds.
      key: for dropout while training; None afterwards.
      own_kernels: the parameters have an axis that this is vmapped over too: several runs'. The
        same function, computed in another way (see `_patch_product`).
    """
    network = nnx.merge(_structure(config), params)
    length = None
    if config.features.kind == "pooled":
        length = _length(config, input_XM[-1, 0], reference_XM[-1, 0])
    mean_XM, scale_XM = (jnp.atleast_2d(x) for x in normalisation)
    input_XM, reference_XM = ((x - mean_XM) / scale_XM for x in (input_XM, reference_XM))
    outputs, a_L, b_L, fed = network(input_XM, reference_XM, length, key, own_kernels)
    unit_KP, logits = _decode(config, outputs)
    return Prediction(unit_KP, logits, a_L, b_L, fed)


def settings_of_fed(config: Config, params: Params, fed_L: jax.Array) -> eq.EqParams:
    """The predictor alone: settings for one vector that it is fed; arguments as in `apply`."""
    network = nnx.merge(_structure(config), params)
    unit_KP, _ = _decode(config, network.predictor(fed_L, None))
    return eq.from_unit(eq.table(config.eq_table), unit_KP)


def predict_heard(
    config: Config,
    params: Params,
    normalisation: Normalisation,
    input_XM: jax.Array,
    reference_XM: jax.Array,
) -> eq.EqParams:
    """Settings for the features of two recordings; arguments as in `apply`."""
    prediction = apply(config, params, normalisation, input_XM, reference_XM)
    return eq.from_unit(eq.table(config.eq_table), prediction.unit_KP)


def predict_audio(
    config: Config,
    params: Params,
    normalisation: Normalisation,
    input_T: jax.Array,
    reference_T: jax.Array,
) -> eq.EqParams:
    """Settings for two mono recordings at the model's rate, of any length and level."""
    input_XM, reference_XM = observe.heard(config, input_T), observe.heard(config, reference_T)
    return predict_heard(config, params, normalisation, input_XM, reference_XM)
