"""The options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(help="A run folder, or its name in results/runs.")]
RunDir = Annotated[Path | None, typer.Option("--run", help="The run folder.")]
Model = Annotated[str | None, typer.Option(help="Folder, hub id, GGUF file, or demo.")]
Text = Annotated[str | None, typer.Option(help="builtin, file:PATH or hub:OWNER/NAME.")]
Trials = Annotated[int | None, typer.Option(min=1, help="Most trials.")]
Latency = Annotated[
    list[str] | None,
    typer.Option(metavar="WORKLOAD=LIMIT", help="Most time: decode=60%; repeatable."),
]
Target = Annotated[str | None, typer.Option(help="Export target: packed, gguf ...")]
Force = Annotated[bool, typer.Option("--force", help="Replace an export.")]
Modules = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="MODULE", help="Load a module as a plugin."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Evaluators that work side by side.")
]
Engine = Annotated[
    str | None, typer.Option(help="What they run in: process, ray, ray-tune.")
]
Address = Annotated[
    str | None, typer.Option(help="The Ray cluster: auto, HOST:PORT, ray://HOST:PORT.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Write the result as JSON, and nothing else.")
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Tell everything, tracebacks included.")
]
