"""benchmarks.study: its tables are sound, and its records are those of the commands it starts.

A stand-in for the commands writes the files that they would; a slow test starts them.
"""

import dataclasses
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.study import report, schedule, study, summary
from benchmarks.study.plan import Plan
from benchmarks.study.results import Results
from benchmarks.study.runs import check, runs_of
from benchmarks.study.tables import SHORT, TABLES, Claim, InData, Row, Shape, Table
from flowdcn_jax.config import flatten, load_config, validate
from flowdcn_jax.errors import UserError
from tests import tiny

FAST = Row(name="fast", config="digits", changes={"train.batch_size": 10}, seeds=(0, 1))
SLOW = Row(name="slow", config="digits", changes={"model.width": 256})
SMALL = Table(
    title="Small",
    text="Two.",
    rows=(FAST, SLOW),
    claims=(Claim(text="Fast is better", better="fast", worse="slow"),),
    num_steps=40,
    data="digits",
)
FEW = dataclasses.replace(SMALL, solver_steps=(2, 3), curves=False)
PLAN = Plan(weights=Path("features"), guidances=(1.0, 2.0), curve_points=2, num_images=30)


class Commands:
    """Stands in for the commands: they write what the real ones would, and keep no one waiting.

    Attributes:
        started: the commands, with their environment.
        fails: a word; a command with it in its text ends with status 2.
        hangs: likewise, with one that ends when it is terminated.
    """

    def __init__(self, *, fails=None, hangs=None):
        self.started, self.fails, self.hangs = [], fails, hangs
        self._lock = threading.Lock()

    def __call__(self, command, environment, log):
        with self._lock:
            self.started.append((command, environment))
        text, process = " ".join(command), _Process()
        if self.fails and self.fails in text:
            log.write_text("first\nerror: why\n")
            process.status = 2
        elif not (self.hangs and self.hangs in text):
            flags = dict(each[2:].split("=", 1) for each in command if each.startswith("--"))
            _imitate(command, flags)
            process.status = 0
        return process

    def count(self, word):
        return sum(word in " ".join(command) for command, _ in self.started)


class _Process:
    status = None

    def poll(self):
        return self.status

    def terminate(self):
        self.status = 75


def _imitate(command, flags):
    if "train.py" in command:
        _train(Path(flags["workdir"]), flags)
    elif "evaluate.py" in command:
        _evaluate(Path(flags["out"]), flags)
    else:
        Path(flags["out"]).touch()


def _train(workdir, flags):
    """The rate is 1000 images/s in four windows of five, the distance falls by 1 a step."""
    config = load_config(flags["config"])
    machine = {"devices": ["chip"], "driver": None, "date": "2026-11-28 10:00:00"}
    machine["versions"] = {"jax": "1", "flax": "2", "flowdcn_jax": "3"}
    told = {"config": json.loads(config.to_json()), "parameters": 7, "machine": machine}
    told["config"]["train"]["batch_size"] = int(flags.get("config.train.batch_size", 64))
    told["config"]["data"]["data_dir"] = str(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(told))
    rows = []
    for step in range(4, 41, 4):
        rate = 1000 if step % 20 else 10
        rows.append({"step": step, "loss": 1 / step, "images_per_s": rate})
        if step % 20 == 0 and "config.evaluate.every_steps" in flags:
            rows[-1]["FD-efficientnet_lite0"] = 100 - step
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text)


def _evaluate(out, flags):
    """Distances are best at guidance 2; seed 1 is farther by 1, and each step less by 10."""
    run = Path(flags["samples"])
    base = 50 + 10 * ("slow" in run.name) + ("seed1" in run.name)
    samples = out.with_suffix(".npz")
    images = np.full((30, 8, 8, 1), 9, np.uint8)
    np.savez(samples, arr_0=images)
    rows = []
    for guidance in map(float, flags["guidance"].split(",")):
        for steps in map(int, flags["num_steps"].split(",")):
            distance = base + abs(guidance - 2) + (40 - 10 * steps if steps < 4 else 0)
            figures = [{"name": "FD-efficientnet_lite0", "value": distance}]
            figures.append({"name": "KID", "value": 0.5})
            sides = {"samples": {"count": 30, "images": {"source": str(samples)}}}
            options = {"guidance": guidance, "num_steps": steps}
            options = {key: value for key, value in options.items() if "," in flags[key]}
            row = {"figures": figures, "reference": {"count": 9}, "network": {"network": "x"}}
            rows.append(row | sides | {"options": options})
    out.write_text(json.dumps({"rows": rows} if len(rows) > 1 else rows[0]))


def perform(folder, commands, tables=None, **options):
    runs = study.choose(tables or {"small": SMALL}, PLAN)
    return study.perform(runs, folder / "out", folder / "work", start=commands, **options)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the records of two tables."""
    folder = tmp_path_factory.mktemp("study")
    tables = {"small": SMALL, "few": FEW}
    assert perform(folder, Commands(), tables) == 0
    return folder


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_can_be_run(name):
    table = TABLES[name]
    names = [row.name for row in table.rows]
    assert len(set(names)) == len(names)
    for claim in (*table.claims, *table.in_half):
        assert {claim.better, claim.worse} <= set(names)
    for run in runs_of(name, table, PLAN):
        check(run)
        config = load_config(run.row.config)
        with config.ignore_type():
            config.update_from_flattened_dict(dict(run.row.changes))
        validate(config, num_devices=1, num_processes=1)
        if not isinstance(table.data, InData):
            assert config.data.name == table.data and config.train.batch_size == 256


def test_short_runs_are_trained_as_the_config_of_cifar10_says():
    config, expected = load_config("s2"), flatten(load_config("cifar10_s2"))
    with config.ignore_type():
        config.update_from_flattened_dict(dict(SHORT))
    differing = {key for key, value in flatten(config).items() if value != expected[key]}
    sections = {key.split(".")[0] for key in differing}
    assert sections <= {"train", "checkpoint", "log", "sampling"}, differing


def test_a_row_that_changes_no_key_is_named():
    row = dataclasses.replace(FAST, changes={"model.typo": 1})
    with pytest.raises(UserError, match="row 'fast' of small changes model.typo; expected a key"):
        study.choose({"small": dataclasses.replace(SMALL, rows=(row,))}, PLAN)
    with pytest.raises(UserError, match="--rows names 'quick'; expected some of fast, slow"):
        study.choose({"small": SMALL}, PLAN, ["quick"])


def test_seeds_come_in_turns_and_can_be_fewer():
    runs = study.choose({"small": SMALL}, PLAN)
    assert [run.name for run in runs] == ["fast, seed 0", "slow, seed 0", "fast, seed 1"]
    assert len(study.choose({"small": SMALL}, PLAN, ["fast"], 1)) == 1


def test_what_is_done_is_not_done_again(tmp_path):
    first = Commands()
    assert perform(tmp_path, first) == 0
    # A reference for all; of each run the training, the search of a guidance and the figure.
    assert [first.count(each) for each in ("reference_stats", "train.py", "evaluate.py")] == [
        *(1, 3, 6)
    ]
    records = Results(tmp_path / "out", "small").records
    assert {(each["row"], each["settings"]["seed"]) for each in records} == {
        *(("fast", 0), ("fast", 1), ("slow", 0))
    }
    again = Commands()
    shutil.rmtree(tmp_path / "work")  # as on another machine
    assert perform(tmp_path, again) == 0 and not again.started
    longer = study.choose({"small": SMALL}, dataclasses.replace(PLAN, num_steps=50), ["slow"])
    plan = study.planned(longer, tmp_path / "out")
    assert "| small | slow, seed 0 | 50 |" in plan and "done" not in plan
    assert study.planned(study.choose({"small": SMALL}, PLAN), tmp_path / "out").count("done") == 3


def test_a_record_says_what_was_measured_and_how(made):
    record = Results(made / "out", "small").records[0]
    assert record["chosen"] == {"guidance": 2.0, "ema": "ema"}
    assert [each["distance"] for each in record["search"]] == [51, 50]
    assert record["figures"] == {"FD-efficientnet_lite0": 50, "KID": 0.5}
    assert record["images_per_s"] == 1000 and record["processes_a_gpu"] == 1
    assert record["curve"] == [[20, 80], [40, 60]]
    assert "python train.py --config=digits --workdir=WORKDIR/runs" in record["commands"][0]
    assert record["config"]["data"]["data_dir"].startswith("WORKDIR/")
    assert str(made) not in json.dumps(record)  # nothing of the machine's folders


def test_tables_that_share_runs_train_them_once(tmp_path):
    commands = Commands()
    tables = {"a": SMALL, "b": dataclasses.replace(SMALL, solver_steps=(2, 3))}
    assert perform(tmp_path, commands, tables, side_by_side=3) == 0
    assert commands.count("train.py") == 3
    assert commands.count("--num_steps=2,3") == 3
    assert len(Results(tmp_path / "out", "b").records) == 3


def test_a_study_that_is_stopped_goes_on(tmp_path):
    hanging = Commands(hangs="evaluate.py")
    start_s = time.monotonic()
    assert perform(tmp_path, hanging, minutes=0.01) == 75
    assert time.monotonic() - start_s < 20
    assert hanging.count("train.py") == 1 and not Results(tmp_path / "out", "small").records
    rest = Commands()
    assert perform(tmp_path, rest) == 0
    assert rest.count("train.py") == 2 and len(Results(tmp_path / "out", "small").records) == 3


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, capfd):
    assert perform(tmp_path, Commands(fails="--workdir=" + str(tmp_path / "work/runs/fast"))) == 1
    assert "ended with status 2" in (told := capfd.readouterr().err)
    assert "train.log ends: error: why" in told
    assert [each["row"] for each in Results(tmp_path / "out", "small").records] == ["slow"]


def test_processes_are_spread_over_gpus(monkeypatch):
    monkeypatch.setattr(schedule, "gpus", lambda: ["0", "1"])
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    places = schedule.environments(2)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in places] == ["0", "1", "0", "1"]
    assert {each["XLA_PYTHON_CLIENT_MEM_FRACTION"] for each in places} == {"0.450"}
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in schedule.environments(1)[0]


def test_a_process_is_asked_to_stop(tmp_path):
    """A real one; it writes to the log, and its status is that of the signal."""
    log = tmp_path / "log"
    program = "import time; print('begun', flush=True); time.sleep(60)"
    process = schedule.start_process(
        [sys.executable, "-c", program], schedule.environments(1)[0], log
    )
    while "begun" not in log.read_text():
        time.sleep(0.05)
    process.terminate()
    assert process.wait(timeout=20) == -15


def test_weights_must_be_named(tmp_path):
    runs = study.choose({"small": SMALL}, Plan())
    with pytest.raises(UserError, match="--weights is missing; expected those of efficientnet_li"):
        study.perform(runs, tmp_path, tmp_path)


def group_of(folder, **changes):
    """The records of the first table, each with some values changed."""
    records = Results(folder / "out", "small").records
    (group,) = summary.groups(SMALL, [record | changes for record in records])
    return group


def test_equal_time_is_that_of_the_first_to_be_done(made):
    """slow has 64 images a step, fast 10: when fast is done, slow has done 40 * 10 / 64 steps."""
    minutes, distances = summary.equal_time(group_of(made), {})
    assert minutes == pytest.approx(40 * 10 / 1000 / 60)
    assert distances["fast"].of_seeds == (60, 60)
    assert distances["slow"].mean == 80  # its first evaluation: it has none before
    assert str(summary.final_distances(group_of(made))["fast"]) == "50.50 ± 0.71 (2)"
    falling = Results(made / "out", "small").records[0]["config"]
    falling["optimizer"]["schedule"] = "cosine"
    assert summary.equal_time(group_of(made, config=falling), {}) is None


def test_runs_that_shared_a_gpu_have_the_rates_of_others(made, tmp_path):
    """Only those whose steps are the same as were timed; `fast` has another batch size."""
    shared = group_of(made, processes_a_gpu=2)
    row = {"model": "digits", "images_per_s": 500, "pass": "train", "image_size": 256}
    rows = [row | {"mesh": {"data": count, "fsdp": 1}} for count in (1, 2)]
    rows += [rows[0] | {"pass": "forward", "images_per_s": 9}]
    (tmp_path / "rates.json").write_text(json.dumps({"results": rows}))
    rates = summary.read_rates(tmp_path / "rates.json")
    assert rates == {"digits": 500} and summary.read_rates(tmp_path / "none") == {}
    fast, slow = shared.rows["fast"][0], shared.rows["slow"][0]
    slow["settings"]["changes"] = {}
    assert summary.images_per_s(fast, rates) is None and summary.minutes(fast, rates) is None
    assert summary.images_per_s(slow, rates) == 500
    assert summary.minutes(slow, rates) == pytest.approx(40 * 64 / 500 / 60)
    assert summary.equal_time(shared, rates) is None


def test_claims_are_held_to_all_seeds():
    claim = SMALL.claims[0]

    def answer(fast, slow):
        values = {"fast": summary.Value(fast), "slow": summary.Value(slow)}
        return summary.verdict(claim, values).split(" (")[0]

    assert answer((1.0, 2.0), (3.0, 4.0)) == "agrees"
    assert answer((3.0, 4.0), (1.0, 2.0)) == "does not agree"
    assert answer((1.0, 3.5), (3.0, 4.0)) == "not told: the seeds overlap"
    assert "one seed" in summary.verdict(
        claim, {n: summary.Value((1.0,)) for n in ("fast", "slow")}
    )
    assert summary.verdict(claim, {"fast": summary.Value((1.0,))}) is None


def test_a_row_can_be_held_to_another_of_twice_the_steps(made):
    half = group_of(made)
    whole = half._replace(num_steps=80)
    (line,) = summary.in_half(SMALL.claims[0], [half, whole])
    assert line.startswith("- Fast is better, at 40 steps against 80: agrees (50.50")
    other = whole._replace(measured=whole.measured | {"num_images": 31})
    assert summary.in_half(SMALL.claims[0], [half, other]) == []
    assert summary.in_half(SMALL.claims[0], [half]) == []


def test_the_page_is_made_of_the_records(made):
    tables = {"small": SMALL, "few": FEW}
    page = report.write(made / "out", tables)[-1]
    text = page.read_text()
    assert page == made / "out.md" and "## Small, 40 steps" in text
    assert (
        "| fast | 0.0 | 1000 | 0.0 | 2, ema | 50.50 ± 0.71 (2) | 60.00 ± 0.00 (2) | 0.5 |" in text
    )
    assert "| slow | 0.0 | 1000 | 0.0 | 2, ema | 80.00 | 70.00 |" in text
    assert "- Fast is better, at equal steps: agrees (50.50 ± 0.71 (2) against 60.00" in text
    assert "- Fast is better, at 3 Euler steps: agrees" in text
    assert "30 samples of 50 Euler steps against 9 images" in text and "chip, " in text
    assert "--table=small --num_steps=40 --num_images=30 --guidances=1,2 --curve_points=2" in text
    for picture in ("small_curves", "small_samples", "few", "few_samples"):
        assert f"(out/{picture}.png)" in text and (made / "out" / f"{picture}.png").exists()
    file = made / "out" / "small.json"
    kept, name = file.read_text(), '"FD-efficientnet_lite0": '
    assert f"{name}60.0" in kept
    file.write_text(kept.replace(f"{name}60.0", f"{name}61.25"))
    assert "| 61.25 |" in report.write(made / "out", tables)[-1].read_text()


def test_rows_are_measured_at_other_sizes(tmp_path):
    """The data, the weights and the references lie below data_dir."""
    wide = Shape(name="wide", image_size="4x8", adjustment="paper", data=InData("wide"))
    row = Row(name="slow", config="digits", changes={"data.data_dir": InData("aspects")})
    table = dataclasses.replace(
        SMALL, rows=(row,), claims=(), curves=False, shapes=(wide,), data=InData("square")
    )
    commands = Commands()
    runs = study.choose({"small": table}, PLAN)
    with pytest.raises(UserError, match="--data_dir is missing; .* that holds aspects"):
        study.perform(runs, tmp_path / "out", tmp_path / "work", start=commands)
    plan = dataclasses.replace(PLAN, data_dir=str(tmp_path / "data"))
    runs = study.choose({"small": table}, plan)
    assert study.perform(runs, tmp_path / "out", tmp_path / "work", start=commands) == 0
    train, measured = commands.started[0][0], commands.started[-1][0]
    assert f"--config.data.data_dir={tmp_path}/data/aspects" in train
    assert {"--image_size=4x8", "--resolution_adjustment=paper"} <= set(measured)
    assert f"--reference={tmp_path}/work/references/wide_efficientnet_lite0.npz" in measured
    for name in ("square", "wide"):
        assert commands.count(f"--images=folder:{tmp_path}/data/{name}") == 1
    (record,) = Results(tmp_path / "out", "small").records
    assert record["shapes"] == {"wide": 60} and record["config"]["data"]["data_dir"]
    text = report.write(tmp_path / "out", {"small": table})[-1].read_text()
    assert "equal steps | FD-efficientnet_lite0: wide | KID |" in text and "| 60.00 |" in text


def test_photos_are_cropped_to_a_size(tmp_path):
    (tmp_path / "photos" / "a").mkdir(parents=True)
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 255  # what is left of it at 10x10
    Image.fromarray(image).save(tmp_path / "photos" / "a" / "b.png")
    command = [sys.executable, "-m", "benchmarks.study.photos", f"--source={tmp_path / 'photos'}"]
    code, output = tiny.run([*command, "--image_size=5x5", f"--out={tmp_path / 'out'}"])
    assert code == 0 and "1 photos of 5x5" in output, output
    with Image.open(tmp_path / "out" / "00000.png") as cropped:
        assert cropped.size == (5, 5) and np.asarray(cropped).min() > 200
    code, output = tiny.run([*command, "--image_size=5", f"--out={tmp_path / 'out'}"])
    assert code == 2 and "--image_size is '5'; expected HxW" in output


def test_without_results_no_page_is_written(tmp_path):
    assert report.write(tmp_path / "out", TABLES) == []
    assert not (tmp_path / "out.md").exists()


@pytest.mark.slow
def test_the_commands_do_it(tmp_path, repository):
    """One run of digits, from training to the page."""
    keys = ("model.width", "model.depth", "model.num_groups", "model.patch_size")
    small = {key: tiny.OVERRIDES[key] for key in (*keys, "data.image_size", "train.batch_size")}
    changes = small | {"optimizer.warmup_steps": 2, "ema.others": ("power_0.05", "power_0.1")}
    row = Row(name="digits", config="digits", changes=changes, emas=("ema", "power_0.08"))
    table = dataclasses.replace(SMALL, rows=(row,), claims=(), num_steps=8)
    few = dataclasses.replace(table, solver_steps=(2, 3))
    weights = repository / "tests/fixtures/tiny_dinov2"
    numbers = dict(num_images=20, search_images=12, curve_images=12, draw_batch_size=10)
    numbers |= dict(sampling_steps=3, curve_points=2)
    plan = Plan(features="dinov2", weights=weights, guidances=(1.0, 2.0), **numbers)
    runs = study.choose({"table": table, "few": few}, plan)
    assert study.perform(runs, tmp_path / "out", tmp_path / "work") == 0
    (record,) = Results(tmp_path / "out", "table").records
    assert len(record["search"]) == 4 and [step for step, _ in record["curve"]] == [4, 8]
    assert record["figures"]["FD-dinov2"] > 0 and record["num_references"] == 1797
    assert len(report.write(tmp_path / "out", {"table": table, "few": few})) == 5
