import json
import struct
from pathlib import Path

import numpy as np
import pytest

from mto_analysis.errors import DataError
from mto_analysis.rauc.curves import read_curves
from mto_analysis.rauc.logs import read_log

LOGS = Path(__file__).parent / "logs"


def curve(name, **options):
    frame = read_curves([LOGS / name], **options).frame
    return dict(zip(frame["epoch"], frame["score"].round(6), strict=True))


def found(name, **options):
    return [str(one).removeprefix(f"{LOGS}/") for one in read_curves([LOGS / name], **options).findings]


@pytest.mark.parametrize(
    ("name", "form", "epochs", "last"),
    [
        ("mae_finetune_log.txt", "MAE JSON lines", range(24), 81.72),
        ("mae_linprobe_log.txt", "MAE JSON lines", range(24), 65.9),
        ("bootmae_log.txt", "MAE JSON lines", [0, 5, 10, 15, 20, 25, *range(29, 40)], 83.884),
        ("conmim_log.txt", "MAE JSON lines", range(22), 76.036),
        ("simmim_finetune.log", "text", range(3), 31.104),
        ("timm_summary.csv", "timm summary", range(26), 75.172),
        ("hf_trainer_state.json", "transformers trainer state", range(1, 5), 97.4),
        ("lightning_metrics.csv", "Lightning metrics", range(7), 60.997969),
        ("mmpretrain_scalars.json", "OpenMMLab JSON lines", [2, 4, 6, 8], 70.309998),
        ("mmcls_0x.log.json", "OpenMMLab JSON lines", range(1, 8), 71.91),
        ("tensorboard_sample", "TensorBoard events", range(12), 74.69739),
        ("tensorboard_resumed_sample", "TensorBoard events", range(15), 77.41712),
        ("resumed_log.txt", "MAE JSON lines", range(15), 77.522),
        ("broken_log.txt", "MAE JSON lines", [0, 1, 2, 3, 4, 5, *range(7, 16)], 78.6),
    ],
)
def test_read_log__reads_what_each_trainer_writes(name, form, epochs, last):
    read = curve(name)
    assert list(read) == list(epochs)
    assert list(read.values())[-1] == last
    assert read_log(LOGS / name).form == form


def test_read_log__keeps_the_last_record_of_a_resumed_run():
    read = curve("resumed_log.txt")
    assert [read[epoch] for epoch in (7, 8, 9)] == [67.42, 69.774, 71.642]
    assert found("resumed_log.txt") == [
        "resumed_log.txt:11: 3 epochs written again (7 to 9): the last score of each counts"
    ]
    assert curve("timm_summary.csv")[13] == 63.152
    assert "timm_summary.csv:16: skipped: the header again (a resumed run)" in found("timm_summary.csv")


def test_read_log__names_every_line_it_skips():
    text = found("broken_log.txt")
    assert [one for one in text if "not a JSON object" in one] == [
        f"broken_log.txt:{line}: skipped: not a JSON object" for line in (5, 12, 13)
    ]
    assert "broken_log.txt:21: skipped: the last line is cut" in text
    assert "broken_log.txt:8: left out: this epoch's score or loss is not finite" in text
    assert any(one.startswith("broken_log.txt:9: no score between epochs 5 and 7") for one in text)


def test_read_log__skips_simmims_check_of_the_loaded_weights():
    assert curve("simmim_finetune.log") == {0.0: 13.846, 1.0: 31.272, 2.0: 31.104}
    assert any("an accuracy before training started" in one for one in found("simmim_finetune.log"))


def test_read_log__reads_a_captured_console_with_colours(tmp_path):
    text = (LOGS / "simmim_finetune.log").read_text().replace("INFO", "\x1b[32mINFO\x1b[0m").replace("] (", "](")
    (tmp_path / "console.log").write_text(text)
    frame = read_curves([tmp_path / "console.log"]).frame
    assert frame["score"].tolist() == [13.846, 31.272, 31.104]


def test_read_log__splits_a_chart_export_into_runs():
    table = read_curves([LOGS / "wandb_export.csv"], steps_per_epoch=1251)
    assert table.methods == ["fallow-elm-12", "brisk-otter-15"]
    first, second = (next(iter(table.runs(name).values())) for name in table.methods)
    assert (first.epochs.tolist(), first.scores[-1]) == (list(range(1, 25)), 79.764)
    assert (len(second.epochs), second.scores[-1]) == (9, 79.242)


@pytest.mark.parametrize("name", ["mae_pretrain_log.txt", "conmim_pretrain_log.txt"])
def test_read_log__a_pretraining_log_has_no_curve(name):
    with pytest.raises(DataError, match="no accuracy found"):
        read_log(LOGS / name)


def test_read_log__takes_a_named_key_and_tag():
    assert read_log(LOGS / "mae_finetune_log.txt", score_column="test_acc5").rows["score"].iloc[-1] == 95.842
    assert read_log(LOGS / "tensorboard_sample", score_column="loss").rows["epoch"].tolist()[:3] == [0.0, 250.0, 500.0]
    with pytest.raises(DataError, match="there is no column 'nope'"):
        read_log(LOGS / "timm_summary.csv", score_column="nope")


def test_read_log__a_cut_event_file_loses_its_last_record_only(tmp_path):
    source = next((LOGS / "tensorboard_sample").iterdir())
    (tmp_path / source.name).write_bytes(source.read_bytes()[:-10])
    table = read_curves([tmp_path])
    assert len(table.frame) in (11, 12)
    assert any("the last record is cut" in str(one) for one in table.findings)


def test_read_log__a_damaged_event_file_is_named(tmp_path):
    data = bytearray(next((LOGS / "tensorboard_sample").iterdir()).read_bytes())
    first = struct.unpack_from("<Q", data)[0] + 16
    data[first + 12 : first + 20] = b"\xff" * 8
    (tmp_path / "events.out.tfevents.1").write_bytes(data)
    with pytest.raises(DataError, match="record 2 is damaged"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"  \n \n", "empty"),
        (b"\x00\x01\x02binary", "neither text nor"),
        (b"just words\nand more\n", "not a log of a known form"),
        (b'{"log_history": [', "broken"),
        (b'{"log_history": 3}', "not a list"),
        (b'{"test_acc1": 3}\n{"test_acc1": 4}\n', "a score without 'epoch'"),
        (b"method,epoch,score\nMAE,1,oops\n", r":2: 'oops' in column 'score' is not a number"),
        (b"method,epoch,score\nMAE,x1,5\n", r":2: 'x1' in column 'epoch' is not a number"),
        (b"method,epoch,score\n", "no row"),
        (b"method,epoch,score\nMAE,1,2\nMAE,2,3,4,5\n", ":3: the table is broken"),
        (b"method,epoch,score\nMAE,1,57,4\n", "more fields than the header"),
        (b"epoch,score,score\n1,2,3\n", "comes twice"),
        (b"time,score\n1,2\n", "a score without 'epoch'"),
        (b"step,score\n1,2\n", "one evaluation, no curve"),
        (b"epoch,val_acc\n1,2\n", "one evaluation, no curve"),
        (b"\xff\xfeepoch,score\n", "UTF-8"),
        (b"[2022 x] (y 1): INFO  * Acc@1 1.0 Acc@5 2.0\n", "no accuracy line"),
    ],
)
def test_read_log__says_what_is_wrong_with_a_file(tmp_path, content, message):
    path = tmp_path / "a.log"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_curves([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_read_log__a_missing_file_and_an_empty_folder_are_data_errors(tmp_path):
    with pytest.raises(DataError, match="there is no such log"):
        read_log(tmp_path / "none.csv")
    with pytest.raises(DataError, match="no TensorBoard event file"):
        read_log(tmp_path)


def test_read_log__takes_semicolons_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffmethod;epoch;score\n"MAE; big";1;50\n"MAE; big";2;60\n'.encode())
    assert read_curves([path]).methods == ["MAE; big"]


def test_read_log__a_scalar_in_a_string_is_a_number(tmp_path):
    lines = [{"epoch": 1, "accuracy": "61.5"}, {"epoch": 2, "accuracy": True}, {"epoch": 3, "accuracy": 63}]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, lines)))
    assert np.isnan(read_log(tmp_path / "a.json").rows["score"]).tolist() == [False, True, False]
