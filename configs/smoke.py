"""The main job: `pooled` on synthetic talkers alone, five minutes of two cores.

python -m eqst.train --config=configs/smoke.py --workdir=runs/smoke
"""

import pathlib
import runpy


def get_config():
    """Those of the file beside this one, wherever the command is started."""
    return runpy.run_path(str(pathlib.Path(__file__).with_name("pooled.py")))["get_config"]()
