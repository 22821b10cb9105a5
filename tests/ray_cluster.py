"""An experiment on a Ray cluster of two nodes on this machine, one of which is killed while it works.

Run: ``ray_cluster.py FILE DATA OUT``; a program of its own, as Ray's processes outlive a test that fails.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from ray.cluster_utils import Cluster

from mto_analyze import app


def main() -> None:
    file, data, out = sys.argv[1:]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()

    def kill() -> None:
        """Once both nodes work, and the second run has trained for a step."""
        while sum(path.stat().st_size > 0 for path in Path(out).glob("*/*/metrics.csv")) < 2:
            time.sleep(0.05)
        working = sorted(path.parent.name for path in Path(out).glob("*/*/.lock"))
        cluster.remove_node(other, allow_graceful=False)
        print("killed the node of one of", ", ".join(working), flush=True)

    threading.Thread(target=kill, daemon=True).start()
    arguments = ["experiment", file, "--images", data, "--out", out, "--engine", "ray", "--address", cluster.address]
    try:
        app(arguments, prog_name="mto-analyze")
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
