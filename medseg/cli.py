"""The command line: parse, one library call, print. The only place that prints."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

import medseg
from medseg.cli_data import dataset, report
from medseg.cli_import import import_, prune
from medseg.cli_options import (
    Anyway,
    AsJson,
    Assume,
    Crf,
    Device,
    ExpectedVolumes,
    Mirror,
    Probabilities,
    Reuse,
    Step,
    Uncertainty,
)
from medseg.cli_show import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    batch_table,
    plain,
    print_error,
    print_json,
    print_measurements,
    print_series,
    print_table,
    progress,
    show_outcomes,
    show_segmented,
    tiles,
)
from medseg.cli_terminal import Verbs, err, out
from medseg.cli_train import evaluate, networks, plan, train
from medseg.errors import MedsegError, UsageError

app = typer.Typer(
    cls=Verbs,
    help="Segment CT and MRI volumes, train the networks that do it, and keep the geometry exact.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; an expected error becomes one line and an exit code, never a traceback."""
    warnings.showwarning = lambda message, *_args, **_kwargs: err.print(f"warning: {message}", style="yellow")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal cannot show must not end the work
            stream.reconfigure(errors="backslashreplace")
    os.environ["PYTHONSAFEPATH"] = "1"  # whatever else is started imports nothing from the working folder
    for name in ("SIGTERM", "SIGHUP"):  # not by raising SIGINT, which a script's background processes ignore
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup means it
            signal.signal(number, signal.default_int_handler)
    try:
        app()
    except MedsegError as error:
        print_error(error, error.path)
        sys.exit(EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED)
    except MemoryError:
        print_error("Memory ran out: a file asks for more than this machine has. It is damaged, or too large.", None)
        sys.exit(EXIT_FAILED)
    except OSError as error:  # what a path alone can cause: folders that may not be entered, names that are too long
        print_error(f"The system refused this: {error.strerror or error}.", error.filename)
        sys.exit(EXIT_FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"medseg {medseg.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Segment CT and MRI volumes, train the networks that do it, and keep the geometry exact."""


@app.command()
def info(
    path: Path,
    as_json: AsJson = False,
    assume_orientation: Assume = None,
    descriptions: Annotated[
        bool,
        typer.Option("--descriptions", help="Show the descriptions of series, too: free text that can hold names."),
    ] = False,
) -> None:
    """Show grid, spacing and intensities of a volume, or the series of a DICOM folder, DICOMDIR or .zip."""
    if path.is_dir() or path.name.upper() == "DICOMDIR" or path.suffix.lower() == ".zip":
        from medseg.study.describe import describe_studies

        facts = describe_studies(path, descriptions=descriptions)
    else:
        from medseg.report.describe import describe

        facts = describe(path, assume_orientation=assume_orientation)
    if as_json:
        print_json(facts)
    elif "series" in facts:
        print_series(facts)
    else:
        for name, value in facts.items():
            shown = "NaN or infinite" if value is None else plain(value)
            out.print(f"{name:>14}  {shown}")


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(metavar="IN", help="A volume, a DICOM series, a DICOM SEG or RTSTRUCT.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .nii.gz, .nii, .nrrd, .mha file; .dcm for labels as DICOM.")
    ],
    source: Annotated[
        Path | None, typer.Option(help="The DICOM series that labels in a SEG or RTSTRUCT belong to.")
    ] = None,
    to: Annotated[str | None, typer.Option(help="What a .dcm file is: seg (default), labelmap or rtstruct.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="A model, or JSON with the names of labels; by default NAME.labels.json.")
    ] = None,
    assume_orientation: Assume = None,
) -> None:
    """Write any readable volume in another format, in the same place; labels also as DICOM SEG and RTSTRUCT."""
    from medseg.io.convert import convert as convert_file

    written = convert_file(path, target, source=source, kind=to, table=labels, assume_orientation=assume_orientation)
    if written != [target]:
        names = ", ".join(file.name for file in written)
        told = f"The labels overlap and became one mask each: {names}." if written else "No label is set: no file."
        out.print(told, soft_wrap=True)


@app.command()
def segment(  # noqa: PLR0913, PLR0917 - one option for each decision
    model: Annotated[str, typer.Argument(help="A model folder, or the name of a model that medseg ships.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A volume, a DICOM series folder, a folder of volumes, or a.nii.gz,b.nii.gz for channels.",
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The label file, .dcm for a DICOM SEG of a series; for a folder of volumes, a folder."
        ),
    ],
    roi: Annotated[
        str | None, typer.Option(help="A box in mm of RAS+ world space: x,y,z,x,y,z. The rest stays 0.")
    ] = None,
    step: Step = None,
    mirror: Mirror = False,
    reuse: Reuse = True,
    crf: Crf = None,
    device: Device = None,
    runtime: Annotated[
        str | None, typer.Option(help="openvino, torch or onnx; by default what is fastest here.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the network.", min=1)] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or tf32, where the device can.")
    ] = None,
    assume_orientation: Assume = None,
    probabilities: Probabilities = False,
    uncertainty: Uncertainty = False,
    expected_volumes: ExpectedVolumes = False,
    report: Annotated[Path | None, typer.Option(help="Write times, memory and volumes of each scan as JSON.")] = None,
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Segment a scan, or each scan of a folder; labels are written on the scan's own grid."""
    from medseg.model.run import Options, Outcome, is_folder_of_volumes, segment_file, segment_folder
    from medseg.model.segmenter import Model

    channels = _channels(source)
    if report is not None:
        _check_report(report, channels, target)
    loaded = Model.load(model, device=device, runtime=runtime, threads=threads, precision=precision)
    extras = (probabilities, uncertainty, expected_volumes)
    options = Options(_box(roi), step, mirror, reuse, assume_orientation, *extras, anyway, crf)
    outcomes: list[Outcome]
    with progress(as_json=as_json) as show:
        first = channels[0]
        if len(channels) == 1 and is_folder_of_volumes(first):
            outcomes = list(segment_folder(loaded, first, target, options, progress=tiles(show)))
        else:
            scan = first if len(channels) == 1 else channels
            outcomes = [segment_file(loaded, scan, target, options, progress=tiles(show))]
    show_segmented(outcomes, report, as_json=as_json)
    if any(outcome.error for outcome in outcomes) or all(outcome.left_out for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


pipelines = typer.Typer(
    help="Pipelines: which series, which model, which clean-up, which outputs.", no_args_is_help=True
)
app.add_typer(pipelines, name="pipeline")


@pipelines.command()
def check(
    pipeline: Annotated[str, typer.Argument(help="A YAML file, or the name of a pipeline that medseg ships.")],
    study: Annotated[
        Path | None, typer.Argument(help="A study (folder, DICOMDIR or .zip) to show the choice of series for.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a pipeline can run here and, with a study, show which series it would take, and why not the others."""
    from medseg.study.check import check_pipeline, explain
    from medseg.study.pipeline import load_pipeline

    chosen = load_pipeline(pipeline)
    check_pipeline(chosen)
    explained = [] if study is None else explain(chosen, study)
    if as_json:
        print_json(
            {
                "pipeline": chosen.model_dump(mode="json", exclude={"model": True, "localizer": {"model"}}),
                "studies": explained,
            }
        )
    else:
        out.print(f"{chosen.name}: the pipeline can run")
        for one in explained:
            rows = [{"channel": row["channel"], "series": row["series"], "": row["reason"]} for row in one["choices"]]
            print_table(f"Study {one['study']}", rows)
            if one["refusal"]:
                out.print(one["refusal"]["text"])
    if any(one["refusal"] for one in explained):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def batch(  # noqa: PLR0913, PLR0917 - one option for each decision
    pipeline: Annotated[str, typer.Argument(help="A YAML file, or the name of a pipeline that medseg ships.")],
    studies: Annotated[Path, typer.Argument(help="The folder below which the studies lie, in folders or .zip files.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for the results.")],
    workers: Annotated[int, typer.Option(help="Processes on this machine, each with a network of its own.", min=1)] = 1,
    shard: Annotated[str | None, typer.Option(help="i/n: only the i-th of n parts, for job arrays.")] = None,
    verify: Annotated[
        str, typer.Option(help="quick: sizes and times of inputs, hashes of outputs; full: hashes of inputs, too.")
    ] = "quick",
    show_paths: Annotated[
        bool, typer.Option("--show-paths", help="Show folders, which may be called after patients, beside the hashes.")
    ] = False,
    scheduler: Annotated[
        str | None, typer.Option(help="Run on Dask: tcp://host:port, or local for a cluster of --workers processes.")
    ] = None,
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="Results for research: nothing in OUT says whose they are.")
    ] = False,
    device: Device = None,
    runtime: Annotated[str | None, typer.Option(help="openvino, torch or onnx; by default what is fastest.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each network.", min=1)] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32, float16, bfloat16 or tf32, where the device can.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Minutes that one study may be worked on; then its worker is ended.", min=0.01)
    ] = 240,
    as_json: AsJson = False,
) -> None:
    """Run a pipeline over all studies of a folder. Started again, it keeps what is done and true, and does the rest."""
    from medseg.study.batch import Options, run_batch

    if verify not in {"quick", "full"}:
        raise UsageError(f"A batch verifies quick or full, not {verify!r}.")
    options = Options(
        workers=workers, shard=_shard(shard), verify="full" if verify == "full" else "quick",
        device=device, runtime=runtime, precision=precision, threads=threads, deidentify=deidentify,
        time_limit_s=60 * time_limit,
    )  # fmt: skip
    try:
        with batch_table(show_paths, as_json=as_json) as show:
            outcomes = run_batch(pipeline, studies, target, options, scheduler=scheduler, progress=show)
    except KeyboardInterrupt as error:
        err.print("medseg: interrupted; what has ended is kept, the same command does the rest.", style="red")
        raise typer.Exit(EXIT_INTERRUPTED) from error
    show_outcomes(outcomes, show_paths=show_paths, as_json=as_json)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


app.command()(report)
app.command()(dataset)
app.command()(networks)
app.command()(plan)
app.command()(train)
app.command()(evaluate)
app.command("import")(import_)
app.command()(prune)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the image, labels and picture go.")] = Path("demo_out"),
) -> None:
    """Segment both hippocampi of the ICBM152 brain, an average of 152 people, and draw them."""
    from medseg.demo import run_demo

    measurements = run_demo(folder, progress=err.print)
    print_measurements("Hippocampi of the ICBM152 template", measurements)
    out.print(f"Look at {folder / 'overlay.png'}; the labels are {folder / 'labels.nii.gz'}.", soft_wrap=True)


def _channels(text: str) -> tuple[Path, ...]:
    """Return the channels of a scan: the paths between commas, or one path that has commas in it."""
    return (Path(text),) if os.path.lexists(text) else tuple(Path(part) for part in text.split(","))


def _check_report(report: Path, channels: tuple[Path, ...], target: Path) -> None:
    from medseg.io.files import check_place

    check_place(report, channels)
    if report.resolve() == target.resolve():
        raise UsageError("The report would replace the labels: give it another name.", path=report)


def _box(text: str | None) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 6:
        raise UsageError(f"A box is six numbers in mm, x,y,z of two opposite corners; not {text!r}.")
    return numbers[:3], numbers[3:]


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    part, _, count = text.partition("/")
    if not (part.isdecimal() and count.isdecimal()):
        raise UsageError(f"A shard is i/n, such as 2/8; not {text!r}.")
    return int(part), int(count)
