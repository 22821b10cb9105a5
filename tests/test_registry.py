import dataclasses
import json
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from published_files import PUBLISHED
from typer.testing import CliRunner

from mto_analysis import load_checkpoint
from mto_analysis.checkpoints import registry
from mto_analysis.checkpoints.layouts import LAYOUTS
from mto_analysis.checkpoints.registry import find_checkpoint, find_published, find_source, list_checkpoints
from mto_analysis.demo import DEMO_CHECKPOINTS
from mto_analysis.errors import CheckpointNotFoundError
from mto_analyze import app

ROOT = Path(__file__).parents[1]
ROWS = list_checkpoints()
DEMO = str(DEMO_CHECKPOINTS["MAE"])


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["checkpoints", *arguments])


def test_rows__each_is_complete_and_plausible() -> None:
    assert len(ROWS) == 256
    assert max(Counter(row.id for row in ROWS).values()) == 1
    for row in ROWS:
        assert re.fullmatch(r"[a-z0-9_.]+", row.id)
        assert row.style in (("inpainting", "decoder") if row.has_mask_token else ("",)), row.id
        assert row.source.startswith(("https://", "hf://")), row.id
        assert "huggingface.co" not in row.source, row.id
        assert row.mask_ratio is None or 0 < row.mask_ratio < 1, row.id
        assert row.normalization in ("imagenet", "half", "clip", ""), row.id
        assert row.basis in ("names seen", "code", "published statement", "uncertain"), row.id
        assert re.fullmatch(r"((md5|sha256):[0-9a-f]{6,64})?", row.digest), row.id


def test_rows__name_only_files_that_are_listed() -> None:
    ids = {row.id for row in ROWS}
    for row in ROWS:
        for name in re.findall(r"\b(?:mae_vit_|bootmae_vit_|hiera_mae_|data2vec_vit_|eva_psz)\w+", row.notes):
            assert name in ids, (row.id, name)


def test_rows__claim_no_more_than_was_tried() -> None:
    read = {layout.name for layout in LAYOUTS if layout.convert}
    for row in ROWS:
        if row.loads:
            assert row.has_mask_token
            assert row.layout in read
            assert row.evidence.startswith(("original code: ", "slow reference", "key names only"))
        else:
            assert row.evidence == ""
    assert not find_checkpoint("mae_vit_base_encoder").loads
    assert not find_checkpoint("conmim_vit_base_800e_ft").loads
    assert not find_checkpoint("simmim_swinv2_giant_22k_125k").loads
    assert find_checkpoint("mae_vit_base_full").evidence == "original code: facebookresearch/mae efb2a80"
    assert find_checkpoint("ibot_vits_16").evidence == "original code: bytedance/ibot da316d82 (compared once)"
    assert find_checkpoint("hivit_mae_base_1600e").evidence == "slow reference"


def test_claims__name_layouts_families_and_files_that_exist() -> None:
    claims, layouts = registry._claims(), {layout.name: layout for layout in LAYOUTS}
    assert {claim.layout for claim in claims.values()} <= set(layouts)
    assert set(claims) <= {row.family for row in ROWS}
    references = {published.name.split(",")[0] for published in PUBLISHED}
    for claim in claims.values():
        assert claim.basis in ("original code", "slow reference", "")
        assert bool(claim.original) == (claim.basis == "original code")
        assert bool(claim.basis) == bool(layouts[claim.layout].convert)
        if claim.basis == "slow reference":
            assert any(name in claim.layout for name in references), claim
        if claim.golden.startswith("originals/"):
            about = json.loads((ROOT / "tests" / "golden" / claim.golden / "meta.json").read_text())
            assert set(claim.original.split()) <= set(about["original"].split())
        assert not claim.golden or (ROOT / "tests" / "golden" / claim.golden).is_dir()


def test_find_checkpoint__guesses() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"did you mean .*mae_vit_large_full"):
        find_checkpoint("mae_vit_larg_full")
    with pytest.raises(CheckpointNotFoundError, match="see mto-analyze checkpoints list"):
        find_checkpoint("zzz")


def test_find_published__by_id_address_and_unique_name() -> None:
    row = find_checkpoint("mae_vit_base_encoder")
    assert find_published(row.id, Path("x.pth")) == row
    assert find_published(row.source, Path("x.pth")) == row
    assert find_published("folder/mae_pretrain_vit_base.pth", Path("folder/mae_pretrain_vit_base.pth")) == row
    assert find_published("checkpoint.pth", Path("checkpoint.pth")) is None
    assert find_source(row.source) == row
    shared = next(source for source, count in Counter(row.source for row in ROWS).items() if count > 1)
    assert find_source(shared) is None


def test_statistics__are_those_of_the_name() -> None:
    assert find_checkpoint("bootmae_vit_base_800e").mean_and_std == ((0.5,) * 3, (0.5,) * 3)
    assert find_checkpoint("hf_data2vec_vision_base").mean_and_std is None


def test_page__is_what_the_registry_gives() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "checkpoints.py"))
    text = script["page"]()
    assert (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8") == text, "run python docs/checkpoints.py"
    assert all(f"`{row.id}`" in text for row in ROWS)
    ids = {row.id for row in ROWS}
    for name in re.findall(r"`((?:mae|bootmae|simmim)_\w+)`", text.partition(script["MARK"])[0]):
        assert name in ids or any(each.startswith(name) for each in ids), name


class TestCommands:
    def test_list__is_filtered(self) -> None:
        every, some = invoke("list").stdout.splitlines(), invoke("list", "--with-mask-token").stdout.splitlines()
        assert (len(every) - 1, len(some) - 1) == (256, sum(row.has_mask_token for row in ROWS))
        shown = json.loads(invoke("list", "--family", "mae", "--json").stdout)
        assert {row["family"] for row in shown} == {"mae"}
        assert {"id", "loads", "evidence", "layout", "licence", "source"} <= set(shown[0])
        assert max(map(len, every)) <= 100
        swins = invoke("list", "SWIN-B", "--loadable").stdout.splitlines()[1:]
        found = [row for row in ROWS if row.loads and "swin-b" in f"{row.id} {row.backbone}".lower()]
        assert [line.split()[0] for line in swins] == [row.id for row in found] != []
        nothing = invoke("list", "nosuch")
        assert (nothing.exit_code, len(nothing.stdout.splitlines())) == (0, 1)
        assert "leave a filter out" in nothing.stderr

    def test_list__an_unknown_family_is_a_usage_error(self) -> None:
        result = invoke("list", "--family", "maee")
        assert result.exit_code == 2
        assert "did you mean mae" in result.stderr
        assert result.stderr.count("\n") == 1

    def test_info__in_words_and_json(self) -> None:
        assert "CC-BY-NC-4.0" in invoke("info", "mae_vit_base_full").stdout
        row = json.loads(invoke("info", "mae_vit_base_full", "--json").stdout)
        assert row["mask_ratio"] == 0.75
        assert invoke("info", "mae_vit_bas_full").exit_code == 3

    def test_verify__prints_metadata_and_the_hash(self, tmp_path: Path) -> None:
        result = invoke("verify", DEMO)
        assert result.exit_code == 0, result.stderr
        assert "sha256:" in result.stdout
        found = json.loads(invoke("verify", DEMO, "--json").stdout)
        (tmp_path / "copy.safetensors").write_bytes(Path(DEMO).read_bytes())
        for recorded, code in ((found["sha256"], 0), ("0" * 64, 3)):
            (tmp_path / "copy.safetensors.sha256").write_text(f"{recorded}  copy.safetensors\n")
            assert invoke("verify", str(tmp_path / "copy.safetensors")).exit_code == code

    def test_verify__takes_the_image_size_of_a_grid_that_is_not_square(self) -> None:
        path = str(ROOT / "tests" / "golden" / "originals" / "hiera_rect" / "checkpoint.pth")
        assert "give --image-size" in invoke("verify", path).stderr
        said = invoke("verify", path, "--image-size", "64x96", "--mean", "0.5,0.5,0.5").stdout
        assert "64 x 96 px" in said
        assert "mean (0.5, 0.5, 0.5), std (0.229, 0.224, 0.225) (mean given, std published)" in said

    def test_verify__a_file_that_is_not_the_published_one(self, tmp_path: Path) -> None:
        (tmp_path / "mae_pretrain_vit_base.pth").write_bytes(Path(DEMO).read_bytes())
        result = invoke("verify", str(tmp_path / "mae_pretrain_vit_base.pth"))
        assert result.exit_code == 3
        assert "is not mae_vit_base_encoder: its md5" in result.stderr

    def test_convert__loads_back_bit_for_bit(self, tmp_path: Path) -> None:
        out = tmp_path / "new folder" / "model.safetensors"
        assert invoke("convert", DEMO, "--out", str(out)).exit_code == 0
        before, after = load_checkpoint(DEMO), load_checkpoint(out)
        assert dataclasses.replace(before.info, layout="") == dataclasses.replace(after.info, layout="")
        assert before.config == after.config
        for (name, one), (same, other) in zip(before.state_dict().items(), after.state_dict().items(), strict=True):
            assert name == same
            assert torch.equal(one, other)

    def test_convert__never_overwrites_unasked(self, tmp_path: Path) -> None:
        out = tmp_path / "model.safetensors"
        out.write_text("somebody's work")
        result = invoke("convert", DEMO, "--out", str(out))
        assert result.exit_code == 2
        assert out.read_text() == "somebody's work"
        assert invoke("convert", DEMO, "--out", str(out), "--overwrite").exit_code == 0
        assert load_checkpoint(out).info.family == "mae"

    @pytest.mark.parametrize("command", ["verify", "fetch", "convert"])
    def test_errors_are_one_line_and_a_code(self, command: str, tmp_path: Path) -> None:
        more = ["--out", str(tmp_path / "out.safetensors")] if command == "convert" else []
        result = invoke(command, "nothing.pth", *more)
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())
