"""The run that asks for open questions: what is asked about whom, several requests in flight, and what it did.

Each protein is written when it is finished, and all that a run takes is bounded before it is sent; so a run may end at
any point, by Ctrl-C, a kill or the budget, and the same command goes on.
"""

import contextlib
import io
import os
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
    DEFAULT_PROMPT,
    DONE,
    FAILED,
    INVALID,
    LEFT,
    OpenQuestionsError,
    Options,
    Subject,
    append,
    cache_key,
    fill_prompt,
    leaked_id,
    open_output,
    output_file,
    parse_answer,
    read_prompt,
    read_records,
    read_subjects,
    turns_of,
)
from proteingpt.endpoint import (
    BYTES_PER_TOKEN,
    DEFAULT_KEY_VARIABLE,
    Client,
    Dialect,
    Endpoint,
    EndpointError,
    InvalidAnswer,
    Ledger,
    OutOfBudget,
    Prices,
    RequestFailed,
    Stopped,
    Tokens,
    estimate_tokens,
    make_prices,
    make_usd,
    read_key,
    request_body,
)
from proteingpt.protein import Turn

ANSWER_ATTEMPTS = 3  # requests for one protein until an answer is valid


@dataclass(frozen=True)
class Job:
    """One question to the model: all subjects whose cache key is the same."""

    key: str
    subjects: tuple[Subject, ...]

    @property
    def ids(self) -> list[str]:
        return [subject.id for subject in self.subjects]


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


@dataclass(frozen=True)
class Estimate:
    """What a run would take at most, if every first answer is valid."""

    num_subjects: int
    num_cached: int
    num_requests: int
    tokens: Tokens
    usd: Decimal | None
    spent_usd: Decimal | None


def check_budget(prices: Prices | None, max_usd: Decimal | None) -> None:
    if max_usd is not None and prices is None:
        raise OpenQuestionsError("--max-usd needs the prices: give --usd-per-1k-input and --usd-per-1k-output")


def plan_jobs(
    subjects: Iterable[Subject], options: Options, records: Iterable[dict], retry_set_aside: bool = False
) -> tuple[list[Job], list[tuple[Subject, dict]], int]:
    """(jobs, answers to copy, number of subjects that need nothing).

    A subject needs nothing where its own last line was made from the same content. Where another entry's line was, that
    line is its answer too, unless a question names this entry's id. Pure. Raises OpenQuestionsError for an id that
    occurs twice.
    """
    settled = (DONE,) if retry_set_aside else (DONE, INVALID)
    last: dict[str, dict] = {}
    by_key: dict[str, dict] = {}
    for record in records:
        if record["status"] in settled:
            last[record["id"]] = record
            if record["status"] == DONE:
                by_key[record["key"]] = record
    groups: dict[str, list[Subject]] = {}
    copies, num_cached, seen = [], 0, set()
    for subject in subjects:
        if subject.id in seen:
            raise OpenQuestionsError(f"the entry {subject.id} occurs twice")
        seen.add(subject.id)
        key = cache_key(subject, options)
        known = by_key.get(key)
        if last.get(subject.id, {}).get("key") == key:
            num_cached += 1
        elif known is not None and not leaked_id(turns_of(known), [subject.id]):
            copies.append((subject, known))
        else:
            groups.setdefault(key, []).append(subject)
    return [Job(key, tuple(group)) for key, group in groups.items()], copies, num_cached


def estimate(
    subjects: Iterable[Subject],
    out: str | Path,
    options: Options,
    prices: Prices | None = None,
    *,
    retry_set_aside: bool = False,
) -> Estimate:
    """What `generate` would ask and spend. Makes no request and writes nothing."""
    subjects = list(subjects)
    path = output_file(out)
    records = read_records(path)[0] if path.is_file() else []
    jobs, copies, num_cached = plan_jobs(subjects, options, records, retry_set_aside)
    tokens = Tokens()
    for job in jobs:
        body = request_body(options.form, _prompt_of(job, options), Dialect())
        tokens += estimate_tokens(body, options.max_output_tokens)
    usd, spent = (prices.cost(tokens), _spent_usd(records, prices)) if prices else (None, None)
    return Estimate(len(subjects), num_cached + len(copies), len(jobs), tokens, usd, spent)


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
        earlier = _spent_usd(records, prices)
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
    prompt = _prompt_of(job, options)
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


def _prompt_of(job: Job, options: Options) -> str:
    return fill_prompt(options.prompt, job.subjects[0], options.num_questions)


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


def _spent_usd(records: Iterable[dict], prices: Prices | None) -> Decimal:
    """What the lines of a file have cost; where no price was known then, at the prices of now."""
    spent = Decimal(0)
    for record in records:
        if record["usd"] is not None:
            spent += Decimal(record["usd"])
        elif prices is not None:
            spent += prices.cost(Tokens(record["input_tokens"], record["output_tokens"]))
    return spent


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


def format_estimate(found: Estimate) -> str:
    """What a dry run says."""
    lines = [
        f"{found.num_subjects} proteins, {found.num_cached} of them answered already, "
        f"{found.num_requests} requests to make",
        f"input: about {found.tokens.input} tokens ({BYTES_PER_TOKEN} bytes of a request count as one); "
        f"output: at most {found.tokens.output} tokens",
    ]
    if found.usd is None:
        lines.append("for an estimate in USD give --usd-per-1k-input and --usd-per-1k-output")
    else:
        lines.append(
            f"about {found.usd:.4f} USD at most, if every first answer is valid; "
            f"{found.spent_usd:.4f} USD spent on this output so far"
        )
    return "\n".join([*lines, "dry run: no request was made, nothing was written"])


def format_summary(summary: Summary) -> str:
    """What a run says at its end: the counts, what was set aside and why, what is left, and what to type next."""
    money = ""
    if summary.usd is not None:
        money = f", {summary.usd:.4f} USD ({summary.total_usd:.4f} USD for this output in all)"
    lines = [
        f"{summary.num_subjects} proteins: {summary.num_cached} answered already, {summary.num_done} answered now with "
        f"{summary.num_pairs} questions, {len(summary.set_aside)} set aside, {summary.num_left} left",
        f"{summary.num_requests} requests, {summary.tokens.input} input and {summary.tokens.output} output tokens"
        + money,
    ]
    lines += [f"  set aside {entry}: {reason}" for entry, reason in list(summary.set_aside.items())[:10]]
    if len(summary.set_aside) > 10:
        lines.append(f"  and {len(summary.set_aside) - 10} more, each with its reason in {summary.out}")
    if summary.num_left:
        lines.append(
            f"stopped before --max-usd {summary.max_usd} would be exceeded: {summary.num_left} proteins are left; "
            "the same command with a larger --max-usd goes on"
        )
    lines.append(f"next: python launch/build_shards.py ... --qa {summary.out}")
    return "\n".join(lines)


def run(
    *,
    data: Path | None,
    abstracts: Path | None,
    qa_endpoint: str | None,
    model: str,
    out: Path,
    key_variable: str | None = None,
    prompt: Path = DEFAULT_PROMPT,
    questions_per_protein: int = 5,
    max_output_tokens: int | None = None,
    max_usd: str | None = None,
    usd_per_1k_input: str | None = None,
    usd_per_1k_output: str | None = None,
    workers: int = 8,
    timeout_seconds: float = 120.0,
    retries: int = 5,
    backoff_seconds: float = 1.0,
    max_failures_in_a_row: int = 20,
    retry_set_aside: bool = False,
    dry_run: bool = False,
    progress: TextIO | None = None,
) -> str:
    """The command launch/open_questions.py, settings checked before anything is read; returns what it prints."""
    if max_output_tokens is None:
        # A question with its answer takes 60 to 150 tokens.
        max_output_tokens = 100 + 200 * questions_per_protein
    options = Options(model, read_prompt(prompt), questions_per_protein, max_output_tokens)
    prices = make_prices(usd_per_1k_input, usd_per_1k_output)
    budget = None if max_usd is None else make_usd(max_usd, "--max-usd")
    check_budget(prices, budget)
    if dry_run:
        subjects = read_subjects(data=data, abstracts=abstracts)
        return format_estimate(estimate(subjects, out, options, prices, retry_set_aside=retry_set_aside))
    if qa_endpoint is None:
        raise OpenQuestionsError("give --qa-endpoint, as in https://api.openai.com/v1, or --dry-run")
    variable = key_variable or DEFAULT_KEY_VARIABLE
    key = read_key(key_variable, os.environ)
    endpoint = Endpoint(qa_endpoint, key, variable, timeout_seconds, retries, backoff_seconds)
    summary = generate(
        read_subjects(data=data, abstracts=abstracts),
        out,
        endpoint,
        options,
        prices=prices,
        max_usd=budget,
        workers=workers,
        max_failures_in_a_row=max_failures_in_a_row,
        retry_set_aside=retry_set_aside,
        progress=progress,
    )
    return format_summary(summary)
