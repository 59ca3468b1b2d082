"""What a recipe will take on a cluster: memory of each kind of rank, step time, hours, and what other choices would do.

Every figure follows from the real model's shapes (memory.py, activations.py), from the real plan's packs (work.py) and
from rates that are said to be measured or assumed (rates of spec.py, or a file of calibrate.py). Given up: anything
that varies from run to run, such as reading, evaluating and saving.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch

from proteingpt.cluster import times
from proteingpt.cluster.activations import activation_bytes, meta_model, sizes_of
from proteingpt.cluster.calibrate import Calibration
from proteingpt.cluster.encoders import EncoderShape, encoder_shape
from proteingpt.cluster.memory import MARGIN, Memory, Setting, memory
from proteingpt.cluster.shapes import Flops, step_flops, total
from proteingpt.cluster.spec import Cluster, ClusterError, Kind
from proteingpt.cluster.times import Rate
from proteingpt.cluster.work import DataSet, StageWork, make_pack, stage_work
from proteingpt.config import RunConfig
from proteingpt.data.collate import Pack
from proteingpt.data.shares import assign, reached
from proteingpt.encoders import cache_plan
from proteingpt.model import assemble
from proteingpt.protein import PrefixLength

GIB = 2**30
# Of the search for the largest forward, in tokens; on a CPU, where a forward is counted branch by branch, not so far.
GRAIN, MOST_TOKENS, MOST_ON_CPU = 256, 2**16, 2**13


@dataclass(frozen=True)
class Choice:
    """A way to run a recipe. cached: encoder rows are read rather than computed."""

    label: str
    config: RunConfig
    ds_config: dict
    cached: bool


@dataclass(frozen=True)
class OfKind:
    """A kind's ranks. largest_forward: tokens that fit, None where it was not looked for."""

    kind: Kind
    rate: Rate
    memory: Memory
    fits: bool
    capacity: int | None
    largest_forward: int | None = None


@dataclass(frozen=True)
class OfStage:
    """share: of the summed speed that steps reach."""

    name: str
    num_steps: int
    packs_per_step: float
    share: float
    step_seconds: float
    tokens_per_second: float
    hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Outcome:
    choice: Choice
    kinds: list[OfKind]
    stages: list[OfStage]

    @property
    def fits(self) -> bool:
        return all(kind.fits for kind in self.kinds)

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def fullest(self) -> OfKind:
        """The kind with the least room left."""
        return max(self.kinds, key=lambda k: k.memory.total / k.kind.gib)


@dataclass
class Estimator:
    """Everything but the choice. Counted activations are kept: choices share them."""

    cluster: Cluster
    llm_config: object
    data: DataSet
    calibrations: list[Calibration]
    counted: dict = field(default_factory=dict)

    def outcome(self, choice: Choice, look_for_largest: bool = False) -> Outcome:
        config = choice.config
        encoders = encoder_shape(config.encoders)
        length = PrefixLength(encoders.number, config.model.projector_tokens)
        works = {name: self.stage_work(name, stage, config, length) for name, stage in config.stages.items()}
        rates = {kind: self.rate(kind, config) for kind in self.cluster.kinds}
        of_kind = partial(
            self.of_kind, choice=choice, works=works, encoders=encoders, look_for_largest=look_for_largest
        )
        kinds = [of_kind(kind, rates[kind]) for kind in self.cluster.kinds]
        capacity = {found.kind: found.capacity for found in kinds}
        stages = [self.of_stage(name, work, choice, rates, capacity, encoders) for name, work in works.items()]
        return Outcome(choice, kinds, stages)

    def stage_work(self, name, stage, config: RunConfig, length: PrefixLength) -> StageWork:
        context = assemble.context_length(self.llm_config)
        longest, crop = config.data.max_residues, config.data.long_proteins == "crop"
        key = ("work", name, stage, config.seed, longest, crop, length)
        if key not in self.counted:
            self.counted[key] = stage_work(self.data, name, stage, config.seed, length, context, longest, crop)
        return self.counted[key]

    # ------------------------------------------------------------------------------------------------------- memory

    def model(self, choice: Choice, on_cpu: bool):
        encoders = encoder_shape(choice.config.encoders)
        dtype = torch.bfloat16 if is_half(choice.ds_config) else torch.float32
        key = ("model", choice.config.model, encoders.widths, dtype, on_cpu)
        if key not in self.counted:
            made = meta_model(self.llm_config, choice.config.model, encoders.widths, dtype, on_cpu)
            self.counted[key] = (made, sizes_of(made), encoders.widths)
        return key, self.counted[key]

    def memory_of(self, kind: Kind, choice: Choice, pack: Pack, encoder_bytes: float, several: bool) -> Memory:
        on_cpu = "CPU" in kind.name
        key, (model, sizes, widths) = self.model(choice, on_cpu)
        counted = (key, pack.num_tokens, len(pack.targets))
        if counted not in self.counted:
            self.counted[counted] = activation_bytes(model, pack, widths, on_cpu)
        setting = Setting.of(sizes, self.num_ranks, choice.ds_config, several, on_cpu)
        return memory(sizes, self.counted[counted], setting, encoder_bytes)

    @property
    def num_ranks(self) -> int:
        return len(self.cluster.ranks)

    def of_kind(
        self, kind: Kind, rate: Rate, choice: Choice, works, encoders: EncoderShape, look_for_largest: bool
    ) -> OfKind:
        given = choice.config.devices.tokens_per_forward
        room = MARGIN * kind.gib * GIB
        several = any(max(map(len, work.steps)) > self.num_ranks for work in works.values())

        def needs(pack: Pack) -> Memory:
            residues = sum(map(len, pack.proteins)) * (1 if choice.cached else 2)
            held = encoders.rows_bytes(residues) + (0 if choice.cached else encoders.bytes)
            return self.memory_of(kind, choice, pack, held, several)

        work = max(works.values(), key=lambda w: w.largest.num_tokens)
        largest = None
        if look_for_largest or given == "auto":
            most = MOST_ON_CPU if "CPU" in kind.name else MOST_TOKENS
            largest = largest_that_fits(lambda tokens: needs(self.pack_of(tokens, work)).total, room, most)
        capacity = given
        if given == "auto":
            packs = [stage.tokens_per_pack for stage in choice.config.stages.values()]
            capacity = max(largest // max(packs) * max(packs), max(packs))
        packs = [work.largest for work in works.values()] + ([self.pack_of(capacity, work)] if capacity else [])
        fullest = max((needs(pack) for pack in packs), key=lambda m: m.total)
        return OfKind(kind, rate, fullest, fullest.total <= room, capacity, largest)

    def pack_of(self, tokens: int, work: StageWork) -> Pack:
        """With as many questions a protein, and as long ones, as the stage's own."""
        key = ("pack", tokens, work.asked)
        if key not in self.counted:
            self.counted[key] = make_pack(tokens, self.llm_config.vocab_size, 0, *work.asked)
        return self.counted[key]

    # --------------------------------------------------------------------------------------------------------- time

    def rate(self, kind: Kind, config: RunConfig) -> Rate:
        """Measured where a calibration is of such a device, else assumed. ClusterError where neither is known."""
        update = times.UPDATE_BYTES / times.GPU_BYTES_PER_SECOND
        for found in self.calibrations:
            if kind.name.lower() in found.device.lower():
                line = found.lines["on" if config.model.activation_checkpointing else "off"]
                overhead = line.overhead_seconds * self.llm_config.num_hidden_layers / found.layers
                source = f"measured: {found.llm}, {found.precision}, train {found.train}, on {found.device}"
                attention = (line.seconds_per_prefix_flop, line.seconds_per_branch_flop)
                costs = [seconds / line.seconds_per_flop for seconds in attention]
                update = found.update_seconds / found.trained
                return Rate(1 / line.seconds_per_flop, overhead, update, source, *costs)
        if kind.flops is None:
            raise ClusterError(
                f"{kind.label}: no data sheet known here. Give its tflops in a YAML cluster, or measure it: "
                "--calibrate FILE there, --calibration FILE here"
            )
        return Rate(kind.flops, 0.0, update, kind.source)

    def of_stage(self, name: str, work: StageWork, choice: Choice, rates, capacity, encoders: EncoderShape) -> OfStage:
        config = choice.config
        _, (_, sizes, _) = self.model(choice, on_cpu=False)
        setting = Setting.of(sizes, self.num_ranks, choice.ds_config)
        ranks = self.cluster.ranks
        kept, checkpointing = [rates[kind] for kind in ranks], config.model.activation_checkpointing
        if setting.offloads_optimizer:
            kept = [replace(rate, update_seconds=times.UPDATE_BYTES / times.HOST_BYTES_PER_SECOND) for rate in kept]
        moved = times.traffic(
            setting.stage, setting.element, sizes.frozen, sizes.trained, len(ranks), self.cluster.link_gbps,
            setting.offloads_optimizer, setting.offloads_weights,
        )  # fmt: skip
        capacities = [capacity[kind] for kind in ranks]
        seconds, shares = [], []
        for packs in work.steps:
            tokens = [pack.tokens for pack in packs]
            flops = [
                step_flops(self.llm_config, p.tokens, p.answers, p.pairs, config.model.train, checkpointing)
                for p in packs
            ]
            live = [0.0 if choice.cached else p.residues * encoders.flops_per_residue for p in packs]
            mean = Flops(*(part / len(flops) for part in total(flops)))
            speeds = [sum(tokens) / len(tokens) / rate.seconds(mean) for rate in kept]
            asked = [1.0] * len(ranks) if config.devices.balance == "equal" else speeds
            shared = shared_out(tokens, capacities)
            state = sizes.trained / (len(ranks) if setting.stage else 1)
            seconds.append(
                times.step_seconds(tokens, flops, live, kept, asked, shared, moved, state, setting.stage == 3)
            )
            measured = asked is speeds
            shares.append(reached(tokens, asked, shared) if measured else equal_share(tokens, asked, speeds, shared))
        mean_seconds = sum(seconds) / len(seconds)
        hours = mean_seconds * work.num_steps / 3600
        return OfStage(
            name, work.num_steps, sum(map(len, work.steps)) / len(work.steps), sum(shares) / len(shares), mean_seconds,
            work.mean("tokens") / mean_seconds, hours, hours * len(ranks),
        )  # fmt: skip

    def cache_against_live(self, outcome: Outcome) -> tuple[cache_plan.Estimate, int]:
        """(the cache's cost and the live encoders', by its own estimate; epochs), of the stage that reads most."""
        config = outcome.choice.config
        encoders = encoder_shape(config.encoders)
        length = PrefixLength(encoders.number, config.model.projector_tokens)
        name, stage = max(config.stages.items(), key=lambda item: item[1].epochs)
        work = self.stage_work(name, stage, config, length)
        residues = int(self.data.residues.mean() * self.data.num_proteins)
        by_kind = {found.kind: found.rate.flops for found in outcome.kinds}
        rates = [by_kind[kind] / encoders.flops_per_residue for kind in self.cluster.ranks]
        readings = work.mean("residues") * work.steps_per_epoch / residues
        found = cache_plan.estimate(
            int(encoders.rows_bytes(residues)), {"train": residues}, rates, epochs=stage.epochs,
            readings_per_epoch=readings,
        )
        return found, stage.epochs


def shared_out(tokens: list[int], capacities: list[int | None]) -> list[int | None]:
    """Capacities under which the largest pack finds a place, so that time can be told of what does not fit, too."""
    return [None if limit is None else max(limit, max(tokens)) for limit in capacities]


def equal_share(tokens: list[int], asked: list[float], speeds: list[float], capacities) -> float:
    """Share of the summed speed where packs are dealt out as if speeds were `asked`."""
    loads = [sum(tokens[p] for forward in share for p in forward) for share in assign(tokens, asked, capacities)]
    return sum(tokens) / sum(speeds) / max(load / speed for load, speed in zip(loads, speeds))


def largest_that_fits(bytes_of, room: float, most: int) -> int:
    """The most tokens, in whole GRAINs up to `most`, for which bytes_of(tokens) <= room; 0 for none. bytes_of: never
    less for more tokens, and nearly a line, on which the next number to try is looked for."""
    low, high, tried = 0, most // GRAIN + 1, []
    while high - low > 1:
        grains = on_the_line(*tried[-2:], room) if 2 <= len(tried) < 6 else (low + high) // 2 if tried else 8
        grains = min(max(grains, low + 1), high - 1)
        taken = bytes_of(grains * GRAIN)
        tried.append((grains, taken))
        low, high = (grains, high) if taken <= room else (low, grains)
    return low * GRAIN


def on_the_line(one: tuple[int, float], other: tuple[int, float], room: float) -> int:
    """Where the line through two (grains, bytes) reaches `room`; far away where it does not rise."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    return int(one[0] + (room - one[1]) / slope) if slope > 0 else MOST_TOKENS


def is_half(ds_config: dict) -> bool:
    return any(ds_config.get(name, {}).get("enabled") for name in ("bf16", "fp16"))


# ------------------------------------------------------------------------------------------------------ other choices


def with_zero(ds_config: dict, stage: int, optimizer: bool = False, weights: bool = False) -> dict:
    """The same JSON with another ZeRO stage, and with what is offloaded."""
    zero = {k: v for k, v in ds_config.get("zero_optimization", {}).items() if not k.startswith("offload_")}
    host = {"device": "cpu", "pin_memory": True}
    zero |= {"stage": stage} | ({"offload_optimizer": host} if optimizer else {})
    zero |= {"offload_param": host} if weights else {}
    return {**ds_config, "zero_optimization": zero}


def alternatives(base: Choice) -> list[Choice]:
    """One thing changed at a time."""
    config, model = base.config, base.config.model

    def choice(label: str, **changes) -> Choice:
        return replace(base, label=label, **changes)

    def with_model(**changes) -> RunConfig:
        return replace(config, model=replace(model, **changes))

    made = [choice(f"ZeRO {n}", ds_config=with_zero(base.ds_config, n)) for n in (1, 2, 3)]
    made.append(choice("ZeRO 2, optimizer on the host", ds_config=with_zero(base.ds_config, 2, optimizer=True)))
    made.append(choice("ZeRO 3, optimizer and weights on the host", ds_config=with_zero(base.ds_config, 3, True, True)))
    made.append(choice("live encoders" if base.cached else "cached embeddings", cached=not base.cached))
    checkpointing = not model.activation_checkpointing
    label = f"activation checkpointing {'on' if checkpointing else 'off'}"
    made.append(choice(label, config=with_model(activation_checkpointing=checkpointing)))
    for train in ("projector", "lora", "full"):
        if train != model.train:
            lora = {} if train == "lora" else {"lora": type(model.lora)()}
            made.append(choice(f"train: {train}", config=with_model(train=train, **lora)))
    now = base.ds_config.get("zero_optimization", {})
    offloads = (now.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param"))
    places = {(1, False, False): 0, (2, False, False): 1, (3, False, False): 2, (2, True, False): 3, (3, True, True): 4}
    same = places.get((now.get("stage", 0), *offloads))
    return [c for number, c in enumerate(made) if number != same]
