"""The paper's proposal: dB mel features and a learned comparison.

python -m eqst.train --config=configs/db_mel_pm.py --workdir=runs/db_mel_pm
"""

from eqst import config


def get_config():
    """`config.paper` is this variant."""
    return config.paper()
