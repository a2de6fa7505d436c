"""Ours: pooled statistics of both recordings, a residual MLP, continuous settings.

python -m eqst.train --config=configs/pooled.py --workdir=runs/pooled
"""

from eqst import config


def get_config():
    """Pooled features, trained on statistics moved by the EQ's band gains."""
    settings = config.default()
    settings.features.kind = "pooled"
    settings.model.comparison = "direct"
    settings.model.head = "continuous"
    settings.data.rendering = "pooled"
    settings.data.warp = 1.2
    settings.data.curve_share = 0.5
    settings.data.noise_share = 0.5
    settings.loss.parameters = 0.24
    settings.loss.gain = 0.005
    settings.train.batch_size = 256
    settings.train.steps = 12000
    return settings
