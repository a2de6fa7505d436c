"""The main job: `pooled` on synthetic talkers alone, five minutes of two cores.

python -m eqst.train --config=configs/smoke.py --workdir=runs/smoke
"""

from configs import pooled


def get_config():
    return pooled.get_config()
