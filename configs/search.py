"""A search round our own model: an example of what a sweep() may be over (launch/README.md).

    python launch/sweep.py --config=configs/search.py --workdir=runs/search --replicas=8 --dry_run

Four factors, each a table with its first level as the base: a grid, a zip, twelve random draws and
named levels. Draws that differ in numbers alone are trained as one program with --replicas.
"""

from eqst import recipes
from eqst.sweeps import spaces

SEEDS = 2
BASE = spaces.named({"as it is": {}})


def get_config():
    """`recipes.pooled`, short, judged by few pairs."""
    settings = recipes.pooled()
    settings.train.steps = 3000
    settings.evaluation.seconds = (3.0,)
    settings.evaluation.pairs = 200
    return settings


def sweep():
    """Yields (factor, level, seed, changes)."""
    network = spaces.grid({"model.hidden": (256, 512), "model.blocks": (1, 2, 3)})
    # Twice the pairs of a step at twice the rate, and so on.
    batch = spaces.zipped(
        {"train.batch_size": (128, 256, 512), "train.learning_rate": (5e-4, 1e-3, 2e-3)}
    )
    optimiser = spaces.random(
        {
            "train.learning_rate": spaces.log_uniform(3e-4, 1e-2),
            "train.weight_decay": spaces.log_uniform(1e-5, 1e-1),
            "train.ema_decay": spaces.choice((0.99, 0.999, 0.9995)),
            "loss.parameters": spaces.uniform(0.0, 1.0),
        },
        count=12,
    )
    data = spaces.named(
        {
            "as it is": {},
            "without augmentation": {
                "data.warp": 1.0,
                "data.curve_share": 0.0,
                "data.noise_share": 0.0,
                "data.one_sided_noise_share": 0.0,
                "data.gate_share": 0.0,
            },
            "one length": {"data.segment_seconds": (3.0,)},
        }
    )
    for factor, levels in (
        ("network", network),
        ("batch", batch),
        ("optimiser", BASE + optimiser),
        ("data", data),
    ):
        yield from spaces.runs(factor, levels, seeds=range(SEEDS))
