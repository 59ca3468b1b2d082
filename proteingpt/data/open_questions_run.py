"""The run that asks for open questions: several requests in flight, what became of each, and what it did.

Each protein is written when it is finished, and all that a run takes is bounded before it is sent; so a run may end at
any point, by Ctrl-C, a kill or the budget, and the same command goes on.
"""

import contextlib
import io
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from proteingpt.data.open_questions import (
    DONE,
    FAILED,
    INVALID,
    LEFT,
    OpenQuestionsError,
    Options,
    Subject,
    append,
    open_output,
    output_file,
    parse_answer,
    turns_of,
)
from proteingpt.data.open_questions_plan import Job, check_budget, plan_jobs, prompt_of, spent_usd
from proteingpt.endpoint import (
    Client,
    Endpoint,
    EndpointError,
    InvalidAnswer,
    Ledger,
    OutOfBudget,
    Prices,
    RequestFailed,
    Stopped,
    Tokens,
)
from proteingpt.protein import Turn

ANSWER_ATTEMPTS = 3  # requests for one protein until an answer is valid


@dataclass(frozen=True)
class Outcome:
    """What became of a job. status: done, invalid (no answer was valid), failed (no answer came), left (not asked)."""

    status: str
    turns: tuple[Turn, ...] = ()
    reason: str = ""
    tokens: Tokens = Tokens()
    fatal: EndpointError | None = None


@dataclass
class Summary:
    """What a run did. Counts are of proteins, except pairs and requests. set_aside: {id: reason}, by invalid answers or
    by requests that failed; left: not asked, for want of budget. usd: of this run; total_usd: of the output file."""

    out: str
    num_subjects: int
    num_cached: int = 0
    num_done: int = 0
    num_pairs: int = 0
    num_requests: int = 0
    set_aside: dict[str, str] = field(default_factory=dict)
    num_left: int = 0
    tokens: Tokens = Tokens()
    usd: Decimal | None = None
    total_usd: Decimal | None = None
    max_usd: Decimal | None = None


def generate(
    subjects: Iterable[Subject],
    out: str | Path,
    endpoint: Endpoint,
    options: Options,
    *,
    prices: Prices | None = None,
    max_usd: Decimal | None = None,
    workers: int = 8,
    max_failures_in_a_row: int = 20,
    retry_set_aside: bool = False,
    progress: TextIO | None = None,
) -> Summary:
    """Asks about every subject that the output file does not answer yet, and appends a line for each.

    max_usd bounds what the output file has cost in all, earlier runs included; the run ends before a request could
    exceed it. workers: requests in flight. retry_set_aside: ask again where earlier answers were invalid (where a
    request failed it is always asked again).
    Raises OpenQuestionsError for settings, and EndpointError where the endpoint refuses, cannot be reached, or
    max_failures_in_a_row proteins were set aside one after the other. Whatever was finished is in the file.
    """
    for name, value in (("--workers", workers), ("--max-failures-in-a-row", max_failures_in_a_row)):
        if value < 1:
            raise OpenQuestionsError(f"{name} is {value}, wanted at least 1")
    check_budget(prices, max_usd)
    subjects = list(subjects)
    path = output_file(out)
    with open_output(path) as (file, records):
        earlier = spent_usd(records, prices)
        ledger = Ledger(prices, max_usd, earlier)
        jobs, copies, num_cached = plan_jobs(subjects, options, records, retry_set_aside)
        copied = [_record(s, known["key"], options, Outcome(DONE, turns_of(known)), prices) for s, known in copies]
        append(file, copied)
        num_left = sum(len(job.subjects) for job in jobs)
        summary = Summary(str(path), len(subjects), num_cached + len(copies), num_left=num_left)
        client = Client(endpoint, options.form, ledger)
        _run_jobs(jobs, client, options, file, summary, workers, max_failures_in_a_row, progress)
    summary.num_requests, summary.tokens, summary.max_usd = ledger.num_requests, ledger.tokens, max_usd
    if prices is not None:
        summary.usd, summary.total_usd = ledger.spent_usd - earlier, ledger.spent_usd
    return summary


def _run_jobs(
    jobs: list[Job],
    client: Client,
    options: Options,
    file: io.FileIO,
    summary: Summary,
    workers: int,
    max_failures_in_a_row: int,
    progress: TextIO | None,
) -> None:
    """Keeps up to `workers` jobs in flight and writes each as it is finished. A run that ends early, by an error or by
    Ctrl-C, still takes in what is in flight."""
    waiting = iter(jobs)
    running: dict[Future, Job] = {}
    meter = _Progress(summary, client.ledger, progress)
    failures, fatal = 0, None
    with _noting_ctrl_c() as pressed, ThreadPoolExecutor(workers) as pool, contextlib.ExitStack() as last:
        # So that no thread goes on after an exception.
        last.callback(client.stopping.set)
        while True:
            while len(running) < workers and not client.stopping.is_set() and (job := next(waiting, None)):
                running[pool.submit(_ask, job, client, options)] = job
            if not running:
                break
            # With a timeout, so that Ctrl-C also ends the pauses before repetitions.
            for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                _take(outcome, running.pop(future), options, client.ledger.prices, file, summary)
                meter.show()
                failures = failures + 1 if outcome.status in (INVALID, FAILED) else 0
                fatal = fatal or outcome.fatal
                if failures >= max_failures_in_a_row and fatal is None:
                    fatal = EndpointError(
                        f"{client.name}: {failures} proteins in a row were set aside, the last because: "
                        f"{outcome.reason}"
                    )
                if fatal or outcome.status == LEFT:
                    client.stopping.set()
            if pressed:
                client.stopping.set()
    meter.show(last=True)
    if pressed:
        raise KeyboardInterrupt
    if fatal:
        raise EndpointError(
            f"{fatal}; {summary.num_done} proteins were answered before that and are kept in {summary.out}, "
            "the same command goes on"
        )


@contextlib.contextmanager
def _noting_ctrl_c() -> Iterator[list[int]]:
    """A list that the first Ctrl-C in the block fills, instead of an exception that could fall between an answer and
    its writing; a second one does what it always does."""
    pressed: list[int] = []
    previous = signal.getsignal(signal.SIGINT)
    # Python lets only the main thread set handlers; and who ignores Ctrl-C, as a background job, goes on ignoring it.
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield pressed
        return

    def note(number, frame) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _ask(job: Job, client: Client, options: Options) -> Outcome:
    """Runs in a thread."""
    taken: list[Tokens] = []
    outcome = _ask_until_valid(job, client, options, taken)
    return replace(outcome, tokens=sum(taken, Tokens()))


def _ask_until_valid(job: Job, client: Client, options: Options, taken: list[Tokens]) -> Outcome:
    prompt = prompt_of(job, options)
    reason = ""
    try:
        for _ in range(ANSWER_ATTEMPTS):
            try:
                return Outcome(DONE, parse_answer(client.complete(prompt, taken), options.num_questions, job.ids))
            except InvalidAnswer as error:
                reason = str(error)
        return Outcome(INVALID, reason=f"{ANSWER_ATTEMPTS} invalid answers, the last: {reason}")
    except RequestFailed as error:
        return Outcome(FAILED, reason=str(error))
    except EndpointError as error:
        return Outcome(LEFT, reason=str(error), fatal=error)
    except (OutOfBudget, Stopped) as error:
        return Outcome(LEFT, reason=type(error).__name__)


def _take(
    outcome: Outcome, job: Job, options: Options, prices: Prices | None, file: io.FileIO, summary: Summary
) -> None:
    """Writes what became of a job, and counts it."""
    if outcome.status != LEFT or outcome.tokens != Tokens():
        # What it took stands on the first line alone, so that the file's sum is what was spent.
        free = replace(outcome, tokens=Tokens())
        first, *others = job.subjects
        lines = [_record(first, job.key, options, outcome, prices)]
        append(file, lines + [_record(other, job.key, options, free, prices) for other in others])
    if outcome.status == LEFT:
        return
    summary.num_left -= len(job.subjects)
    if outcome.status == DONE:
        summary.num_done += len(job.subjects)
        summary.num_pairs += len(outcome.turns) * len(job.subjects)
    else:
        summary.set_aside |= dict.fromkeys(job.ids, outcome.reason)


def _record(subject: Subject, key: str, options: Options, outcome: Outcome, prices: Prices | None) -> dict:
    return {
        "id": subject.id,
        "key": key,
        "model": options.model,
        "status": outcome.status,
        "turns": [{"Q": turn.question, "A": turn.answer} for turn in outcome.turns],
        "reason": outcome.reason,
        "input_tokens": outcome.tokens.input,
        "output_tokens": outcome.tokens.output,
        "usd": None if prices is None else str(prices.cost(outcome.tokens)),
    }


class _Progress:
    """A line on `stream` every 10 seconds, and one at the end."""

    def __init__(self, summary: Summary, ledger: Ledger, stream: TextIO | None):
        self.summary, self.ledger, self.stream = summary, ledger, stream
        self.total = summary.num_left
        self.started = self.shown = time.monotonic()

    def show(self, last: bool = False) -> None:
        now = time.monotonic()
        if self.stream is None or (now - self.shown < 10 and not last):
            return
        self.shown = now
        asked = self.total - self.summary.num_left
        rate = asked / max(now - self.started, 1e-6)
        usd = f", {self.ledger.spent_usd:.4f} USD in all" if self.ledger.prices else ""
        print(
            f"{asked}/{self.total} proteins, {rate:.2f}/s, {len(self.summary.set_aside)} set aside{usd}, "
            f"{self.summary.num_left / max(rate, 1e-6):.0f} s left",
            file=self.stream,
            flush=True,
        )
