"""What a build says: one line of progress, report.json, skipped.tsv, and the picture of a finished shard directory.

report.json holds nothing of the clock or the machine, so that it too is the same for the same input.
"""

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO
from xml.sax.saxutils import escape

import numpy as np

from proteingpt.data.filters import PASSING, Skip
from proteingpt.data.shards import ShardError, ShardSet, read_manifest, replacing

SKIPPED_NAME = "skipped.tsv"
REPORT_NAME = "report.json"
PICTURE_NAME = "info.svg"
# Upper ends of the bins of the length histogram, in residues; the last bin is open.
LENGTH_BINS = (50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 1000, 1500)


@dataclass
class BuildReport:
    """What a build did. num_files = entries with a file + duplicates; with one chain per entry num_entries = samples +
    skips.

    samples, entries: {split: count}. funnel: [(step, entries left after it)]. leak: how far the split fails to separate
    (see `build`). skips: everything set aside but duplicates; duplicates: further files of an entry already read, those
    among them that it was not read from because they are damaged with the reason `replaced`.
    """

    out: str
    options: dict
    num_files: int = 0
    num_entries: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    funnel: list[tuple[str, int]] = field(default_factory=list)
    leak: dict[str, float | int] = field(default_factory=dict)
    skips: list[Skip] = field(default_factory=list)
    duplicates: list[Skip] = field(default_factory=list)
    num_continued: int = 0
    seconds: float = 0.0

    @property
    def num_samples(self) -> int:
        return sum(self.samples.values())

    @property
    def num_replaced(self) -> int:
        return sum(skip.reason == "replaced" for skip in self.duplicates)

    @property
    def skipped_by_reason(self) -> dict[str, int]:
        """Commonest first, then by name."""
        counts = Counter(skip.reason for skip in self.skips)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def write_skipped(path: Path, report: BuildReport) -> None:
    """A tab-separated table of skips, then duplicates, a header first. Tabs and newlines in a detail become blanks."""
    columns = ("file", "entry", "chain", "reason", "detail")
    rows = [columns] + [tuple(getattr(skip, name) for name in columns) for skip in report.skips + report.duplicates]
    with replacing(path) as file:
        file.writelines("\t".join(" ".join(cell.split()) for cell in row).encode() + b"\n" for row in rows)


def write_report(path: Path, report: BuildReport) -> None:
    """The report without the long lists, which stand in skipped.tsv, and without what differs from run to run."""
    left_out = ("out", "skips", "duplicates", "num_continued", "seconds")
    content = {name: value for name, value in vars(report).items() if name not in left_out}
    content |= {
        "num_samples": report.num_samples,
        "num_skipped": len(report.skips),
        "skipped": report.skipped_by_reason,
        "num_duplicates": len(report.duplicates),
        "num_replaced": report.num_replaced,
    }
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def format_report(report: BuildReport) -> str:
    """What the command says at its end: the counts, the funnel, where the shards are, and what to type next."""
    lines = [
        f"{report.num_files} structure files, {report.num_entries} entries, {report.num_samples} samples, "
        f"{len(report.skips)} skipped, {len(report.duplicates)} duplicate files, {report.seconds:.1f} s"
    ]
    if report.num_continued:
        lines.append(f"  {report.num_continued} of them were read by an earlier start of this build")
    if report.num_replaced:
        lines.append(f"  {report.num_replaced} damaged files, replaced by another file of their entry")
    lines += format_funnel(report.funnel)
    lines += [f"  skipped, {reason}: {count}" for reason, count in report.skipped_by_reason.items()]
    if PASSING & report.skipped_by_reason.keys():
        lines.append(f"  {', '.join(sorted(PASSING))}: no fault of the files; build again with --overwrite")
    lines += [
        f"  {split}: {count} samples of {report.entries[split]} entries" for split, count in report.samples.items()
    ]
    lines += format_leak(report.leak)
    if report.skips or report.duplicates:
        lines.append(f"every skip with its file and reason: {Path(report.out) / SKIPPED_NAME}")
    lines += [
        f"shards: {report.out}",
        "next: deepspeed launch/train.py --ds_config ds_configs/zero2.json --recipe paper-align --data " + report.out,
    ]
    return "\n".join(lines)


def format_funnel(funnel: list[tuple[str, int]]) -> list[str]:
    width = max((len(name) for name, _ in funnel), default=0)
    return [f"  {name:<{width}}  {count:>9,}" for name, count in funnel]


def format_leak(leak: Mapping[str, float | int]) -> list[str]:
    lines = []
    if "num_test_sequences_in_train" in leak:
        lines.append(
            f"  leak: {leak['num_test_sequences_in_train']} test samples ({leak['share_test_sequences_in_train']:.1%}) "
            "have a sequence that is also trained on"
        )
    if "num_test_samples_in_train_clusters" in leak:
        lines.append(
            f"  leak: {leak['num_test_samples_in_train_clusters']} test samples "
            f"({leak['share_test_samples_in_train_clusters']:.1%}) are in a sequence cluster that is also trained on"
        )
    return lines


# --- progress -------------------------------------------------------------------------------------------------------


class Progress:
    """One line on `stream`: a bar, how many are done, rate, skips, time left. Rewritten in a terminal, else repeated.

    num_done: what an earlier start has done; it does not count for the rate. what: that is counted.
    """

    def __init__(self, total: int, stream: TextIO | None, num_done: int = 0, what: str = "entries"):
        self.total, self.stream, self.done, self.before, self.what = total, stream, num_done, num_done, what
        self.num_skips = 0
        self.started = self.shown = time.monotonic()
        self.terminal = stream is not None and stream.isatty()

    def advance(self, num_entries: int, num_skips: int) -> None:
        self.done, self.num_skips = self.done + num_entries, self.num_skips + num_skips
        if self.stream is not None and time.monotonic() - self.shown >= (0.5 if self.terminal else 30):
            self._show("\r" if self.terminal else "\n")

    def finish(self) -> None:
        if self.stream is not None:
            self._show("\n")

    def say(self, line: str) -> None:
        if self.stream is not None:
            print(line, file=self.stream, flush=True)

    def _show(self, end: str) -> None:
        self.shown = time.monotonic()
        rate = (self.done - self.before) / max(self.shown - self.started, 1e-6)
        left = f"{format_seconds((self.total - self.done) / rate)} left" if rate else "unknown time left"
        if self.done == self.total:
            left = f"in {format_seconds(self.shown - self.started)}"
        filled = 20 * self.done // max(self.total, 1)
        bar = "#" * filled + "." * (20 - filled)
        line = f"[{bar}] {self.done}/{self.total} {self.what}, {rate:.1f}/s, {self.num_skips} skipped, {left}"
        # Blanks wipe what a longer line left in the terminal.
        print(f"{line:<96}" if self.terminal else line, end=end, file=self.stream, flush=True)


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


# --- a finished directory -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Info:
    """What a shard directory holds. lengths: int (samples,); questions: {question: how often}, commonest first."""

    directory: str
    totals: dict[str, dict[str, int]]
    funnel: list[tuple[str, int]]
    leak: dict[str, float | int]
    lengths: np.ndarray
    questions: dict[str, int]


def read_info(directory: str | Path) -> Info:
    """Reads indexes and questions of every split, and report.json where there is one. Raises ShardError."""
    directory = Path(directory)
    manifest = read_manifest(directory)
    report_path = directory / REPORT_NAME
    try:
        report = json.loads(report_path.read_bytes()) if report_path.is_file() else {}
        funnel = [(str(name), int(count)) for name, count in report.get("funnel", [])]
        leak = dict(report.get("leak", {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise ShardError(f"{report_path}: not the report of a build ({error}): remove it, shards do without") from error
    lengths, questions = [], Counter()
    for split in manifest["splits"]:
        shard_set = ShardSet(directory, split)
        lengths.append(shard_set.num_residues)
        for i in range(len(shard_set)):
            questions.update(turn.question for turn in shard_set.read_text(i)[1])
        shard_set.close()
    ordered = dict(sorted(questions.items(), key=lambda item: (-item[1], item[0])))
    all_lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)
    return Info(str(directory), manifest["totals"], funnel, leak, all_lengths, ordered)


def count_lengths(lengths: np.ndarray) -> list[tuple[str, int]]:
    """[("1-50", count), ("51-100", count), ..., ("1501-", count)]."""
    starts = (1, *(end + 1 for end in LENGTH_BINS))
    ends = (*LENGTH_BINS, None)
    counts = np.bincount(np.searchsorted(LENGTH_BINS, lengths), minlength=len(starts))
    return [(f"{start}-{end or ''}", int(count)) for start, end, count in zip(starts, ends, counts)]


def format_info(info: Info, max_questions: int = 40) -> str:
    lines = [info.directory]
    for split, totals in info.totals.items():
        lines.append(
            f"  {split}: {totals['num_samples']:,} samples, {totals['num_residues']:,} residues, "
            f"{totals['num_turns']:,} questions, {totals['num_shards']} shards, {totals['num_bytes'] / 1e6:,.1f} MB"
        )
    lines += format_leak(info.leak)
    if info.funnel:
        lines += ["entries left after each step", *format_funnel(info.funnel)]
    if len(info.lengths):
        low, median, high = np.percentile(info.lengths, (10, 50, 90)).round().astype(int)
        lines.append(f"chain lengths: median {median}, 10 % under {low}, 10 % over {high}")
    counts = count_lengths(info.lengths)
    most = max((count for _, count in counts), default=0) or 1
    lines += [f"  {name:>9}  {count:>9,}  {'#' * round(40 * count / most)}" for name, count in counts]
    lines.append(f"{len(info.questions):,} different questions")
    lines += [f"  {count:>9,}  {question}" for question, count in list(info.questions.items())[:max_questions]]
    if len(info.questions) > max_questions:
        lines.append(f"  and {len(info.questions) - max_questions:,} more, each rarer than these")
    return "\n".join(lines)


# --- the picture: bars in plain SVG, since a drawing library would be a dependency for this alone

ROW_HEIGHT, WIDTH, MARGIN = 20, 1100, 20
MAX_LABEL = 115  # letters of a question that fit beside its bar
BAR = 'fill="#4c78a8"'


def draw_info(info: Info, max_questions: int = 40) -> str:
    """An SVG: funnel and chain lengths side by side, the question counts below."""
    questions = list(info.questions.items())[:max_questions]
    lengths = count_lengths(info.lengths)
    left = _draw_bars("Entries left after each step", info.funnel, MARGIN, 200, 220)
    right = _draw_bars("Residues per chain", lengths, WIDTH // 2 + MARGIN, 100, 340)
    below = 60 + (max(len(info.funnel), len(lengths)) + 3) * ROW_HEIGHT
    rows = len(questions) + 3 if questions else 0
    height = below + rows * ROW_HEIGHT
    totals = ", ".join(f"{split} {found['num_samples']:,} samples" for split, found in info.totals.items())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
            '<rect width="100%" height="100%" fill="white"/>',
            _draw_text(MARGIN, 30, f"{Path(info.directory).name}: {totals}", 'font-weight="bold" font-size="16"'),
            *_draw_at(60, left + right),
            *_draw_at(below, _draw_questions(questions)),
            "</svg>\n",
        ]
    )


def _draw_at(top: int, parts: list[str]) -> list[str]:
    return [f'<g transform="translate(0 {top})">', *parts, "</g>"]


def _draw_bars(title: str, rows: list[tuple[str, int]], x: int, label_width: int, bar_width: int) -> list[str]:
    """Label, bar and number of each row."""
    most = max((count for _, count in rows), default=0) or 1
    parts = [_draw_text(x, ROW_HEIGHT, title, 'font-weight="bold"')] if rows else []
    bars = x + label_width
    for y, (name, count) in enumerate(rows, 2):
        y, length = y * ROW_HEIGHT, bar_width * count / most
        parts += [
            _draw_text(bars - 8, y, name, 'text-anchor="end"'),
            f'<rect x="{bars}" y="{y - 12}" width="{length:.1f}" height="15" {BAR}/>',
            _draw_text(round(bars + length + 6), y, f"{count:,}", 'fill="#444"'),
        ]
    return parts


def _draw_questions(rows: list[tuple[str, int]]) -> list[str]:
    """Number, bar and question of each row: the text comes last, since it may be long and fonts differ in width."""
    most = max((count for _, count in rows), default=0) or 1
    parts = [_draw_text(MARGIN, ROW_HEIGHT, "How often each question is asked", 'font-weight="bold"')] if rows else []
    bars, texts, width = MARGIN + 80, MARGIN + 220, 130
    for y, (name, count) in enumerate(rows, 2):
        y = y * ROW_HEIGHT
        label = name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 3] + "..."
        parts += [
            _draw_text(bars - 8, y, f"{count:,}", 'text-anchor="end" fill="#444"'),
            f'<rect x="{bars}" y="{y - 12}" width="{width * count / most:.1f}" height="15" {BAR}/>',
            _draw_text(texts, y, label, ""),
        ]
    return parts


def _draw_text(x: int, y: int, text: str, style: str) -> str:
    # XML has no control characters, not even escaped; questions may come from a language model.
    printable = "".join(character if character.isprintable() else " " for character in text)
    return f'<text x="{x}" y="{y}" {style}>{escape(printable)}</text>'
