"""The paper's second baseline: dB mel features, latents compared by subtraction.

python -m eqst.train --config=configs/db_mel_bl.py --workdir=runs/db_mel_bl
"""

from eqst import recipes


def get_config():
    """`db_mel_pm` but for the comparison."""
    settings = recipes.paper()
    settings.model.comparison = "subtract"
    return settings
