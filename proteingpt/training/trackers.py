"""Where curves, texts and settings go: TensorBoard always; Weights & Biases or MLflow where `track` names one.

All three are told the same by the same four methods: scalars, texts, settings, close. TensorBoard's writer is a thread
already. The other two talk to a network, so they live in a thread of ours behind a bounded queue: training never waits
for them, what fails is said once and tried again, what does not fit is dropped and counted. A stage is a run of its own
in each, so that stages lie over each other; RUN/trackers.json keeps their ids, and a resumed run goes on in the same
ones.
"""

import importlib.util
import json
import logging
import netrc
import os
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from time import time as wall_clock
from urllib.parse import urlsplit

from proteingpt.config import ConfigError, RunConfig, replace_text
from proteingpt.config.addresses import without_secrets
from proteingpt.training.curves import layout
from proteingpt.training.progress import read_object

log = logging.getLogger("proteingpt")

TRY_AGAIN_SECONDS = 60.0
CLOSE_SECONDS = 15.0  # that the end of a stage waits for what is still to be sent
STOP_SECONDS = 3.0  # that a stop does: its launcher has little patience
QUEUED = 10_000  # steps that a tracker may lag behind
TOGETHER = 500  # of which so many go in one request, at most
TRIES = 3
WAKE = "wake"  # a message to the thread alone
IDS = "trackers.json"
PROJECT = "proteingpt"
# Of a stage, what people compare runs by.
STAGE_SETTINGS = (
    "epochs", "max_steps", "init_lr", "min_lr", "warmup_steps", "weight_decay", "llm_lr_factor", "samples_per_step",
    "tokens_per_step", "tokens_per_pack", "questions_per_group", "questions_per_protein", "max_answer_tokens",
)  # fmt: skip
NUMBERS = ("lora_rank", *STAGE_SETTINGS)  # settings that are not set in every run
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow"}  # `track` -> what pip installs; mlflow-skinny has the same module


# ------------------------------------------------------------------------------------------------------ TensorBoard


class TensorBoard:
    """In DIRECTORY. What was drawn beyond first_step, by a start before, is taken back. Where the disk takes nothing,
    that is said and tried again each minute."""

    def __init__(self, directory: Path, first_step: int, absent: tuple[str, ...] = ()):
        self.directory, self.first_step = directory, first_step
        self.writer, self.failed_at, self.is_new = None, None, True
        # written first whenever a file is begun
        self.heads = [lambda writer: writer.add_custom_scalars(layout(absent))]
        self.write(lambda writer: None)

    def write(self, action: Callable):
        """Do it, if the disk lets us. The writer is a thread, whose error is raised by a later call."""
        if self.failed_at is not None and time.monotonic() - self.failed_at < TRY_AGAIN_SECONDS:
            return
        try:
            if self.writer is None:
                self.open()
            action(self.writer)
            self.failed_at = None
        except OSError as error:
            log.warning("TensorBoard's files cannot be written (%s): the training goes on without curves", error)
            self.failed_at = time.monotonic()
            self.drop_writer()

    def open(self):
        from torch.utils.tensorboard import SummaryWriter

        put_before_now(self.directory, wall_clock())
        purge_step = self.first_step + 1 if self.is_new else None
        self.writer = SummaryWriter(self.directory, purge_step=purge_step, max_queue=1000)
        self.is_new = False
        for head in self.heads:
            head(self.writer)

    def drop_writer(self):
        writer, self.writer = self.writer, None
        try:
            if writer is not None:
                writer.close()
        except OSError:
            pass

    def scalars(self, points: list[tuple[int, dict[str, float]]]):
        """[(step, {tag: value}), ...]. One event of a file for each step: add_scalar would open the file for each
        value."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for step, values in points:
            made = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
            self.write(lambda writer: writer.file_writer.add_summary(made, step))

    def texts(self, step: int, texts: dict[str, str]):
        for name, text in texts.items():
            self.write(lambda writer: writer.add_text(name, text, step))

    def settings(self, values: dict, metrics: tuple[str, ...]):
        """A row of the HPARAMS page. metrics: tags whose last values stand beside the settings; they fill while it
        trains. SummaryWriter.add_hparams would make a run of its own with a time in its name."""
        from torch.utils.tensorboard.summary import hparams

        # The page takes its columns from the first run it finds: each declares those of all.
        experiment, _, _ = hparams({**dict.fromkeys(NUMBERS, 0.0), **values}, dict.fromkeys(metrics, 0.0))
        _, begin, self.end = hparams(values, dict.fromkeys(metrics, 0.0))

        def head(writer):
            writer.file_writer.add_summary(experiment)
            writer.file_writer.add_summary(begin)

        self.heads.append(head)
        self.write(head if self.writer is not None else lambda writer: None)

    def close(self, finished: bool):
        if finished and hasattr(self, "end"):
            self.write(lambda writer: writer.file_writer.add_summary(self.end))
        self.drop_writer()


def put_before_now(directory: Path, now: float):
    """TensorBoard reads event files in the order of the times in their names. Where a clock that was ahead has been set
    back, older files would come last: they get earlier names, in their order."""
    named = [
        (re.match(r"events\.out\.tfevents\.(\d+)\.(.*)", path.name), path) for path in directory.glob("events.out.*")
    ]
    files = sorted((int(match[1]), match[2], path) for match, path in named if match)
    if files and files[-1][0] >= int(now):
        for number, (_, rest, path) in enumerate(files):
            path.rename(path.with_name(f"events.out.tfevents.{max(0, int(now) - len(files) + number):010d}.{rest}"))


# -------------------------------------------------------------------------------------------------- over a network


class WandB:
    """Its own variables say where to (WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline, WANDB_API_KEY). Nothing of the
    machine or of the command line is recorded: keys may stand there."""

    def __init__(self, output: Path, stage: str, run_id: str | None):
        import wandb

        quiet = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True,
            x_disable_machine_info=True, x_save_requirements=False, init_timeout=20, finish_timeout=CLOSE_SECONDS / 2,
        )  # fmt: skip
        self.wandb, self.id = wandb, run_id or uuid.uuid4().hex[:12]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=self.id, resume="allow", reinit="create_new",
            name=f"{output.name} {stage}", group=output.name, dir=str(output), settings=quiet,
        )  # fmt: skip

    def scalars(self, points: list[tuple[int, dict[str, float]]]):
        for step, values in points:
            self.run.log(values, step=step)

    def texts(self, step: int, texts: dict[str, str]):
        table = self.wandb.Table(columns=["step", "name", "text"], data=[[step, *pair] for pair in texts.items()])
        self.run.log({"texts": table}, step=step)

    def settings(self, values: dict, metrics: tuple[str, ...]):
        self.run.config.update(values, allow_val_change=True)

    def close(self, finished: bool):
        self.run.finish(exit_code=0)


class MLflow:
    """Its own variables say where to (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and those of its log-in)."""

    def __init__(self, output: Path, stage: str, run_id: str | None):
        import mlflow

        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it would say each of its tries
        self.mlflow, self.client = mlflow, mlflow.MlflowClient()
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
            self.id = run_id
        else:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            known = self.client.get_experiment_by_name(name)
            experiment = known.experiment_id if known else self.client.create_experiment(name)
            tags = {"proteingpt.run": output.name, "proteingpt.stage": stage}
            self.id = self.client.create_run(experiment, run_name=f"{output.name} {stage}", tags=tags).info.run_id

    def scalars(self, points: list[tuple[int, dict[str, float]]]):
        now = int(wall_clock() * 1000)
        metric, flat = (
            self.mlflow.entities.Metric,
            [(step, *pair) for step, values in points for pair in values.items()],
        )
        made = [metric(tag, float(value), now, step) for step, tag, value in flat]
        for begin in range(0, len(made), 1000):  # as many as its server takes
            self.client.log_batch(self.id, metrics=made[begin : begin + 1000])

    def texts(self, step: int, texts: dict[str, str]):
        whole = "\n\n---\n\n".join(f"# {name}\n\n{text}" for name, text in texts.items())
        self.client.log_text(self.id, whole, f"texts/step-{step:08d}.md")

    def settings(self, values: dict, metrics: tuple[str, ...]):
        """Those of a run's first start stay: a parameter of MLflow cannot change."""
        known = self.client.get_run(self.id).data.params
        new = [self.mlflow.entities.Param(name, str(value)) for name, value in values.items() if name not in known]
        if new:
            self.client.log_batch(self.id, params=new)

    def close(self, finished: bool):
        self.client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


TRACKERS = {"wandb": WandB, "mlflow": MLflow}


class Background:
    """A tracker in a thread of its own. open: makes it, as often as that fails."""

    def __init__(self, name: str, open: Callable[[], object], try_again_seconds: float = TRY_AGAIN_SECONDS):
        self.name, self.open, self.try_again_seconds = name, open, try_again_seconds
        self.queue: queue.Queue = queue.Queue(QUEUED)
        self.tracker, self.finished, self.closing = None, False, threading.Event()
        self.num_told = self.num_taken = 0
        self.warned = False
        self.thread = threading.Thread(target=self.run, name=f"tracker {name}", daemon=True)
        self.thread.start()

    def scalars(self, points):
        self.put("scalars", points)

    def texts(self, step, texts):
        self.put("texts", step, texts)

    def settings(self, values, metrics):
        self.put("settings", values, metrics)

    def close(self, finished: bool):
        """Send what is left, as far as that goes in the time."""
        self.finished = finished
        self.closing.set()
        self.put(WAKE)
        self.thread.join(CLOSE_SECONDS if finished else STOP_SECONDS)
        if self.num_lost:
            log.warning("%s did not take everything: %d messages are lost", self.name, self.num_lost)

    @property
    def num_lost(self) -> int:
        """Once it is closed."""
        return self.num_told - self.num_taken

    def put(self, method: str, *arguments):
        self.num_told += method != WAKE
        try:
            self.queue.put_nowait((method, *arguments))
        except queue.Full:
            pass

    # -------------------------------------------------------------------------------------------- in the thread

    def run(self):
        while not (self.closing.is_set() and self.queue.empty()):
            for message in together(self.queue):
                if message[0] != WAKE and self.deliver(*message):
                    self.num_taken += len(message[1]) if message[0] == "scalars" else 1
        if self.tracker is not None:
            self.deliver("close", self.finished)

    def deliver(self, method: str, *arguments) -> bool:
        """Whether the tracker took it. Once the stage is over nothing is tried again: the run is to end."""
        for _ in range(TRIES):
            try:
                self.tracker = self.tracker or self.open()
                getattr(self.tracker, method)(*arguments)
                return True
            except Exception as error:  # of a package and a network that are not ours
                self.say(error)
                if self.closing.wait(self.try_again_seconds):
                    break
        return False

    def say(self, error: Exception):
        if not self.warned:
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            log.warning(
                "%s takes nothing (%s): the training goes on, and tries again", self.name, without_secrets(said)
            )
        self.warned = True


def together(waiting: queue.Queue) -> list[tuple]:
    """The next message and those behind it that wait already, all scalars of a row in one."""
    messages = [waiting.get()]
    while len(messages) < TOGETHER:
        try:
            messages.append(waiting.get_nowait())
        except queue.Empty:
            break
    joined: list[tuple] = []
    for message in messages:
        if message[0] == "scalars" and joined and joined[-1][0] == "scalars":
            joined[-1] = ("scalars", [*joined[-1][1], *message[1]])
        else:
            joined.append(message)
    return joined


# ------------------------------------------------------------------------------------------------------- choosing


def check_tracker(track: str | None, env: Mapping[str, str] = os.environ):
    """ConfigError where the package, or W&B's key, is not there. Imports neither."""
    if track is None:
        return
    if importlib.util.find_spec(PACKAGES[track]) is None:
        raise ConfigError(
            f"track is {track!r}, but the package {PACKAGES[track]} is not installed here: pip install "
            f"{PACKAGES[track]}, or leave --track out; TensorBoard's curves are there without it"
        )
    if track == "wandb" and not has_wandb_key(env):
        raise ConfigError(
            "track is 'wandb', but there is no key for it: run `wandb login`, set WANDB_API_KEY, or set "
            "WANDB_MODE=offline"
        )


def has_wandb_key(env: Mapping[str, str]) -> bool:
    """Or needs none. It would ask at the terminal, and a training would wait for the answer."""
    if env.get("WANDB_MODE", "online") not in ("online", "shared") or env.get("WANDB_API_KEY"):
        return True
    host = urlsplit(env.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (env.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(Path(path).expanduser()).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def open_tracker(track: str | None, output: Path, stage: str) -> list[Background]:
    """That of `track` for a stage of the run in `output`, or none."""
    if track is None:
        return []
    key = f"{track} {stage}"

    def open():
        made = TRACKERS[track](output, stage, read_object(output / IDS).get(key))
        remember(output / IDS, key, made.id)
        return made

    return [Background(track, open)]


def remember(path: Path, key: str, run_id: str):
    ids = read_object(path)
    if ids.get(key) != run_id:
        replace_text(path, json.dumps({**ids, key: run_id}) + "\n")


def run_settings(
    config: RunConfig, stage: str, ds_config: Mapping, num_ranks: int
) -> dict[str, bool | int | float | str]:
    """What tells runs apart in a table: the recipe's main fields, and how it runs."""
    data, model = config.data, config.model
    precision = next((name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")), "fp32")
    chosen = {
        "recipe": config.recipe, "stage": stage, "seed": config.seed, "llm": model.llm, "train": model.train,
        "projector": model.projector, "lora_rank": model.lora.rank if model.train == "lora" else None,
        "data": data.shards or data.mixture,
        "ranks": num_ranks, "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0),
        "precision": precision,
        **{name: getattr(config.stages[stage], name) for name in STAGE_SETTINGS},
    }  # fmt: skip
    return {name: plain(value) for name, value in chosen.items() if value is not None}


def plain(value) -> bool | int | float | str:
    """As trackers can show it: anything but a number as text, and addresses without what may be a secret in them."""
    return value if isinstance(value, (bool, int, float)) else without_secrets(str(value))
