"""A small run as a process of its own, for tests that kill it or launch several: ``worker.py FOLDER JSON``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from pretraining_cases import run, small_recipe

from mto_analysis.errors import MTOAnalysisError
from mto_analysis.mto import MTOConfig
from mto_analysis.training import RunSettings


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    recipe = small_recipe(options.pop("method", "mae"), **options.pop("recipe", {}))
    if options.pop("mto", False):
        options["mto"] = MTOConfig()
    resume = options.pop("resume", True)
    settings = RunSettings(device="cpu", log_every=2, **options)
    try:
        run(folder, recipe, settings, resume=resume, on_note=lambda line: print(line, file=sys.stderr))
    except MTOAnalysisError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
