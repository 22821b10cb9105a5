import re
import shutil
from pathlib import Path

from typer.testing import CliRunner

from mto_analyze import app

DOCS = Path(__file__).parents[1] / "docs"


def test_docs_rauc__commands_print_what_the_page_says(tmp_path, monkeypatch):
    shutil.copy(DOCS / "rauc_example.csv", tmp_path)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```console\n\$ mto-analyze (.+)\n((?:.*\n)*?)```", (DOCS / "rauc.md").read_text())
    assert blocks
    for command, output in blocks:
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == output.strip()
