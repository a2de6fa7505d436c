"""The paper's first baseline: linear mel features, latents compared by subtraction.

python -m eqst.train --config=configs/linear_mel_bl.py --workdir=runs/linear_mel_bl

Time as configs/db_mel_pm.py; 2.69 dB at 3 s, measured in the same way (`normalisation,
linear_mel_bl` in colab/results/ablation.md; with normalised features 2.93, mean of five seeds).
"""

from eqst import recipes


def get_config():
    """`db_mel_pm` but for the features, the comparison and the learning rate."""
    settings = recipes.paper()
    settings.features.scale = "linear"
    settings.model.comparison = "subtract"
    settings.features.normalise = False  # linear features are better as they are
    # With normalised features three times as much is no better (-0.05 dB, not clear).
    settings.train.learning_rate = 1e-3
    return settings
