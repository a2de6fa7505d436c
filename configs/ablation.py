"""The ablation: the paper's three variants, and one factor at a time around its proposal.

    python launch/sweep.py --config=configs/ablation.py:../shared/data/speech \
        --workdir=runs/ablation --data=../shared/data/speech --manifest=../shared/data/manifest.csv

The standard data are synthetic talkers and the permissive train rows of the folder named after the
colon (its manifest.csv lies in the folder above); without a folder, synthetic talkers alone, and
the levels that need recordings are left out. Seed s holds out fold s of five of the train talkers,
so that the validation errors of the five seeds are one cross-validation.

The variants have five seeds, the other levels one (LEVEL_SEEDS: raise it where there is more to
compute with). A run is 128,000 pairs, of one three times that: 100 seconds where fifteen share an
H100, 14 to 22 minutes of two CPU cores. All 54 are ten minutes of the former, or 13 to 20 hours of
the latter. Those in colab/results/ablation.json took nine minutes of an H100 for 36 of them and
about four hours of two cores for the rest.
"""

from eqst import recipes

SEEDS = 5  # of the variants, and folds
LEVEL_SEEDS = 1  # of every other level, at most SEEDS

# Exact rendering knows no augmentation, so it is compared without.
UNAUGMENTED = {"data.warp": 1.0, "data.curve_share": 0.0, "data.noise_share": 0.0}

# The level that `get_config` stands for comes first; the others say what they change.
FACTORS: dict[str, dict[str, dict]] = {
    "variant": {
        "db_mel_pm": {},
        "db_mel_bl": {"model.comparison": "subtract"},
        "linear_mel_bl": {"model.comparison": "subtract", "features.scale": "linear"},
    },
    "head": {
        "grid": {},
        "continuous": {"model.head": "continuous"},
    },
    "loss": {
        "both": {},
        "parameters": {"loss.response": 0.0},
        "response": {"loss.parameters": 0.0},
    },
    "mel bands": {
        "128": {},
        "64": {"features.mel_bands": 64},
        "256": {"features.mel_bands": 256},
    },
    "segment length": {
        "3 s": {},
        "1.5 s": {"data.segment_seconds": (1.5,)},
        "6 s": {"data.segment_seconds": (6.0,)},
        "3, 10, 1.5 and 6 s": {"data.segment_seconds": (3.0, 10.0, 1.5, 6.0)},
    },
    "augmentation": {
        "all": {},
        "none": UNAUGMENTED,
        "without warping": {"data.warp": 1.0},
        "without curves": {"data.curve_share": 0.0},
        "without noise": {"data.noise_share": 0.0},
        "with one-sided noise": {"data.one_sided_noise_share": 0.35},
    },
    "rendering": {
        "device, no augmentation": UNAUGMENTED,
        "exact as on the host, no augmentation": {**UNAUGMENTED, "data.rendering": "exact"},
    },
    "protocol": {
        "mixed": {},
        "plain": {"data.protocol": "plain"},
        "coloured": {"data.protocol": "coloured"},
        "different recordings": {"data.different_recordings": True},
    },
    "ranges": {
        "paper": {},
        "practical": {"eq_table": "practical"},
    },
    "optimisation": {
        "as it is": {},
        "learning rate x 1/3": {"train.learning_rate": 3e-4},
        "learning rate x 3": {"train.learning_rate": 3e-3},
        "steps x 3": {"train.steps": 3},
    },
    "capacity": {
        "512 hidden, 20 channels": {},
        "256 hidden": {"model.hidden": 256},
        "1024 hidden": {"model.hidden": 1024},
    },
    "baseline variants": {
        "db_mel_bl": {"model.comparison": "subtract"},
        "db_mel_bl, learning rate x 1/3": {
            "model.comparison": "subtract",
            "train.learning_rate": 3e-4,
        },
        "db_mel_bl, learning rate x 3": {
            "model.comparison": "subtract",
            "train.learning_rate": 3e-3,
        },
        "db_mel_bl, 1024 hidden": {"model.comparison": "subtract", "model.hidden": 1024},
    },
    "comparison, learning rate x 1/3": {
        "subtraction": {"model.comparison": "subtract", "train.learning_rate": 3e-4},
        "learned": {"train.learning_rate": 3e-4},
    },
    "comparison, learning rate x 3": {
        "subtraction": {"model.comparison": "subtract", "train.learning_rate": 3e-3},
        "learned": {"train.learning_rate": 3e-3},
    },
    "comparison, mixed lengths": {
        "subtraction": {
            "model.comparison": "subtract",
            "data.segment_seconds": (3.0, 10.0, 1.5, 6.0),
        },
        "learned": {"data.segment_seconds": (3.0, 10.0, 1.5, 6.0)},
    },
    "linear features": {
        "linear_mel_bl": {"model.comparison": "subtract", "features.scale": "linear"},
        "learning rate x 1/3": {
            "model.comparison": "subtract",
            "features.scale": "linear",
            "train.learning_rate": 3e-4,
        },
        "learning rate x 3": {
            "model.comparison": "subtract",
            "features.scale": "linear",
            "train.learning_rate": 3e-3,
        },
        "learned comparison": {"features.scale": "linear"},
    },
    "comparison, 1024 hidden": {
        "subtraction": {"model.comparison": "subtract", "model.hidden": 1024},
        "learned": {"model.hidden": 1024},
    },
    "normalisation, db_mel_pm": {
        "with": {},
        "without": {"features.normalise": False},
    },
    "normalisation, db_mel_bl": {
        "with": {"model.comparison": "subtract"},
        "without": {"features.normalise": False, "model.comparison": "subtract"},
    },
    "normalisation, linear_mel_bl": {
        "with": {"model.comparison": "subtract", "features.scale": "linear"},
        "without": {
            "features.normalise": False,
            "model.comparison": "subtract",
            "features.scale": "linear",
        },
    },
    "comparison, without normalisation": {
        "subtraction": {"features.normalise": False, "model.comparison": "subtract"},
        "learned": {"features.normalise": False},
    },
}

# What takes recordings: which kind, and how much of it. A seed's fold leaves four fifths.
SYNTHETIC = {"data.sources": ("synthetic",), "data.source_weights": (1.0,)}
PERMISSIVE = {"data.source_weights": (1.0, 0.0)}
DATA: dict[str, dict[str, dict]] = {
    "data": {
        "permissive and synthetic": {},
        "synthetic": SYNTHETIC,
        "permissive": PERMISSIVE,
        "all real": {**PERMISSIVE, "data.permissive_only": False},
        "all real and synthetic": {"data.permissive_only": False},
    },
    "amount of real speech": {
        "four fifths of the permissive": PERMISSIVE,
        "half of the permissive": {**PERMISSIVE, "data.folds": 2},
    },
    "amount of synthetic speech": {
        "four fifths of 320 talkers": SYNTHETIC,
        "four fifths of 32 talkers": {**SYNTHETIC, "data.synthetic_talkers": 32},
    },
}

# Here a level says a factor of what `get_config` has.
TIMES = ("train.steps",)


def get_config(folder=""):
    """`db_mel_pm` on the standard data."""
    settings = recipes.paper()
    if folder:
        settings.data.sources = (f"folder:{folder}", "synthetic")
        settings.data.source_weights = (0.5, 0.5)
        settings.data.manifest = f"{folder}/../manifest.csv"
        settings.data.permissive_only = True
    settings.data.folds = SEEDS
    # One budget for all, 128,000 pairs, and the learning rate that was the variants' before it.
    settings.train.batch_size, settings.train.steps = 64, 2000
    settings.train.learning_rate = 1e-3
    settings.train.eval_every = 1000
    settings.train.checkpoint_every = 500
    settings.evaluation.seconds = (3.0, 10.0)
    settings.evaluation.pairs = 400
    return settings


def sweep(folder=""):
    """Yields (factor, level, seed, changes): the variants first, then the rest seed by seed, so
    that a sweep stopped early has fewer seeds of all of it. What is a variant too has its seeds."""
    variants = {"variant": FACTORS["variant"]}
    base = get_config(folder)
    others = {name: levels for name, levels in FACTORS.items() if name != "variant"}
    if folder:
        others |= DATA
    for factors in (variants, others):
        for seed in range(SEEDS):
            for factor, levels in factors.items():
                for level, changes in levels.items():
                    if seed < LEVEL_SEEDS or changes in FACTORS["variant"].values():
                        yield factor, level, seed, _completed(changes, base, seed)


def _completed(changes, base, seed):
    """The changes with their fold, and with numbers in place of factors."""
    changes = dict(changes)
    for key in TIMES:
        if key in changes:
            changes[key] *= base.train[key.removeprefix("train.")]
    folds = changes["data.folds"] if "data.folds" in changes else SEEDS
    return {**changes, "data.fold": seed % folds}
