"""python launch/open_questions.py --data shards/NAME --qa-endpoint URL --model NAME --out FILE.jsonl [--dry-run] ..."""

import argparse
import sys
from pathlib import Path

from proteingpt.console import run_command
from proteingpt.data.open_questions import DEFAULT_PROMPT, OpenQuestionsError
from proteingpt.data.open_questions_command import run
from proteingpt.data.published import PublishedDataError
from proteingpt.data.shards import ShardError
from proteingpt.endpoint import DEFAULT_KEY_VARIABLE, EndpointError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python launch/open_questions.py",
        description="Makes open questions from abstracts and facts by any OpenAI-compatible server. The key is read "
        "from the environment alone; the output goes into shards with launch/build_shards.py --qa FILE.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="shards: descriptions and facts of their entries")
    source.add_argument("--abstracts", type=Path, help="an abstract.json: [{pdb_id, caption}, ...]")
    add("--qa-endpoint", help="base address of an OpenAI-compatible server, as in https://api.openai.com/v1")
    add("--model", required=True, help="the model's name, as the server knows it")
    add("--key-variable", help=f"environment variable that holds the key (None: {DEFAULT_KEY_VARIABLE}, if set)")
    add("--out", type=Path, required=True, help="FILE.jsonl or a directory; what it holds already is not asked again")
    add("--prompt", type=Path, default=DEFAULT_PROMPT, help="text with {abstract}, {facts} and {num_questions}")
    add("--questions-per-protein", type=int, default=5, help="pairs asked for, and the most that are accepted")
    add("--max-output-tokens", type=int, help="bound on an answer (None: 100 + 200 per question)")
    add("--max-usd", help="stop before this output has cost more, earlier runs included (None: no bound)")
    add("--usd-per-1k-input", help="price of 1,000 input tokens in US dollars")
    add("--usd-per-1k-output", help="price of 1,000 output tokens in US dollars")
    add("--workers", type=int, default=8, help="requests in flight")
    add("--timeout-seconds", type=float, default=120.0, help="for one request")
    add("--retries", type=int, default=5, help="repetitions after 429, 5xx, a lost connection or a timeout")
    add("--backoff-seconds", type=float, default=1.0, help="before the first repetition; doubled each time")
    add("--max-failures-in-a-row", type=int, default=20, help="stop when so many proteins running are set aside")
    add("--retry-set-aside", action="store_true", help="ask again where the answers of an earlier run were invalid")
    add("--dry-run", action="store_true", help="print proteins, tokens and an estimate in USD; make no request")
    return parser.parse_args()


def main() -> int:
    try:
        print(run(**vars(parse_arguments()), progress=sys.stderr))
    except (OpenQuestionsError, EndpointError, PublishedDataError, ShardError, OSError) as error:
        print(f"open_questions: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("open_questions: interrupted; what was finished is kept, the same command goes on", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
