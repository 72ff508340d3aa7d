"""The whole bench: real runs on real engines, failed rows, the tables and the command."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from colour import write_colours
from places import GOLDEN

from ssod_edge.bench.backends import BF16, Backends, combined_hash
from ssod_edge.bench.interrupt import Interrupts
from ssod_edge.bench.latency import Plan
from ssod_edge.bench.measurement import BenchOptions
from ssod_edge.bench.record import RECORD_KEYS, ROW_KEYS, load_record
from ssod_edge.bench.report import DEPLOYMENT, markdown, print_record
from ssod_edge.bench.run import BenchOutput, bench, exit_code, run_bench
from ssod_edge.cli import main
from ssod_edge.detect.metrics import deployment_metrics
from ssod_edge.errors import UsageError
from ssod_edge.files import write_json
from ssod_edge.runtime.export import Export
from ssod_edge.spec import Threshold, load_spec
from ssod_edge.terminal import Screen

GOLDEN_FILE = GOLDEN / "bench.json"
BRIEF = Plan(warmup_s=0.0, warmup_queries=2, measure_s=0.0, measure_queries=8, repeats=3, pair_s=0.0)
ROWS = [
    "onnx-fp32",
    "openvino-fp32",
    "onnx-fp16",
    "openvino-fp16",
    BF16,
    "eager",
    "plain-onnx-fp32",
    "plain-openvino-fp32",
]


@pytest.fixture(autouse=True, scope="module")
def no_bf16() -> Iterator[None]:
    """A CPU without bf16, so that the rows are the same on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ssod_edge.runtime.engines.openvino.cpu_capabilities", lambda: ["FP32", "INT8"])
        yield


def test_bf16_is_a_row_of_its_own(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    with Backends(Export.at(export), tmp_path / "a", None) as backends:
        row = backends.named(BF16)
    assert (row.status, row.error) == ("missing", "this CPU has no bf16 arithmetic, only FP32, INT8")
    monkeypatch.setattr("ssod_edge.runtime.engines.openvino.cpu_capabilities", lambda: ["FP32", "BF16"])
    (tmp_path / "b").mkdir()
    with Backends(Export.at(export), tmp_path / "b", None) as backends:
        row = backends.named(BF16)
    assert (row.status, row.error, row.sha256) == (
        "ok",
        None,
        combined_hash(load_spec(export).artifact("openvino-fp32")),
    )


@pytest.fixture
def golden() -> dict[str, Any]:
    return load_record(GOLDEN_FILE)


def row_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if row["artifact"] == name)


def key_tree(value: Any) -> Any:
    """The keys of nested mappings, without what they hold; a list is that of its first element."""
    if isinstance(value, dict):
        return {key: key_tree(inner) for key, inner in value.items()}
    return [key_tree(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


def shown(show: Any, *values: Any) -> str:
    console = Screen(width=160, record=True, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    show(*values, console)
    return console.export_text()


@pytest.fixture(scope="module")
def damaged(export_template: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A bench of an export in which one artifact was edited after it was hashed."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(export_template, folder / "export")
    with open(folder / "export" / "model-fp16.onnx", "r+b") as file:
        file.seek(40)
        file.write(b"damaged")
    return folder, bench(folder, BenchOptions(threads=1, plan=BRIEF))


def test_a_failed_row_is_shown_and_the_others_go_on(damaged: tuple[Path, dict[str, Any]]) -> None:
    _, record = damaged
    assert [row["artifact"] for row in record["rows"]] == ROWS
    row = row_of(record, "onnx-fp16")
    assert row["status"] == "failed"
    assert "was changed or cut short" in row["error"]
    assert row["latency_ms"] is row["rss_mb"] is row["precision"] is None
    assert exit_code(record) == 1
    good = [row for row in record["rows"] if row["artifact"] not in ("onnx-fp16", BF16, "eager")]
    assert all(row["status"] == "ok" and row["error"] is None for row in good)
    for row in good:
        assert row["latency_ms"]["n"] == 3 * BRIEF.measure_queries
        assert 0 < row["latency_ms"]["min"] <= row["latency_ms"]["p50"] <= row["latency_ms"]["p90"]
        assert row["latency_ms"]["p99"] is None
        assert row["rss_mb"] > 5
        assert row["top1"] is row["auroc"] is row["decision_flips"] is None
    text = shown(print_record, record)
    assert "onnx-fp16 failed: " in text
    assert "eager missing: there is no best.safetensors" in text


def test_the_record_has_the_golden_keys(damaged: tuple[Path, dict[str, Any]], golden: dict[str, Any]) -> None:
    _, record = damaged
    assert tuple(record) == RECORD_KEYS and all(tuple(row) == ROW_KEYS for row in record["rows"])
    names = {"packages", "variables", "data", "details"}  # what they hold depends on the machine or the data

    def comparable(record: dict[str, Any]) -> Any:
        tree = key_tree({**record, "rows": [row_of(record, "openvino-fp32")]})
        tree["environment"] = {key: None if key in names else inner for key, inner in tree["environment"].items()}
        tree["data"] = list(tree["data"])
        return tree

    ours = comparable(record)
    for key in ("class_names", "version", "model", "taught_from"):  # which the record has had since then
        del ours["export"][key]
    del ours["environment"]["cpu"]["quota"]
    for state in ("state", "state_after"):
        del ours["environment"][state]["throttled_s"]
    expected = comparable(golden)
    expected["rows"][0]["ood_sets"] = None
    assert ours == expected
    json.dumps(record, allow_nan=False)


def test_what_ran_is_reported(damaged: tuple[Path, dict[str, Any]]) -> None:
    folder, record = damaged
    spec = load_spec(folder / "export")
    row = row_of(record, "openvino-fp16")
    assert (row["engine"], row["device"], row["precision"]) == ("openvino", "CPU", "fp32"), (
        "stored as fp16, ran in fp32"
    )
    assert row["sha256"] == combined_hash(spec.artifact("openvino-fp16"))
    assert row_of(record, "onnx-fp32")["sha256"] == next(iter(spec.artifact("onnx-fp32").files.values()))
    assert record["command"] == f"ssod-edge bench {folder} --batch 1 --threads 1"
    assert record["method"]["measure_queries"] == BRIEF.measure_queries
    for engine in ("onnxruntime", "openvino"):
        assert record["cost_of_unknown"][engine]["ratio"] == sorted(record["cost_of_unknown"][engine]["repeats"])[1]


def test_markdown_has_a_row_each(damaged: tuple[Path, dict[str, Any]]) -> None:
    _, record = damaged
    lines = markdown(record).splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(ROWS)
    assert len({line.count("|") for line in table}) == 1
    assert "p90 ms" in table[0]
    assert "top-1" not in table[0], "a column without figures is left out"
    assert f"- `{record['command']}`" in lines


def test_golden_tables(golden: dict[str, Any]) -> None:
    text = markdown(golden)
    assert "| artifact | runs in | p50 ms | p90 ms | p99 ms | compute p50 ms | images/s |" in text
    assert "| openvino-fp32 | fp32 | 1.13 | 1.24 | 1.57 | 0.71 | 867 |" in text
    assert "cost of knowing unknown on openvino: 1.004 x the plain classifier" in text
    screen = shown(print_record, golden)
    for part in ("AUROC", "FPR95", "93.00", "Medians of the stages", "cost of knowing unknown on onnxruntime: 1.006"):
        assert part in screen


def test_what_a_threshold_does_is_a_table_of_its_own(golden: dict[str, Any]) -> None:
    assert DEPLOYMENT not in markdown(golden)
    threshold = Threshold(value=0.5, target_tpr=0.95, n=100, data="others", fitted_tpr=0.95)
    scores, right, labels = [0.1, 0.2, 0.3, 0.9], [True, True, False, True], [0, 0, 1, 1]
    row = row_of(golden, "openvino-fp32")
    row["deployment"] = deployment_metrics(scores, {"far": [0.4, 0.8]}, threshold, right, labels, ("cat", "dog"))
    lines = markdown(golden).split(DEPLOYMENT)[1].splitlines()
    assert lines[2] == (
        "| artifact | known accepted % | selective accuracy % | AURC % | far accepted % | most rejected class % |"
    )
    assert lines[4].startswith("| openvino-fp32 | 75.0 (30.1-95.4) | 66.7 (20.8-93.9) | ")
    assert lines[4].endswith(" | 50.0 (9.5-90.5) | dog 50.0 |") and lines[5] == ""
    screen = shown(print_record, golden)
    assert DEPLOYMENT in screen and "dog 50.0" in screen


@pytest.mark.parametrize(("file", "engine"), [("model-fp32.onnx", "onnx"), ("openvino-fp32/model.xml", "openvino")])
def test_a_damaged_source_fails_the_plain_row_too(export: Path, tmp_path: Path, file: str, engine: str) -> None:
    """Each plain classifier is cut out of the artifact that it is compared with."""
    (export / file).write_bytes(b"")
    backends = Backends(Export.at(export), tmp_path / "scratch", None)
    failed = {backend.name for backend in backends.all if backend.status == "failed"}
    assert failed == {f"plain-{engine}-fp32"}
    with backends:
        for backend in backends.working():
            backends.open(backend)
    others = {"onnx-fp32", "plain-onnx-fp32", "openvino-fp32", "plain-openvino-fp32", "onnx-fp16", "openvino-fp16"}
    assert {backend.name for backend in backends.working()} == others - {f"{engine}-fp32", f"plain-{engine}-fp32"}


def test_a_missing_engine_is_not_a_failure(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: dict[str, Any]
) -> None:
    monkeypatch.setattr("ssod_edge.runtime.open.is_installed", lambda engine: engine != "openvino")
    with Backends(Export.at(export), tmp_path / "scratch", None) as backends:
        found = backends.named("openvino-fp32")
        backends.open(found)
    assert (found.status, found.runner) == ("missing", None)
    assert "pip install 'ssod-edge[openvino]'" in str(found.error)
    for row in golden["rows"]:
        row["status"] = "missing"
    assert exit_code(golden) == 3
    golden["rows"][0]["status"] = "ok"
    assert exit_code(golden) == 0
    golden["data"]["id"]["unreadable"] = ["one"]
    assert exit_code(golden) == 1


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real backbone at 32 px, trained for a moment on colours, and its fp32 export."""
    pytest.importorskip("timm", reason="needs the extra train")
    from ssod_edge.config import Preprocess, TrainConfig
    from ssod_edge.export.graph.build import export_run
    from ssod_edge.training.loop import train

    runs = tmp_path_factory.mktemp("runs")
    config = TrainConfig(
        backbone="mobilenetv3_small_050",
        data=str(write_colours(runs / "data", n=20)),
        name="tiny",
        epochs=2,
        batch_size=8,
        val_fraction=0.2,
        calib_fraction=0.4,
        workers=0,
        preprocess=Preprocess(input_size=32),
    )
    run = train(config, out=runs)
    export_run(run, precisions=("fp32",))
    return run


def test_bench_of_a_real_export(tiny_run: Path) -> None:
    far = tiny_run.parent / "data" / "red"
    record = bench(tiny_run, BenchOptions(threads=1, plan=BRIEF, ood_data={"far": str(far)}))
    names = ["onnx-fp32", "openvino-fp32", BF16, "eager", "plain-onnx-fp32", "plain-openvino-fp32"]
    assert [row["artifact"] for row in record["rows"]] == names
    record["rows"] = [row for row in record["rows"] if row["artifact"] != BF16]
    assert [(row["status"], row["error"]) for row in record["rows"]] == [("ok", None)] * 5
    assert exit_code(record) == 0
    assert record["data"]["id"]["data"] == f"{tiny_run.parent / 'data'} (val split)"
    assert (record["data"]["id"]["n"], record["data"]["ood"]["far"]["n"]) == (12, 20)
    assert (
        record["method"]["images"] == f"12 images of {tiny_run.parent / 'data'} (val split), 20x24, as JPEG in memory"
    )
    assert len({row["top1"] for row in record["rows"]}) == 1, "five ways to run the same weights"
    for row in record["rows"]:
        assert row["agreement"] == (None if row["artifact"] == "eager" else 1.0)
        assert (row["precision"], row["device"]) == ("fp32", "CPU")
        assert row["size_mb"] > 1
        assert row["rss_mb"] > 5
    onnx_row, openvino_row, eager_row, *plain_rows = record["rows"]
    for row in (onnx_row, openvino_row):
        assert row["auroc"] == pytest.approx(eager_row["auroc"], abs=0.05)
        assert row["ood_sets"]["far"]["auroc"] == row["auroc"]
        assert row["decision_flips"] <= 1
    assert eager_row["decision_flips"] is None
    assert all(row["auroc"] is row["decision_flips"] is None for row in plain_rows)
    for cost in record["cost_of_unknown"].values():
        assert 0.5 < cost["ratio"] < 2


def test_without_the_eager_model_the_first_fp32_artifact_is_compared_with(tiny_run: Path, tmp_path: Path) -> None:
    """As on a device: an export folder alone, without its checkpoint."""
    shutil.copytree(tiny_run / "export", tmp_path / "export")
    far = write_colours(tmp_path / "far", n=4)
    known = str(tiny_run.parent / "data")
    record = bench(tmp_path / "export", BenchOptions(threads=1, plan=BRIEF, id_data=known, ood_data={"far": str(far)}))
    assert record["data"]["reference"] == "onnx-fp32"
    rows = {row["artifact"]: row for row in record["rows"]}
    assert rows["eager"]["status"] == "missing" and rows["onnx-fp32"]["agreement"] is None
    assert rows["openvino-fp32"]["agreement"] == 1.0 and rows["openvino-fp32"]["decision_flips"] is not None
    assert "agreement and flips against onnx-fp32" in shown(print_record, record)


def test_plain_classifier_of_a_real_backbone_is_its_graph_up_to_the_softmax(tiny_run: Path) -> None:
    import onnx

    from ssod_edge.bench.plain import cut_plain

    fused = onnx.load(tiny_run / "export" / "model-fp32.onnx")
    cut = copy.deepcopy(fused)
    cut_plain(cut, 3)
    operators = [node.op_type for node in fused.graph.node]
    assert [node.op_type for node in cut.graph.node] == [*operators[: operators.index("Gemm") + 1], "Softmax"]
    assert len(cut.graph.initializer) < len(fused.graph.initializer)


def test_newest_export_by_time_and_backbone(tmp_path: Path, make_export: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match=r"there is no export under .* ssod-edge export"):
        Export.newest(tmp_path)
    for age, name in ((300, "old"), (100, "new"), (200, "middle")):
        make_export(tmp_path / name / "export")
        stamp = time.time() - age
        os.utime(tmp_path / name / "export" / "ssod.json", (stamp, stamp))
    assert Export.newest(tmp_path).folder == tmp_path / "new" / "export"
    assert Export.newest(tmp_path, "colour").folder == tmp_path / "new" / "export"
    (tmp_path / "new" / "export" / "ssod.json").write_text("{")
    assert Export.newest(tmp_path, "colour").folder == tmp_path / "middle" / "export"
    with pytest.raises(UsageError, match="ssod-edge export --backbone mobilenetv3"):
        Export.newest(tmp_path, "mobilenetv3")


def test_the_bench_itself_loads_no_engine() -> None:
    """So it runs on a device without torch, and measures memory from a small process."""
    code = "import sys, ssod_edge.bench.run, ssod_edge.bench.memory\n"
    code += "print(sorted({'torch', 'timm', 'onnx', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("field", ["batch", "threads", "via_size"])
def test_options_below_one(field: str) -> None:
    with pytest.raises(UsageError, match=f"{field} must be at least 1, got 0"):
        BenchOptions(**{field: 0})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "does not exist. Give the folder of a run"),
        (["{export}", "--backbone", "mobilenetv3"], 2, "either DIR or --backbone"),
        (["{export}", "--ood", "far"], 2, "NAME=DATA"),
        (["{export}", "--batch", "0"], 2, "--batch"),
        (["{export}", "--compare", "none.json"], 2, "none.json"),
        (["{export}", "--json", "{export}/ssod.json/x.json"], 1, "cannot create the folder"),
        (["{export}", "--json", "-"], 2, "not the name of an output file"),
        (["{export}", "--id", "nowhere.tar"], 2, "nowhere.tar"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(
    export: Path, arguments: list[str], code: int, message: str
) -> None:
    start = time.monotonic()
    result = CliRunner().invoke(main, ["bench", *(argument.format(export=export) for argument in arguments)])
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert time.monotonic() - start < 20


def test_a_folder_is_no_json_file(export: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a folder"):
        run_bench(str(export), BenchOptions(plan=BRIEF), BenchOutput(json_file=str(tmp_path)))


def test_command_saves_prints_and_compares(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: dict[str, Any]
) -> None:
    monkeypatch.setattr("ssod_edge.bench.measurement.QUICK", BRIEF)
    write_json(tmp_path / "old.json", golden)
    arguments = ["--quick", "--threads", "1", "--json", str(tmp_path / "new.json")]
    result = CliRunner().invoke(main, ["bench", str(export), *arguments, "--compare", str(tmp_path / "old.json")])
    assert result.exit_code == 0, result.output
    for name in ROWS:
        assert name in result.output
    assert "another export" in result.output
    record = load_record(tmp_path / "new.json")
    assert record["command"] == f"ssod-edge bench {export} --quick --batch 1 --threads 1"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_interrupt_shows_what_was_measured_and_saves_nothing(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ssod_edge.bench.measurement.QUICK", BRIEF)
    monkeypatch.setattr("ssod_edge.bench.measurement.Measurement._measure_memory", interrupt)
    arguments = ["--quick", "--threads", "1", "--json", str(tmp_path / "b.json")]
    result = CliRunner().invoke(main, ["bench", str(export), *arguments])
    assert result.exit_code == 130, result.output
    assert "onnx-fp32" in result.stdout and "p90" in result.stdout and "RSS" not in result.stdout
    assert "no JSON is written" in result.stderr and not (tmp_path / "b.json").exists()
    monkeypatch.setattr("ssod_edge.bench.measurement.Measurement._measure_latency", interrupt)
    result = CliRunner().invoke(main, ["bench", str(export), *arguments])
    assert (result.exit_code, result.stdout) == (130, "")


def test_an_interrupt_that_a_library_drops_is_not_lost() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        interrupts.check()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_leaves_nothing_half_written(export: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [
        sys.executable,
        "-m",
        "ssod_edge",
        "bench",
        str(export),
        "--threads",
        "1",
        "--json",
        str(tmp_path / "b.json"),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(temporary)}
    )
    deadline = time.monotonic() + 60
    # The plain classifiers are the last thing that is made before measuring begins.
    while not list(temporary.glob("*/plain-openvino-fp32/ssod.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "interrupted" in errors
    assert "Traceback" not in output + errors
    assert not list(tmp_path.glob("*b.json*"))
    assert not list(temporary.glob("ssod-edge-*"))
