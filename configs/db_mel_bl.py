"""The paper's second baseline: dB mel features, latents compared by subtraction.

python -m eqst.train --config=configs/db_mel_bl.py --workdir=runs/db_mel_bl

Time as configs/db_mel_pm.py; 2.13 dB at 3 s, measured in the same way.
"""

from eqst import recipes


def get_config():
    """`db_mel_pm` but for the comparison."""
    settings = recipes.paper()
    settings.model.comparison = "subtract"
    return settings
