"""How long a user waits: ``mto-analyze --help`` and ``mto-analyze demo`` as processes of their own.

Usage: ``python benchmarks/startup.py``. Prints medians of five runs (the demo: one) beside an empty Python process.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time


def seconds(*arguments: str, times: int) -> float:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def main() -> None:
    print(f"{'empty Python process':<24}{seconds('-c', 'pass', times=5):>7.2f} s")
    print(f"{'mto-analyze --help':<24}{seconds('-m', 'mto_analyze', '--help', times=5):>7.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        demo = seconds("-m", "mto_analyze", "demo", "--out", f"{folder}/demo", times=1)
    print(f"{'mto-analyze demo':<24}{demo:>7.2f} s")


if __name__ == "__main__":
    main()
