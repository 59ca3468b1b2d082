"""What launch/status.py says of a run: what is wrong with it, and the lines that people read. Pure functions of what
training.status has read.
"""

from collections.abc import Sequence
from statistics import fmean

from proteingpt.training.ledger import STARTING, STEPPING, summary_text
from proteingpt.training.progress import duration, number, whole

WAITING_SHARE, LEAST_GOODPUT, GOODPUT_AFTER_SECONDS, MEMORY_SHARE, FREE_SAVES = 0.1, 0.5, 3600.0, 0.97, 2
SPARKS = "▁▂▃▄▅▆▇█"


def is_break(ended: str) -> bool:
    """Whether a start that ended so did not mean to."""
    return ended not in ("finished", "stopped")


def what_is_wrong(found: dict) -> list[str]:
    """In words, the worst first."""
    return [*wrong_with_life(found), *wrong_with_learning(found), *wrong_with_speed(found), *wrong_with_keeping(found)]


def wrong_with_life(found: dict) -> list[str]:
    age, state = found["seconds_since_sign"], found["state"]
    since = "nothing was ever written" if age is None else f"nothing was written for {duration(age)}"
    where = f"rank 0 (pid {found['pid']} on {found['host']})"
    saved = found["checkpoint"]
    again = f"goes on from step {saved['step']} of {saved['stage']}" if saved else "begins it again"
    again = f"the same command {again}"
    wrong = []
    if state == "dead" and found["ended"] and is_break(found["ended"]):
        wrong.append(f"it ended with {found['ended']}; {again}")
    elif state == "dead" and found["pid"] is None:
        wrong.append(f"it ended before it had begun; {again}")
    elif state == "dead" and found["process"] == "gone":
        wrong.append(f"dead: {where} is gone and said nothing of its end: killed, or out of memory; {again}")
    elif state == "dead":
        wrong.append(f"dead, it seems: {since}, and {where} cannot be looked at from here; {again}")
    elif state == "hung" and found["process"] == "stopped":
        wrong.append(f"hung: {where} is stopped by a signal; kill -CONT {found['pid']} lets it go on")
    elif state == "hung":
        usual = f", where a step takes {found['step_seconds']:.3g} s" if found["step_seconds"] else ""
        wrong.append(
            f"hung: {where} lives, but {since} while {doing_text(found)}{usual}; after "
            "devices.hang_seconds it ends itself and leaves every rank's stack"
        )
    elif state == "running" and found["process"] is None and not found["lock_held"]:
        told = f"running is what its files say, the last {duration(age or 0)} ago"
        wrong.append(f"{where} cannot be looked at from here: {told}")
    if found["has_stacks"]:
        wrong.append(f"stacks of ranks that hung are in {found['run']}/stacks")
    return wrong


def wrong_with_learning(found: dict) -> list[str]:
    wrong, scores = [], found["evaluation"] or {}
    if any(loss is None for loss in found["losses"]):
        wrong.append("a loss of the last steps is not finite")
    if found["trend"] and found["trend"]["word"] == "rising":
        wrong.append("the loss rises")
    lift = scores.get("held_out_lift")
    if lift is not None and lift <= 0:
        wrong.append("at its last evaluation it answered no better than a model that sees no protein")
    if found["skipped_steps"]:
        wrong.append(f"{found['skipped_steps']} steps were skipped: see the log for their losses and samples")
    if found["quarantined_samples"]:
        wrong.append(f"{found['quarantined_samples']} samples are quarantined: see {found['run']}/set_aside.jsonl")
    if found["unreadable_samples"]:
        wrong.append(f"{found['unreadable_samples']} samples could not be read: see {found['run']}/set_aside-*.jsonl")
    return wrong


def wrong_with_speed(found: dict) -> list[str]:
    wrong, ranks, spent = [], found["ranks"], found["time"]
    for rank in found["slow_ranks"]:
        wrong.append(f"rank {rank} stays slower than others of its kind: look at its clock, temperature and neighbours")
    if (found["waiting_for_data_share"] or 0) > WAITING_SHARE:
        wrong.append(f"{found['waiting_for_data_share']:.0%} of the last step was waiting for data")
    for rank, row in enumerate(ranks):
        used, total = number(row.get("memory_gib")), number(row.get("memory_total_gib"))
        if used and total and used > MEMORY_SHARE * total:
            wrong.append(f"rank {rank} has used {used:.1f} of its {total:.1f} GiB")
    if spent and spent["seconds"] > GOODPUT_AFTER_SECONDS and spent["goodput"] < LEAST_GOODPUT:
        wrong.append(f"only {spent['goodput']:.0%} of the time went into useful steps")
    return wrong


def wrong_with_keeping(found: dict) -> list[str]:
    wrong, saved, spent = [], found["checkpoint"], found["time"]
    if spent and spent["failed_saves"]:
        wrong.append(f"{spent['failed_saves']} checkpoints could not be written: is the disk full?")
    if saved and found["free_gib"] is not None and found["free_gib"] < FREE_SAVES * saved["gib"]:
        wrong.append(f"{found['free_gib']:.2f} GiB are free, and a checkpoint takes {saved['gib']:.2f}")
    return wrong


# ---------------------------------------------------------------------------------------------------------- showing


def text_of(found: dict) -> str:
    """For people, in lines of a label and what is known."""
    rows = [
        ("loss", loss_text(found)), ("held out", evaluation_text(found["evaluation"])), ("speed", speed_text(found)),
        ("ranks", ""), ("time", summary_text(found["time"]) if found["time"] else ""),
        ("checkpoint", checkpoint_text(found)), ("starts", starts_text(found)),
    ]  # fmt: skip
    lines = [head_text(found)]
    for label, text in rows:
        lines += rank_table(found["ranks"]) if label == "ranks" else [f"  {label:<11} {text}"] if text else []
    wrong = found["wrong"] or ["nothing that shows from here"]
    return "\n".join([*lines, *(f"  {'wrong' if not n else '':<11} {text}" for n, text in enumerate(wrong))])


def head_text(found: dict) -> str:
    parts, stages, report = [f"{found['run']}: {found['state']}"], found["stages"], found["report"] or {}
    if whole(report.get("steps")) and number(report.get("seconds")):
        parts.append(f"{report['steps']:,} steps in {duration(report['seconds'])}")
    if found["doing"] not in (None, STEPPING):
        parts[0] += f", {doing_text(found)}"
    if found["stage"] and found["state"] != "finished":
        known = found["stage"] in stages and len(stages) > 1
        of = f" ({stages.index(found['stage']) + 1} of {len(stages)})" if known else ""
        parts.append(f"stage {found['stage']}{of}")
    if found["step"] is not None and found["num_steps"] and found["state"] != "finished":
        parts.append(f"step {found['step']:,} of {found['num_steps']:,} ({found['step'] / found['num_steps']:.0%})")
        if found["state"] == "running" and found["seconds_left"] is not None and found["step"]:
            parts.append(f"{duration(found['seconds_left'])} left of the stage")
    return ", ".join(parts)


def doing_text(found: dict) -> str:
    return "loading or exporting" if found["doing"] == STARTING else str(found["doing"]).replace("_", " ")


def loss_text(found: dict) -> str:
    if found["loss"] is None:
        return ""
    said, seen = f"{found['loss']:.4f} nats per answer token", found["trend"]
    if seen:
        said += f", {seen['word']}: {seen['now']:.4f} in the last {seen['steps']} steps, {seen['before']:.4f} before"
    return f"{said}  {sparks([loss for loss in found['losses'] if loss is not None])}"


def sparks(values: Sequence[float], width: int = 24) -> str:
    """A line of blocks, lowest to highest, each the mean of as many values."""
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    bins = [values[len(values) * n // width : len(values) * (n + 1) // width] for n in range(width)]
    means = [fmean(part) for part in bins]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def evaluation_text(scores: dict | None) -> str:
    if scores is None or scores.get("held_out_loss") is None:
        return ""
    parts = [f"loss {scores['held_out_loss']:.4f}"]
    if scores.get("held_out_accuracy") is not None:
        parts.append(f"accuracy {scores['held_out_accuracy']:.1%}")
    if scores.get("held_out_lift") is not None:
        parts += [f"blind {scores['held_out_blind_accuracy']:.1%}", f"lift {100 * scores['held_out_lift']:+.1f} points"]
    return f"{', '.join(parts)}, after step {scores['step']:,} of {scores['stage']}"


def speed_text(found: dict) -> str:
    if found["tokens_per_second"] is None:
        return ""
    parts = [f"{found['tokens_per_second']:,.0f} tokens/s", f"{found['step_seconds'] or 0:.3g} s a step"]
    if found["mfu"] is not None:
        parts.append(f"MFU {found['mfu']:.1%}")
    elif found["ranks"]:
        devices = {str(row.get("device")) for row in found["ranks"] if number(row.get("mfu")) is None}
        parts.append(f"MFU left out, since no data sheet is known here for {', '.join(sorted(devices))}")
    if found["pack_fill"] is not None:
        parts.append(f"packs {found['pack_fill']:.1%} full")
    parts.append(f"{found['waiting_for_data_share'] or 0:.1%} waiting for data")
    return ", ".join(parts)


def rank_table(rows: list[dict]) -> list[str]:
    """A line for each rank: what it does, and how it is."""
    if not rows:
        return []
    header = ("rank", "device", "tokens/s", "MFU", "given", "not computing", "memory GiB")
    cells = [header, *(rank_cells(rank, row) for rank, row in enumerate(rows))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
    aligned = [[text.rjust(width) for text, width in zip(line, widths)] for line in cells]
    for made, line in zip(aligned, cells):
        made[1] = line[1].ljust(widths[1])
    return [f"  {'  '.join(line)}" for line in aligned]


def rank_cells(rank: int, row: dict) -> tuple[str, ...]:
    def shown(name: str, form: str) -> str:
        value = number(row.get(name))
        return "-" if value is None else format(value, form)

    total = number(row.get("memory_total_gib"))
    memory = shown("memory_gib", ".1f") + (f" of {total:.1f}" if total else "")
    device = f"{row.get('device') or '?'} ({row.get('host') or '?'})"
    shares = (shown("mfu", ".1%"), shown("agreed_share", ".1%"), shown("not_computing_share", ".1%"))
    return str(rank), device, shown("tokens_per_second", ",.0f"), *shares, memory


def checkpoint_text(found: dict) -> str:
    saved = found["checkpoint"]
    if saved is None:
        return "none yet"
    ago = "" if saved["seconds_ago"] is None else f", {duration(saved['seconds_ago'])} ago"
    behind = (found["step"] or 0) - saved["step"] if found["stage"] == saved["stage"] else 0
    lost = f"; {behind:,} steps since" if behind > 0 and found["state"] != "finished" else ""
    return f"{saved['path']}{ago}{lost}"


def starts_text(found: dict) -> str:
    if found["starts"] < 2 and not found["stops"]:
        return ""
    return f"{found['starts']}; stopped and saved {found['stops']} times, broken off {found['breaks']} times"
