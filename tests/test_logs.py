import gzip
import json
import runpy
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mto_analysis.errors import DataError
from mto_analysis.rauc.curves import Source, read_curves
from mto_analysis.rauc.logs import FORMATS, read_log

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
        (b"0%|\n{'loss': '2.1', 'epoch': '1'}\n", r"what the Trainer of Hugging Face prints.*trainer_state\.json"),
        (b"{'eval_loss': 2.1, 'epoch': 1.0}\n", "what the Trainer of Hugging Face prints"),
        (b"Epoch 1/2\n10/10 - 1s - loss: 2.3 - accuracy: 0.1\n", r"what Keras prints.*give .*CSVLogger"),
        ("10/10 \u2501\u2501 1s 5ms/step - accuracy: 0.1 - loss: 2.3\n".encode(), "what Keras prints"),
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


ALTERNATING = [
    (0, "a", 10.0),
    (0, "b", 10.0),
    *((e, each, base + e) for e in range(1, 5) for each, base in zip("ab", (40, 50), strict=True)),
]


def test_tidy__two_scores_in_each_epoch_are_two_curves(tmp_path):
    lines = "".join(f"{epoch},{variant},{score}\n" for epoch, variant, score in ALTERNATING)
    path = write(tmp_path, "a.csv", f"epoch,variant,val_acc\n{lines}")
    with pytest.raises(DataError, match="has a second score for epoch 1 and others"):
        read_curves([path])
    assert len(read_curves([path], method_column="variant").frame) == 10


@pytest.mark.parametrize("last", ["4,400,,90", "4,,,90"])
def test_tidy__an_evaluation_after_training_is_no_epoch(tmp_path, last):
    head = "epoch,step,train_loss,val_acc\n"
    epochs = "".join(f"{e},{100 * e + 99},1,\n{e},{100 * e + 99},,{50 + e}\n" for e in range(4))
    table = read_curves([write(tmp_path, "a.csv", f"{head}{epochs}{last}\n")])
    assert table.frame["score"].tolist() == [50.0, 51.0, 52.0, 53.0]
    assert [str(one).rpartition(": ")[2] for one in table.findings] == ["left out"]
    longer = read_curves([write(tmp_path, "b.csv", f"{head}{epochs}4,499,,54\n")])  # it trained, and logged no loss
    assert longer.frame["score"].tolist()[-1] == 54.0
    below = "".join(f"{e},{100 * e + 99},,{50 + e}\n{e},{100 * e + 99},1,\n" for e in range(4))  # as Lightning does
    table = read_curves([write(tmp_path, "c.csv", f"{head}{below}{last}\n")])
    assert table.frame["score"].tolist() == [50.0, 51.0, 52.0, 53.0]


def test_read_curves__names_the_option_that_settles_different_axes(tmp_path):
    logs = [write(tmp_path, f"{axis}.csv", f"{axis},val_acc\n1,50\n2,51\n") for axis in ("epoch", "step", "hours")]
    with pytest.raises(DataError, match=r"counts epochs and .* counts steps; --steps-per-epoch"):
        read_curves(logs[:2])
    with pytest.raises(DataError, match=r"counts steps and .* counts hours; name a column that both have"):
        read_curves(logs[1:])


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.log", "EPOCH {0} training takes 1\n * Acc@1 {1} Acc@5 90\n"),
        ("a.log", "Epoch(val) [{0}][5/5]    accuracy/top1: {1}  accuracy/top5: 90.0\n"),
        ("val_acc", "165000000000{0} {1} {0}\n"),
        ("a.csv", "{0},{1}\n"),
    ],
)
def test_read_log__a_written_nan_is_named_where_it_is_the_last_score_too(tmp_path, name, line):
    head = "epoch,val_acc\n" if name == "a.csv" else ""
    text = "".join(line.format(epoch, 50 + epoch if epoch < 3 else "nan") for epoch in range(4))
    table = read_curves([write(tmp_path, name, head + text)])
    assert table.frame["score"].tolist() == [50.0, 51.0, 52.0]
    assert "left out: this epoch's score or loss is not finite" in str(table.findings[0])


@pytest.mark.parametrize("columns", ["epoch,train_loss,val_acc", "epoch,step,train_loss,val_acc"])
def test_tidy__the_best_model_evaluated_at_the_end_is_no_epoch(tmp_path, columns):
    step = "{0}0," if "step" in columns else ""
    rows = "".join(f"{{0}},{step}1,{{1}}\n".format(e, 50 + e) for e in range(6)) + f"2,{step},70\n".format(2)
    table = read_curves([write(tmp_path, "a.csv", f"{columns}\n{rows}")])
    assert table.frame["score"].tolist() == [50.0, 51.0, 52.0, 53.0, 54.0, 55.0]
    assert "evaluated again without training in between" in str(table.findings[0])


def test_tidy__an_evaluation_after_the_summary_of_training_is_no_epoch(tmp_path):
    history = [
        {"epoch": float(e), "step": e, key: v} for e in (1, 2, 3) for key, v in (("loss", 1), ("eval_accuracy", e / 4))
    ]
    history += [{"epoch": 3.0, "step": 3, "train_loss": 1.0}, {"epoch": 3.0, "step": 3, "eval_accuracy": 0.5}]
    path = write(tmp_path, "trainer_state.json", json.dumps({"log_history": history}))
    assert read_curves([path]).frame["score"].tolist() == [25.0, 50.0, 75.0]


def test_read_log__the_name_of_a_tensorboard_run_tells_the_split(tmp_path):
    exports = [
        write(tmp_path, f"run-fit_{split}-tag-epoch_accuracy.csv", f"Wall time,Step,Value\n1,0,{score}\n2,1,{score}\n")
        for split, score in (("train", 90), ("validation", 50))
    ]
    with pytest.raises(DataError, match="epoch_accuracy, looks like that of training images"):
        read_curves(exports)
    assert read_curves(exports[1:]).provenance[0].split == "val"
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for split, score in (("train", 90), ("validation", 50)):
        with tensorboard.SummaryWriter(tmp_path / "fit" / split) as writer:
            for step in (0, 1):
                writer.add_scalar("epoch_accuracy", score, step)
    (read,) = read_curves([tmp_path / "fit"]).provenance  # as Keras' callback writes it
    assert (read.split, read.last) == ("val", (1.0, 50.0))
    with pytest.raises(DataError, match="epoch_accuracy, looks like that of training images"):
        read_curves([tmp_path / "fit" / "train"])


def test_read_log__texts_for_numbers_are_named_with_a_line(tmp_path):
    lines = "".join(f'{{"epoch": {epoch}, "val_acc": "5{epoch}%"}}\n' for epoch in range(3))
    with pytest.raises(DataError, match="no score is finite; the score or loss of line 1 is not finite"):
        read_curves([write(tmp_path, "a.jsonl", lines)])


def test_choose__says_that_a_score_beside_an_accuracy_is_not_read(tmp_path):
    table = read_curves([write(tmp_path, "a.csv", "epoch,score,val_acc\n1,50,60\n2,51,61\n")])
    assert (table.provenance[0].column, len(table.findings)) == ("val_acc", 1)
    assert "'score' is not read" in str(table.findings[0])


def test_provenance__says_what_steps_were_divided_by(tmp_path):
    table = read_curves([write(tmp_path, "a.csv", "step,val_acc\n100,50\n200,51\n")], steps_per_epoch=100)
    assert "over steps ('step', 100 per epoch), 2 points, 1: 50 to 2: 51" in str(table.provenance[0])


def test_read_log__names_the_line_of_a_score_that_is_no_number(tmp_path):
    path = write(tmp_path, "a.csv", f"epoch,val_acc\n1,{'9' * 400}\n2,5\n")
    with pytest.raises(DataError, match=r"one evaluation, no curve.* the score or loss of line 2 is not finite"):
        read_curves([path])


def test_read_log__takes_torchvisions_text(tmp_path):
    lines = (
        f"Epoch: [{e}] Total time: 0:10:00\nTest:   [  0/1563]  eta: 0:10:00  acc1: 0.0 (0.0)\n"
        f"Test:  Acc@1 {50 + e}.5 Acc@5 90.0\nTest: EMA Acc@1 {60 + e} Acc@5 95.0\n"
        for e in range(3)
    )
    table = read_curves([write(tmp_path, "a.log", "".join(lines))])
    assert (table.frame["epoch"].tolist(), table.frame["score"].tolist()) == ([0, 1, 2], [50.5, 51.5, 52.5])
    assert any("EMA Acc@1 (EMA weights) is not read" in str(one) for one in table.findings)


def test_read_log__places_validation_by_iterations_of_mmcls_on_the_training_line_before(tmp_path):
    lines = (
        f"x - mmcls - INFO - Iter [{1000 * e}/5000]\tlr: 1.0e-3, loss: 2.0\n"
        f"x - mmcls - INFO - Iter(val) [49]\taccuracy_top-1: {50 + e}.0, accuracy_top-5: 90.0000\n"
        for e in (1, 2, 3)
    )
    (read,) = read_curves([write(tmp_path, "a.log", "".join(lines))]).provenance
    assert (read.axis, read.first, read.last) == ("steps", (1000.0, 51.0), (3000.0, 53.0))


def test_read_table__a_column_per_method_takes_columns_of_one_metric(tmp_path):
    rows = "".join(f"{e},{90 + e},{50 + e},{92 + e},{52 + e},0.1,0.2\n" for e in range(3))
    path = write(tmp_path, "a.csv", f"epoch,MAE_train,MAE_val,MTO_train,MTO_val,MAE_val_std,learning_rate\n{rows}")
    table = read_curves([path], wanted=["MAE_val"])
    assert table.methods == ["MAE_val", "MTO_val"]
    assert "not read as methods: MAE_train, MTO_train, MAE_val_std, learning_rate" in str(table.findings[0])
    losses = write(tmp_path, "b.csv", "epoch,MAE loss,MTO loss\n0,5,4\n1,4,3\n")
    with pytest.raises(DataError, match="loss is an error or a loss"):
        read_curves([losses], wanted=["MAE loss"])
    table = read_curves([losses], wanted=["MAE loss"], lower_is_better=True)
    assert (table.methods, table.provenance[0].kind) == (["MAE loss", "MTO loss"], "loss")
    with pytest.raises(DataError, match="of different metrics: accuracy, loss"):
        read_curves([write(tmp_path, "c.csv", "epoch,A loss,B acc\n0,5,4\n1,4,3\n")], wanted=["A loss", "B acc"])


def test_read_table__epochs_as_columns_may_have_their_unit_after_the_number(tmp_path):
    path = write(tmp_path, "a.csv", "model,100ep,200 epochs,300ep\nA,50,55,60\nB,52,57,62\n")
    (run,) = read_curves([path]).runs("B").values()
    assert run.epochs.tolist() == [100.0, 200.0, 300.0]


def test_read_log__takes_semicolons_quotes_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffmethod;epoch;score\n"MAE; big";1;50\n"MAE; big";2;60\n'.encode())
    assert read_curves([path]).methods == ["MAE; big"]


def test_read_log__a_scalar_in_a_string_is_a_number(tmp_path):
    lines = [{"epoch": 1, "accuracy": "61.5"}, {"epoch": 2, "accuracy": True}, {"epoch": 3, "accuracy": 63}]
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, lines)))
    assert np.isnan(read_log(tmp_path / "a.json").rows["score"]).tolist() == [False, True, False]


# Every format of the table is read from its example as the page says.


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_formats__each_example_is_recognized(form):
    (read,) = read_curves([LOGS / form.example]).provenance
    assert read.format == form.name
    assert read.points > 2
    assert len(read.sha256) == 64
    if form.first_epoch is not None and read.axis == "epochs":
        assert read.first_epoch == form.first_epoch


def test_formats__the_page_is_the_one_of_the_table():
    script = runpy.run_path(str(LOGS.parents[1] / "docs" / "logs.py"))
    text = script["page"]()
    assert (LOGS.parents[1] / "docs" / "logs.md").read_text(encoding="utf-8") == text, "run python docs/logs.py"


ACCURACIES = [61.2, 68.4, 71.9, 73.5, 74.1, 74.3]


@pytest.mark.parametrize(
    ("name", "column", "axis", "places"),
    [
        ("plain_lines.jsonl", "val/acc1", "epochs", range(1, 7)),
        ("run-mae-tag-val_acc1.csv", "val_acc1", "steps", range(1251, 7507, 1251)),
        ("wandb_history.csv", "val/acc", "epochs", range(6)),
        ("keras_training.csv", "val_accuracy", "epochs", range(6)),
        ("keras_history.json", "val_accuracy", "epochs", range(1, 7)),
        ("array.json", "val_top1", "epochs", range(1, 7)),
        ("mmpretrain.log", "accuracy/top1", "epochs", range(1, 7)),
        ("ultralytics_results.csv", "metrics/accuracy_top1", "epochs", range(1, 7)),
        ("fastai_history.csv", "accuracy", "epochs", range(6)),
        ("mlflow/val_acc1", "val_acc1", "steps", range(6)),
    ],
)
def test_read_log__every_example_gives_its_six_accuracies(name, column, axis, places):
    table = read_curves([LOGS / name])
    assert table.frame["score"].round(6).tolist() == ACCURACIES
    assert table.frame["epoch"].tolist() == list(places)
    (read,) = table.provenance
    assert (read.column, read.axis, read.last[1]) == (column, axis, pytest.approx(74.3))
    assert table.axis == axis[:-1]


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


TABLE = "epoch,val_acc\n1,60.5\n2,61.5\n3,62\n"


@pytest.mark.parametrize(
    "content",
    [
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        "\ufeff" + TABLE,
        TABLE.encode("utf-16"),
        TABLE.encode("utf-16-le"),
        gzip.compress(TABLE.encode(), mtime=0),
        gzip.compress(TABLE.encode()[:20], mtime=0) + gzip.compress(TABLE.encode()[20:], mtime=0),
        TABLE.replace(",", "\t"),
        TABLE.replace(",", ";").replace(".", ","),
        TABLE.replace(",", "\t").replace(".", ","),
        TABLE.replace(",", " , "),
        '"epoch","val_acc"\n"1","60.5"\n"2","61.5"\n"3","62"\n',
        "sep=;\n" + TABLE.replace(",", ";"),
        "\n\n" + TABLE,
        TABLE.replace("\n", ",\n"),
        TABLE.encode("utf-16-be"),
        "# a comment, with a comma\n" + TABLE,
        TABLE.replace(",", "   "),
        (TABLE.replace("\n", ",\xe9\n").replace("acc,\xe9", "acc,note")).encode("latin-1"),
    ],
)
def test_read_log__takes_every_spelling_of_a_table(tmp_path, content):
    table = read_curves([write(tmp_path, "a.csv", content)])
    assert table.frame["score"].tolist() == [60.5, 61.5, 62.0]


def test_read_log__takes_a_spreadsheet(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (("epoch", "val_acc"), (1, 60.5), (2, 61.5)):
        book.active.append(row)
    book.save(tmp_path / "a.xlsx")
    assert read_curves([tmp_path / "a.xlsx"]).frame["score"].tolist() == [60.5, 61.5]
    book.create_sheet("more").append(("epoch", "val_acc"))
    book.save(tmp_path / "b.xlsx")
    with pytest.raises(DataError, match="2 sheets hold something"):
        read_curves([tmp_path / "b.xlsx"])


@pytest.mark.parametrize("module", ["openpyxl", "tensorboard.backend.event_processing.event_file_loader"])
def test_read_log__names_the_package_that_is_missing(tmp_path, monkeypatch, module):
    path = LOGS / "tensorboard_sample"
    if module == "openpyxl":
        path = tmp_path / "a.xlsx"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("xl/workbook.xml", "")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'mto-analysis\[(spreadsheets|tensorboard)\]'"):
        read_log(path)


def test_read_log__takes_the_only_log_of_a_run_folder(tmp_path):
    lines = (LOGS / "mmpretrain_scalars.json").read_bytes()
    write(tmp_path, "20230101/vis_data/scalars.json", lines)
    write(tmp_path, "20230101/vis_data/20230101.log.json", lines)  # the same lines again
    write(tmp_path, "config.csv", "name,value\nlr,1\n")
    assert read_log(tmp_path).form == "OpenMMLab JSON lines"
    write(tmp_path, "log.txt", '{"epoch": 0, "test_acc1": 3}\n{"epoch": 1, "test_acc1": 4}\n')
    with pytest.raises(DataError, match=r"holds 2 logs; name one: .*log.txt.*scalars.json|holds 2 logs"):
        read_log(tmp_path)


def test_read_log__prefers_the_state_of_the_last_checkpoint(tmp_path):
    history = [{"epoch": float(e), "eval_accuracy": e / 10, "step": e} for e in (1, 2, 3)]
    for count in (2, 3):
        write(tmp_path, f"checkpoint-{count}/trainer_state.json", json.dumps({"log_history": history[:count]}))
    assert len(read_log(tmp_path).rows) == 3


@pytest.mark.parametrize(
    ("content", "column"),
    [
        ("epoch,acc,valid_acc\n0,90,40\n1,91,45\n", "valid_acc"),
        ("epoch,acc,validation/accuracy\n0,90,40\n1,91,45\n", "validation/accuracy"),
        ("epoch,train_acc,acc\n0,90,40\n1,91,45\n", "acc"),
        ("epoch,val_acc_top5,val_acc_top1\n0,90,40\n1,91,45\n", "val_acc_top1"),
        ("epoch,eval_prec5,eval_prec1\n0,90,40\n1,91,45\n", "eval_prec1"),
        ("epoch,best_val_acc,val_acc\n0,90,40\n1,91,45\n", "val_acc"),
        ("epoch,ema_test_acc1,test_acc1\n0,90,40\n1,91,45\n", "test_acc1"),
        ("epoch,val_acc_step,val_acc_epoch\n0,90,40\n1,91,45\n", "val_acc_epoch"),
        ("epoch,test_acc,val_acc\n0,,40\n1,90,45\n", "val_acc"),
        ("epoch,phase,acc\n0,train,90\n0,val,40\n1,train,91\n1,val,45\n", "val/acc"),
        ("epoch,weights,val_acc\n0,ema,90\n0,model,40\n1,ema,91\n1,model,45\n", "model/val_acc"),
        ("epoch,val_top_k_accuracy,val_accuracy\n0,90,40\n1,91,45\n", "val_accuracy"),
    ],
)
def test_choose__takes_validation_before_training(tmp_path, content, column):
    table = read_curves([write(tmp_path, "a.csv", content)])
    assert table.frame["score"].tolist() == [40.0, 45.0]
    assert table.provenance[0].column == column


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("val_acc,test_acc", "it has 'val_acc', 'test_acc', and nothing tells which is meant"),
        ("knn_top1,linear_top1", "it has 'knn_top1', 'linear_top1', and nothing tells"),
        ("train_acc,val_loss", r"the only accuracy, train_acc, looks like that of training images, while val_loss"),
        ("accuracy,val_loss", r"the only accuracy, accuracy, looks like that of training images"),
        ("score,test_score", "it has 'score' and 'test_score'"),
        ("val_acc_0,val_acc_1", "it has 'val_acc_0', 'val_acc_1', and nothing tells"),
        ("batch_acc,lr", "no accuracy found"),
        ("score,train_acc", "it has 'score' and 'train_acc'"),
        ("val_error,lr", "take it with --score-column 'val_error' --lower-is-better"),
        ("gain,lr", "no accuracy found"),
        ("val_top_k_accuracy,val_acc_topk", "no accuracy found"),
        ("acc,test_acc,train_acc", "it has 'acc', 'test_acc', and nothing tells"),
    ],
)
def test_choose__asks_where_names_do_not_tell(tmp_path, columns, message):
    path = write(tmp_path, "a.csv", f"epoch,{columns}\n0,40,50\n1,45,51\n")
    with pytest.raises(DataError, match=message):
        read_curves([path])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("val_loss", "no accuracy but a loss: say --lower-is-better"),
        ("val_err1", "no accuracy but an error: say --lower-is-better"),
        ("gain", "nothing tells what 'gain' is; say --unit percent, fraction or raw"),
    ],
)
def test_read_curves__asks_what_a_named_column_is(tmp_path, column, message):
    path = write(tmp_path, "a.csv", f"epoch,{column}\n0,4\n1,3\n")
    with pytest.raises(DataError, match=message):
        read_curves([path], score_column=column)
    assert read_curves([path], score_column=column, unit="raw").frame["score"].tolist() == [4.0, 3.0]


def test_choose__a_loss_beside_its_validation_is_of_training(tmp_path):
    history = [{"epoch": float(e), "loss": 2.0 / e, "eval_loss": 3.0 / e, "step": e} for e in (1, 2, 4)]
    path = write(tmp_path, "trainer_state.json", json.dumps({"log_history": [*history, {"train_loss": 1.0}]}))
    (read,) = read_curves([path], lower_is_better=True).provenance
    assert (read.column, read.split, read.last) == ("eval_loss", "val", (4.0, -0.75))
    table = read_curves([path], lower_is_better=True, score_column="loss")
    assert table.provenance[0].split == "train"
    assert any("'loss' is of training images; eval_loss is not read" in str(one) for one in table.findings)


def test_choose__maes_test_accuracy_is_timms_validation_accuracy():
    table = read_curves([LOGS / "mae_finetune_log.txt", LOGS / "timm_summary.csv"])
    assert [one.column for one in table.provenance] == ["test_acc1", "eval_top1"]


def test_read_curves__turns_errors_and_losses_round(tmp_path):
    path = write(tmp_path, "a.csv", "epoch,val_loss,val_err1,val_acc\n0,2.5,40,60\n1,2,30,70\n")
    errors = read_curves([path], lower_is_better=True)
    assert (errors.provenance[0].column, errors.frame["score"].tolist()) == ("val_err1", [60.0, 70.0])
    assert errors.score_label == "100 \N{MINUS SIGN} top-1 error (%)"
    assert errors.as_score(40) == 60
    losses = read_curves([path], lower_is_better=True, score_column="val_loss")
    assert (losses.frame["score"].tolist(), losses.score_label) == ([-2.5, -2.0], "\N{MINUS SIGN}val_loss")
    with pytest.raises(DataError, match="'val_acc' is an accuracy, of which higher is better"):
        read_curves([path], lower_is_better=True, score_column="val_acc")


@pytest.mark.parametrize(
    ("one", "two"),
    [("val_acc1", "test_acc1"), ("val_acc", "acc"), ("test_acc1", "ema_test_acc1"), ("val_acc", "val_knn_acc")],
)
def test_choose__refuses_different_metrics_in_one_comparison(tmp_path, one, two):
    a = write(tmp_path, "a.txt", f'{{"epoch": 0, "{one}": 3}}\n{{"epoch": 1, "{one}": 4}}\n')
    b = write(tmp_path, "b.txt", f'{{"epoch": 0, "{two}": 3}}\n{{"epoch": 1, "{two}": 4}}\n')
    with pytest.raises(DataError, match="these are different metrics, or nothing tells that they are the same"):
        read_curves([a, b])
    asked = [Source.parse(f"A={a}[score={one}]"), Source.parse(f"B={b}[score={two}]")]
    assert [read.column for read in read_curves(asked).provenance] == [one, two]


def test_read_curves__a_list_of_columns_is_never_cut(tmp_path):
    columns = [f"column{place}" for place in range(40)]
    path = write(tmp_path, "a.csv", f"epoch,{','.join(columns)}\n0{',1' * 40}\n1{',2' * 40}\n")
    with pytest.raises(DataError, match="column39"):
        read_curves([path])


CHART_COLUMNS = [f"{run} - val/acc{end}" for run in ("a", "a", "b - x") for end in ("", "__MIN")]
CHART = ",".join(f'"{column}"' for column in ["Step", *CHART_COLUMNS]) + "\n"


def test_read_log__runs_of_one_name_in_a_chart_are_seeds(tmp_path):
    path = write(tmp_path, "a.csv", CHART + '"1","60","60","61","61","62","62"\n"2","70","70","71","71","72","72"\n')
    table = read_curves([path])
    assert table.methods == ["a", "b - x"]
    assert {seed: run.scores.tolist() for seed, run in table.runs("a").items()} == {
        "1": [60.0, 70.0],
        "2": [61.0, 71.0],
    }
    assert any("runs of one name are taken as its seeds" in str(one) for one in table.findings)
    (read,) = table.provenance
    assert (read.axis, read.runs, table.axis) == ("steps", 3, "step")


def test_read_log__a_mean_of_runs_in_a_chart_is_named(tmp_path):
    text = '"Step","g - val/acc","g - val/acc__MIN","g - val/acc__MAX"\n1,60,59,61\n2,70,69,71\n'
    assert any(
        "is a mean of several runs" in str(one) for one in read_curves([write(tmp_path, "a.csv", text)]).findings
    )


@pytest.mark.parametrize(
    "text",
    [
        "Name,State,epoch,val_acc\na,finished,80,61\nb,finished,90,62\n",
        "run,epoch,val_acc\na,80,61\nb,90,62\nc,100,63\n",
        '"Name","Runtime","val/acc","_step"\n"a","10","61","5"\n"b","11","62","6"\n',
    ],
)
def test_read_log__a_table_of_runs_is_no_curve(tmp_path, text):
    with pytest.raises(DataError, match="table of runs"):
        read_curves([write(tmp_path, "a.csv", text)])


def test_read_log__methods_as_columns(tmp_path):
    path = write(tmp_path, "a.csv", "epoch,MAE,MTO,lr\n1,50,51,0.1\n2,60,62,0.1\n")
    table = read_curves([path], wanted=["MAE"])
    assert table.methods == ["MAE", "MTO"]
    assert any("not read as methods: lr" in str(one) for one in table.findings)


def test_read_log__iterations_of_open_mmlab_are_steps(tmp_path):
    lines = [
        {"loss": 1.0, "step": 100, "iter": 100}, {"accuracy/top1": 50.0, "step": 100},
        {"loss": 0.5, "step": 200, "iter": 200}, {"accuracy/top1": 60.0, "step": 200},
    ]  # fmt: skip
    path = write(tmp_path, "scalars.json", "\n".join(map(json.dumps, lines)))
    assert read_curves([path]).provenance[0].axis == "steps"
    old = [
        {"mode": "val", "epoch": 1, "iter": 4000, "accuracy_top-1": 50.0, "lr": 1},
        {"mode": "val", "epoch": 1, "iter": 8000, "accuracy_top-1": 60.0, "lr": 1},
    ]
    read = read_curves([write(tmp_path, "old.log.json", "\n".join(map(json.dumps, old)))])
    assert read.frame["epoch"].tolist() == [4000.0, 8000.0]
    trained = [{"mode": "train", "epoch": 1, "iter": 4000 * e, "loss": 1.0, "lr": 1} for e in (1, 2)]
    batches = [line | {"iter": 49} for line in old]  # mmcv writes the number of validation batches
    lines = [line for pair in zip(trained, batches, strict=True) for line in pair]
    read = read_curves([write(tmp_path, "batches.log.json", "\n".join(map(json.dumps, lines)))])
    assert (read.axis, read.frame["epoch"].tolist()) == ("step", [4000.0, 8000.0])


def test_read_log__several_evaluations_in_an_epoch_are_placed_on_steps(tmp_path):
    path = write(tmp_path, "metrics.csv", "epoch,step,val_acc\n0,50,0.2\n0,99,0.3\n1,149,0.4\n1,199,0.5\n")
    table = read_curves([path])
    assert (table.axis, table.frame["epoch"].tolist()) == ("step", [50.0, 99.0, 149.0, 199.0])
    assert any("several evaluations in an epoch" in str(one) for one in table.findings)


def test_read_log__accuracy_lines_of_the_moving_average_are_another_series(tmp_path):
    text = "".join(
        f"Epoch: [{e}] Total time: 0:10:00\n* Acc@1 {50 + e} Acc@5 80\n"
        f"* Acc@1 {60 + e} Acc@5 90\nAccuracy of the model EMA on 50000 test images: {60 + e}%\n"
        for e in range(3)
    )
    path = write(tmp_path, "a.txt", text)
    table = read_curves([path])
    assert table.frame["score"].tolist() == [50.0, 51.0, 52.0]
    assert any("EMA Acc@1 (EMA weights) is not read" in str(one) for one in table.findings)
    assert read_curves([path], score_column="EMA Acc@1").frame["score"].tolist() == [60.0, 61.0, 62.0]


@pytest.mark.parametrize(
    ("test", "first", "second"),
    [("Test: [ 0/98]\n", "training Acc@1", "Acc@1"), ("", "Acc@1 #1", "Acc@1 #2")],
)
def test_read_log__two_accuracies_after_each_epoch_are_two_series(tmp_path, test, first, second):
    line = "Epoch: [{0}][ 0/10]\n * Acc@1 {1}.0\n" + test + " * Acc@1 {2}.0\n"
    path = write(tmp_path, "a.txt", "".join(line.format(e, 90 + e, 50 + e) for e in range(3)))
    assert read_curves([path], score_column=first).frame["score"].tolist() == [90.0, 91.0, 92.0]
    assert read_curves([path], score_column=second).frame["score"].tolist() == [50.0, 51.0, 52.0]
    if test:
        assert read_curves([path]).provenance[0].column == "Acc@1"
    else:
        with pytest.raises(DataError, match=r"it has 'Acc@1 #1', 'Acc@1 #2', and nothing tells"):
            read_curves([path])


def test_read_log__an_accuracy_line_may_name_its_split(tmp_path):
    text = "".join(f"Epoch: [{e}][0/9]\n * Train Acc@1 {90 + e}\n * Val Acc@1 {50 + e}\n" for e in range(3))
    assert read_curves([write(tmp_path, "a.txt", text)]).frame["score"].tolist() == [50.0, 51.0, 52.0]


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.jsonl"])
def test_read_log__nan_in_each_row_is_no_value(tmp_path, name):
    rows = [row for e in range(3) for row in ((e, 1.0, "NaN"), (e, "NaN", 50.0 + e))]
    texts = [f'{{"epoch": {e}, "train_loss": {loss}, "val_acc": {acc}}}' for e, loss, acc in rows]
    table = "epoch,train_loss,val_acc\n" + "".join(f"{e},{loss},{acc}\n" for e, loss, acc in rows)
    content = {"a.csv": table, "a.json": f"[{', '.join(texts)}]", "a.jsonl": "\n".join(texts)}[name]
    read = read_curves([write(tmp_path, name, content)])
    assert read.frame["score"].tolist() == [50.0, 51.0, 52.0]
    assert "each row has one" in str(read.findings[0])
    missing = write(tmp_path, "keras.csv", "epoch,val_acc,val_loss\n0,NA,NA\n1,51,1\n2,NA,NA\n3,53,1\n")
    assert read_curves([missing]).findings == ()


def test_read_curves__says_what_an_unknown_axis_counts(tmp_path):
    one, two = (write(tmp_path, f"{axis}.csv", f"{axis},val_acc\n1,50\n2,51\n3,52\n") for axis in ("t", "epoch"))
    read = read_curves([one], epoch_column="t")
    assert (read.axis, read.provenance[0].axis) == ("t", "other")
    assert any("nothing tells what 't' counts" in str(finding) for finding in read.findings)
    with pytest.raises(DataError, match=r"counts t and .* counts epochs; .*first-epoch=1"):
        read_curves([Source(one, epoch="t"), two])
    assert read_curves([Source(one, epoch="t", first_epoch=1), two]).axis == "epoch"
    steps = write(tmp_path, "steps.csv", "step,val_acc\n0,50\n1,51\n2,52\n")
    assert read_curves([Source(steps, first_epoch=0), two]).frame["epoch"].tolist() == [1, 2, 3] * 2
    named = write(tmp_path, "b.csv", "epochs trained,optimizer updates,val_acc\n1,100,50\n2,200,51\n")
    axes = [read_curves([named], epoch_column=each).axis for each in ("epochs trained", "optimizer updates")]
    assert axes == ["epoch", "step"]


def test_choose__says_why_an_accuracy_is_passed_over(tmp_path):
    path = write(tmp_path, "a.csv", "epoch,val_top5,best_val_acc\n0,80,50\n1,90,60\n")
    with pytest.raises(DataError, match=r"val_top5 is top-5, best_val_acc is the best one so far; take one"):
        read_curves([path])


def test_choose__the_spread_of_an_accuracy_is_none(tmp_path):
    path = write(tmp_path, "a.csv", "epoch,val_acc_std,val_acc_mean,val_acc_time\n0,1,50,3\n1,1,60,3\n")
    assert read_curves([path]).provenance[0].column == "val_acc_mean"
    with pytest.raises(DataError, match="no accuracy found"):
        read_curves([write(tmp_path, "b.csv", "epoch,val_acc_std\n0,1\n1,2\n")])


def test_choose__an_accuracy_beside_a_loss_may_be_of_training(tmp_path):
    (finding,) = read_curves([write(tmp_path, "a.csv", "epoch,accuracy,loss\n0,50,1\n1,60,1\n")]).findings
    assert "nothing tells of which images 'accuracy' is" in str(finding)


def test_tidy__a_run_of_one_epoch_before_another_can_be_left_out(tmp_path):
    header = "epoch,train_loss,valid_loss,accuracy,time\n"
    second = "".join(f"{e},1,1,{50 + e},00:10\n" for e in range(3))
    path = write(tmp_path, "history.csv", f"{header}0,1,1,40,00:10\n{header}{second}")
    with pytest.raises(DataError, match="choose with --run"):
        read_curves([path])
    assert read_curves([path], run=-1).frame["score"].tolist() == [50.0, 51.0, 52.0]
    with pytest.raises(DataError, match="every score of 'val_acc' is at 0"):
        read_curves([write(tmp_path, "val_acc", "".join(f"165000000000{e} {50 + e} 0\n" for e in range(3)))])


def test_read_log__a_title_above_the_header_is_no_header(tmp_path):
    text = "Results of June;\n;\nepoch;val_acc\n1;50,5\n2;60\n"
    assert read_curves([write(tmp_path, "a.csv", text)]).frame["score"].tolist() == [50.5, 60.0]


SPLITS = (("train", 9), ("val", 0))


@pytest.mark.parametrize(
    ("document", "places"),
    [
        ([{"epoch": e, "val": {"acc": a}} for e, a in ((1, 50), (2, 60))], [1, 2]),
        ({"config": {"lr": 1}, "results": [{"epoch": e, "val_acc": a} for e, a in ((1, 50), (2, 60))]}, [1, 2]),
        ({"5": {"val_acc": 50}, "10": {"val_acc": 60}}, [5, 10]),
        ({"epoch": {"0": 3, "1": 4}, "val_acc": {"0": 50, "1": 60}}, [3, 4]),
        ({"history": {"accuracy": [90, 91], "val_accuracy": [50, 60]}, "params": {"epochs": 2}}, [1, 2]),
        ({mode: [{"epoch": e, "acc": 50 + e + more} for e in (0, 10)] for mode, more in SPLITS}, [0, 10]),
    ],
)  # fmt: skip
def test_read_log__takes_the_usual_forms_of_a_json_document(tmp_path, document, places):
    table = read_curves([write(tmp_path, "a.json", json.dumps(document, indent=1))])
    assert (table.frame["epoch"].tolist(), table.frame["score"].tolist()) == (places, [50.0, 60.0])


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"train_acc": [1, 2], "val_acc": [50, 60, 70]}, "different lengths"),
        ([50, 60, 70], "no list of objects"),
        ({"a": [{"x": 1}], "b": [{"x": 1}]}, r"several lists \(a, b\)"),
        ({"val_acc": 61.5}, "one evaluation, no curve"),
    ],
)
def test_read_log__refuses_a_json_document_without_a_curve(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        read_log(write(tmp_path, "a.json", json.dumps(document)))


def test_read_log__a_name_may_say_that_it_is_in_percent(tmp_path):
    path = write(tmp_path, "a.csv", "epoch,Top-1 Accuracy (%)\n1,0.5\n2,0.9\n")
    assert read_curves([path]).frame["score"].tolist() == [0.5, 0.9]


def test_read_log__iterations_of_an_open_mmlab_console_are_steps(tmp_path):
    text = "".join(
        f"x - mmengine - INFO - Iter(train) [{1000 * e}/3000]  loss: 2.0\n"
        f"x - mmengine - INFO - Iter(val) [50/50]    accuracy/top1: {50 + e}.0  time: 0.1\n"
        for e in (1, 2, 3)
    )
    table = read_curves([write(tmp_path, "a.log", text)])
    assert (table.axis, table.frame["epoch"].tolist()) == ("step", [1000.0, 2000.0, 3000.0])


def test_read_log__a_second_block_is_no_later_evaluation(tmp_path):
    # Two data sets of which no column is read, both at chance in the first epoch.
    blocks = "".join(f"{e},{s + more * e}\n" for more in (0, 1) for e, s in enumerate((10, 50, 60, 70)))
    with pytest.raises(DataError, match="starts over at epoch 0, so the file holds more than one run"):
        read_curves([write(tmp_path, "a.csv", "epoch,val_acc\n" + blocks)])
    copies = "epoch,val_acc\n" + "1,50\n2,60\n" * 2
    assert any("2 rows are copies" in str(one) for one in read_curves([write(tmp_path, "b.csv", copies)]).findings)


@pytest.mark.parametrize(
    ("one", "two", "clash"),
    [
        (range(0, 10), range(1, 11), True),
        (range(9, 60, 10), range(10, 61, 10), True),
        (range(0, 10), range(1, 10), False),  # the same end: epoch 0 is the state before training
        (range(0, 101, 10), range(10, 101, 10), False),
        (range(0, 10), range(0, 5), False),
        (range(5, 20, 2), range(1, 20, 2), False),
    ],
)
def test_read_curves__epochs_that_are_shifted_by_one_are_refused(tmp_path, one, two, clash):
    paths = [
        write(tmp_path, f"{name}.csv", "epoch,val_acc\n" + "".join(f"{e},{40 + e / 2}\n" for e in epochs))
        for name, epochs in (("a", one), ("b", two))
    ]
    if clash:
        with pytest.raises(DataError, match="pass --epochs completed"):
            read_curves(paths)
        table = read_curves(paths, epochs="completed")
        (first,), (second,) = (table.runs(name).values() for name in "ab")
        assert first.epochs.tolist() == second.epochs.tolist()
    else:
        assert read_curves(paths).frame["epoch"].tolist() == [*one, *two]


def test_read_curves__a_run_counts_once(tmp_path):
    path = write(tmp_path, "a.csv", "epoch,val_acc\n0,50\n1,60\n")
    with pytest.raises(DataError, match=r"the same run as .*a.csv, given for one method twice"):
        read_curves([Source(path, "A", "0"), Source(path, "A", "1")])
    assert len(read_curves([Source(path, "A"), Source(path, "B")]).methods) == 2


def test_read_curves__a_shorter_last_step_shows_that_epochs_count_from_0(tmp_path):
    paths = [
        write(tmp_path, f"{epochs[0]}.csv", "epoch,val_acc\n" + "".join(f"{e},{40 + e / 2}\n" for e in epochs))
        for epochs in ((0, 10, 20, 29), (10, 20, 30))
    ]
    with pytest.raises(DataError, match=r"/0.csv calls the first epoch 0 .*/10.csv calls it 1"):
        read_curves(paths)


def test_read_curves__steps_per_epoch_that_nobody_counts_are_named(tmp_path):
    table = read_curves([write(tmp_path, "a.csv", TABLE)], steps_per_epoch=10)
    assert table.frame["epoch"].tolist() == [1.0, 2.0, 3.0]
    assert any("no log counts steps" in str(one) for one in table.findings)
    with pytest.raises(DataError, match="steps-per-epoch is for logs that count steps; this one counts epochs"):
        read_curves([Source(tmp_path / "a.csv", steps_per_epoch=10.0)])


@pytest.mark.parametrize(("path", "message"), [("a\0b", "cannot be read"), ("x" * 5000, "cannot be read")])
def test_read_log__a_path_that_cannot_be_is_a_data_error(path, message):
    with pytest.raises(DataError, match=message):
        read_log(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Epoch(val) [1][5/5]    accuracy/top1: 1.2.3  time: 0.1\n", r":1: a metric is not a number"),
        (f"Epoch(val) [{'9' * 5000}][5/5]    accuracy/top1: 1.2\n", "no validation line|not a log"),
        (f"EPOCH {'9' * 5000} training takes 0:01\n * Acc@1 50.0 Acc@5 90\n", "no accuracy line"),
        ('{"\\u00b2": {"val_acc": 1}, "\\u00b3": {"val_acc": 2}}', "no list of objects"),
    ],
)
def test_read_log__numbers_that_are_none_are_data_errors(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        read_log(write(tmp_path, "a.log", text))


@pytest.mark.parametrize("text", ["score,100,200\n1,2,3\n", "epoch,A,B,score\n1,2,3,4\n2,3,4,5\n"])
def test_read_log__a_wide_table_has_no_column_score(tmp_path, text):
    with pytest.raises(DataError, match="a wide table cannot have a column 'score' too"):
        read_curves([write(tmp_path, "a.csv", text)], wanted=["A"])


def test_read_curves__a_second_run_with_the_same_first_score_is_a_second_run(tmp_path):
    lines = [
        f'{{"epoch": {epoch}, "train_loss": {1 / (epoch + run)}, "test_acc1": {10 + epoch * run}}}'
        for run in (1, 2)
        for epoch in range(6)
    ]
    rows = [f"{epoch},{10 + epoch * run}" for run in (1, 2) for epoch in range(6)]
    for path in (
        write(tmp_path, "log.txt", "\n".join(lines) + "\n"),
        write(tmp_path, "log.csv", "\n".join(["epoch,val_acc", *rows]) + "\n"),
        write(tmp_path, "short.csv", "\n".join(["epoch,val_acc", *rows[:-2], "9,20"]) + "\n"),
    ):
        with pytest.raises(DataError, match="starts over at epoch 0, so the file holds more than one run"):
            read_curves([path])
        for run, last in ((1, 15), (2, 20), (-1, 20)):
            assert read_curves([path], run=run).frame["score"].iloc[-1] == last
    copied = write(tmp_path, "copied.txt", "\n".join([lines[0], *lines[:6]]) + "\n")
    assert read_curves([copied]).frame["score"].tolist() == [10, 11, 12, 13, 14, 15]


def test_read_curves__completed_counts_a_lone_table_from_0_too(tmp_path):
    path = write(tmp_path, "a.csv", "method,epoch,score\n" + "".join(f"A,{e},{40 + e}\n" for e in range(5)))
    assert read_curves([path]).frame["epoch"].tolist() == [0, 1, 2, 3, 4]
    table = read_curves([path], epochs="completed")
    assert table.frame["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert any("1 was added to each" in str(finding) for finding in table.findings)


def test_read_curves__names_in_another_encoding_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("method,epoch,score\nViT-ä,0,1\nViT-ä,1,2\nViT-ö,0,3\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a.csv: the name .* is not UTF-8 text, others may differ in it"):
        read_curves([tmp_path / "a.csv"])


def test_read_curves__one_column_in_two_units_is_refused(tmp_path):
    low = write(tmp_path, "low.csv", "epoch,val_acc\n1,0.1\n2,0.1\n")
    high = write(tmp_path, "high.csv", "epoch,val_acc\n1,50\n2,60\n")
    with pytest.raises(DataError, match=r"never exceeds 1 in .*low.csv and does in .*\[unit=fraction\]"):
        read_curves([low, high])
    assert read_curves([low, high], unit="percent").frame["score"].tolist() == [0.1, 0.1, 50, 60]
    told = read_curves([Source(low, unit="fraction"), high])
    assert told.frame["score"].tolist() == [10, 10, 50, 60]


@pytest.mark.parametrize("name", ["method", "seed", "epoch", "score", "line"])
def test_read_curves__columns_of_every_curve_group_nothing(tmp_path, name):
    path = write(tmp_path, "a.csv", "method,epoch,score\nA,0,50\nA,1,60\n")
    with pytest.raises(DataError, match=f"{name!r} is a name that curves need themselves"):
        read_curves([path], groups=[name])
