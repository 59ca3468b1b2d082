"""What an estimate found, as tables and words, and as JSON."""

import dataclasses

from proteingpt.cluster.estimate import GIB, MOST_ON_CPU, MOST_TOKENS, Estimator, Outcome
from proteingpt.cluster.memory import MARGIN
from proteingpt.cluster.spec import Cluster


def table(rows: list[tuple]) -> str:
    """Markdown; the first row is the head."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(texts[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in texts]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def memory_table(outcome: Outcome) -> str:
    parts = ("weights", "encoders", "gradients", "optimizer", "activations")
    rows = [
        (
            "GiB of a rank",
            *parts[:1],
            "cache" if outcome.choice.cached else "encoders",
            *parts[2:],
            "in all",
            "fits",
            "fullest while",
            "largest forward",
        )
    ]
    for found in outcome.kinds:
        values = [f"{getattr(found.memory, part) / GIB:.2f}" for part in parts]
        whole = f"{found.memory.total / GIB:.1f} of {MARGIN * found.kind.gib:.1f}"
        at_least = "" if found.largest_forward not in (MOST_TOKENS, MOST_ON_CPU) else "over "
        largest = "-" if found.largest_forward is None else f"{at_least}{found.largest_forward:,} tokens"
        rows.append(
            (f"{found.kind.count} x {found.kind.label}", *values, whole, yes(found.fits), found.memory.moment, largest)
        )
    return table(rows)


def time_table(outcome: Outcome) -> str:
    rows = [("stage", "steps", "packs a step", "of summed speed", "s a step", "tokens/s", "hours", "GPU-hours")]
    for s in outcome.stages:
        rows.append(
            (s.name, f"{s.num_steps:,}", f"{s.packs_per_step:.3g}", f"{s.share:.1%}", f"{s.step_seconds:.3g}",
             f"{s.tokens_per_second:,.0f}", f"{s.hours:,.1f}", f"{s.gpu_hours:,.1f}")
        )  # fmt: skip
    return table(rows)


def others_table(others: list[Outcome]) -> str:
    rows = [("instead", "fits", "GiB on the fullest rank", "hours")]
    for o in others:
        full = o.fullest
        rows.append(
            (
                o.choice.label,
                yes(o.fits),
                f"{full.memory.total / GIB:.1f} of {MARGIN * full.kind.gib:.1f} ({full.kind.label})",
                f"{o.hours:,.1f}",
            )
        )
    return table(rows)


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def title(outcome: Outcome, llm: str, cluster: Cluster) -> str:
    choice = outcome.choice
    stage = choice.ds_config.get("zero_optimization", {}).get("stage", 0)
    kinds = " + ".join(f"{kind.count} x {kind.label}" for kind in cluster.kinds)
    checkpointing = ", activation checkpointing" if choice.config.model.activation_checkpointing else ""
    rows = "cached embeddings" if choice.cached else "live encoders"
    precision = next((p for p in ("bf16", "fp16") if choice.ds_config.get(p, {}).get("enabled")), "fp32")
    return (
        f"{choice.config.recipe}: {llm}, train {choice.config.model.train}{checkpointing}, ZeRO {stage} in "
        f"{precision}, {rows}, on {kinds}"
    )


def text_of(outcome: Outcome, others: list[Outcome], llm: str, estimator: Estimator) -> str:
    cached, epochs = estimator.cache_against_live(outcome)
    hosts = [found for found in outcome.kinds if found.memory.host]
    lines = [
        title(outcome, llm, estimator.cluster),
        "",
        memory_table(outcome),
        "",
        time_table(outcome),
        "",
        others_table(others),
        "",
    ]
    lines += advice(outcome, others)
    lines += [f"host memory of a rank: {found.memory.host / GIB:.1f} GiB" for found in hosts[:1]]
    lines += [
        f"rate of {found.kind.label}: {found.rate.flops / 1e12:.4g} TFLOP/s, {found.rate.source}"
        for found in outcome.kinds
    ]
    lines.append(
        f"link: {estimator.cluster.link_gbps:g} GB/s, assumed unless a YAML cluster gives it; data: "
        f"{estimator.data.source}"
    )
    lines.append(
        f"encoders: assumed at their device's rate. A cache takes {cached.num_bytes / 1e9:.0f} GB and "
        f"{cached.hours_to_cache:.3g} hours; live they take {cached.hours_live:.3g} in {epochs} epoch(s)"
    )
    return "\n".join(lines)


def json_of(outcome: Outcome, others: list[Outcome], llm: str, estimator: Estimator) -> dict:
    return {
        "title": title(outcome, llm, estimator.cluster),
        "fits": outcome.fits,
        "hours": outcome.hours,
        "kinds": [
            {**dataclasses.asdict(k), "memory": {**dataclasses.asdict(k.memory), "total": k.memory.total}}
            for k in outcome.kinds
        ],
        "stages": [dataclasses.asdict(stage) for stage in outcome.stages],
        "others": [
            {"label": o.choice.label, "fits": o.fits, "gib": o.fullest.memory.total / GIB, "hours": o.hours}
            for o in others
        ],
        "advice": advice(outcome, others),
        "data": estimator.data.source,
        "link_gbps": estimator.cluster.link_gbps,
    }


def advice(outcome: Outcome, others: list[Outcome]) -> list[str]:
    """What to change where it does not fit, in words."""
    lines = []
    for found in outcome.kinds:
        if not found.fits:
            over = found.memory.total / GIB - MARGIN * found.kind.gib
            lines.append(
                f"{found.kind.label}: {over:.1f} GiB too much of the {MARGIN * found.kind.gib:.1f} that a step may "
                f"fill, while {found.memory.moment}."
            )
            if found.largest_forward:
                lines.append(
                    f"  Forwards of up to {found.largest_forward} tokens would fit: lower tokens_per_pack, "
                    "devices.tokens_per_forward or data.max_residues."
                )
    if lines:
        fitting = sorted((o for o in others if o.fits), key=lambda o: o.hours)
        if fitting:
            lines.append(
                "What fits with one change, fastest first: "
                + "; ".join(f"{o.choice.label} ({o.hours:.3g} h)" for o in fitting)
            )
        else:
            lines.append(
                "No single change here fits: change two (ZeRO 3 with checkpointing, or train: lora), or leave the "
                "smaller devices out."
            )
    return lines
