"""Modules that can be collected for their examples only where Triton is installed."""

import importlib.util

_KERNELS = ["mto_analysis/training/kernels.py", "mto_analysis/training/term_kernels.py"]
collect_ignore = [] if importlib.util.find_spec("triton") else _KERNELS
