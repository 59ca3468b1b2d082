"""What a run of open questions would ask, of whom, and what it may cost: from the subjects and the output so far."""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from proteingpt.data.open_questions import (
    DONE,
    INVALID,
    OpenQuestionsError,
    Options,
    Subject,
    cache_key,
    fill_prompt,
    leaked_id,
    output_file,
    read_records,
    turns_of,
)
from proteingpt.endpoint import Dialect, Prices, Tokens, estimate_tokens, request_body


@dataclass(frozen=True)
class Job:
    """One question to the model: all subjects whose cache key is the same."""

    key: str
    subjects: tuple[Subject, ...]

    @property
    def ids(self) -> list[str]:
        return [subject.id for subject in self.subjects]


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
    """What open_questions_run.generate would ask and spend. Makes no request and writes nothing."""
    subjects = list(subjects)
    path = output_file(out)
    records = read_records(path)[0] if path.is_file() else []
    jobs, copies, num_cached = plan_jobs(subjects, options, records, retry_set_aside)
    tokens = Tokens()
    for job in jobs:
        body = request_body(options.form, prompt_of(job, options), Dialect())
        tokens += estimate_tokens(body, options.max_output_tokens)
    usd, spent = (prices.cost(tokens), spent_usd(records, prices)) if prices else (None, None)
    return Estimate(len(subjects), num_cached + len(copies), len(jobs), tokens, usd, spent)


def prompt_of(job: Job, options: Options) -> str:
    return fill_prompt(options.prompt, job.subjects[0], options.num_questions)


def spent_usd(records: Iterable[dict], prices: Prices | None) -> Decimal:
    """What the lines of a file have cost; where no price was known then, at the prices of now."""
    spent = Decimal(0)
    for record in records:
        if record["usd"] is not None:
            spent += Decimal(record["usd"])
        elif prices is not None:
            spent += prices.cost(Tokens(record["input_tokens"], record["output_tokens"]))
    return spent
