"""How every entry point starts and fails: quiet logs, one line for a mistake, an exit code."""

from __future__ import annotations

import difflib
import errno
import io
import os
import re
import runpy
import shlex
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from eqst.files import cache_folder

# C++ libraries read these when they are loaded, so they are set before anything is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

HELP = ("--help", "-help", "-h", "-?", "--helpshort", "--helpfull")


def said(error: BaseException) -> str:
    """What an error says, for a person; of the system's, the file first."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        way_out = "make room" if full else "check the path and its permissions"
        text = f"{os.fspath(error.filename)!r}: {error.strerror}: {way_out}"
    return text or type(error).__name__


def _exit(name: str, text: str) -> NoReturn:
    r"""Ends with one line on stderr: no line breaks, real ones or a quoted message's "\n"."""
    text = "".join(c if c.isprintable() or c in "\n\r\t" else repr(c)[1:-1] for c in text)
    text = " ".join(text.replace("\\n", " ").split())
    if len(text) > 580:  # some value was a novel; what to do about it is said at the end
        text = f"{text[:280]} .. {text[-280:]}"
    sys.exit(f"{name}: {text}")


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
    return shlex.join([*_called(name), *sys.argv[1:]])


def _called(name: str) -> list[str]:
    """How a module ("eqst.train") or a script ("launch/sweep.py") is started."""
    return ["python", name] if name.endswith(".py") else ["python", "-m", name]


def start(name: str, define_flags: Callable[[], None], body: Callable[[], None]) -> None:
    """Parses the flags and runs `body`; never a traceback for a user's mistake.

    absl's own `app.run` would end with two lines for a wrong flag, and with 1 after --help.

    Args:
      name: of the module, for messages ("eqst.train").
      define_flags: called before parsing; defining flags here keeps imports free of them.
      body: the command. ValueError, OSError, ImportError, FloatingPointError and an exhausted
        memory become one line on stderr and exit code 1; SystemExit passes.
    """
    from absl import flags, logging

    for stream in (sys.stdout, sys.stderr):  # a file may be named in bytes that are no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    before = set(flags.FLAGS)
    define_flags()
    own = [flag for flag in flags.FLAGS if flag not in before]
    if any(word in HELP for word in sys.argv[1:]):
        print(_help(name, sys.modules[body.__module__].__doc__ or "", own))
        return
    mistake = _parse(own)
    if mistake:
        _exit(name, mistake)
    keep_compiled()
    logging.set_verbosity(logging.WARNING)  # Orbax tells absl's log of every step it takes
    try:
        body()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _exit(name, said(error))
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _exit(name, f"out of memory, make batches smaller ({said(error)[:200]})")
    except KeyboardInterrupt:
        _exit(name, "interrupted")


# ---- parsing


def _parse(own: list[str]) -> str | None:
    """Parses sys.argv; what is wrong with it, in one line, or None."""
    from absl import flags

    words = sys.argv[1:]
    unexpected = "unexpected argument {!r}: options look like --name=value, --help lists them"
    for before, word in zip(["", *words], words, strict=False):
        if not word.startswith("-") and not _awaits_value(before):
            return unexpected.format(word)
    has_config = "config" in own
    mistake = next(_config_mistakes(words), None) if has_config else None
    if mistake:
        return mistake
    try:
        rest = flags.FLAGS(sys.argv)
    except flags.Error as error:
        return _wrong_flag(error)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:  # ml_collections'
        return said(error)
    if len(rest) > 1:
        return unexpected.format(rest[1])
    for name in own:
        if flags.FLAGS[name].present and flags.FLAGS[name].value in ("", []):
            return f"--{name} is empty: give it a value, or leave it out"
    return None


def _awaits_value(word: str) -> bool:
    """Whether the word after this one is its value: `--name value`."""
    from absl import flags

    name = word.lstrip("-")
    if not word.startswith("-") or "=" in word or not name:
        return False
    for candidate in (name, name.removeprefix("no")):
        if candidate in flags.FLAGS and flags.FLAGS[candidate].boolean:
            return False
    return True


def _wrong_flag(error: BaseException) -> str:
    """absl's complaint in our words."""
    from absl import flags

    text = re.sub(r"\s*\n\s*", " ", str(error))
    if isinstance(error, flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, list(flags.FLAGS), n=1)
        hint = f"did you mean --{near[0]}? " if near else ""
        return f"unknown option --{error.flagname}: {hint}--help lists the options"
    missing = re.findall(r"Flag --(\S+) must have a value other than None", text)
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        return f"{names} missing: give {' '.join(f'--{name}=..' for name in missing)} (see --help)"
    wrong = re.fullmatch(r"flag --([^=]+)=(.*?): (.*)", text)
    if wrong and wrong[1] in flags.FLAGS:
        name, value, reason = wrong.groups()
        parser = flags.FLAGS[name].parser
        if isinstance(parser, flags.BooleanParser):
            reason = "give true or false"
        elif parser.syntactic_help:
            reason = f"give {parser.syntactic_help}"
        return f"--{name}={value}: {reason}"
    return f"{text.rstrip('.')}; --help lists the options"


# ---- config files and --config.key=value, checked before ml_collections reports them its way


def _config_path(words: list[str]) -> str | None:
    """The word given for --config, or None."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if re.fullmatch(r"--?config", word):
            return after
        if re.match(r"--?config=", word):
            return word.partition("=")[2]
    return None


def _config_file_mistake(path: str) -> str | None:
    """What is wrong with the file, which is run here once before ml_collections does."""
    file, colon, argument = path.partition(":")
    if not file:
        return "--config is empty: name a config file, as in --config=configs/smoke.py"
    if os.path.isdir(file):
        return f"--config={file} is a folder: name a config file in it"
    if not os.path.exists(file):
        return f"--config={file} is not there: check the path, or take one of configs/"
    try:
        inside = runpy.run_path(file)
        if "get_config" not in inside:
            return f"--config={file} has no function get_config: see configs/ for how it looks"
        made = inside["get_config"](*([argument] if colon else []))
    except Exception as error:  # it is a program, which may raise anything
        return f"--config={path} fails ({type(error).__name__}: {said(error)}): mend it"
    if not hasattr(made, "to_dict"):
        return f"--config={path}: get_config() gives a {type(made).__name__}, not a ConfigDict"
    return None


def _config_mistakes(words: list[str]) -> Iterator[str]:
    path = _config_path(words)
    mistake = None if path is None else _config_file_mistake(path)
    if mistake:
        yield mistake
    from eqst import config

    known = _flat(config.as_dict(config.Config()), "")
    for word in words:
        override = re.match(r"--?(?:no)?config\.([^=]*)", word)
        if override and override[1] not in known:
            yield _unknown_setting(override[1], known)


def _flat(values: dict[str, Any], prefix: str) -> list[str]:
    keys = []
    for key, value in values.items():
        inside = isinstance(value, dict)
        keys += _flat(value, f"{prefix}{key}.") if inside else [f"{prefix}{key}"]
    return keys


def _unknown_setting(key: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return (
            f"--config.{key} is a group of settings: set one of it, as in --config.{inside[0]}=.."
        )

    def likeness(name: str) -> float:
        """By the whole name, or by its last part where the group is wrong or left out."""
        pairs = ((key, name), (key.rpartition(".")[2], name.rpartition(".")[2]))
        whole, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return max(whole, last - 0.05)

    nearest = sorted(known, key=likeness, reverse=True)[:3]
    return f"unknown setting {key!r}: the nearest are {', '.join(nearest)}"


# ---- help


def _help(name: str, about: str, own: list[str]) -> str:
    from absl import flags

    lines = [" ".join(_called(name)), "", about.strip(), ""]
    for flag in (flags.FLAGS[flag] for flag in own):
        label = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}="
        bounds = flag.parser.syntactic_help
        facts = [bounds] if bounds else []
        if flag.default not in (None, "", [], False):
            facts.append(f"default {flag.default}")
        text = flag.help + (f" ({'; '.join(facts)})" if facts else "")
        lines += textwrap.wrap(
            f"{label:<15} {text}", 96, initial_indent="  ", subsequent_indent=" " * 18
        )
    return "\n".join(lines)
