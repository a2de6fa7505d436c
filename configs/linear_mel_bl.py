"""The paper's first baseline: linear mel features, latents compared by subtraction.

python -m eqst.train --config=configs/linear_mel_bl.py --workdir=runs/linear_mel_bl

Time as configs/db_mel_pm.py. At a third of its learning rate 2.93 dB at 3 s (mean of five seeds,
`variant` in colab/results/ablation.md).
"""

from eqst import recipes


def get_config():
    """`db_mel_pm` but for the features' scale and the comparison."""
    settings = recipes.paper()
    settings.features.scale = "linear"
    settings.model.comparison = "subtract"
    return settings
