"""How every entry point starts and fails: quiet logs, one line for a mistake, an exit code."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Callable

from eqst.files import cache_folder

# C++ libraries read these when they are loaded, so they are set before anything is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _one_line(error: BaseException) -> str:
    r"""The message without line breaks, real ones or the "\n" of a quoted message."""
    return " ".join(str(error).replace("\\n", " ").split())


def keep_compiled() -> None:
    """Compiled programs are kept for the next process, where nobody has said where to."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = cache_folder() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # then each process compiles for itself
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # A damaged entry or a full disk costs a compilation and is no business of the user's.
    warnings.filterwarnings("ignore", message="Error .* persistent compilation cache")


def line(name: str) -> str:
    """The command as it was given, for beside its results."""
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def start(name: str, define_flags: Callable[[], None], body: Callable[[], None]) -> None:
    """Parses the flags and runs `body`; never a traceback for a user's mistake.

    Args:
      name: of the module, for messages ("eqst.train").
      define_flags: called before parsing; defining flags here keeps imports free of them.
      body: the command. ValueError, OSError, ImportError and FloatingPointError become one line
        on stderr and exit code 1; SystemExit passes.
    """
    from absl import app, logging

    def main(argv: list[str]) -> None:
        keep_compiled()
        # Orbax and JAX tell absl's log of every step they take.
        logging.set_verbosity(logging.WARNING)
        if len(argv) > 1:
            sys.exit(f"{name}: unexpected argument {argv[1]!r}; options look like --name=value")
        try:
            body()
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            sys.exit(f"{name}: {_one_line(error)}")
        except KeyboardInterrupt:
            sys.exit(f"{name}: interrupted")

    def parse(argv: list[str]) -> list[str]:
        # ml_collections raises these for an unknown setting, a wrong type, a missing config file.
        try:
            return app.parse_flags_with_usage(argv)
        except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
            sys.exit(f"{name}: {_one_line(error)}")

    define_flags()
    app.run(main, flags_parser=parse)
