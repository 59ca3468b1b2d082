"""What a training step holds in a rank's memory, part by part, before any device is touched.

Weights, gradients and optimizer state follow from shapes, from the ZeRO stage, and from what DeepSpeed 0.19 and our
engine copy when (read in their source, held to measured steps by tests/numerics/test_estimate.py). Activations are
counted by activations.py. A step has three moments, forward and backward, reducing, and the update, whose scratch is
never there
together: the fullest counts. Given up: what allocators lose between blocks (a margin, see MARGIN).
"""

from dataclasses import dataclass

from proteingpt.training.engine import KEPT_AT_MOST

MARGIN = 0.92  # share of a device's memory that a step may fill: the rest is its context, NCCL's buffers and gaps
FP32 = 4
MOMENTS = 2 * FP32  # AdamW's two, for each parameter that trains
# DeepSpeed's defaults: zero_optimization.reduce_bucket_size, stage3_max_live_parameters, stage3_prefetch_bucket_size
# and sub_group_size, in elements.
REDUCE_BUCKET, STAGE3_LIVE, STAGE3_PREFETCH, SUB_GROUP = 5e8, 1e9, 5e7, 1e9


@dataclass(frozen=True)
class Sizes:
    """Parameters: frozen, trained, the largest trained tensor, and those of the largest module that ZeRO 3 gathers
    whole."""

    frozen: int
    trained: int
    largest: int
    gathered: int


@dataclass(frozen=True)
class Activations:
    """Bytes at the fullest moment of a forward and backward, beside the weights. with_gradients: where those of the
    weights stay where they are made; alone: where each goes at once."""

    with_gradients: float
    alone: float


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at its fullest moment: `moment`. optimizer: its state, and its scratch if it is then. host:
    what offload puts elsewhere."""

    weights: float
    encoders: float
    gradients: float
    optimizer: float
    activations: float
    host: float = 0.0
    moment: str = ""

    @property
    def total(self) -> float:
        return self.weights + self.encoders + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Setting:
    """What of a DeepSpeed JSON, and of how a rank works, memory depends on. element: bytes of a weight. several: a rank
    has more than one forward in a step. on_cpu: where torch's AdamW goes tensor by tensor, and memory that nobody has
    written to takes no place; on a GPU it updates all at once."""

    stage: int
    element: int
    world_size: int
    keeps: bool
    several: bool
    on_cpu: bool
    bucket: float
    live: float
    prefetch: float
    sub_group: float
    offloads_optimizer: bool
    offloads_weights: bool

    @staticmethod
    def of(
        sizes: Sizes, world_size: int, ds_config: dict, several=False, on_cpu=False, kept_at_most=KEPT_AT_MOST
    ) -> "Setting":
        zero = ds_config.get("zero_optimization", {})
        stage = zero.get("stage", 0)
        half = any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))
        autocast = ds_config.get("torch_autocast", {}).get("enabled")
        return Setting(
            stage=stage,
            element=2 if half else FP32,
            world_size=world_size,
            keeps=stage < 3 and not autocast and sizes.trained <= kept_at_most,
            several=several,
            on_cpu=on_cpu,
            bucket=zero.get("reduce_bucket_size", REDUCE_BUCKET),
            live=zero.get("stage3_max_live_parameters", STAGE3_LIVE),
            prefetch=zero.get("stage3_prefetch_bucket_size", STAGE3_PREFETCH),
            sub_group=zero.get("sub_group_size", SUB_GROUP),
            offloads_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            offloads_weights=stage == 3 and zero.get("offload_param", {}).get("device", "none") != "none",
        )


def memory(sizes: Sizes, activations: Activations, setting: Setting, encoders: float = 0.0) -> Memory:
    """The fullest moment of a step. encoders: bytes of what gives the proteins' rows, and of rows that are held."""
    standing = state_memory(sizes, setting)
    moments = {
        "forward and backward": backward_scratch(sizes, activations, setting),
        "reducing gradients": reduce_scratch(sizes, setting),
        "update": update_scratch(sizes, setting),
    }
    name = max(moments, key=lambda n: sum(moments[n]))
    weights, gradients, optimizer, held = moments[name]
    return Memory(
        weights=standing.weights + weights,
        encoders=encoders,
        gradients=standing.gradients + gradients,
        optimizer=standing.optimizer + optimizer,
        activations=held,
        host=standing.host,
        moment=name,
    )


def state_memory(sizes: Sizes, setting: Setting) -> Memory:
    """What stands through the whole run. Stage 1 cuts the optimizer's state over the ranks, 2 the gradients, 3 the
    weights (arXiv 1910.02054, section 5)."""
    s, all_weights = setting, sizes.frozen + sizes.trained
    weights, gradients = s.element * all_weights, 0.0
    # In 16 bits the optimizer owns fp32 copies of the weights; ZeRO makes them in fp32 as well.
    optimizer = (MOMENTS + (FP32 if s.stage or s.element < FP32 else 0)) * share(sizes, s)
    if s.stage == 3:
        weights /= s.world_size
        # Partitions of the gradients, and the bucket they are gathered in, are allocated once and kept.
        gradients = s.element * share(sizes, s) + bucket_bytes(sizes, s)
    host = 0.0
    if s.offloads_optimizer:
        # With the gradients in fp32, which stay there, and a copy in 16 bits on its way back.
        host, optimizer = optimizer + (FP32 + s.element) * share(sizes, s), 0.0
    if s.offloads_weights:
        host, weights = host + weights, 0.0
    return Memory(weights, 0.0, gradients, optimizer, 0.0, host)


def share(sizes: Sizes, setting: Setting) -> float:
    """Trained parameters whose state this rank has."""
    return sizes.trained / setting.world_size if setting.stage else sizes.trained


def bucket_bytes(sizes: Sizes, setting: Setting) -> float:
    """DeepSpeed's buffer of gradients on their way, allocated whole; on a CPU what is written to takes place."""
    return setting.element * (min(setting.bucket, sizes.trained) if setting.on_cpu else setting.bucket)


Scratch = tuple[float, float, float, float]  # of weights, gradients, optimizer, activations


def backward_scratch(sizes: Sizes, activations: Activations, setting: Setting) -> Scratch:
    s, whole = setting, setting.element * sizes.trained
    made = max(0.0, activations.with_gradients - activations.alone)
    if s.keeps:
        # The engine adds up in fp32 what autograd hands over whole: the sum so far, and at the end a copy beside the
        # new.
        earlier = FP32 * sizes.trained if s.several else 0.0
        at_the_end = whole + (FP32 * sizes.trained if s.element < FP32 else 0.0)
        return max((0.0, earlier + made, 0.0, activations.alone), (0.0, earlier + at_the_end, 0.0, 0.0), key=sum)
    if s.stage == 3:
        return gathered_bytes(sizes, s), 0.0, 0.0, activations.alone
    if s.several:  # what the earlier forwards have made stays where it is until all are through
        return 0.0, whole, 0.0, activations.alone
    if s.stage == 2 and not s.on_cpu:
        return 0.0, bucket_bytes(sizes, s) + s.element * share(sizes, s), 0.0, activations.alone
    return 0.0, made, 0.0, activations.alone


def reduce_scratch(sizes: Sizes, setting: Setting) -> Scratch:
    s, whole, bucket = setting, setting.element * sizes.trained, bucket_bytes(sizes, setting)
    reduced = s.element * share(sizes, s)
    # Laid out anew for the collective.
    flat = s.element * min(s.bucket, sizes.trained)
    if s.stage == 3:
        return gathered_bytes(sizes, s, ahead=False), flat + flat / s.world_size, 0.0, 0.0
    kept = FP32 * sizes.trained if s.keeps else 0.0
    if s.stage == 0:
        # Handed over and taken in; then its norm, in fp32.
        return 0.0, kept + whole + (whole if s.element == FP32 else FP32 * sizes.trained), 0.0, 0.0
    if s.stage == 2 and not s.keeps and not s.several:  # each bucket as it is full; what it is laid out in goes first
        return 0.0, bucket + max(flat, reduced), 0.0, 0.0
    return 0.0, kept + whole + max(bucket, reduced), 0.0, 0.0


def update_scratch(sizes: Sizes, setting: Setting) -> Scratch:
    s, mine = setting, share(sizes, setting)
    if s.offloads_optimizer:
        return 0.0, 0.0, 0.0, 0.0
    if s.stage == 0:
        gradients = s.element * sizes.trained + (FP32 * sizes.trained if s.element < FP32 else 0.0)
        return 0.0, gradients, adam_bytes(sizes.trained, sizes.largest, s), 0.0
    if s.stage == 3:
        at_once = min(mine, s.sub_group)
        return 0.0, FP32 * at_once, adam_bytes(at_once, at_once, s), 0.0
    return 0.0, (s.element + FP32) * mine, adam_bytes(mine, mine, s), 0.0


def adam_bytes(parameters: float, largest: float, setting: Setting) -> float:
    """Temporaries of torch's AdamW: its denominator, of all tensors at once on a GPU; on a CPU tensor by tensor, and
    twice."""
    return 2 * FP32 * largest if setting.on_cpu else FP32 * parameters


def gathered_bytes(sizes: Sizes, setting: Setting, ahead: bool = True) -> float:
    """Weights that ZeRO 3 holds whole for a while and, on their way, those fetched ahead once more."""
    s, everything = setting, sizes.frozen + sizes.trained
    if s.world_size == 1 and not s.offloads_weights:
        return 0.0
    whole = min(everything, max(s.live, sizes.gathered))
    return s.element * (whole + (min(everything, s.prefetch) if ahead else 0.0))
