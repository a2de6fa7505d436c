"""Ours: pooled statistics of both recordings, a residual MLP, continuous settings.

python -m eqst.train --config=configs/pooled.py --workdir=runs/pooled
"""

from eqst import config


def get_config():
    """`config.pooled`, trained for longer."""
    settings = config.pooled()
    settings.train.steps = 16000
    return settings
