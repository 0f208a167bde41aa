"""Options that several verbs of the command line share."""

from __future__ import annotations

from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of a table.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or mps; by default the fastest there is.")]
Assume = Annotated[
    str | None,
    typer.Option(help="Where the array axes point, such as RAS, for a file that does not say so."),
]
Start = Annotated[str | None, typer.Option("--from", help="A model to begin with: its plan and its weights.")]
Network = Annotated[str | None, typer.Option(help="Which network to plan, such as unet; medseg networks lists them.")]
NetworkWidth = Annotated[
    int | None, typer.Option("--width", help="Features at the finest resolution; by default by the device.")
]
NetworkDepth = Annotated[
    int | None, typer.Option("--depth", help="Resolutions of the network; by default as many as the patch allows.")
]
NetworkSize = Annotated[str | None, typer.Option("--size", help="A preset of the network: S, M or L.")]
Dropout = Annotated[float | None, typer.Option(help="Share of feature maps that a step omits; kept in train.json.")]
FreezeEncoder = Annotated[
    bool, typer.Option("--freeze-encoder", help="With --from: the encoder stays as it is, the decoder learns.")
]
Probabilities = Annotated[bool, typer.Option("--probabilities", help="Also write OUT_probability_VALUE of each label.")]
Uncertainty = Annotated[
    bool, typer.Option("--uncertainty", help="Also write OUT_uncertainty: 0 where the model is sure, up to 1.")
]
ExpectedVolumes = Annotated[
    bool, typer.Option("--expected-volumes", help="Also sum the probabilities of each label to a volume.")
]
Mirror = Annotated[bool, typer.Option(help="Average over the flips that the model allows: slower, a bit better.")]
Reuse = Annotated[bool, typer.Option(help="Compute tiles of one constant value once; the labels are the same.")]
Crf = Annotated[
    bool | None,
    typer.Option("--crf/--no-crf", help="Sharpen boundaries by a dense CRF, or do not; by default as the model says."),
]
Step = Annotated[
    float | None, typer.Option(help="Distance between tiles, a share of the patch; by default what the model says.")
]
Anyway = Annotated[
    bool,
    typer.Option("--anyway", help="Take a series of another modality than the model's, and label maps, for scans."),
]
