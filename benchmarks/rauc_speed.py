"""How long ``mto-analyze rauc`` takes, process start included: a small log, a million rows of CSV and of JSON lines.

Usage: ``python benchmarks/rauc_speed.py``. Prints the best of five runs beside that of an empty Python process. For a
million rows it prints the ratio to a process that only parses them (``pandas.read_csv``, or ``json.loads`` for each
line), whose runs alternate with ours, so that other load meets both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMAND = "from mto_analyze import app; app()"
PARSE = {
    "csv": "import sys, pandas; [pandas.read_csv(path) for path in sys.argv[1:]]",
    "json lines": "import sys, json; [[json.loads(line) for line in open(path)] for path in sys.argv[1:]]",
}


# An installed package has its bytecode, as pandas has; a checkout run with this variable would compile it in each run.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def best(*commands: list[str], times: int = 5) -> list[float]:
    """The shortest of ``times`` runs of each command, in seconds, after one run that is not counted."""
    took: list[list[float]] = [[] for _ in commands]
    for _ in range(times + 1):
        for each, command in zip(took, commands, strict=True):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
            each.append(time.perf_counter() - begin)
    return [min(each[1:]) for each in took]


def write(folder: Path, rows: int, kind: str) -> list[str]:
    """Two methods with half of the rows each; CSV in one file, JSON lines in a file per method."""
    count = rows // 2
    curves = {
        name: np.round(70 + np.random.default_rng(seed).random(count) + 5 * np.arange(count) / count, 3)
        for seed, name in enumerate(("MAE", "MTO"))
    }
    if kind == "csv":
        lines = [f"{name},{epoch},{score}\n" for name, scores in curves.items() for epoch, score in enumerate(scores)]
        (folder / "curves.csv").write_text("method,epoch,score\n" + "".join(lines))
        logs = ["--log", str(folder / "curves.csv")]
    else:
        line = '{{"train_lr": 0.0002, "train_loss": 6.69999, "test_loss": 2.71873, "test_acc1": {}, "epoch": {}}}\n'
        logs = []
        for name, scores in curves.items():
            path = folder / f"{name}.txt"
            path.write_text("".join(line.format(score, epoch) for epoch, score in enumerate(scores)))
            logs += ["--log", str(path)]
    return [*logs, "--baseline", "MAE", "--target", "MTO", "--start", "0", "--end", str(count - 1), "--json"]


def main() -> None:
    print(f"{'empty Python process':<40}{best(['-c', 'pass'])[0]:>8.2f} s")
    for rows, kind in ((30, "csv"), (30, "json lines"), (1_000_000, "csv"), (1_000_000, "json lines")):
        with tempfile.TemporaryDirectory() as folder:
            arguments = write(Path(folder), rows, kind)
            files = [each for each in arguments if Path(each).is_file()]
            took, alone = best(["-c", COMMAND, "rauc", *arguments], ["-c", PARSE[kind], *files])
            beside = f", {took / alone:.2f} x parsing alone" if rows > 30 else ""
            print(f"{f'rauc, {rows:,} rows of {kind}':<40}{took:>8.2f} s{beside}", flush=True)


if __name__ == "__main__":
    main()
