"""What others would use for the same work, as their users call it; for `eqst.speed` alone.

Responses from filter coefficients (in JAX, dasp-pytorch, scipy), the encoder and predictor in
PyTorch, and matchering as a process of its own. None of it is a dependency: what is not installed
(the extra [rivals] has all of it) is left out of the comparison.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eqst import biquad, eq
from eqst.config import Config

Bands = tuple[Any, ...]  # frequency in Hz, gain in dB, q; [K] or [B, K] each

# matchering's process: target, reference, result.
MATCHERING = (
    "import sys, matchering as m; "
    "m.process(target=sys.argv[1], reference=sys.argv[2], results=[m.pcm16(sys.argv[3])])"
)


def installed(name: str) -> bool:
    """Whether a package is there, without importing it."""
    return importlib.util.find_spec(name) is not None


def _coefficients(bands: Bands, sample_rate: float) -> tuple[jax.Array, jax.Array]:
    """[K, 3] numerators and denominators of one EQ, in float32 by the Audio EQ Cookbook."""
    numerators, denominators = [], []
    for k, kind in enumerate(eq.KINDS):
        freq_hz, gain_db, q = (x[k] for x in bands)
        a, w0 = 10.0 ** (gain_db / 40.0), 2.0 * math.pi * freq_hz / sample_rate
        alpha, cos = jnp.sin(w0) / (2.0 * q), jnp.cos(w0)
        if kind == biquad.PEAKING:
            num = (1.0 + alpha * a, -2.0 * cos, 1.0 - alpha * a)
            den = (1.0 + alpha / a, -2.0 * cos, 1.0 - alpha / a)
        else:
            sign = 1.0 if kind == biquad.LOW_SHELF else -1.0
            up, down, root = a + 1.0, sign * (a - 1.0), 2.0 * jnp.sqrt(a) * alpha
            num = (
                a * (up - down * cos + root),
                2.0 * a * (down - up * cos),
                a * (up - down * cos - root),
            )
            den = (
                up + down * cos + root,
                -2.0 * (down + up * cos),
                up + down * cos - root,
            )
        numerators.append(jnp.stack(num))
        denominators.append(jnp.stack(den))
    return jnp.stack(numerators), jnp.stack(denominators)


def complex_db(*bands: jax.Array, freq_hz_F: np.ndarray, sample_rate: float) -> jax.Array:
    """[F] dB of one EQ from complex polynomials in 1/z, with bands as an axis."""
    z_F = np.exp(-2j * np.pi * np.asarray(freq_hz_F, np.float64) / sample_rate)
    power_3F = jnp.asarray(z_F[None] ** np.arange(3)[:, None], jnp.complex64)
    num_K3, den_K3 = _coefficients(bands, sample_rate)
    response_KF = (num_K3 @ power_3F) / (den_K3 @ power_3F)
    return 20.0 * jnp.log10(jnp.abs(jnp.prod(response_KF, axis=0)))


def complex_unrolled_db(*bands: jax.Array, freq_hz_F: np.ndarray, sample_rate: float) -> jax.Array:
    """The same band by band, in the form that XLA makes one loop of: the fastest that we found."""
    z_F = np.exp(-2j * np.pi * np.asarray(freq_hz_F, np.float64) / sample_rate)
    z1_F, z2_F = jnp.asarray(z_F, jnp.complex64), jnp.asarray(z_F**2, jnp.complex64)
    response_F = jnp.ones_like(z1_F)
    for b, a in zip(*_coefficients(bands, sample_rate), strict=True):
        above_F, below_F = (c[0] + c[1] * z1_F + c[2] * z2_F for c in (b, a))
        response_F = response_F * above_F / below_F
    return 20.0 * jnp.log10(jnp.abs(response_F))


def fft_db(*bands: jax.Array, freq_hz_F: np.ndarray, sample_rate: float) -> jax.Array:
    """[F] dB of one EQ as the quotient of FFTs of coefficients; F - 1 bins make a power of two."""
    size = 2 * (len(freq_hz_F) - 1)
    num_KF, den_KF = (jnp.fft.rfft(x, size) for x in _coefficients(bands, sample_rate))
    return 20.0 * jnp.log10(jnp.abs(jnp.prod(num_KF / den_KF, axis=0)))


def scipy_db(bands: Bands, freq_hz_F: np.ndarray, sample_rate: float) -> np.ndarray:
    """[B, F] dB by `scipy.signal.sosfreqz` of float64 sections, one call for each EQ."""
    import scipy.signal

    sos_BK6 = biquad.sos(
        *(np.asarray(x, np.float64) for x in bands), kinds=eq.KINDS, sample_rate=sample_rate
    )
    responses = [scipy.signal.sosfreqz(sos, freq_hz_F, fs=sample_rate)[1] for sos in sos_BK6]
    return 20.0 * np.log10(np.abs(np.stack(responses)))


def dasp(bands: Bands, freq_hz_F: np.ndarray, sample_rate: float, weight_BF: np.ndarray) -> Any:
    """(value, value and gradient): functions of nothing, by dasp-pytorch's biquads and FFTs."""
    import torch
    from dasp_pytorch import signal

    size = 2 * (len(freq_hz_F) - 1)
    fixed = [torch.tensor(np.asarray(x)) for x in bands]
    weight = torch.tensor(weight_BF)

    def response_db(freq_hz: Any, gain_db: Any, q: Any) -> Any:
        sections = [
            torch.cat(
                signal.biquad(gain_db[:, k], freq_hz[:, k], q[:, k], sample_rate, kind), dim=-1
            )
            for k, kind in enumerate(eq.KINDS)
        ]
        response = signal.fft_sosfreqz(torch.stack(sections, dim=1), n_fft=size)
        return 20.0 * torch.log10(torch.abs(response))

    def value() -> np.ndarray:
        with torch.no_grad():
            return response_db(*fixed).numpy()

    def gradient() -> tuple[np.ndarray, ...]:
        leaves = [x.clone().requires_grad_() for x in fixed]
        (weight * response_db(*leaves)).sum().backward()
        return tuple(x.grad.numpy() for x in leaves)

    return value, gradient


def torch_network(config: Config, params: dict[str, Any], *, channels_last: bool) -> Any:
    """The network of a mel config (learned comparison, grid head) in PyTorch, with our parameters.

    Args:
      config: `features.kind` mel, `model.comparison` learned, `model.head` grid.
      params: from `predictor.init`.
      channels_last: PyTorch's memory format of that name, which its convolutions may prefer.

    Returns:
      torch.nn.Module: (input [B, N, M], reference [B, N, M]) -> logits [B, K, sizes].
    """
    import torch
    from torch.nn import functional

    model, bands = config.model, len(eq.KINDS)

    def linear(leaf: dict[str, Any]) -> Any:
        layer = torch.nn.Linear(*leaf["kernel"].shape)
        _put(layer.weight, np.asarray(leaf["kernel"]).T)
        _put(layer.bias, leaf["bias"])
        return layer

    def norm(leaf: dict[str, Any]) -> Any:
        layer = torch.nn.LayerNorm(leaf["scale"].shape[0], eps=1e-6)
        _put(layer.weight, leaf["scale"])
        _put(layer.bias, leaf["bias"])
        return layer

    def convolution(leaf: dict[str, Any], stride: int) -> Any:
        time, mel, inputs, outputs = leaf["kernel"].shape
        layer = torch.nn.Conv2d(inputs, outputs, (time, mel), stride=(stride, 1))
        _put(layer.weight, np.asarray(leaf["kernel"]).transpose(3, 2, 0, 1))
        _put(layer.bias, leaf["bias"])
        return layer

    def numbered(tree: dict[str, Any]) -> list[Any]:
        return [tree[str(i)] for i in range(len(tree))]

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = numbered(params["encoder"]["layers"])
            self.convolutions = torch.nn.ModuleList(
                convolution(x, stride) for x, stride in zip(layers, model.stride_time, strict=True)
            )
            self.first = linear(params["comparison"]["first"])
            self.second = linear(params["comparison"]["second"])
            tail = params["predictor"]
            self.enter, self.head = linear(tail["enter"]), linear(tail["head"])
            self.norms = torch.nn.ModuleList(norm(x) for x in numbered(tail["norms"]))
            self.blocks = torch.nn.ModuleList(linear(x) for x in numbered(tail["blocks"]))

        def encode(self, x: Any) -> Any:
            x = x[:, None]
            for layer in self.convolutions:
                (time, mel), stride, frames = layer.kernel_size, layer.stride[0], x.shape[2]
                padding = max((-(-frames // stride) - 1) * stride + time - frames, 0)
                sides = ((mel - 1) // 2, mel // 2, padding // 2, padding - padding // 2)
                x = functional.leaky_relu(layer(functional.pad(x, sides)))
            return x.mean(dim=2)

        def forward(self, input_BNM: Any, reference_BNM: Any) -> Any:
            count = len(input_BNM)
            both = self.encode(torch.cat([input_BNM, reference_BNM]))
            both = torch.cat([both[:count], both[count:]], dim=1).transpose(1, 2)
            fed = self.second(functional.leaky_relu(self.first(both))).transpose(1, 2)
            x = self.enter(fed.reshape(count, -1))
            gelu = functools.partial(functional.gelu, approximate="tanh")
            for layer_norm, block in zip(self.norms, self.blocks, strict=True):
                x = x + block(gelu(layer_norm(x)))
            return self.head(gelu(x)).reshape(count, bands, -1)

    network = Network()
    return network.to(memory_format=torch.channels_last) if channels_last else network


def _put(parameter: Any, values: Any) -> None:
    import torch

    with torch.no_grad():
        parameter.copy_(torch.tensor(np.array(values, np.float32)))


def torch_step(config: Config, network: Any, seen: Any) -> Callable[[], None]:
    """One AdamW update of `torch_network` on a fixed batch, cross-entropy on the grids alone.

    Less than our step does, which also has the response in its loss and an average of the weights.

    Args:
      seen: `batches.Seen` of mel features.
    """
    import torch
    from torch.nn import functional

    sizes = eq.grid_sizes(eq.table(config.eq_table))
    sounds = [torch.tensor(np.array(x)) for x in seen[:2]]
    unit_BKP = np.array(seen.label_BKP)
    labels = [
        torch.tensor(np.abs(np.asarray(grid)[None, None] - unit_BKP[..., p, None]).argmin(-1))
        for p, grid in enumerate(eq.grid_units(eq.table(config.eq_table)))
    ]
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.train.learning_rate)

    def step() -> None:
        optimiser.zero_grad()
        parts = network(*sounds).split(sizes, dim=-1)
        loss = sum(
            functional.cross_entropy(part.flatten(0, 1), label.flatten())
            for part, label in zip(parts, labels, strict=True)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.clip_norm)
        optimiser.step()

    return step


def matchering_command(target: str, reference: str, result: str) -> list[str]:
    """The command line of a process that matches one file with matchering."""
    return [sys.executable, "-c", MATCHERING, target, reference, result]
