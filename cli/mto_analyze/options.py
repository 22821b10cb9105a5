"""Options that several commands share, with their help."""

from pathlib import Path
from typing import Annotated

import typer

Checkpoints = Annotated[
    list[Path], typer.Option("--ckpt", help="Checkpoint file or Hugging Face folder; repeat to compare.")
]
Heads = Annotated[
    int | None, typer.Option("--num-heads", min=1, help="Encoder attention heads, where the file does not say.")
]
DecoderHeads = Annotated[
    int | None, typer.Option("--decoder-num-heads", min=1, help="Decoder attention heads, where the file does not say.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bar; warnings still show.")]
