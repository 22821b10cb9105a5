import errno
import hashlib
import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from servers import ABSENT_FILE, Page, Server, hub_pages, serve
from typer.testing import CliRunner

from mto_analysis.checkpoints import downloading, fetching, resolve
from mto_analysis.checkpoints.registry import find_checkpoint
from mto_analysis.errors import CheckpointError, CheckpointNotFoundError
from mto_analyze import app


def _weights(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    torch.save({"model": {"mask_token": torch.full((60_000,), float(seed))}}, buffer)
    return buffer.getvalue()


WEIGHTS = _weights()
HALF = 2 * 65536  # whole chunks, so that nothing received is thrown away


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "BACKOFF", 0.0)
    monkeypatch.setattr(downloading, "TIMEOUT", (5.0, 0.5))


@pytest.fixture
def server() -> Iterator[Server]:
    with serve({}) as running:
        yield running


def fetch(server: Server, cache: Path, page: Page, name: str = "weights.pth") -> Path:
    server.pages[f"/{name}"] = page
    return resolve(f"{server.url}/{name}", cache=cache)


def looks_whole(cache: Path) -> list[str]:
    aside = (".part", ".tag", ".lock")
    return [path.name for path in cache.rglob("*") if path.is_file() and not path.name.endswith(aside)]


def parts(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for _, _, headers in server.requests]


class TestUrls:
    def test_a_file_is_fetched_once_and_its_hash_recorded(self, server: Server, tmp_path: Path) -> None:
        path = fetch(server, tmp_path, Page(WEIGHTS))
        again = resolve(f"{server.url}/weights.pth", cache=tmp_path)
        assert path == again
        assert path.read_bytes() == WEIGHTS
        assert len(server.requests) == 1
        recorded = path.with_name("weights.pth.sha256").read_text().split()
        assert recorded == [hashlib.sha256(WEIGHTS).hexdigest(), "weights.pth"]
        assert not parts(tmp_path)

    def test_a_cut_connection_is_taken_up_where_it_stopped(self, server: Server, tmp_path: Path) -> None:
        path = fetch(server, tmp_path, Page(WEIGHTS, cut_at=HALF, cuts=1))
        assert path.read_bytes() == WEIGHTS
        assert ranges(server) == [None, f"bytes={HALF}-"]

    def test_the_next_run_goes_on_with_what_the_last_one_left(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(downloading, "ATTEMPTS", 1)
        with pytest.raises(CheckpointError, match="run it again to resume"):
            fetch(server, tmp_path, Page(WEIGHTS, cut_at=HALF))
        assert looks_whole(tmp_path) == []
        assert [part.stat().st_size for part in parts(tmp_path)] == [HALF]
        assert fetch(server, tmp_path, Page(WEIGHTS)).read_bytes() == WEIGHTS
        assert ranges(server)[-1] == f"bytes={HALF}-"

    def test_what_was_whole_but_not_renamed_is_kept(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(downloading, "check_container", interrupted)
            with pytest.raises(KeyboardInterrupt):
                fetch(server, tmp_path, Page(WEIGHTS))
        assert looks_whole(tmp_path) == []
        assert fetch(server, tmp_path, Page(WEIGHTS)).read_bytes() == WEIGHTS
        assert ranges(server) == [None, f"bytes={len(WEIGHTS)}-"]

    def test_without_ranges_it_starts_anew(self, server: Server, tmp_path: Path) -> None:
        path = fetch(server, tmp_path, Page(WEIGHTS, cut_at=HALF, cuts=1, ranges=False))
        assert path.read_bytes() == WEIGHTS

    @pytest.mark.parametrize("ignores_condition", [False, True])
    def test_parts_of_two_versions_are_never_joined(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores_condition: bool
    ) -> None:
        monkeypatch.setattr(downloading, "ATTEMPTS", 1)
        with pytest.raises(CheckpointError):
            fetch(server, tmp_path, Page(WEIGHTS, cut_at=HALF))
        monkeypatch.setattr(downloading, "ATTEMPTS", 3)
        other = _weights(1)
        path = fetch(server, tmp_path, Page(other, etag='"two"', ignores_condition=ignores_condition))
        assert path.read_bytes() == other

    def test_without_a_version_it_starts_anew(self, server: Server, tmp_path: Path) -> None:
        path = fetch(server, tmp_path, Page(WEIGHTS, etag="", cut_at=HALF, cuts=1))
        assert path.read_bytes() == WEIGHTS
        assert ranges(server) == [None, None]

    def test_a_length_longer_than_the_file_is_an_error(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="failed"):
            fetch(server, tmp_path, Page(WEIGHTS, extra_length=1000))
        assert looks_whole(tmp_path) == []
        assert len(server.requests) <= downloading.ATTEMPTS

    def test_a_length_shorter_than_the_file_is_an_error(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            fetch(server, tmp_path, Page(WEIGHTS, extra_length=-1000))
        assert looks_whole(tmp_path) == parts(tmp_path) == []

    def test_a_redirect_is_followed_but_not_in_circles(self, server: Server, tmp_path: Path) -> None:
        server.pages["/real"] = Page(WEIGHTS)
        assert fetch(server, tmp_path, Page(redirect="/real")).read_bytes() == WEIGHTS
        with pytest.raises(CheckpointError, match="redirects"):
            fetch(server, tmp_path, Page(redirect="/circle.pth"), "circle.pth")

    def test_a_slow_server_is_waited_for(self, server: Server, tmp_path: Path) -> None:
        assert fetch(server, tmp_path, Page(WEIGHTS, delay=0.2)).read_bytes() == WEIGHTS

    def test_a_stalled_server_is_not(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(downloading, "ATTEMPTS", 1)
        monkeypatch.setattr(downloading, "TIMEOUT", (1.0, 0.1))
        with pytest.raises(CheckpointError, match="failed"):
            fetch(server, tmp_path, Page(WEIGHTS, delay=1.0))
        assert looks_whole(tmp_path) == []

    def test_a_busy_server_is_asked_again(self, server: Server, tmp_path: Path) -> None:
        assert fetch(server, tmp_path, Page(WEIGHTS, failures=2)).read_bytes() == WEIGHTS
        with pytest.raises(CheckpointError, match="503"):
            fetch(server, tmp_path, Page(WEIGHTS, failures=99), "busy.pth")
        assert len(server.requests) == 3 + downloading.ATTEMPTS

    def test_a_server_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with serve({}) as stopped:
            url = stopped.url
        with pytest.raises(CheckpointError, match=r"127\.0\.0\.1.*failed"):
            resolve(f"{url}/weights.pth", cache=tmp_path)

    def test_404_is_not_tried_again(self, server: Server, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="404"):
            resolve(f"{server.url}/nothing.pth", cache=tmp_path)
        assert len(server.requests) == 1
        assert looks_whole(tmp_path) == []

    @pytest.mark.parametrize("type_", ["text/html; charset=utf-8", "application/octet-stream"])
    def test_a_web_page_is_refused(self, server: Server, tmp_path: Path, type_: str) -> None:
        with pytest.raises(CheckpointError, match="web page"):
            fetch(server, tmp_path, Page(b"<!doctype html><html></html>", type=type_))
        assert looks_whole(tmp_path) == parts(tmp_path) == []

    @pytest.mark.parametrize("when", ["before", "during"])
    def test_a_full_disk_is_named(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        if when == "before":
            monkeypatch.setattr(downloading.shutil, "disk_usage", lambda _: _Usage(10))
        else:
            real = Path.open

            class Full(io.BytesIO):
                def write(self, content: object) -> int:
                    raise OSError(errno.ENOSPC, "No space left on device")

            monkeypatch.setattr(Path, "open", lambda p, mode="r", **k: Full() if mode == "ab" else real(p, mode, **k))
        with pytest.raises(CheckpointError, match="no space left"):
            fetch(server, tmp_path, Page(WEIGHTS))
        assert looks_whole(tmp_path) == []

    def test_a_cache_that_cannot_be_written_is_named(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(CheckpointError, match="cannot hold"):
            fetch(server, tmp_path / "cache", Page(WEIGHTS))

    def test_a_fetched_file_that_changed_is_refused(self, server: Server, tmp_path: Path) -> None:
        path = fetch(server, tmp_path, Page(WEIGHTS))
        path.write_bytes(_weights(1))
        with pytest.raises(CheckpointError, match="not the file that was first fetched"):
            resolve(f"{server.url}/weights.pth", cache=tmp_path)

    def test_another_file_than_the_first_is_refused(self, server: Server, tmp_path: Path) -> None:
        fetch(server, tmp_path, Page(WEIGHTS)).unlink()
        with pytest.raises(CheckpointError, match="not the file that was first fetched"):
            fetch(server, tmp_path, Page(_weights(1)))

    @pytest.mark.parametrize("algorithm", ["md5", "sha256"])
    def test_a_known_hash_is_checked(self, server: Server, tmp_path: Path, algorithm: str) -> None:
        server.pages["/weights.pth"] = Page(WEIGHTS)
        url, known = f"{server.url}/weights.pth", hashlib.new(algorithm, WEIGHTS).hexdigest()[:8]
        assert downloading.download(url, tmp_path / "good.pth", digest=f"{algorithm}:{known}").exists()
        with pytest.raises(CheckpointError, match=f"{algorithm}.*published is 00000000"):
            downloading.download(url, tmp_path / "bad.pth", digest=f"{algorithm}:00000000")
        assert not (tmp_path / "bad.pth").exists()

    def test_two_addresses_with_the_same_name_do_not_meet(self, server: Server, tmp_path: Path) -> None:
        first = fetch(server, tmp_path, Page(WEIGHTS), "a/checkpoint.pth")
        second = fetch(server, tmp_path, Page(_weights(1)), "b/checkpoint.pth")
        assert first.read_bytes() != second.read_bytes()

    def test_offline_touches_no_network(self, server: Server, tmp_path: Path) -> None:
        server.pages["/weights.pth"] = Page(WEIGHTS)
        url = f"{server.url}/weights.pth"
        with pytest.raises(CheckpointError, match="offline nothing is fetched"):
            resolve(url, offline=True, cache=tmp_path)
        assert server.requests == []
        there = resolve(url, cache=tmp_path)
        assert resolve(url, offline=True, cache=tmp_path) == there
        assert len(server.requests) == 1


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free


class TestNames:
    def test_what_exists_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("mae_vit_base_full").mkdir()
        assert resolve("mae_vit_base_full", offline=True) == Path("mae_vit_base_full")

    def test_an_unknown_name_gets_the_nearest_ids(self) -> None:
        with pytest.raises(CheckpointNotFoundError, match="did you mean mae_vit_base_full"):
            resolve("mae_vit_base_ful", offline=True)

    @pytest.mark.parametrize("name", ["nothing.pth", "some/folder", "a\0b", "x" * 5000, Path("hf:/a/b")])
    def test_a_path_that_is_not_there_is_no_checkpoint(self, name: str | Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
            resolve(name, offline=True)

    def test_an_id_is_fetched_from_its_source_and_checked(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import dataclasses

        row = find_checkpoint("mae_vit_base_encoder")
        server.pages["/weights.pth"] = Page(WEIGHTS)
        moved = dataclasses.replace(row, source=f"{server.url}/weights.pth")
        monkeypatch.setattr(fetching, "find_checkpoint", lambda name: moved)
        with pytest.raises(CheckpointError, match="published is 8cad7c"):
            resolve(row.id, cache=tmp_path)
        known = dataclasses.replace(moved, digest="md5:" + hashlib.md5(WEIGHTS).hexdigest()[:6])
        monkeypatch.setattr(fetching, "find_checkpoint", lambda name: known)
        assert resolve(row.id, cache=tmp_path) == tmp_path / row.id / "weights.pth"

    def test_google_drive_is_explained_and_what_was_put_there_is_found(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"open https://drive\.google.*put the file into"):
            resolve("simmim_vit_base_800e", cache=tmp_path)
        folder = tmp_path / "simmim_vit_base_800e"
        folder.mkdir()
        (folder / "any name.pth").write_bytes(WEIGHTS)
        for _ in range(2):
            assert resolve("simmim_vit_base_800e", offline=True, cache=tmp_path) == folder / "any name.pth"
        (folder / "another.pth").write_bytes(WEIGHTS)
        with pytest.raises(CheckpointError, match="must hold one checkpoint"):
            resolve("simmim_vit_base_800e", cache=tmp_path)

    @pytest.mark.parametrize("address", ["hf://", "hf://name", "hf://a/b@c/d@e", "hf://a/b?x"])
    def test_a_wrong_hub_address_is_refused(self, address: str) -> None:
        with pytest.raises(CheckpointError, match="must be hf://owner/name"):
            resolve(address, offline=True)

    @pytest.mark.parametrize(
        ("address", "expected"),
        [
            ("hf://a/b", ("a/b", None, "config.json")),
            ("hf://a/b@v1", ("a/b", "v1", "config.json")),
            ("hf://a/b@refs/pr/1", ("a/b", "refs/pr/1", "config.json")),
            ("hf://a/b/c/d.pt", ("a/b", None, "c/d.pt")),
            ("hf://a/b/c/d.pt@v1", ("a/b", "v1", "c/d.pt")),
            ("hf://a/b@v1/c/d.pt", ("a/b", "v1", "c/d.pt")),
            ("https://huggingface.co/a/b/blob/main/c/d%20e.pt?download=true", ("a/b", "main", "c/d e.pt")),
            ("https://huggingface.co/a/b/resolve/v1/d.pt", ("a/b", "v1", "d.pt")),
        ],
    )
    def test_hub_addresses(self, address: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[tuple[object, ...]] = []

        def hub_file(_: str, name: str, where: dict[str, object]) -> Path:
            asked.append((where["repo_id"], where["revision"], name))
            return Path("snapshot") / name

        monkeypatch.setattr(fetching, "_hub_file", hub_file)
        resolve(address, offline=True)
        assert asked[0] == expected


def hub(endpoint: str, home: Path, code: str, **environment: str) -> str:
    """What a fresh process prints: the hub's client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hub__only_needed_files_from_its_own_cache(tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    plain = {
        "config.json": b"{}",
        "preprocessor_config.json": b"{}",
        "pytorch_model.bin": b"weights",
        "README.md": b"no",
    }
    pages = hub_pages("o/plain", plain)
    pages |= hub_pages("o/shards", {"model.safetensors.index.json": index, "model-1.safetensors": b"1"})
    pages |= hub_pages("o/shards", {"model-2.safetensors": b"2"}) | hub_pages("o/file", {"x/y.pt": b"3"}, "v1")
    wrong = {"none": "RepoNotFound", "gated": "GatedRepo", "renamed": "RevisionNotFound"}
    pages |= {
        f"/o/{name}/resolve/main/config.json": Page(status=404, headers={"X-Error-Code": code})
        for name, code in wrong.items()
    }
    code = """
        import os
        from mto_analysis.checkpoints.fetching import drop_fetched, resolve
        from mto_analysis.errors import CheckpointError
        if os.environ["HF_HUB_OFFLINE"] == "0":  # what is dropped is fetched again
            folder = resolve("hf://o/shards")
            blobs = folder.parents[1] / "blobs"
            held = len(list(blobs.iterdir()))
            assert drop_fetched("hf://o/shards", folder)
            assert len(list(blobs.iterdir())) == held - 2
        files = "plain", "shards", "file/x/y.pt@v1", "file", "file/z.pt"
        for source in (*files, "none", "gated", "renamed"):
            try:
                path = resolve(f"hf://o/{source}")
                print(sorted(p.name for p in path.iterdir()) if path.is_dir() else path.name)
            except CheckpointError as error:
                print(error)
    """
    with serve(pages) as server:
        server.absent = ABSENT_FILE
        online = hub(server.url, tmp_path, code).splitlines()
        asked = len(server.requests)
        offline = hub(server.url, tmp_path, code, HF_HUB_OFFLINE="1").splitlines()
        assert len(server.requests) == asked
        assert not any("README" in path for _, path, _ in server.requests)
    assert online[:3] == offline[:3]
    assert online[0] == "['config.json', 'preprocessor_config.json', 'pytorch_model.bin']"
    assert online[1] == "['model-1.safetensors', 'model-2.safetensors', 'model.safetensors.index.json']"
    assert online[2] == "y.pt"
    assert "neither model.safetensors nor pytorch_model.bin" in online[3]
    assert "offline nothing is fetched" in offline[3]
    assert "z.pt" in online[4]
    for line, words in zip(online[5:], ("no such repository", "on request", "no revision"), strict=True):
        assert words in line


def test_hub__that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(**_: object) -> str:
        raise LocalEntryNotFoundError("two\nlines")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("hf://o/name")
    with pytest.raises(CheckpointError, match="offline nothing is fetched"):
        resolve("hf://o/name", offline=True)


def test_commands__fetch_and_inspect_by_url(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mto_analysis.demo import DEMO_CHECKPOINTS

    monkeypatch.setenv("MTO_ANALYSIS_CACHE", str(tmp_path))
    server.pages["/demo.safetensors"] = Page(Path(DEMO_CHECKPOINTS["MAE"]).read_bytes())
    url = f"{server.url}/demo.safetensors"
    run = CliRunner()
    refused = run.invoke(app, ["inspect", url, "--offline"])
    assert refused.exit_code == 3
    assert refused.stderr.count("\n") == 1
    fetched = run.invoke(app, ["checkpoints", "fetch", url])
    assert fetched.exit_code == 0, fetched.output
    assert Path(fetched.stdout.strip()).is_file()
    for command in (["inspect"], ["checkpoints", "verify"]):
        assert run.invoke(app, [*command, url, "--offline"]).exit_code == 0
    measured = ["heterogeneity", "--ckpt", url, "--limit", "2", "--out", str(tmp_path / "out")]
    assert run.invoke(app, [*measured, "--offline"]).exit_code == 0
    assert len(server.requests) == 1
    assert "as recorded" not in run.invoke(app, ["checkpoints", "verify", str(DEMO_CHECKPOINTS["MAE"])]).stdout
    assert "as recorded" in run.invoke(app, ["checkpoints", "verify", url]).stdout
