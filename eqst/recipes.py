"""What several config files share; each of configs/ starts from one of these."""

from __future__ import annotations

from ml_collections import config_dict

from eqst import config


def _augmented() -> config_dict.ConfigDict:
    """The defaults with the augmentation that all models share: data is the limit (section 5)."""
    settings = config.default()
    settings.data.warp = 1.2
    settings.data.curve_share = 0.5
    settings.data.noise_share = 0.5
    return settings


def paper() -> config_dict.ConfigDict:
    """What the paper's variants share: augmentation and one budget; their files start here.

    The learning rate is from the ablation (colab/results/ablation.json; one seed).
    """
    settings = _augmented()
    settings.train.batch_size = 64
    settings.train.steps = 2000
    settings.train.learning_rate = 3e-3
    settings.train.ema_decay = 0.995
    return settings


def pooled() -> config_dict.ConfigDict:
    """The settings of our own model; its config files start from these."""
    settings = _augmented()
    settings.features.kind = "pooled"
    settings.model.comparison = "direct"
    settings.model.head = "continuous"
    settings.data.rendering = "pooled"
    # The first is what the evaluation during training uses.
    settings.data.segment_seconds = (3.0, 10.0, 1.5, 6.0)
    settings.data.one_sided_noise_share = 0.35
    settings.data.gate_share = 0.25
    settings.loss.parameters = 0.24
    settings.loss.gain = 0.005
    settings.train.batch_size = 256
    settings.train.log_every = 200
    settings.train.eval_every = 1000
    settings.train.checkpoint_every = 1000
    return settings
