"""Options that several commands share, with their help."""

from typing import Annotated

import typer

SOURCE = "File or Hugging Face folder, id of the registry, hf://owner/name[@revision], or URL"

Checkpoints = Annotated[list[str], typer.Option("--ckpt", help=f"{SOURCE}; repeat to compare.")]
Checkpoint = Annotated[str, typer.Argument(help=f"{SOURCE}.")]
Offline = Annotated[bool, typer.Option("--offline", help="Never touch the network.")]
Heads = Annotated[
    int | None, typer.Option("--num-heads", min=1, help="Encoder attention heads, where the file does not say.")
]
DecoderHeads = Annotated[
    int | None, typer.Option("--decoder-num-heads", min=1, help="Decoder attention heads, where the file does not say.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace results that are already there.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No notes and no progress bar; warnings still show.")]
