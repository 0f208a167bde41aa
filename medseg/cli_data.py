"""The verbs dataset and report of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from medseg.cli_options import AsJson
from medseg.cli_show import EXIT_FAILED, print_json, print_measurements, print_table, progress
from medseg.cli_terminal import err, out


def dataset(
    studies: Annotated[Path, typer.Argument(help="The folder below which the studies lie, in folders or .zip files.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The training folder; OUT.private keeps the key.")],
    labels: Annotated[Path, typer.Option(help="YAML: which series, which structures become which labels.")],
    as_json: AsJson = False,
) -> None:
    """Make a training folder of the contours (RTSTRUCT, SEG) in studies. Started again, it does what is left."""
    from medseg.study.dataset import make_dataset
    from medseg.study.dataset_folder import untaken

    with progress(as_json=as_json) as show:
        outcomes = make_dataset(
            studies, target, labels, progress=lambda done, total: show("studies", done / total, f"{done} of {total}")
        )
    rows = [
        {"case": one.case, "status": one.status, "reason": one.reason or "", "labels": ", ".join(one.structures)}
        for one in outcomes
    ]
    if as_json:
        print_json({"cases": [{**row, "text": one.text} for row, one in zip(rows, outcomes, strict=True)],
                    "untaken": dict(untaken(outcomes))})  # fmt: skip
    else:
        print_table(f"{sum(one.status == 'taken' for one in outcomes)} of {len(outcomes)} studies are cases", rows)
        for one in outcomes:
            for told in (*([one.text] if one.text else []), *one.warnings):
                out.print(f"{one.case}: {told}")
        if left := untaken(outcomes):
            print_table("Structures that no rule took", [{"structure": name, "times": times} for name, times in left])
    if any(one.status == "failed" for one in outcomes):
        raise typer.Exit(EXIT_FAILED)


def report(
    image: Annotated[Path, typer.Argument(help="The scan: a volume, or the folder of a DICOM series.")],
    labels: Annotated[Path, typer.Argument(help="Its labels: a volume, or a DICOM SEG or RTSTRUCT.")],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .json or .csv file, a .png picture, a .dcm file: DICOM SR.")
    ],
    names: Annotated[
        Path | None,
        typer.Option("--labels", help="A model, or JSON with the names of labels; by default NAME.labels.json."),
    ] = None,
) -> None:
    """Measure labels, and write volumes and intensities as a table or a DICOM SR, or a picture."""
    from medseg.report.write import write_report

    rows = write_report(image, labels, target, table=names)
    print_measurements(str(target), rows)
    if not any(row.voxels for row in rows):
        err.print("No label is set.")
