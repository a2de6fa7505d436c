"""The main job: `pooled` on synthetic talkers alone, five minutes of two cores.

python -m eqst.train --config=configs/smoke.py --workdir=runs/smoke

2.09 dB at 3 s on held-out real talkers (colab/results/smoke_dev.json, its best step, 5,000).
"""

from eqst import recipes


def get_config():
    """`recipes.pooled`, short, with a small evaluation."""
    settings = recipes.pooled()
    settings.train.steps = 6000
    settings.evaluation.seconds = (3.0, 10.0)
    settings.evaluation.pairs = 128
    settings.evaluation.tune_pairs = 320
    return settings
