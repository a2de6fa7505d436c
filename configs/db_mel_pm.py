"""The paper's proposal: dB mel features and a learned comparison.

python -m eqst.train --config=configs/db_mel_pm.py --workdir=runs/db_mel_pm

100 seconds where fifteen share an H100, 15 to 25 minutes of two x86-64 cores. On the ablation's
data (half synthetic, half permissive) 2.08 dB at 3 s on the held-out talkers, with one fifth of the
train talkers left out: `learning rate x 3` in colab/results/ablation.md.
"""

from eqst import recipes


def get_config():
    """`recipes.paper` is this variant."""
    return recipes.paper()
