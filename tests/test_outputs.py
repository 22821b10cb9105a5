"""Files of a run: whole or not at all, never over somebody's work."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mto_analysis.errors import MTOAnalysisError, OutputError, OutputExistsError
from mto_analysis.figures.files import write_figure
from mto_analysis.runtime.outputs import OutputFolder, atomic_file, check_writable, run_metadata, write_atomically


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_write_atomically__writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_atomically(path, b"old")
    write_atomically(path, b"new and longer")
    assert files_of(tmp_path) == {"a.csv": b"new and longer"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("step", ["write", "fsync", "chmod", "replace"])
def test_write_atomically__leaves_the_old_file_and_nothing_else_when_it_fails(
    tmp_path: Path, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")

    def fail(*arguments: object, **options: object) -> None:
        raise error

    if step == "write":
        real = os.fdopen

        def open_broken(*arguments, **options):
            file = real(*arguments, **options)

            class Broken:
                def __enter__(self):
                    return self

                def __exit__(self, *exception):
                    file.close()

                def write(self, content):
                    file.write(content[:1])
                    raise error

            return Broken()

        monkeypatch.setattr(os, "fdopen", open_broken)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, step, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert files_of(tmp_path) == {"a.csv": b"old"}


def test_write_atomically__never_shows_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # At the moment of the last step the new file is whole beside the old one.
    path = tmp_path / "a.csv"
    path.write_bytes(b"old")
    seen: list[dict[str, bytes]] = []
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (seen.append(files_of(tmp_path)), real(self, target))[1])
    write_atomically(path, b"new")
    (before,) = seen
    assert before.pop("a.csv") == b"old"
    assert list(before.values()) == [b"new"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_write_atomically__gives_the_permissions_of_any_other_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"x")
        (tmp_path / "b").write_bytes(b"x")
        assert os.umask(0o027) == 0o027  # and the umask is as it was
    finally:
        os.umask(before)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes == [0o640, 0o640]


def test_write_atomically__says_when_there_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        write_atomically(tmp_path / "none" / "a", b"x")


def test_output_folder__refuses_to_overwrite_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"already holds b\.csv; choose another --out or pass --overwrite"):
        OutputFolder(tmp_path, ["a.csv", "b.csv"])
    OutputFolder(tmp_path, ["c.csv"])  # other files are no hindrance
    OutputFolder(tmp_path, ["a.csv", "b.csv"], overwrite=True)
    assert files_of(tmp_path) == {"b.csv": b"mine"}  # nothing is removed or made beforehand


def test_output_folder__is_made_with_the_first_file(tmp_path: Path) -> None:
    folder = OutputFolder(tmp_path / "new" / "deep", ["a.json"])
    assert not (tmp_path / "new").exists()
    assert folder.write_json("a.json", {"x": 1}) == tmp_path / "new" / "deep" / "a.json"
    assert json.loads((tmp_path / "new" / "deep" / "a.json").read_text()) == {"x": 1}


def test_output_folder__refuses_a_file_as_folder(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="is a file, and results need a folder"):
            OutputFolder(tmp_path / "out", ["a"], overwrite=overwrite)
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputExistsError, match=r"page\.html is a folder, and a file of this name"):
        OutputFolder(tmp_path, ["page.html"], overwrite=True)


def test_output_folder__writes_only_what_was_announced(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b\.csv was not announced; announced are a\.csv"):
        OutputFolder(tmp_path, ["a.csv"]).write_bytes("b.csv", b"")
    assert not files_of(tmp_path)


def test_write_table__keeps_every_digit(tmp_path: Path) -> None:
    table = pd.DataFrame({"model": ["a, b"], "heterogeneity": [1 / 3], "ci_low": [float("nan")], "num_visible": [49]})
    path = OutputFolder(tmp_path, ["t.csv"]).write_table("t.csv", table)
    assert path.read_bytes() == b'model,heterogeneity,ci_low,num_visible\n"a, b",0.3333333333333333,,49\n'
    pd.testing.assert_frame_equal(pd.read_csv(path), table)


@pytest.mark.rendered
def test_write_figure__writes_png_and_pdf_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        figure = Figure(figsize=(1, 1))
        figure.subplots().plot([1, 2])
        folder = OutputFolder(tmp_path / name, ["f.png", "f.pdf"])
        assert [path.name for path in write_figure(folder, "f", figure)] == ["f.png", "f.pdf"]
        written.append(files_of(tmp_path / name))
    assert written[0] == written[1]
    assert written[0]["f.png"].startswith(b"\x89PNG")
    assert written[0]["f.pdf"].startswith(b"%PDF")


def test_run_metadata__can_be_written_and_tell_versions_and_arguments(tmp_path: Path) -> None:
    metadata = run_metadata({"out": tmp_path, "limit": None}, models=[{"sha256": "ab"}])
    path = OutputFolder(tmp_path, ["run.json"]).write_json("run.json", metadata)
    read = json.loads(path.read_text())
    assert read["arguments"] == {"out": str(tmp_path), "limit": None}
    assert read["models"] == [{"sha256": "ab"}]
    assert {"torch", "timm", "numpy"} <= set(read["versions"])
    assert read["finished"].endswith("+00:00")


def test_errors__have_their_documented_exit_codes() -> None:
    from mto_analysis import errors

    codes = {
        "CheckpointError": 3,
        "CheckpointNotFoundError": 3,
        "DataError": 4,
        "DataNotFoundError": 4,
        "HeadCountError": 3,
        "NumericalError": 5,
        "OptionNeededError": 3,
        "OutputExistsError": 2,
    }
    assert {name: getattr(errors, name).exit_code for name in codes} == codes
    assert all(issubclass(getattr(errors, name), MTOAnalysisError) for name in errors.__all__ if name != "explained")


def test_atomic_file__a_full_disk_names_the_file_that_did_not_fit(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(tmp_path / "table.csv"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "table.csv")
    assert not list(tmp_path.iterdir())


def test_check_writable__leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "deep" / "folder")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(OutputError, match=r"cannot be written .*; choose another --out"):
            check_writable(place)


def test_check_writable__a_read_only_place_is_an_error(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system", str(tmp_path / "tmp1"))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        OutputFolder(tmp_path / "out", ["a.csv"])
    assert not list(tmp_path.iterdir())
