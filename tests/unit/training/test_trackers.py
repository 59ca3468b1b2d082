"""Where curves go: TensorBoard's pages as its own plugins see them, the real packages of Weights & Biases and MLflow
without a network, and what happens where a tracker fails."""

import json
import threading
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard_pages import custom_scalars_page, hparams_columns, hparams_page

from proteingpt.config import ConfigError, RunConfig, from_dict, read_recipe
from proteingpt.training import trackers
from proteingpt.training.curves import LAYOUT
from proteingpt.training.trackers import (
    IDS,
    Background,
    TensorBoard,
    check_tracker,
    has_wandb_key,
    open_tracker,
    run_settings,
    together,
)

# ------------------------------------------------------------------------------------------------------ TensorBoard


def test_the_page_custom_scalars_asks_the_three_questions_once_for_all_stages(tmp_path):
    for stage in ("align", "instruct"):
        TensorBoard(tmp_path / stage, 0).close(True)
    assert custom_scalars_page(tmp_path) == LAYOUT
    assert list(LAYOUT) == ["Is it learning?", "Is it fast?", "Is it healthy?"]


def test_a_chart_that_would_stay_empty_is_not_there(tmp_path):
    TensorBoard(tmp_path / "align", 0, ("speed/mfu", "speed_by_rank/mfu", "learning/held_out_accuracy")).close(True)
    page = custom_scalars_page(tmp_path)
    assert not [title for title in page["Is it fast?"] if "MFU" in title]
    # Half of this one is there.
    assert any("accuracy" in title for title in page["Is it learning?"])
    assert page["Is it healthy?"] == LAYOUT["Is it healthy?"]


def test_the_page_hparams_has_a_row_for_a_stage_from_its_beginning_with_its_last_values(tmp_path):
    made = TensorBoard(tmp_path / "align", 0)
    made.settings({"init_lr": 1e-4, "llm": "vicuna", "epochs": 3}, ("learning/loss",))
    made.scalars([(1, {"learning/loss": 3.0}), (2, {"learning/loss": 2.0, "other": 1.0})])
    made.drop_writer()
    wanted = ({"init_lr": 1e-4, "llm": "vicuna", "epochs": 3.0}, {"learning/loss": 2.0})
    settings, metrics, status = hparams_page(tmp_path)["align"]
    assert (settings, metrics) == wanted and status != "STATUS_SUCCESS"
    made.close(True)
    assert hparams_page(tmp_path)["align"] == (*wanted, "STATUS_SUCCESS")


def test_the_page_hparams_has_the_columns_of_all_runs_though_it_asks_the_first_alone(tmp_path):
    for stage, values in (("align", {"seed": 7, "samples_per_step": 16}), ("instruct", {"seed": 7, "tokens_per_step": 4096})):
        made = TensorBoard(tmp_path / stage, 0)
        made.settings(values, ("learning/loss", "learning/held_out_accuracy"))
        made.scalars([(1, {"learning/held_out_accuracy": 0.5})] if stage == "instruct" else [])
        made.close(True)
    names, metrics = hparams_columns(tmp_path)
    assert {"seed", "samples_per_step", "tokens_per_step"} <= names
    assert metrics == {"learning/loss", "learning/held_out_accuracy"}
    rows = hparams_page(tmp_path)
    assert rows["align"][:2] == ({"seed": 7.0, "samples_per_step": 16.0}, {})
    assert rows["instruct"][:2] == ({"seed": 7.0, "tokens_per_step": 4096.0}, {"learning/held_out_accuracy": 0.5})


def test_settings_reach_a_disk_that_took_nothing_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "TRY_AGAIN_SECONDS", 0.0)
    (tmp_path / "align").write_text("a file where the directory should be")
    made = TensorBoard(tmp_path / "align", 0)
    made.settings({"seed": 7}, ())
    (tmp_path / "align").unlink()
    made.scalars([(1, {"learning/loss": 3.0})])
    made.close(True)
    assert hparams_page(tmp_path)["align"][0] == {"seed": 7.0} and custom_scalars_page(tmp_path) == LAYOUT


def test_all_values_of_a_step_are_one_write(tmp_path):
    """On a network's disk each write opens and closes the file."""
    made = TensorBoard(tmp_path, 0)
    made.scalars([(1, {f"tag_{n}": float(n) for n in range(20)})])
    made.close(True)
    (path,) = tmp_path.iterdir()
    reader = EventAccumulator(str(path))
    reader.Reload()
    assert len({reader.Scalars(f"tag_{n}")[0].wall_time for n in range(20)}) == 1
    assert [reader.Scalars(f"tag_{n}")[0].value for n in range(20)] == list(range(20))


# ------------------------------------------------------------------------------------------------- settings, secrets


def recipe(**data) -> RunConfig:
    values = read_recipe("fast-align")
    return from_dict(RunConfig, {**values, "data": {**values.get("data", {}), **data}})


def test_settings_are_the_recipes_and_how_it_runs():
    found = run_settings(
        recipe(shards="shards/pdb"), "align", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}, 4
    )
    config = recipe().align
    assert found["recipe"] == "fast-align" and found["stage"] == "align" and found["data"] == "shards/pdb"
    assert (found["zero_stage"], found["precision"], found["ranks"]) == (2, "bf16", 4)
    assert found["init_lr"] == config.init_lr and found["epochs"] == config.epochs
    assert None not in found.values() and all(isinstance(value, (bool, int, float, str)) for value in found.values())


def test_no_secret_of_an_address_is_among_them():
    found = run_settings(recipe(shards="s3://me@bucket/x?X-Amz-Signature=abc"), "align", {}, 1)
    assert found["data"] == "s3://bucket/x"
    both = run_settings(recipe(mixture={"https://h/x?key=abc": 1.0, "shards/b": 2.0}), "align", {}, 1)["data"]
    assert "abc" not in both and "https://h/x" in both and "shards/b" in both


# --------------------------------------------------------------------------------------------- over a network, or not


class Recorder:
    """A tracker that is slow, or fails so many times first."""

    id = "7"

    def __init__(self, failures: int = 0, seconds: float = 0.0):
        self.failures, self.seconds, self.told, self.steps = failures, seconds, [], []

    def take(self, *message):
        time.sleep(self.seconds)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to https://me:secret@host/x?key=secret")
        self.told.append(message[0])

    def scalars(self, points):
        self.take("scalars")
        self.steps += [step for step, _ in points]

    def texts(self, step, texts):
        self.take("texts")

    def settings(self, values, metrics):
        self.take("settings")

    def close(self, finished):
        self.take("close")


def test_all_arrives_in_order_and_steps_that_wait_go_together():
    made = Recorder(seconds=0.05)
    background = Background("test", lambda: made)
    background.settings({}, ())
    for step in range(1, 200):
        background.scalars([(step, {"a": 1.0})])
    background.texts(200, {})
    background.scalars([(200, {"a": 1.0})])
    background.close(True)
    assert made.steps == list(range(1, 201)) and background.num_lost == 0
    assert made.told[0] == "settings" and made.told[-3:] == ["texts", "scalars", "close"] and len(made.told) < 10


def test_training_does_not_wait_for_a_tracker_that_does_not_answer(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.2)
    monkeypatch.setattr(trackers, "QUEUED", 50)
    released = threading.Event()

    class Silent(Recorder):
        def take(self, *message):
            released.wait(30)

    background = Background("test", Silent)
    background.scalars([(0, {})])
    while not background.queue.empty():
        time.sleep(0.001)
    for step in range(80):
        background.scalars([(step, {})])
    assert background.queue.full()
    background.close(True)
    assert background.thread.is_alive() and "81 messages are lost" in caplog.text
    released.set()
    background.thread.join(10)
    assert not background.thread.is_alive() and background.num_lost == 30


def test_what_fails_is_said_once_without_secrets_and_tried_again(caplog):
    made = Recorder(failures=2)
    background = Background("test", lambda: made, try_again_seconds=0.01)
    background.scalars([(1, {})])
    while not made.told:
        time.sleep(0.001)
    background.close(True)
    assert made.told == ["scalars", "close"] and background.num_lost == 0
    assert caplog.text.count("takes nothing") == 1 and "ConnectionError" in caplog.text and "secret" not in caplog.text


def test_a_tracker_that_cannot_be_opened_is_opened_later():
    failures, made = [1, 1], Recorder()

    def open():
        if failures:
            failures.pop()
            raise OSError("no network")
        return made

    background = Background("test", open, try_again_seconds=0.01)
    background.scalars([(1, {})])
    while not made.told:
        time.sleep(0.001)
    background.close(True)
    assert made.told == ["scalars", "close"]


def test_one_that_never_opens_costs_what_it_was_told_and_a_warning(caplog):
    def open():
        raise OSError("no network")

    background = Background("test", open, try_again_seconds=0.01)
    for step in range(5):
        background.scalars([(step, {})])
    began = time.monotonic()
    background.close(True)
    assert not background.thread.is_alive() and time.monotonic() - began < 5
    assert "5 messages are lost" in caplog.text


def test_what_waits_is_joined_as_far_as_the_next_text():
    import queue

    waiting = queue.Queue()
    for message in (("scalars", [(1, {})]), ("scalars", [(2, {})]), ("texts", 2, {}), ("scalars", [(3, {})])):
        waiting.put(message)
    assert together(waiting) == [("scalars", [(1, {}), (2, {})]), ("texts", 2, {}), ("scalars", [(3, {})])]


# ------------------------------------------------------------------------------------------------- the real packages


def tell(output: Path, track: str, first: int, last: int, settings: dict):
    """As a stage does, from step first to last."""
    (made,) = open_tracker(track, output, "instruct")
    made.settings(settings, ("learning/loss",))
    for step in range(first, last + 1):
        made.scalars([(step, {"learning/loss": 1 / step, "speed/tokens_per_second": 10.0 * step})])
    made.texts(last, {"answer_0": "yes"})
    made.close(True)
    assert made.num_lost == 0 and not made.warned
    return json.loads((output / IDS).read_text())[f"{track} instruct"]


@pytest.fixture
def output(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_mlflow_goes_on_in_the_same_run(output, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the package mlflow (or mlflow-skinny) is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    first = tell(output, "mlflow", 1, 30, {"init_lr": 1e-4, "ranks": 2})
    # killed after step 20 was saved
    assert tell(output, "mlflow", 21, 40, {"init_lr": 1e-4, "ranks": 3, "seed": 7}) == first
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "proteingpt"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == first and run.info.status == "FINISHED" and run.info.run_name == "run instruct"
    assert run.data.params == {"init_lr": "0.0001", "ranks": "2", "seed": "7"}
    history = client.get_metric_history(first, "learning/loss")
    assert {point.step: point.value for point in history} == {step: 1 / step for step in range(1, 41)}
    assert [file.path for file in client.list_artifacts(first, "texts")] == [
        f"texts/step-000000{n}.md" for n in (30, 40)
    ]


def test_wandb_offline_keeps_everything_in_the_run_directory_under_one_id(output, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["train.py", "--key", "hidden-secret"])
    first = tell(output, "wandb", 1, 30, {"init_lr": 0.00375})
    assert tell(output, "wandb", 31, 40, {"init_lr": 0.00375}) == first
    found = sorted(output.glob("wandb/offline-run-*"))
    assert found and all(path.name.endswith(first) for path in found)
    content = b"".join(path.read_bytes() for path in output.rglob("*.wandb"))
    assert b"learning/loss" in content and b"0.00375" in content and b"speed/tokens_per_second" in content
    everything = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert b"hidden-secret" not in everything


# -------------------------------------------------------------------------------------------------------- choosing


def test_without_a_choice_there_is_none(output):
    check_tracker(None)
    assert open_tracker(None, output, "align") == []


@pytest.mark.parametrize("track", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_named_with_what_to_do(track, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"package {track} is not installed here: pip install {track}"):
        check_tracker(track, {})


@pytest.mark.parametrize(
    "env, has",
    [
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "disabled"}, True),
        ({"WANDB_API_KEY": "x"}, True),
        ({}, False),
        ({"NETRC": "KEYS"}, True),
        ({"NETRC": "KEYS", "WANDB_BASE_URL": "https://wandb.here:8080"}, False),
        ({"NETRC": "BROKEN"}, False),
    ],
)
def test_wandb_is_asked_for_its_key_beforehand_since_it_would_ask_at_the_terminal(env, has, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "KEYS").write_text("machine api.wandb.ai login user password abc\n")
    (tmp_path / "BROKEN").write_text("machine\nmachine\n")
    env = {name: str(tmp_path / value) if name == "NETRC" else value for name, value in env.items()}
    assert has_wandb_key(env) is has
