"""Every curve of a run by its tag, with its unit and what it is; and TensorBoard's page "Custom Scalars".

What stands before a tag's slash is its chapter: TensorBoard, Weights & Biases and MLflow all group curves by it, so
that the names alone answer "is it learning, is it fast, is it healthy", in this order, and LAYOUT only lays them over
each other. A tag under *_by_rank is followed by /rank_N, or by /min, /median and /max where there are too many ranks to
look at.
"""

from collections.abc import Collection

CURVES = {
    "learning/loss": ("nats per answer token", "of a step's answer tokens, over all ranks, before its update"),
    "learning/held_out_loss": ("nats per answer token", "of the held-out proteins, at each evaluation"),
    "learning/held_out_accuracy": ("share", "held-out questions answered exactly, after normalisation (instruct)"),
    "learning/held_out_blind_accuracy": ("share", "the same for who sees no protein: the commonest training answer"),
    "learning/held_out_lift": ("share", "the one less the other: what comes from the protein"),
    "learning/learning_rate": ("1", "of the projector; the LLM's is llm_lr_factor times that"),
    "speed/tokens_per_second": (
        "tokens/s", "read by all ranks, over the wall time of a step with its waiting for data"
    ),
    "speed/samples_per_second": ("questions/s", "likewise"),
    "speed/step_seconds": ("s", "wall time of a step, waiting for data in it; evaluating and saving are not"),
    "speed/mfu": ("share", "FLOPs of the LLM's matrix products over what the data sheets of all devices promise"),
    "speed/pack_fill": (
        "share", "of tokens_per_pack that a step's packs hold; the rest is not padding, it is not there"
    ),
    "speed/waiting_for_data_share": ("share", "of a step that rank 0 waited for data"),
    "speed/encoders_share": ("share", "of a step that rank 0's frozen encoders took; on a GPU they run beside it"),
    "speed/waiting_for_encoders_share": ("share", "of a step that stood still for them: what is not hidden behind it"),
    "speed_by_rank/tokens_per_second": (
        "tokens/s", "read by a rank, over wall time, since the last exchange of speeds"
    ),
    "speed_by_rank/mfu": ("share", "as speed/mfu, of a rank against the data sheet of its own device"),
    "speed_by_rank/computing_speed": (
        "tokens/s", "of a rank while it computes, by its last 10 steps but the slowest and fastest"
    ),
    "speed_by_rank/agreed_share": ("share", "of a step's tokens that the speeds agreed upon give to a rank"),
    "time/goodput": ("share", "of the time that processes lived, over all starts, spent in useful steps"),
    "time/useful_steps": ("share", "the same, as a part among the parts"),
    "time/replayed_steps": ("share", "steps that an earlier start had done already"),
    "time/waiting_for_data": ("share", "waiting for data"),
    "time/saving": ("share", "what training waited for checkpoints; they are written in the background"),
    "time/evaluating": ("share", "held-out loss and answers"),
    "time/starting": ("share", "all else: imports, loading, exporting"),
    "vitals/gradient_norm": ("1", "L2 norm over what trains, before clipping; NaN in a step that is skipped for it"),
    "vitals/skipped_steps": ("steps", "so far that changed no weight"),
    "vitals/quarantined_samples": ("samples", "so far that have no weight any more"),
    "vitals/ranks_that_stay_slow": ("ranks", "below 75 % of their class's usual speed at three exchanges"),
    "vitals/memory_gib": ("GiB", "peak of rank 0: of its GPU, or of the process where there is none"),
    "vitals_by_rank/memory_gib": ("GiB", "likewise, of a rank"),
    "vitals_by_rank/not_computing_share": (
        "share", "of its time that a rank waited: for data, others, saves, evaluations"
    ),
}  # fmt: skip


def one(name: str) -> str:
    return f"^{name}$"


def each_rank(name: str) -> str:
    return f"^{name}/"


LAYOUT = {
    "Is it learning?": {
        "loss, nats per answer token": [one("learning/loss"), one("learning/held_out_loss")],
        "held-out accuracy, beside a blind model's": [
            one("learning/held_out_accuracy"), one("learning/held_out_blind_accuracy")
        ],
        "lift: what comes from the protein": [one("learning/held_out_lift")],
        "learning rate": [one("learning/learning_rate")],
    },
    "Is it fast?": {
        "tokens per second": [one("speed/tokens_per_second")],
        "tokens per second of each rank": [each_rank("speed_by_rank/tokens_per_second")],
        "MFU: share of the devices' peak": [one("speed/mfu"), each_rank("speed_by_rank/mfu")],
        "share of a step waiting for data, and for encoders": [
            one("speed/waiting_for_data_share"), one("speed/waiting_for_encoders_share"),
        ],
        "how full packs are": [one("speed/pack_fill")],
        "share of a step given to each rank": [each_rank("speed_by_rank/agreed_share")],
    },
    "Is it healthy?": {
        "gradient norm": [one("vitals/gradient_norm")],
        "steps skipped, samples quarantined, ranks that stay slow": [
            one("vitals/skipped_steps"), one("vitals/quarantined_samples"), one("vitals/ranks_that_stay_slow"),
        ],
        "peak memory of each rank, GiB": [each_rank("vitals_by_rank/memory_gib")],
        "share of time that each rank does not compute": [each_rank("vitals_by_rank/not_computing_share")],
        "goodput, and where the time went": ["^time/"],
    },
}  # fmt: skip


def layout(absent: Collection[str]) -> dict[str, dict[str, list]]:
    """LAYOUT as SummaryWriter.add_custom_scalars takes it, without the charts that would stay empty: those of `absent`
    tags alone."""
    empty = {form(tag) for tag in absent for form in (one, each_rank)}
    return {
        question: {title: ["Multiline", tags] for title, tags in charts.items() if not empty.issuperset(tags)}
        for question, charts in LAYOUT.items()
    }
