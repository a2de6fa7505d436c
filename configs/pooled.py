"""Ours: pooled statistics of both recordings, a residual MLP, continuous settings.

python -m eqst.train --config=configs/pooled.py --workdir=runs/pooled

Five minutes of two x86-64 cores, and the statistics of the segments once before them. With the
permissive talkers beside the synthetic ones 1.91 dB at 3 s on held-out talkers (README).
"""

from eqst import recipes


def get_config():
    """`recipes.pooled`, trained for longer."""
    settings = recipes.pooled()
    settings.train.steps = 16000
    return settings
