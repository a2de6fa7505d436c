"""Find the EQ that makes one recording sound like another, and apply it.

python -m eqst.match --input=A.wav --reference=B.wav --output=C.wav [--settings=S.json|S.txt]

The two need not be the same talker or piece. Any format, rate (8 .. 192 kHz) and channel count that
libsndfile reads; the output keeps the input's. Without --output only the settings are found.
"""

import concurrent.futures
import dataclasses
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
from absl import flags

from eqst import analysis, audio, biquad, command, eq, picture, render, settings
from eqst.audio import AudioError
from eqst.settings import Settings

MODEL_RATE = 44_100

Result = TypeVar("Result")

# (input [T], reference [T]), float32 mono at the model's rate -> settings [K] for that rate.
PredictUnit = Callable[[np.ndarray, np.ndarray], eq.EqParams]


@dataclasses.dataclass(frozen=True)
class Match:
    """A match of two recordings, with what it was made from.

    Attributes:
      settings: for the input's own sample rate.
      notes: lines for the user on what had to be changed or watched.
      params: [K] the same EQ at `model_rate`, before rounding.
      input_T, reference_T: what the model heard, mono at `model_rate`.
      model_rate: Hz.
      top_hz: highest frequency both recordings can hold.
    """

    settings: Settings
    notes: tuple[str, ...]
    params: eq.EqParams
    input_T: np.ndarray
    reference_T: np.ndarray
    model_rate: int
    top_hz: float


class Matcher:
    """Predicts the EQ that brings an input to the sound of a reference.

    Args:
      predict_unit: the model, as a function of two mono recordings at `model_rate`.
      table: the EQ space of its settings.
      model_rate: Hz.
    """

    def __init__(
        self,
        predict_unit: PredictUnit,
        *,
        table: eq.EqTable = eq.PAPER,
        model_rate: int = MODEL_RATE,
    ):
        self._predict_unit = predict_unit
        self._table = table
        self._model_rate = model_rate

    @classmethod
    def load(cls, workdir: str | os.PathLike | None = None) -> Self:
        """A matcher with trained weights.

        Args:
          workdir: a run of `eqst.train`, of which the best checkpoint is taken; None takes the
            weights that come with the package (and then needs no Orbax).

        Raises:
          ValueError: no weights there, damaged, or of a format this version does not read.
        """
        # Late imports: flax and a checkpoint reader are not needed to apply settings or to fail.
        import jax

        from eqst import card, checkpoint, observe, predictor, trials

        loaded = card.load_weights() if workdir is None else checkpoint.load(workdir)
        source = "packaged weights" if workdir is None else os.fspath(workdir)
        trained, network, normalisation, *_ = trials.from_loaded(loaded, source)
        run = jax.jit(predictor.predict_heard, static_argnums=0)

        def predict_unit(input_T: np.ndarray, reference_T: np.ndarray) -> eq.EqParams:
            reference_listened = _begin(lambda: observe.listen(trained, reference_T))
            input_XM = observe.listen(trained, input_T)
            return run(trained, network, normalisation, input_XM, reference_listened())

        return cls(
            predict_unit,
            table=eq.table(trained.eq_table),
            model_rate=trained.data.sample_rate,
        )

    def predict(
        self,
        input: np.ndarray,
        reference: np.ndarray,
        sample_rate: int,
        *,
        amount: float = 1.0,
    ) -> Settings:
        """Settings that make `input` sound like `reference`.

        Args:
          input, reference: [samples] or [samples, channels] floats, full scale at 1.0; at least
            1 s each and no quieter than -60 LUFS; they may differ in length and channels.
          sample_rate: of both, 8000 .. 192000 Hz; the settings are for this rate.
          amount: factor on all gains in dB, -2 .. 2.

        Returns:
          Settings; `settings.params` gives arrays, and `render.render` applies them.

        Raises:
          AudioError: unusable audio (too short, silent, too quiet, NaN, wrong shape) or amount.
        """
        return self.match(
            analysis.from_array(input, sample_rate, "input"),
            analysis.from_array(reference, sample_rate, "reference"),
            amount=amount,
        ).settings

    def match(
        self,
        input: analysis.Recording,
        reference: analysis.Recording,
        *,
        amount: float = 1.0,
    ) -> Match:
        """As `predict`, for recordings measured before (files of any length, of two rates)."""
        rate, model_rate = input.sample_rate, self._model_rate
        band_rate = min(rate, reference.sample_rate, model_rate)
        reference_heard = _begin(lambda: analysis.heard(reference, model_rate, band_rate=band_rate))
        input_T = analysis.heard(input, model_rate, band_rate=band_rate)
        reference_T = reference_heard()
        predicted = self._predict_unit(input_T, reference_T)
        predicted = eq.EqParams(*(np.asarray(values, np.float64) for values in predicted))
        at_rate = predicted
        if rate != model_rate:
            at_rate = eq.refit(predicted, table=self._table, from_rate=model_rate, to_rate=rate)
        at_rate, _ = eq.limit_to_rate(settings.scale(at_rate, amount), rate)
        return Match(
            settings=settings.from_params(at_rate, rate),
            notes=tuple(self._notes(predicted, input, reference)),
            params=settings.scale(predicted, amount),
            input_T=input_T,
            reference_T=reference_T,
            model_rate=model_rate,
            top_hz=eq.RATE_LIMIT * band_rate,
        )

    def _notes(
        self, predicted: eq.EqParams, input: analysis.Recording, reference: analysis.Recording
    ) -> Iterable[str]:
        rate = input.sample_rate
        for band, freq_hz in zip(self._table.bands, predicted.freq_hz, strict=True):
            if freq_hz > eq.RATE_LIMIT * rate:
                yield (
                    f"band {band.name} was found at {freq_hz:.0f} Hz: at {rate} Hz it can lie no "
                    f"higher than {eq.RATE_LIMIT * rate:.0f} Hz"
                )
        if reference.sample_rate < min(rate, self._model_rate):
            yield (
                f"the reference ends at {reference.sample_rate / 2:.0f} Hz: what the EQ does above "
                "that frequency is a guess"
            )
        for recording in (input, reference):
            if recording.frames > analysis.MAX_SECONDS * recording.sample_rate:
                yield (
                    f"{recording.name} is long: {analysis.WINDOWS} windows of it were heard, "
                    f"{analysis.MAX_SECONDS:.0f} s in all"
                )


# ------------------------------------------------------------------------------- the command


def define_flags() -> None:
    """The command's flags; called by its main alone, so that importing this module adds none."""
    flags.DEFINE_string("input", None, "Recording to change.")
    flags.DEFINE_string("reference", None, "Recording it shall sound like.")
    flags.DEFINE_string("output", None, "Audio file to write; its extension names the container.")
    flags.DEFINE_string(
        "settings",
        None,
        "File for the EQ: .json, or .txt for Equalizer APO (preamp safe for any tone).",
    )
    flags.DEFINE_string("picture", None, "PNG, SVG or PDF to draw spectra and EQ in.")
    flags.DEFINE_float("amount", 1.0, "Factor on the gains in dB.", -2.0, 2.0)
    flags.DEFINE_enum(
        "clip", "preamp", ["preamp", "float"], "Over full scale: attenuate, or write a float WAV."
    )
    flags.DEFINE_bool("overwrite", False, "Replace files that exist.")
    flags.DEFINE_string("workdir", None, "Run of eqst.train; without, the packaged weights.")
    flags.mark_flags_as_required(["input", "reference"])


def run(
    input: str,
    reference: str,
    *,
    output: str | None = None,
    settings_file: str | None = None,
    picture_file: str | None = None,
    amount: float = 1.0,
    clip: str = "preamp",
    overwrite: bool = False,
    load: Callable[[], Matcher] = Matcher.load,
    say: Callable[[str], None] = print,
) -> Settings:
    """What the command does: match two files, print the bands, write what was asked for.

    Args:
      input, reference: audio files.
      output, settings_file, picture_file: files to write, None for none.
      amount, clip, overwrite: as in `Matcher.predict` and `render.render_file`.
      load: gives the matcher; called in a thread of its own while the files are measured.
      say: takes lines for the user.

    Returns:
      The settings as written, for the input's sample rate; `preamp_db` is what the output took,
      or, without output, what keeps any tone from clipping. Equalizer APO's text always has the
      latter.

    Raises:
      AudioError: anything wrong with a file, before the work where it can be known.
    """
    targets = [path for path in (output, settings_file, picture_file) if path is not None]
    settings.check_amount(amount)
    _check_targets([input, reference], targets, overwrite)
    source = audio.info(input)
    if settings_file is not None:
        settings.check_extension(settings_file)
    if picture_file is not None:
        picture.check_extension(picture_file)
    if output is not None:
        render.output_format(source, output, clip)
    reference_measured = _begin(lambda: analysis.from_file(reference))
    loaded = _begin(load)
    recordings = analysis.from_file(input), reference_measured()
    match = loaded().match(*recordings, amount=amount)
    found = match.settings
    if output is not None:
        report = render.render_file(input, output, found.params, overwrite=overwrite, clip=clip)
        found = dataclasses.replace(found, preamp_db=round(report.preamp_db, 3) + 0.0)
    say(settings.table_text(found))
    for note in match.notes:
        say(f"note: {note}")
    if output is not None:
        say(f"{output}: {report.format} {report.subtype}, {source.sample_rate} Hz, {_peak(report)}")
    if settings_file is not None:
        settings.save(settings_file, found, overwrite=overwrite)
        safe_db = settings.safe_preamp_db(found)
        if settings_file.lower().endswith(".txt") and safe_db != found.preamp_db:
            say(f"{settings_file}: preamp {safe_db:+.1f} dB, for whatever is played through it")
    if picture_file is not None:
        _draw(picture_file, match, input, reference, overwrite, say)
    return found


def _begin(work: Callable[[], Result]) -> Callable[[], Result]:
    """Starts `work` in a thread; the function returned waits for what it gives or raises.

    A daemon thread, so that a signal ends the command without waiting for it.
    """
    done: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def fill() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=fill, daemon=True).start()
    return done.result


def _peak(report: render.RenderReport) -> str:
    if report.preamp_db < 0:
        return (
            f"attenuated by {-report.preamp_db:.1f} dB, or it would have clipped "
            f"({report.peak_dbfs:+.1f} dBFS)"
        )
    if report.peak_dbfs > 0:
        return f"peak {report.peak_dbfs:+.1f} dBFS: over full scale, which float samples can hold"
    return f"peak {report.peak_dbfs:.1f} dBFS"


def _draw(
    path: str,
    match: Match,
    input: str,
    reference: str,
    overwrite: bool,
    say: Callable[[str], None],
) -> None:
    params, rate = match.params, match.model_rate
    sos_K6 = biquad.sos(params.freq_hz, params.gain_db, params.q, kinds=eq.KINDS, sample_rate=rate)
    scene = picture.Scene(
        settings=match.settings,
        input_T=match.input_T,
        reference_T=match.reference_T,
        matched_T=render.render(match.input_T, sos_K6),
        sample_rate=rate,
        top_hz=match.top_hz,
        input_name=Path(input).name,
        reference_name=Path(reference).name,
    )
    try:
        picture.draw(path, scene, overwrite=overwrite)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        say("note: no picture, for matplotlib is not installed: pip install 'eqst[report]'")


def _check_targets(sources: list[str], targets: list[str], overwrite: bool) -> None:
    """Every file to write can be written, and none is an input or named twice."""
    for target in targets:
        for source in sources:
            if os.path.exists(source) and os.path.exists(target):
                if os.path.samefile(source, target):
                    raise AudioError(f"{target!r} is an input itself: name another file to write")
        audio.check_target(target, overwrite=overwrite)
    if len({os.path.realpath(target) for target in targets}) < len(targets):
        raise AudioError(f"two of {', '.join(targets)} are one file: name them apart")


def main() -> None:
    """The command."""
    # Looking for garbage among thousands of fresh modules is a tenth of a cold start, and what
    # this short process drops goes by counting references.
    gc.disable()
    # As an exception, so that a half-written output is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    values = flags.FLAGS
    run(
        values.input,
        values.reference,
        output=values.output,
        settings_file=values.settings,
        picture_file=values.picture,
        amount=values.amount,
        clip=values.clip,
        overwrite=values.overwrite,
        load=lambda: Matcher.load(values.workdir),
    )


if __name__ == "__main__":
    command.start("eqst.match", define_flags, main)
