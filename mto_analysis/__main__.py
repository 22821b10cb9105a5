"""``python -m mto_analysis``: the command, where scripts are not on the path."""

from mto_analyze import app

app(prog_name="mto-analyze")
