"""Every config, and every way of rendering, takes steps of training."""

import importlib.util

import numpy as np
import pytest
from test_train import CONFIGS, TINY, losses, silent

from eqst import config, train, trials


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


# The others' programs take as long to compile, and are of the same making.
QUICK = ("db_mel_pm", "pooled")
EVERY_CONFIG = [
    pytest.param(file, id=file.stem, marks=[] if file.stem in QUICK else [pytest.mark.long])
    for file in CONFIGS
]


@pytest.mark.parametrize("file", EVERY_CONFIG)
def test_every_config_takes_steps_and_its_loss_is_finite(file, cache, tmp_path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config()
    settings.update_from_flattened_dict(
        TINY | {"train.steps": 2, "data.sources": ("synthetic",), "data.source_weights": (1.0,)}
    )
    settings.data.cache_dir = str(cache)
    state = train.train(config.validate(settings), tmp_path, silent)
    assert int(state.step) == 2
    assert np.isfinite(losses(tmp_path)).all() and len(losses(tmp_path)) == 2
    run = trials.open_run(tmp_path)
    assert run.config == config.validate(settings)


@pytest.mark.long
@pytest.mark.parametrize(
    ("rendering", "pipeline"), [("host", "tfdata"), ("device", "tfdata"), ("exact", "resident")]
)
def test_every_rendering_trains(rendering, pipeline, configure, cache, tmp_path):
    if pipeline == "tfdata":
        pytest.importorskip("tensorflow", reason="tf.data needs the extra [data]")
    changes = TINY | {"data.rendering": rendering, "data.pipeline": pipeline, "train.steps": 2}
    train.train(configure(changes | {"data.cache_dir": str(cache)}), tmp_path, silent)
    assert np.isfinite(losses(tmp_path)).all() and len(losses(tmp_path)) == 2
