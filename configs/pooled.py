"""Ours: pooled statistics of both recordings, a residual MLP, continuous settings.

python -m eqst.train --config=configs/pooled.py --workdir=runs/pooled
"""

from eqst import recipes


def get_config():
    """`recipes.pooled`, trained for longer."""
    settings = recipes.pooled()
    settings.train.steps = 16000
    return settings
