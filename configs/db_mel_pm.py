"""The paper's proposal: dB mel features and a learned comparison.

python -m eqst.train --config=configs/db_mel_pm.py --workdir=runs/db_mel_pm
"""

from eqst import recipes


def get_config():
    """`recipes.paper` is this variant."""
    return recipes.paper()
