"""``python -m mto_analyze``, for launchers: ``torchrun -m mto_analyze ...``."""

from mto_analyze import app

app(prog_name="mto-analyze")
