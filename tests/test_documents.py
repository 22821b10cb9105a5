"""README and docs: blocks run as they stand or say why not, commands run with small stand-ins, links lead somewhere."""

from __future__ import annotations

import doctest
import re
import shlex
import shutil
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import typer
import yaml
from documents import ROOT, Block, blocks, indented_code, notebooks, pages
from image_files import write_images
from typer.testing import CliRunner

from mto_analysis.checkpoints.registry import list_checkpoints
from mto_analysis.demo import DEMO_IMAGES
from mto_analyze import app

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
COMMANDS = typer.main.get_command(app).commands
SHELL = ("bash", "console")
#: Languages of blocks that hold nothing to run, and what lines in them are to be run all the same.
INERT = ("text", "math", "csv", "bibtex")
CODE = re.compile(r"(\$ )?(mto-analyze|pip|python\d?|torchrun|accelerate|import|from \S+ import)\s")

#: Settings that make a pre-training of a recipe for CIFAR-10 one of a few steps, and fit an experiment's to 64 images.
QUICK = {"pretrain": ("epochs=1", "batch_size=4", "model.depth=1"), "experiment": ("epochs=1", "batch_size=16")}


def scripts(page: Path) -> list[str]:
    """Python blocks that are run: those that are not sessions, which ``doctest`` runs."""
    return [block.code for block in blocks(page, "python") if not block.code.startswith(">>>") and not block.reason]


def python_pages() -> list[str]:
    return [name for name, page in PAGES.items() if scripts(page)]


def session_pages() -> list[str]:
    return [name for name, page in PAGES.items() if ">>> " in page.read_text(encoding="utf-8")]


def shell_pages() -> list[str]:
    return [name for name, page in PAGES.items() if any(run_here(page))]


def run_here(page: Path) -> Iterator[str]:
    """Our commands of a page that a test runs, in order."""
    for block in blocks(page, "bash"):
        if not block.reason:
            yield from (command for command in block.commands() if command.startswith("mto-analyze "))


def test_pages__are_there() -> None:
    assert "README.md" in python_pages()
    assert "README.md" in shell_pages()
    assert len([name for name in PAGES if name.startswith("docs/")]) > 10


@pytest.mark.parametrize("name", session_pages())
def test_python_sessions__give_what_the_page_says(name: str) -> None:
    result = doctest.testfile(str(PAGES[name]), module_relative=False)
    assert result.attempted
    assert result.failed == 0


@pytest.mark.parametrize("name", python_pages())
def test_python_blocks__run_in_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")  # a real module, which dataclasses look for
    monkeypatch.setitem(sys.modules, "page", page)
    for number, code in enumerate(scripts(PAGES[name])):
        exec(compile(code, f"{name}, block {number}", "exec"), vars(page))


def unrun(block: Block) -> list[str]:
    """What of a block no test here runs, reads or compares."""
    if block.reason or block.language == "python":
        return []
    if block.language == "toml":
        tomllib.loads(block.code)
        return []
    if block.language in SHELL:
        return [command for command in block.commands() if not command.startswith("mto-analyze ")]
    if block.language in INERT:
        return [line for line in block.code.splitlines() if CODE.match(line)]
    return [f"a block of {block.language or 'no language'}: {block.code[:60]}"]


@pytest.mark.parametrize("name", PAGES)
def test_blocks__are_run_or_say_why_not(name: str) -> None:
    left = [each for block in blocks(PAGES[name]) for each in unrun(block)] + list(indented_code(PAGES[name]))
    assert not left, "run it, or say in a comment above the block why not: <!-- not run: reason -->"


def shown_commands() -> list[tuple[str, str]]:
    return [
        (name, command)
        for name, page in PAGES.items()
        for block in blocks(page, *SHELL)
        for command in block.commands()
        if command.startswith("mto-analyze ")
    ]


def leaf(words: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command of a line, such as ``checkpoints list``, and what follows it."""
    commands, rest = COMMANDS, list(words)
    while rest[0] in commands and hasattr(commands[rest[0]], "commands"):
        commands = commands[rest.pop(0)].commands
    return commands[rest[0]], rest[1:]


def options(command: typer.core.TyperCommand) -> set[str]:
    return {option for each in command.params for option in (*each.opts, *each.secondary_opts)} | {"--help"}


@pytest.mark.parametrize(("page", "line"), shown_commands())
def test_commands__exist_with_the_options_shown(page: str, line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0].startswith("-"):
        return
    command, rest = leaf(words)
    used = {word.split("=")[0] for word in rest if word.startswith("-") and len(word) > 1}
    assert used <= options(command), line


class StandIns:
    """Small files in place of those that a page names: checkpoints, images, curves."""

    def __init__(self, folder: Path, checkpoints: dict[str, Path]) -> None:
        self.folder, self.checkpoints = folder, checkpoints
        self.ids = {row.id for row in list_checkpoints()}
        self.images = write_images(folder / "IMAGES", ("cat.jpg", "dogs/rex.jpg", "a.png", "b.png"))
        for name in ("DATA", "TRAIN", "TEST"):  # labelled by their sub-folders
            write_images(folder / name, tuple(f"{kind}/{n}.png" for kind in ("cat", "dog") for n in range(4)))
        (folder / "CIFAR10").mkdir()
        for part in ("train", "test"):
            pq.write_table(pq.read_table(DEMO_IMAGES).slice(0, 64), folder / "CIFAR10" / f"{part}.parquet")
        epochs, seeds = (100, 200, 300, 400), (0, 1, 2)
        rows = [
            (method, epoch, 60 + gain * epoch / 20 + seed / 10, seed)
            for method, gain in (("MAE", 1.0), ("MAE + MTO", 1.1))
            for epoch in epochs
            for seed in seeds
        ]
        pd.DataFrame(rows, columns=["method", "epoch", "score", "seed"]).to_csv(folder / "curves.csv", index=False)
        shutil.copy(ROOT / "docs" / "rauc_example.csv", folder)

    def line(self, line: str) -> list[str]:
        """Arguments of a command, which may be given again for the same results."""
        words = shlex.split(line)[1:]
        if words[:2] == ["checkpoints", "info"]:
            return words
        command, _ = leaf(words)
        fresh = "--overwrite" in options(command) and not {"--overwrite", "--resume"} & set(words)
        more = ["--overwrite"] if fresh else []
        if "--resume" not in words:
            more += [word for setting in QUICK.get(words[0], ()) for word in ("--set", setting)]
        return [self.word(word) for word in words] + more

    def word(self, word: str) -> str:
        name = word.rsplit("/", 1)[-1]
        if word in self.ids or word == "CHECKPOINT" or name.endswith(".pth") or word.startswith("hf://"):
            place = self.folder / f"{name.partition('.')[0]}.safetensors"
            shutil.copy(self.checkpoints["simmim" if "simmim" in word else "mae"], place)
            return str(place)
        return word


@pytest.mark.parametrize("name", shell_pages())
def test_commands__run_with_stand_ins(
    name: str, tmp_path: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = StandIns(tmp_path, checkpoints)
    for line in run_here(PAGES[name]):
        result = CliRunner().invoke(app, small.line(line))
        assert result.exit_code == 0, f"{line}\n{result.stderr}\n{result.exception!r}"


def sessions() -> list[tuple[str, str, str]]:
    """Page, command and printed text of every shell session."""
    found = []
    for name, page in PAGES.items():
        for block in blocks(page, "console"):
            for command, output in re.findall(r"^\$ (mto-analyze .+)\n((?:(?!\$ ).*\n)*)", block.code, re.MULTILINE):
                found.append((name, command, output))
    return found


@pytest.mark.parametrize(("name", "command", "output"), sessions())
def test_shell_sessions__print_what_the_page_says(
    name: str, command: str, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for table in (ROOT / "docs").glob("*.csv"):
        shutil.copy(table, tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == output.strip()


def anchors(page: Path) -> set[str]:
    """Of the headings of a page: their words in lower case, without signs, joined by hyphens."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w -]", "", heading.lower())) for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links__lead_to_files_and_headings_that_exist(name: str) -> None:
    page = PAGES[name]
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.exists(), f"{name}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{name}: {target}"


def test_results__state_the_values_of_the_figure() -> None:
    table = pd.read_csv(ROOT / "figures" / "fig1b.csv")
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for model, rows in table.groupby("model"):
        values = [f"{value:.3f}".removeprefix("0") for value in rows.sort_values("layer_depth")["heterogeneity"]]
        assert re.search(rf"\| {model} \| [\d.]+ \| {re.escape(' '.join(values))} \|", page), model


def test_errors__are_said_in_the_words_of_the_page() -> None:
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    files = [path for folder in ("mto_analysis", "cli") for path in sorted((ROOT / folder).rglob("*.py"))]
    code = "".join(path.read_text(encoding="utf-8") for path in files)
    said = re.sub(r"\"\s*\n\s*f?\"", "", code)  # strings that go on in the next line
    messages = re.findall(r"^- \*([^*]+)\*", page, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for part in re.split(r"\b[XN]\b", message):  # X and N stand for what differs
            assert part.strip() in said, message


#: What is said otherwise: torch and the paper spell -ize, and masked image modelling speaks of images.
OTHER_WORDS = re.compile(
    r"\w*(?:initial|minim|normal|optim|quant|recogn|regular|solar|synchron|vector)is(?:e[ds]?|ing|er|ation)s?\b|pictures?\b",
    re.IGNORECASE,
)


def test_words__are_spelt_one_way() -> None:
    code = [path for folder in ("mto_analysis", "cli") for path in (ROOT / folder).rglob("*.py")]
    for path in (*(page for page in pages() if page.name != "CHANGELOG.md"), *notebooks(), *code):
        found = set(OTHER_WORDS.findall(path.read_text(encoding="utf-8")))
        assert found <= {"when_minimised"}, path  # a column of the published tables


def test_citation__is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["references"][0]["title"] == "Emerging Property of Masked Token for Effective Pre-training"
