"""The atlas end to end: files of many families in published layouts behind a server, some of which are bad."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from image_files import write_images
from published_files import PUBLISHED
from servers import Page, Server, serve
from test_cli import fails, ok, run, start
from test_experiments import Killing

from mto_analysis.atlas import COLUMNS, Protocol, choose_entries, compare_again, merge_tables, read_table, sample_table
from mto_analysis.atlas.page import _for_table, read_scores, render_atlas
from mto_analysis.atlas.running import AtlasFolder
from mto_analysis.atlas.table import parquet_bytes
from mto_analysis.atlas.verifying import check_complete
from mto_analysis.checkpoints import downloading, registry
from mto_analysis.checkpoints.fetching import drop_fetched
from mto_analysis.demo import DEMO_IMAGES
from mto_analysis.errors import CheckpointError, DataError, OutputExistsError
from mto_analysis.experiments import running
from mto_analysis.experiments.worker import Outcome, Resources, Task, attempt
from mto_analysis.images import open_images
from mto_analysis.images.image_sets import ImageSet, load_image_set, summarize_images
from mto_analysis.probe.request import Request, Settings
from mto_analysis.probe.study import measure_checkpoints
from mto_analysis.runtime.outputs import csv_bytes

#: Published layouts that say all about themselves, of as many families.
NAMES = {
    "simmim": "microsoft/SimMIM ViT",
    "simmim_swin": "SimMIM Swin, whole windows",
    "simmim_swinv2": "SimMIM SwinV2",
    "eva02": "EVA-02, tiny and small",
    "ibot_swin": "iBOT Swin",
    "conmim": "ConMIM",
    "beit": "BEiT",
    "beit_v2": "BEiT v2",
    "data2vec": "data2vec vision",
    "openmixup": "OpenMixup SimMIM ViT",
}
GOOD = [name for name in NAMES if name != "ibot_swin"]  # with the registry's row of a wrong hash in its place


def in_this_process(task: Task, resources: Resources, begun: object = None) -> Outcome:
    """As a process of its own does it, in a second less."""
    notes: list[str] = []
    told = attempt(task, resources, notes.append)
    return Outcome(tuple(dict.fromkeys(notes)), **told)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small files by name, as their authors would publish them."""
    contents = {}
    for name, published in NAMES.items():
        (layout,) = (each for each in PUBLISHED if each.name == published)
        contents[name] = layout.save(tmp_path_factory.mktemp(name)).read_bytes()
    return contents


@dataclass
class World:
    """A server with checkpoints, and images."""

    server: Server
    images: Path
    folder: Path

    def arguments(self, *names: str) -> list[str]:
        return [f"{name}={self.server.url}/{name}.pth" for name in names]

    def run(self, out: str, *arguments: object) -> Any:
        return run("atlas", "run", "--images", self.images, "--out", self.folder / out, "--seed", 3, *arguments)


@pytest.fixture(scope="module")
def world(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Where nothing is slow: downloads are tried once, and tasks are done in this process."""
    folder = tmp_path_factory.mktemp("atlas")
    with pytest.MonkeyPatch.context() as patch, serve({}) as server:
        patch.setenv("MTO_ANALYSIS_CACHE", str(folder / "cache"))
        patch.setattr(downloading, "BACKOFF", 0.0)
        patch.setattr(downloading, "ATTEMPTS", 1)
        patch.setattr(running, "perform", in_this_process)
        known = registry.find_checkpoint("simmim_vit_base_800e")
        wrong = replace(known, id="wrong", source=f"{server.url}/ibot_swin.pth", digest="md5:0123ab")
        rows = (*registry.list_checkpoints(), wrong)
        patch.setattr(registry, "_rows", lambda: rows)
        server.pages = {f"/{name}.pth": Page(content) for name, content in files.items()}
        server.pages["/damaged.pth"] = Page(files["beit"][:-2000] + b"\0" * 2000)
        yield World(server, write_images(folder / "images", ("a.png", "b.png", "c.png")), folder)


@pytest.fixture(scope="module")
def measured(world: World) -> tuple[Any, Any]:
    """The first run, in which a connection is cut midway, and the second."""
    world.server.pages["/eva02.pth"].cut_at = 2**16
    names = [*world.arguments(*GOOD, "damaged"), "wrong"]
    first = world.run("atlas", *names, "--drop-files", "--contributor", "me")
    world.server.pages["/eva02.pth"].cut_at = None
    failed = pd.read_csv(world.folder / "atlas/failures.csv")
    parts = {part.stem: part.stat().st_mtime_ns for part in (world.folder / "atlas/parts").iterdir()}
    assert len(parts) == len(GOOD) - 1
    second = world.run("atlas", *names, "--drop-files", "--contributor", "me")
    assert {
        part.stem: part.stat().st_mtime_ns for part in (world.folder / "atlas/parts").iterdir()
    }.items() > parts.items()
    # Here, as other tests fetch files too, and tests run in any order.
    ranges = [headers.get("Range") for _, path, headers in world.server.requests if path == "/eva02.pth"]
    assert ranges == [None, f"bytes={2**16}-"]
    assert not list((world.folder / "cache").rglob("*.pth"))  # dropped
    assert len(list((world.folder / "cache").rglob("*.pth.sha256"))) == len(GOOD)
    return (first, failed), second


@pytest.fixture(scope="module")
def table(world: World, measured: object) -> pd.DataFrame:
    return read_table(world.folder / "atlas")


def test_run__goes_on_after_failures_and_resumes(world: World, measured: tuple[Any, Any], table: pd.DataFrame) -> None:
    (first, failed), second = measured
    assert first.exit_code == second.exit_code == 3
    reasons = failed.set_index("checkpoint")["reason"]
    assert set(reasons.index) == {"eva02", "damaged", "wrong"}
    assert "run it again to resume" in reasons["eva02"]
    assert "damaged" in reasons["damaged"]
    assert "published is 0123ab" in reasons["wrong"]
    assert (failed["exit_code"] == 3).all()
    assert "mto-analyze: error: 3 checkpoints failed: " in first.stderr
    left = pd.read_csv(world.folder / "atlas/failures.csv")
    assert set(left["checkpoint"]) == {"damaged", "wrong"}
    assert set(table["checkpoint"]) == set(GOOD)
    assert table["family"].nunique() >= 8


def test_table__holds_what_heterogeneity_measures(world: World, table: pd.DataFrame, files: dict[str, bytes]) -> None:
    path = world.folder / "simmim.pth"
    path.write_bytes(files["simmim"])
    request = Request([path], open_images(world.images), Settings(seed=3, measures="all,-attention"))
    study = measure_checkpoints(request)
    mine = table[table["checkpoint"] == "simmim"]
    per_layer = study.measures[study.measures["other_layer_depth"].isna()].dropna(subset="value")
    joined = mine.merge(per_layer, on=["stack", "layer_depth", "measure"], suffixes=("", "_one"))
    assert len(joined) == len(mine) == len(per_layer)
    assert {"heterogeneity", "effective_rank_masked", "frequency_high", "cosine_masked"} <= set(mine["measure"])
    for number in ("value", "ci_low", "ci_high"):
        np.testing.assert_allclose(joined[number], joined[f"{number}_one"], rtol=1e-6)
    (model,), row = study.models, mine.iloc[0]
    assert row["file_sha256"] == model["sha256"]
    assert row["own_loss"] == pytest.approx(model["own_loss"]["loss"], rel=1e-6)
    assert row["mask_rule"] == model["masks"]
    assert (row["evidence"], row["contributor"]) == ("original code: microsoft/SimMIM d3e29bc", "me")
    images = summarize_images(open_images(world.images), "images")
    assert row["images_sha256"] == images.sha256
    assert load_image_set(world.folder / "atlas/images.csv").digests == images.digests
    methods = (world.folder / "atlas/methods.md").read_text()
    assert all(
        each in methods for each in ("beit_v2, ", "rank, ", "of the set images", images.sha256[:12], "fp32 on cpu")
    )


def test_table__is_the_same_as_csv_and_however_it_was_measured(world: World, table: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(read_table(world.folder / "atlas/atlas.csv"), table, check_exact=True)
    world.run("again", *world.arguments("simmim"), "--contributor", "me")
    world.run("again", *world.arguments("beit_v2", "simmim"), "--contributor", "me", "--batch-size", 3)
    some = table[table["checkpoint"].isin(["beit_v2", "simmim"])].reset_index(drop=True)
    assert (world.folder / "again/atlas.parquet").read_bytes() == parquet_bytes(some)


def test_run__interrupted_before_and_after_tasks_resumes(world: World, table: pd.DataFrame) -> None:
    chance, names = random.Random(0), world.arguments("simmim", "beit", "beit_v2")

    def interrupted(*arguments: Any) -> Outcome:
        if chance.random() < 0.5:
            raise KeyboardInterrupt
        outcome = in_this_process(*arguments)
        if chance.random() < 0.5:
            raise KeyboardInterrupt
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "perform", interrupted)
        for _ in range(10):
            result = world.run("stopped", *names, "--contributor", "me")
            if result.exit_code == 0:
                break
            assert result.exit_code == 130
            assert result.stderr.splitlines()[-1] == "mto-analyze: error: interrupted; the same command resumes"
    assert world.run("stopped", *names, "--contributor", "me").exit_code == 0
    some = table[table["checkpoint"].isin(["simmim", "beit", "beit_v2"])].reset_index(drop=True)
    assert (world.folder / "stopped/atlas.parquet").read_bytes() == parquet_bytes(some)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--limit", 2), "holds measurements of other images; use the same options, or another --out"),
        (("--seed", 4), "was measured with mask_seed 3, now 4"),
        (("--measures", "h"), "was measured with measures all,-attention,-cka, now h"),
        (("--num-heads", 3), "--num-heads N and --decoder-num-heads N are for one checkpoint"),
        (
            ("--image-set", "cifar10_test_256"),
            "256 of the 256 images of the set cifar10_test_256 are not there: 0 (missing)",
        ),
        (("--image-set", "none"), "no image set none: give a file, or one of cifar10_test_256"),
    ],
)
def test_run__refuses_what_does_not_belong_together(
    world: World, table: pd.DataFrame, arguments: tuple[object, ...], told: str
) -> None:
    before = (world.folder / "atlas/atlas.csv").read_bytes()
    result = world.run("atlas", *world.arguments("beit", "simmim"), *arguments)
    assert result.exit_code in (2, 4)
    assert told in result.stderr
    assert (world.folder / "atlas/atlas.csv").read_bytes() == before


def test_run__notices_that_a_file_of_ones_own_has_changed(world: World, files: dict[str, bytes]) -> None:
    path = world.folder / "mine.pth"
    path.write_bytes(files["beit"])
    assert world.run("mine", path, "--measures", "h").exit_code == 0
    assert world.run("mine", path, "--measures", "h").exit_code == 0
    path.write_bytes(files["conmim"])
    result = world.run("mine", path, "--measures", "h")
    assert result.exit_code == 2
    assert "mine.parquet was measured with file_sha256 " in result.stderr
    assert "is not from an earlier run" in fails(2, "atlas", "merge", path, path, "--out", world.folder / "mine")


def test_run__refuses_parts_that_do_not_belong_together(world: World, files: dict[str, bytes]) -> None:
    """Of another version or other images, or that cannot be read; each says what to do."""
    (world.folder / "own.pth").write_bytes(files["beit"])
    arguments = ("parts", world.folder / "own.pth", "--measures", "h")
    world.run(*arguments)
    folder = world.folder / "parts"
    part = folder / "parts/own.parquet"
    rows = read_table(part)
    for content, told in (
        (parquet_bytes(rows.assign(mto_analysis_version="0.0.9")), "with mto_analysis_version 0.0.9, now "),
        (parquet_bytes(rows.assign(images_sha256="0" * 64)), f"with images_sha256 {'0' * 64}, now "),
        (parquet_bytes(rows.assign(checkpoint="other")), "with checkpoint other, now own"),
        (parquet_bytes(rows)[:-9], "delete it to measure it again"),
    ):
        part.write_bytes(content)
        result = world.run(*arguments)
        assert result.exit_code in (2, 4)
        assert told in result.stderr
    part.write_bytes(parquet_bytes(rows))
    (folder / "failures.csv").write_text("mine\n1\n")
    assert "failures.csv is not the list of an earlier run; move it away" in world.run(*arguments).stderr
    (folder / "failures.csv").unlink()
    result = world.run(*arguments[:2], "--measures", "none")  # before anything is fetched
    assert (result.exit_code, "measures are h, " in result.stderr) == (2, True)


def test_run__leaves_a_table_of_others_alone(world: World) -> None:
    (world.folder / "theirs").mkdir()
    (world.folder / "theirs/atlas.csv").write_text("mine")
    result = world.run("theirs", *world.arguments("beit"))
    assert result.exit_code == 2
    assert "already holds atlas.csv of no run" in result.stderr


# merge


@pytest.fixture(scope="module")
def halves(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Two tables with one checkpoint in both."""
    return {
        "a": table[table["checkpoint"].isin(GOOD[:5])].reset_index(drop=True),
        "b": table[table["checkpoint"].isin(GOOD[4:])].reset_index(drop=True),
    }


def changed(table: pd.DataFrame, **columns: object) -> pd.DataFrame:
    return table.assign(**columns)


def test_merge__joins_tables_that_agree(world: World, halves: dict[str, pd.DataFrame], table: pd.DataFrame) -> None:
    paths = [world.folder / f"{name}.{kind}" for name, kind in (("a", "parquet"), ("b", "csv"))]
    paths[0].write_bytes(parquet_bytes(halves["a"]))
    paths[1].write_bytes(csv_bytes(halves["b"]))
    result = ok("atlas", "merge", *paths, "--out", world.folder / "merged")
    both = table["checkpoint"].eq(GOOD[4]).sum()
    assert f"{both} rows are in two of them and agree" in result.stderr
    pd.testing.assert_frame_equal(read_table(world.folder / "merged"), table)
    assert "already holds" in fails(2, "atlas", "merge", *paths, "--out", world.folder / "merged")
    assert "give at least two" in fails(2, "atlas", "merge", paths[0], "--out", world.folder / "one-table")


def test_merge__takes_rounding_for_what_it_is(halves: dict[str, pd.DataFrame]) -> None:
    """What differs by less than the precision's tolerance, as a part of the curve, is the same."""
    b = halves["b"]
    both = b["checkpoint"] == GOOD[4]
    scale = b.groupby(["checkpoint", "stack", "measure"])["value"].transform(lambda each: each.abs().max())
    for precision, part, fits in (
        ("fp32", 5e-4, True),
        ("fp32", 2e-3, False),
        ("bf16", 2e-3, True),
        ("fp64", 5e-4, True),
    ):
        moved = b.assign(precision=precision, **{n: b[n] + part * scale * both for n in ("value", "ci_low", "ci_high")})
        if fits:
            merged, found = merge_tables({"a": halves["a"], "b": moved})
            assert found.largest == pytest.approx(
                part / {"fp32": 1e-3, "bf16": 0.15, "fp64": 1e-3}[precision], rel=1e-3
            )
            kept = merged[merged["checkpoint"] == GOOD[4]]
            assert set(kept["precision"]) == {"fp64" if precision == "fp64" else "fp32"}  # the finest stays
        else:
            told = rf"{both.sum()} of {both.sum()} rows of both tables differ .* \(fp32, cpu \(\w+\), [\d.]+\) and "
            with pytest.raises(DataError, match=told):
                merge_tables({"a": halves["a"], "b": moved})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"images_sha256": "0" * 64},
            r"of different images: 3 of images, sha256 \w{8}... and 3 of images, ",
        ),
        ({"mask_seed": 7}, r"a and b are of different masks: seed 3, 1 per image and seed 7, 1 per image"),
        ({"masks_per_image": 2}, r"seed 3, 1 per image and seed 3, 2 per image; only like tables"),
        ({"masks_sha256": "0" * 64}, rf"{GOOD[4]} has different masks in a \(.* seed 3\) and in b \("),
    ],
)
def test_merge__refuses_unlike_images_and_masks_by_name(
    halves: dict[str, pd.DataFrame], change: dict[str, object], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        merge_tables({"a": halves["a"], "b": halves["b"].assign(**change)})


# verify


def test_verify__measures_a_part_again(world: World, table: pd.DataFrame, tmp_path: Path) -> None:
    options = ("--fraction", 0.2, "--images", world.images, "--drop-files", "-q")
    for left in (world.folder / "cache").rglob("*.pth"):  # of other tests: what was there before is not deleted
        left.unlink()
    result = ok("atlas", "verify", world.folder / "atlas", *options)
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert len(rows) == 2
    assert all(row[1] == row[2] and row[4] == "True" for row in rows)

    first, second = rows[0][0], rows[1][0]
    bad = table.copy()
    one = bad["measure"].eq("heterogeneity") & bad["checkpoint"].eq(first) & bad["layer_depth"].eq(1)
    for number in ("value", "ci_low", "ci_high"):
        bad.loc[one, number] *= 0.99
    (tmp_path / "bad.csv").write_bytes(csv_bytes(bad))
    # Nor is another file behind the address what was measured.
    pages = world.server.pages
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pages, f"/{second}.pth", pages["/ibot_swin.pth"])
        result = run("atlas", "verify", tmp_path / "bad.csv", *options)
    assert result.exit_code == 4
    assert f"{second} failed: http" in result.stderr
    assert "is not the file that was first fetched" in result.stderr
    assert f"1 of {rows[0][2]} rows of both tables differ beyond rounding: {first}, " in result.stderr
    said = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [(row[2], row[4]) for row in said] == [(rows[0][2], "False"), ("0", "False")]
    result = run("atlas", "verify", world.folder / "atlas", *options, "--offline")
    assert result.exit_code == 3
    *told, end = result.stderr.splitlines()
    assert f"{first} failed: " in told[0]
    assert told[0].endswith("offline nothing is fetched")
    assert end == f"mto-analyze: error: 2 checkpoints failed: {first}, {second}; nothing was verified"
    assert "other images: images (" in fails(2, "atlas", "verify", world.folder / "atlas", "-q")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop(index=3), r"table lacks 1 row: beit, encoder, layer depth \d, cosine_\w+; the others agree"),
        (
            lambda t: t.assign(measure=t["measure"].where(t.index != 3, "h")),
            r"no measurement of 1 row: beit, .*, h; the",
        ),
        (lambda t: t.assign(own_loss=0.1), r"layer depth 0, cosine_masked: own_loss 0.1 \(fp32.*\) and [^;]*$"),
        (lambda t: t.assign(ci_low=np.nan), r"ci_low nan \("),
        (lambda t: t.assign(num_images=50), r"num_images 50 \(.* and 3 \("),
        (lambda t: t.assign(family="mae"), r"family mae \(.* and beit"),
        (lambda t: t.assign(evidence="original code"), r"evidence original code \("),
    ],
)
def test_verify__notices_all_that_was_changed(
    table: pd.DataFrame, change: Callable[[pd.DataFrame], pd.DataFrame], told: str
) -> None:
    again = table[table["checkpoint"] == "beit"].reset_index(drop=True)
    again["own_loss"] = 0.5
    sample = sample_table(change(again.copy()), 1, seed=0, protocol=Protocol())
    summary, found = compare_again(sample, again)
    assert not summary["agrees"].any()
    check = check_complete if found.rows["agrees"].all() else lambda sample, again: found.check()
    with pytest.raises(DataError, match=told):
        check(sample, again)
    whole = sample_table(again, 1, seed=0, protocol=Protocol())
    assert compare_again(whole, again)[0]["agrees"].all()
    check_complete(whole, again)


def test_begin__keeps_files_of_no_run(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("mine")
    with pytest.raises(OutputExistsError, match=r"already holds run\.json of no run"):
        AtlasFolder(tmp_path).begin(load_image_set("cifar10_test_256"))


def test_page__a_measure_that_begins_later_has_no_first_value() -> None:
    curve = {"depth": [1, 2], "value": [0.5, 0.25], "low": [None, None], "high": [None, None]}
    checkpoint = {"measures": {"lidar": curve}, "layers": 3, "loss": None}
    shown = _for_table(checkpoint, "lidar")
    assert (shown["first"], shown["min"], shown["last"]) == ("", "0.25", "")
    assert _for_table(checkpoint | {"layers": 2}, "lidar")["last"] == "0.25"
    assert _for_table(checkpoint, "rank")["min"] == ""


def test_sample_table__depends_on_its_seed_alone(table: pd.DataFrame) -> None:
    found = [sample_table(table, 0.5, seed=seed, protocol=Protocol()) for seed in (0, 0, 1)]
    assert [each.name for each in found[0].wanted] == [each.name for each in found[1].wanted]
    assert [each.name for each in found[0].wanted] != [each.name for each in found[2].wanted]
    assert len(found[0].wanted) == -(-len(GOOD) // 2)
    assert len(sample_table(table, 0.001, seed=0, protocol=Protocol()).wanted) == 1
    with pytest.raises(ValueError, match="fraction must be above 0 and at most 1, got 0"):
        sample_table(table, 0, seed=0, protocol=Protocol())
    h = table["measure"] == "heterogeneity"  # of a merged table, in which these were measured by somebody else
    mixed = table.assign(measures=table["measures"].where(~h, "h"), precision=table["precision"].where(~h, "fp64"))
    wanted = sample_table(mixed[mixed["checkpoint"] == "beit"], 1, seed=0, protocol=Protocol()).wanted
    assert {entry.name: (how.measures, how.precision) for entry, how in wanted.items()} == {
        "beit-0": ("all,-attention,-cka", "fp32"),
        "beit-1": ("h", "fp64"),
    }
    with pytest.raises(DataError, match=r"\w+ cannot be measured as the table states: measures are h, .*'foo'"):
        sample_table(table.assign(measures="foo"), 0.1, seed=0, protocol=Protocol())


# table


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.drop(columns="stack"), "lacks stack"),
        (lambda t: t.assign(extra=1), "has unknown extra"),
        (lambda t: t.assign(schema_version=2), r"row 1 \(beit\) has schema_version 2, read is 1"),
        (
            lambda t: t.assign(value=t["value"].where(t.index != 1)),
            r"row 2 \(beit\) has value nan, and every row needs one",
        ),
        (lambda t: t.assign(value=t["value"] + 100), r"has ci_high .*, on the wrong side of the value"),
        (lambda t: t.assign(**dict.fromkeys(("value", "ci_low", "ci_high"), 9.0)), "has value 9.0, and H lies between"),
        (lambda t: pd.concat([t, t]), r"row \d+ \(beit\) has checkpoint beit, with a measure of a layer given before"),
        (lambda t: t.assign(file_sha256="abc"), "has file_sha256 abc, which cannot be"),
        (lambda t: t.assign(loading="{ }"), "has loading { }, which atlas does not write so"),
        (lambda t: t.assign(checkpoint="_x"), "has checkpoint _x, which cannot be"),
        (lambda t: t.assign(mask_seed=t.index), r"row 2 \(beit\) has mask_seed 1, and row 1 has 0: all need the same"),
        (lambda t: t.assign(layer_depth=-1), "has layer_depth -1, the smallest is 0"),
        (lambda t: t.iloc[:0], "has no rows"),
        (lambda t: t.assign(checkpoint="../../x"), "has checkpoint ../../x, which cannot be"),
        (
            lambda t: t[["stack"]],
            r"lacks schema_version, checkpoint, source, file_sha256, hash_compared_with and 38 more",
        ),
        (lambda t: t.assign(layer_depth="0.0"), "the column layer_depth: .* invalid value '0.0'"),
        (lambda t: t.reset_index(names=""), "has unknown a column without a name"),
        (lambda t: t.iloc[:, [*range(t.shape[1]), 0]], "has the column schema_version twice"),
    ],
)
def test_read_table__refuses_what_cannot_be(
    table: pd.DataFrame, tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], told: str
) -> None:
    of_one = table[table["checkpoint"].eq("beit") & table["measure"].eq("heterogeneity")].reset_index(drop=True)
    (tmp_path / "t.csv").write_bytes(csv_bytes(change(of_one)))
    with pytest.raises(DataError, match=told):
        read_table(tmp_path / "t.csv")


def test_read_table__refuses_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "semicolon.csv").write_text("schema_version;checkpoint\n1;a,b\n")
    with pytest.raises(DataError, match="save it with commas between columns and points in numbers"):
        read_table(tmp_path / "semicolon.csv")
    for name, content in (("t.parquet", b"PAR1nonsense"), ("t.csv", b"\xff\xfe\0"), ("u.csv", b"a,b\n1\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="is not a table of an atlas"):
            read_table(tmp_path / name)
    with pytest.raises(DataError, match="no atlas at"):
        read_table(tmp_path)


def test_documentation__has_every_column() -> None:
    page = (Path(__file__).parents[1] / "docs/atlas.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| (\w+) \|", page, flags=re.MULTILINE) == [
        (each.name, each.kind) for each in COLUMNS
    ]


# which checkpoints and images


def test_choose_entries__by_id_family_and_source(tmp_path: Path) -> None:
    (tmp_path / "a=b.pth").touch()
    names = ["simmim_vit_base_800e", "x=hf://me/x", "https://here/y.pth?a=b", str(tmp_path / "a=b.pth")]
    assert [(entry.name, entry.source) for entry in choose_entries(names)] == [
        ("simmim_vit_base_800e", "simmim_vit_base_800e"),
        ("x", "hf://me/x"),
        ("y", "https://here/y.pth?a=b"),
        ("a-b", str(tmp_path / "a=b.pth")),
    ]
    every = choose_entries(every=True)
    assert len(every) == sum(row.loads for row in registry.list_checkpoints())
    assert choose_entries(["mae_vit_base_full"], families=["mae"]) == choose_entries(families=["mae"])
    for arguments, told in (
        ({}, "give ids, --family or --all"),
        ({"names": ["x/last.pth", "y/last.pth"]}, "two checkpoints are called last; name them apart as NAME=SOURCE"),
        ({"families": ["mea"]}, "did you mean mae"),
        (
            {"names": ["mae_vit_base_full=x.pth"]},
            "mae_vit_base_full is the id of another file, .*; give it another name",
        ),
        ({"names": ["..=x.pth"]}, "is not NAME=SOURCE: a name has up to 100 letters"),
        ({"names": ["x="]}, "is not NAME=SOURCE"),
        ({"names": [f"{'x' * 101}=x.pth"]}, "is not NAME=SOURCE"),
    ):
        with pytest.raises(ValueError, match=told):
            choose_entries(**arguments)
    with pytest.raises(CheckpointError, match="mae_vit_base_encoder cannot be measured: it has no mask token"):
        choose_entries(["mae_vit_base_encoder"])


def test_drop_fetched__keeps_contents_that_another_revision_holds(tmp_path: Path) -> None:
    blob = tmp_path / "blobs/abc"
    blob.parent.mkdir()
    blob.write_bytes(b"weights")
    for revision in ("main", "pinned"):
        (tmp_path / "snapshots" / revision).mkdir(parents=True)
        (tmp_path / "snapshots" / revision / "model.safetensors").symlink_to(blob)
    assert drop_fetched("hf://o/n@pinned", tmp_path / "snapshots/pinned")
    assert (tmp_path / "snapshots/main/model.safetensors").read_bytes() == b"weights"
    assert drop_fetched("hf://o/n", tmp_path / "snapshots/main")
    assert not blob.exists()


def test_drop_fetched__never_deletes_what_was_given_by_path(tmp_path: Path) -> None:
    (tmp_path / "mine.pth").touch()
    assert not drop_fetched(tmp_path / "mine.pth", tmp_path / "mine.pth")
    assert (tmp_path / "mine.pth").exists()


def test_image_set__is_found_by_name_and_by_content(tmp_path: Path) -> None:
    images = open_images(write_images(tmp_path / "one", ("a.png", "b.png", "c.png")))
    chosen = summarize_images(images, "set")
    path = tmp_path / "set.csv"
    ok("atlas", "images", tmp_path / "one", "--out", path)
    assert load_image_set(path) == chosen
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets save it
    assert load_image_set(path) == chosen
    (tmp_path / "two/val").mkdir(parents=True)
    for name in "abc":
        (tmp_path / f"one/{name}.png").rename(tmp_path / f"two/val/{name}.png")
    (tmp_path / "two/readme.txt").touch()
    found = chosen.find(open_images(tmp_path / "two"))
    assert list(found.names) == ["a.png", "b.png", "c.png"]
    assert summarize_images(found, "set") == chosen
    (tmp_path / "two/b.png").write_bytes(b"other")
    (tmp_path / "two/val/b.png").unlink()
    (tmp_path / "two/val/c.png").unlink()
    with pytest.raises(DataError, match=r"2 of the 3 .* not there: b.png \(other contents\), c.png \(missing\)$"):
        chosen.find(open_images(tmp_path / "two"))
    assert chosen.limited(2).digests.keys() == {"a.png", "b.png"}
    assert ImageSet("x", dict(reversed(chosen.digests.items()))).sha256 == chosen.sha256


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name,hash\n", "its first line must be image,sha256"),
        ("image,sha256\n", "lists no images"),
        ("image,sha256\na,1234\n", "line 2 is not a name and a SHA-256"),
        (f"image,sha256\na,{'0' * 64}\na,{'1' * 64}\n", "line 3 names a again"),
    ],
)
def test_load_image_set__refuses_files_that_are_none(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "set.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        load_image_set(tmp_path / "set.csv")


def test_bundled_set__is_that_of_the_bundled_images() -> None:
    assert load_image_set("cifar10_test_256") == summarize_images(open_images(DEMO_IMAGES), "cifar10_test_256")


# page


def test_page__holds_the_values_and_escapes_names(world: World, table: pd.DataFrame) -> None:
    named = table.assign(contributor="</script><b>me</b>")
    page = render_atlas(named, scores={"top-1": {"beit": 80.0}})
    assert page == render_atlas(named, scores={"top-1": {"beit": 80.0}})
    assert "<b>me" not in page
    untrained = table.assign(own_loss=table["own_loss_of_mean"] * np.where(table["checkpoint"].eq("simmim"), 1.1, 0.5))
    assert render_atlas(untrained).count('class="doubt"') == 1
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])  # type: ignore[index]
    curves = {each["checkpoint"]: each["measures"] for each in data["checkpoints"]}
    assert set(curves) == set(GOOD)
    mine = table[table["checkpoint"].eq("beit") & table["measure"].eq("heterogeneity")]
    np.testing.assert_allclose(curves["beit"]["heterogeneity"]["value"], mine["value"], rtol=1e-6)
    result = ok("atlas", "page", world.folder / "atlas", "--out", world.folder / "atlas.html")
    assert "atlas.html" in result.stderr
    assert "Scores against" not in (world.folder / "atlas.html").read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("model,accuracy\nbeit,3\n", "lacks score"),
        ("model,score\nbeit,high\n", "is not a table of scores"),
        ("model,score\nbeit,3\nbeit,4\n", "gives score of beit twice"),
        ("model,score\nvit,3\n", "names no checkpoint of the table, only vit"),
        ("model,score\nbeit,\n", "row 1 lacks a value"),
        ("model,score\nbeit,inf\n", "row 1 has a score that is not finite"),
        ("model,score\n", "it has no rows"),
        ("model;score\nbeit;3\n", "lacks model and score, and has model;score"),
    ],
)
def test_scores__are_refused_in_words(table: pd.DataFrame, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(DataError, match=told):
        read_scores(tmp_path / "s.csv", table)


def test_page__tells_files_of_one_name_apart(table: pd.DataFrame, tmp_path: Path) -> None:
    one = table[table["checkpoint"] == "beit"]
    both = pd.concat([one, one.assign(file_sha256="0" * 64), one.assign(weights="model_ema")], ignore_index=True)
    data = json.loads(re.search(r'id="data">(.*?)</script>', render_atlas(both))[1])  # type: ignore[index]
    sha256 = one["file_sha256"].iloc[0][:8]
    assert {each["label"] for each in data["checkpoints"]} == {
        f"beit, {sha256}, model",
        "beit, 00000000, model",
        f"beit, {sha256}, model_ema",
    }
    (tmp_path / "s.csv").write_text("model,score\nbeit,0\n")
    with pytest.raises(DataError, match="a score of beit, which are 2 files in the table"):
        read_scores(tmp_path / "s.csv", both)
    assert read_scores(tmp_path / "s.csv", one) == {"score": {"beit": 0.0}}


# with real processes


@pytest.fixture
def slow_world(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Without anything done in this process."""
    monkeypatch.setenv("MTO_ANALYSIS_CACHE", str(tmp_path / "cache"))
    with serve({f"/{name}.pth": Page(content) for name, content in files.items()}) as server:
        yield World(server, write_images(tmp_path / "images", ("a.png", "b.png", "c.png")), tmp_path)


def whole_table(process: Any) -> None:
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, (out, err)


@pytest.mark.slow
def test_run__interrupted_ten_times_at_random_moments_gives_the_same_table(slow_world: World) -> None:
    names = slow_world.arguments("simmim", "beit", "conmim")
    arguments = ["atlas", "run", *names, "--images", slow_world.images, "--jobs", 2, "--drop-files", "--out"]
    began = time.monotonic()
    whole_table(start(*arguments, slow_world.folder / "whole"))
    duration = time.monotonic() - began
    chance = random.Random(0)
    folders, interrupts, files_seen = [slow_world.folder / "0"], 0, set()

    def count_parts() -> int:
        return len(list(folders[-1].glob("parts/*.parquet")))

    while interrupts < 10:
        process = start(*arguments, folders[-1])
        # A busy machine takes longer than it did before, so half of them wait for the next checkpoint instead.
        more = chance.randrange(2)
        wanted = count_parts() + more
        while process.poll() is None and count_parts() < wanted:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(duration * (chance.uniform(0.0, 0.2) if more else chance.uniform(0.2, 0.8)))
        if process.poll() is None:
            interrupts += 1
            process.send_signal(chance.choice((signal.SIGINT, signal.SIGKILL)))
            process.communicate(timeout=60)
            # The last two: before the command began, and when it had just ended.
            assert process.returncode in (130, -signal.SIGKILL, -signal.SIGINT, 0)
            files_seen.add(count_parts())
        else:
            whole_table(process)
            folders.append(slow_world.folder / str(len(folders)))
    whole_table(start(*arguments, folders[-1]))
    assert len(files_seen) > 1  # they were interrupted at different stages
    whole = read_table(slow_world.folder / "whole")
    for folder in folders:
        pd.testing.assert_frame_equal(read_table(folder), whole, check_exact=True)
        for name in ("atlas.parquet", "atlas.csv", "images.csv"):
            assert (folder / name).read_bytes() == (slow_world.folder / "whole" / name).read_bytes()


@pytest.mark.slow
def test_run__a_killed_process_is_started_again_or_fails_alone(
    slow_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = slow_world.arguments("beit", "simmim")
    monkeypatch.setattr(running, "perform", Killing(2))
    assert slow_world.run("one", *names).exit_code == 0
    monkeypatch.setattr(running, "perform", Killing(3))
    result = slow_world.run("two", *names)
    assert result.exit_code == 1
    assert "beit failed: its process died (exit code -9; often memory is short" in result.stderr
    assert set(read_table(slow_world.folder / "two")["checkpoint"]) == {"simmim"}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_run__on_ray_gives_the_same_table(slow_world: World) -> None:
    arguments = ["atlas", "run", *slow_world.arguments("beit", "simmim"), "--images", slow_world.images, "--out"]
    for out, *more in (("local",), ("ray", "--engine", "ray")):
        whole_table(start(*arguments, slow_world.folder / out, *more))
    local, ray = (slow_world.folder / out / "atlas.parquet" for out in ("local", "ray"))
    assert ray.read_bytes() == local.read_bytes()
