"""The command launch/open_questions.py: settings checked, then a dry run or a run, and what it says at its end."""

import os
from pathlib import Path
from typing import TextIO

from proteingpt.data.open_questions import DEFAULT_PROMPT, OpenQuestionsError, Options, read_prompt, read_subjects
from proteingpt.data.open_questions_plan import Estimate, check_budget, estimate
from proteingpt.data.open_questions_run import Summary, generate
from proteingpt.endpoint import BYTES_PER_TOKEN, DEFAULT_KEY_VARIABLE, Endpoint, make_prices, make_usd, read_key


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
