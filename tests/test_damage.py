import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from damage import TRAP, whole_files, whole_folder, write_damaged
from typer.testing import CliRunner

from mto_analysis import CheckpointError, inspect_checkpoint, load_checkpoint
from mto_analyze import app

SECONDS = 20
MEGABYTES = 1000

#: Read, as nothing of them is called: weights under an unknown key, and a function beside the weights.
HARMLESS = ("root_unknown", "attack_getattr", "attack_getattr_old")


def is_harmless(path: Path) -> bool:
    return path.stem.partition("_")[2] in HARMLESS


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> set[tuple[str, int, int]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def check_in_this_process(folder: Path, count: int | None = None) -> None:
    paths = write_damaged(folder, count)
    before = contents(folder)
    wrong = []
    for path in paths:
        with limited(SECONDS):
            result = CliRunner().invoke(app, ["inspect", str(path)])
        wanted = (0, 0, True) if is_harmless(path) else (3, 1, False)
        if (result.exit_code, result.stderr.count("\n"), bool(result.stdout)) != wanted:
            wrong.append(f"{path.name}: exit {result.exit_code}, {result.stderr!r}, {result.exception!r}")
    assert not wrong, "\n".join(wrong)
    assert contents(folder) == before
    assert not (folder / TRAP).exists()


@pytest.mark.parametrize("name", whole_files())
def test_undamaged_files_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(whole_files()[name])
    assert inspect_checkpoint(tmp_path / name).info.family == "mae"


def test_an_undamaged_folder_is_read(tmp_path: Path) -> None:
    for name, content in whole_folder().items():
        (tmp_path / name).write_bytes(content)
    assert inspect_checkpoint(tmp_path).info.layout == "Hugging Face ViTMAE"


def test_a_newer_pickle_protocol_is_named(tmp_path: Path) -> None:
    torch.save({"model": {"mask_token": torch.zeros(1, 1, 8)}}, tmp_path / "new.pth", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="saved with pickle protocol 4"):
        load_checkpoint(tmp_path / "new.pth")


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        content = whole_files()["trainer.pth"]
    finally:
        torch.serialization.set_crc32_options(before)
    (tmp_path / "weights.pth").write_bytes(content)
    assert load_checkpoint(tmp_path / "weights.pth", num_heads=2, decoder_num_heads=2).info.family == "mae"


def test_inspect__40_damaged_files(tmp_path: Path) -> None:
    check_in_this_process(tmp_path, 40)


@pytest.mark.slow
def test_inspect__more_than_200_damaged_files(tmp_path: Path) -> None:
    check_in_this_process(tmp_path)
    assert len(list(tmp_path.iterdir())) > 200


_MEASURED = """
import sys
from mto_analyze import app
try:
    app(["inspect", sys.argv[1]])
finally:
    with open("/proc/self/status") as status:
        print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def check_as_command(path: Path) -> str | None:
    """What is wrong with how a fresh process ends, ``None`` if nothing."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(path)],
        capture_output=True, text=True, timeout=60, check=False, cwd=path.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    peak = int(done.stdout.split()[-1] if done.stdout else 0) / 1024
    good = done.returncode == 3 and done.stderr.count("\n") == 1 and done.stderr.startswith("mto-analyze: error: ")
    if is_harmless(path):
        good = done.returncode == 0 and done.stderr == ""
    if good and peak < MEGABYTES:
        return None
    return f"{path.name}: exit {done.returncode}, {peak:.0f} MB, {done.stderr[-300:]!r}"


def check_as_commands(folder: Path, names: tuple[str, ...]) -> None:
    paths = write_damaged(folder, names=names)
    assert len(paths) >= len(names)
    before = contents(folder)
    assert not [wrong for path in paths if (wrong := check_as_command(path))]
    assert contents(folder) == before


@pytest.mark.slow
def test_inspect__damaged_files_as_commands(tmp_path: Path) -> None:
    names = (
        "attack",
        "deep_",
        "many_",
        "no_end",
        "big_memo",
        "bytearray",
        "huge",
        "doubling",
        "copied",
        "loop",
        "declared",
    )
    check_as_commands(tmp_path, names)


@pytest.mark.parametrize("name", ["published.pth", "trainer.pth"])
def test_a_turned_bit_of_the_weights_is_found(tmp_path: Path, name: str) -> None:
    content = bytearray(whole_files()[name])
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_checkpoint(tmp_path / name, num_heads=2, decoder_num_heads=2)
