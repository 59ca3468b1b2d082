"""DeepSpeed behind one class: the only module that imports it.

The loss of a step is a sum over answer tokens, divided by those of the whole step, so accumulation and batch sizes mean
nothing here and are fixed at 1. Weights and Adam moments go in and out by parameter name, whole, whatever the ZeRO
stage and the number of ranks, so that a checkpoint knows of neither.

Where it can, the engine keeps a step's gradients to itself (torch.autograd.grad, which wakes none of DeepSpeed's hooks)
until the ranks have agreed that they are good, and then hands their sum over in one backward: so ranks may run unlike
numbers of forwards, nobody waits within a forward, and what is dropped was never in DeepSpeed's buffers.
"""

import math
import os
from contextlib import contextmanager
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn

from proteingpt.config import ConfigError, StageConfig
from proteingpt.model.assemble import LLM, shape_of
from proteingpt.training.handed import Trained, wide

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names

# Trained values, at most, whose gradients are kept whole, in fp32, on every rank (1 GiB). Above, and under ZeRO 3, they
# go to DeepSpeed as they are made, which cuts them up; a step then cannot be replayed, and its clock runs otherwise.
KEPT_AT_MOST = 2**28

# The state of DeepSpeed's dynamic loss scale, by its attributes.
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

# Where its optimizers keep this rank's flat fp32 partitions: ZeRO 3, ZeRO 1 and 2, the BF16_Optimizer.
PARTITIONS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")

# Settings of ZeRO++ (arXiv 2306.10209) that DeepSpeed runs with CUDA kernels of its own.
GPU_ONLY = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")

FIXED = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # our AdamW under offload, too: DeepSpeed's needs a compiler
}


def import_deepspeed():
    """DeepSpeed, kept from compiling its shared-memory collective on CPUs: a minute of g++ that gloo makes needless."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def precision(ds_config: dict) -> torch.dtype:
    """The dtype the JSON asks for. ConfigError where the device has none."""
    wanted = [name for name in ("bf16", "fp16") if ds_config.get(name, {}).get("enabled")]
    if len(wanted) > 1:
        raise ConfigError("ds_config enables bf16 and fp16: choose one")
    if wanted == ["fp16"] and not torch.cuda.is_available():
        raise ConfigError("ds_config enables fp16, which this device (CPU) has not: use bf16, or neither for fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[wanted[0]] if wanted else torch.float32


def parameter_groups(model: nn.Module, weight_decay: float, llm_lr_factor: float = 1.0) -> list[dict]:
    """AdamW's groups: what trains; no decay on biases, norms, other vectors. lr_factor: of a step's learning rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if len(shape_of(parameter)) > 1 else 0.0
            factor = llm_lr_factor if name.startswith(LLM) else 1.0
            groups.setdefault((decay, factor), []).append(parameter)
    kinds = sorted(groups.items(), key=lambda item: item[0], reverse=True)
    return [{"params": some, "weight_decay": decay, "lr_factor": factor} for (decay, factor), some in kinds]


@contextmanager
def sharded_loading(ds_config: dict):
    """Under ZeRO 3 transformers, within, cuts an LLM over the ranks as it reads it: rank 0 looks at one tensor of the
    mapped files after the other, and no rank ever holds the whole. Nothing under other stages. A collective."""
    if ds_config.get("zero_optimization", {}).get("stage") != 3:
        yield
        return
    groups = import_deepspeed().utils.groups
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    check_partition(ds_config["zero_optimization"].get("zero_hpz_partition_size", 1), dist.get_world_size())
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # of the stage before: DeepSpeed makes it once, and refuses to again
    kept = HfDeepSpeedConfig({**ds_config, **FIXED})  # transformers itself holds it by a weak reference
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del kept


def check_partition(size: int, world_size: int):
    """ConfigError where DeepSpeed could not form groups of `size` ranks that hold the weights once more (ZeRO++)."""
    if world_size % min(size, world_size):
        raise ConfigError(
            f"zero_optimization.zero_hpz_partition_size in the ds_config is {size}, which does not divide {world_size} "
            "ranks: give the number of GPUs in a node, and start as many ranks on each"
        )


@contextmanager
def gathered(parameters: list[nn.Parameter]):
    """Within, those that ZeRO 3 has cut up are whole; what rank 0 writes into them stays. A collective."""
    if not any(hasattr(parameter, "ds_shape") for parameter in parameters):
        yield
        return
    with import_deepspeed().zero.GatheredParameters(parameters, modifier_rank=0):
        yield


def check_device(ds_config: dict):
    """ConfigError where the JSON asks for what only a GPU has: ZeRO++'s kernels, which DeepSpeed would fail to find."""
    asked = [name for name in GPU_ONLY if ds_config.get("zero_optimization", {}).get(name)]
    if asked and not torch.cuda.is_available():
        raise ConfigError(
            f"zero_optimization.{asked[0]} in the ds_config needs a GPU, and this device is a CPU: quantizing (ZeRO++) "
            "is done by CUDA kernels; use ds_configs/zero3.json here"
        )


class Engine:
    """keeps_gradients: whether a step's gradients stay with this rank until `reduce`. updates: optimizer steps taken.
    grad_norm: of the last reduced gradient, before clipping; NaN or infinite where that was."""

    def __init__(self, model: nn.Module, stage: StageConfig, ds_config: dict, kept_at_most: int = KEPT_AT_MOST):
        deepspeed = import_deepspeed()
        groups = parameter_groups(model, stage.weight_decay, stage.llm_lr_factor)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=stage.betas)  # `step` sets the rate of each step
        # Names survive sharding; the parameter objects are the same afterwards.
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        num_trained = sum(math.prod(shape_of(p)) for p in self.parameters.values())
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=Trained(model),
                optimizer=optimizer,
                model_parameters=[p for group in groups for p in group["params"]],
                config={"gradient_clipping": 1.0, **ds_config, **FIXED},  # DeepSpeed's own default, in sight
                dist_init_required=False,
            )
        except ValueError as error:
            if type(error).__name__ != "ValidationError":  # pydantic's, which DeepSpeed reads its JSON with
                raise
            raise ConfigError(
                f"DeepSpeed does not take the ds_config: {error}; see ds_configs/ for ones it takes"
            ) from error
        self.world_size = self.deepspeed.world_size
        self.is_fp16 = precision(ds_config) == torch.float16
        # torch_autocast is DeepSpeed's, around its own forward.
        whole = not self.is_sharded and not ds_config.get("torch_autocast", {}).get("enabled")
        self.keeps_gradients = whole and num_trained <= kept_at_most
        self.kept: list[torch.Tensor] | None = None
        self.grad_norm = float("nan")
        self.updates = 0
        self.marks_last = False
        # DeepSpeed's wrapper of 16-bit stage 0 takes a step of its own when it is made: set the optimizer back to rest.
        self.make_moments(steps_done=0)

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module.model

    @property
    def is_sharded(self) -> bool:
        """ZeRO 3: every forward is a collective, so every rank must run the same number of them."""
        return self.deepspeed.zero_optimization_stage() == 3

    def forward(self, pack, structure_rows, sequence_rows) -> torch.Tensor:
        """This rank's sum of answer-token losses."""
        run = self.module if self.keeps_gradients else self.deepspeed
        return run(pack, structure_rows, sequence_rows)

    @contextmanager
    def accumulating(self, several: bool):
        """Around a step's forwards and backwards. several: some rank has more than one, which every rank knows.

        Where gradients are not kept, DeepSpeed has them, and no rank may drop out within. With one forward on each they
        are reduced as they are made, so that ZeRO 2 and 3 hold no more than their share. With several: ZeRO 3, whose
        counts are equal, adds up shares, and `backward` marks the last (as for stage 0 and the BF16_Optimizer, which
        reduce then); ZeRO 1 and 2 coalesce at the end of the block, which pairs up unlike counts, and hold the whole.
        """
        coalesces = hasattr(self.deepspeed.optimizer, "_coalesce_grad_reduction") and not self.is_sharded
        self.marks_last = not self.keeps_gradients and several and not coalesces
        if not self.keeps_gradients and several and coalesces:
            with self.deepspeed.coalesce_grad_reduction():
                yield
        else:
            yield

    def backward(self, loss_sum: torch.Tensor, answer_tokens: int, is_last: bool) -> torch.Tensor:
        """Gradient of loss_sum / answer_tokens. The engine averages over ranks, so a sum is scaled by their number.

        Returns the norm of this forward's gradient times the number of ranks, a 0-d tensor; 0 where DeepSpeed has it.
        """
        loss = loss_sum * (self.world_size / answer_tokens)
        if not self.keeps_gradients:
            if self.marks_last:
                self.deepspeed.set_gradient_accumulation_boundary(is_last)
            self.deepspeed.backward(loss, scale_wrt_gas=False)
            return loss.new_zeros(())
        scale = self.loss_scale  # small gradients would vanish in fp16
        made = torch.autograd.grad(loss * scale, list(self.parameters.values()), allow_unused=True)
        # Zeros, not None: every rank hands over every parameter in every step, or collectives would be mis-paired.
        made = [p.new_zeros(p.shape) if g is None else g for g, p in zip(made, self.parameters.values())]
        made = [g.float() / scale for g in made] if self.is_fp16 else [g.to(wide(g.dtype)) for g in made]
        if self.kept is None:
            self.kept = made
        else:
            torch._foreach_add_(self.kept, made)
        return nn.utils.get_total_norm(made)

    def reduce(self) -> float:
        """The step's gradient, summed over ranks: its norm, the same on all. A collective."""
        if self.keeps_gradients:
            kept, self.kept = self.kept, None
            self.deepspeed.backward(self.deepspeed(handed=kept), scale_wrt_gas=False)
        self.grad_norm = self.norm_of_reduced()
        return self.grad_norm

    def drop(self):
        """Forget the gradients of this step, reduced or not. What DeepSpeed itself clears after an overflow."""
        self.kept = None
        wrapper = self.deepspeed.optimizer
        self.deepspeed.zero_grad()  # the parameters' own
        wrapper.zero_grad()
        if hasattr(wrapper, "averaged_gradients"):  # ZeRO 1 to 3: the partitions
            wrapper.averaged_gradients = {}
            wrapper.reset_cpu_buffers()
            wrapper._epilogue_ran_this_backward = False
            if self.is_sharded:
                wrapper.micro_step_id = 0
            else:
                wrapper.micro_step_id = -1  # as `step` sets it: else offload adds the next gradient to this one
                wrapper.all_grad_tensors = {}
                wrapper._offload_accumulated_param_ids = set()

    def step(self, learning_rate: float) -> bool:
        """One optimizer step with the reduced gradient. False where fp16's loss scale was too large: no weight has
        changed then, and DeepSpeed has lowered it."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_factor"]
        self.deepspeed.step()
        taken = not getattr(self.deepspeed.optimizer, "overflow", False)
        self.updates += taken
        return taken

    def norm_of_reduced(self) -> float:
        """DeepSpeed computes it within its own step, which is too late to decide whether to take one."""
        wrapper = self.deepspeed.optimizer
        if hasattr(wrapper, "scaled_global_norm"):  # ZeRO 1 and 2
            norm = wrapper.scaled_global_norm()
        elif hasattr(wrapper, "_get_norm_groups"):  # ZeRO 3
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norm = combine_grad_norm_groups(wrapper._get_norm_groups())
        elif hasattr(wrapper, "get_grads_for_norm"):  # BF16_Optimizer
            norm = nn.utils.get_total_norm(wrapper.get_grads_for_norm()[0])
        else:  # stage 0, where each rank has the whole
            gradients = [p.grad.float() for p in self.parameters.values() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients) if gradients else torch.tensor(float("nan"))
        norm = float(norm)
        return norm / self.loss_scale if norm >= 0 else float("nan")  # ZeRO says -1 for what is not finite

    def get_scaler(self) -> dict[str, float] | None:
        """fp16's loss scale and what it depends on; None in other precisions."""
        scaler = self.scaler
        return {name: getattr(scaler, name) for name in SCALER if hasattr(scaler, name)} if scaler else None

    def set_scaler(self, values: dict[str, float] | None):
        for name in SCALER:
            if self.scaler and name in (values or {}):
                setattr(self.scaler, name, values[name])

    @property
    def scaler(self):
        wrapper = self.deepspeed.optimizer
        return getattr(wrapper, "loss_scale_config", None) or wrapper.loss_scaler if self.is_fp16 else None

    @property
    def loss_scale(self) -> float:
        """fp16's; 1.0 otherwise."""
        return float(self.deepspeed.optimizer.loss_scale) if self.is_fp16 else 1.0

    # ------------------------------------------------------------------------------------------- state by name

    def get_state(self, keep: bool = True) -> dict[str, dict[str, torch.Tensor]]:
        """{"weights" | "exp_avg" | "exp_avg_sq": {parameter name: float32 CPU tensor}}, copies. A collective. keep:
        False on ranks that only help: theirs is empty, so that a host holds one copy and not one for each GPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self.link_moments()
        masters = self.whole_masters()
        state = {kind: {} for kind in ("weights", *MOMENTS)}
        for name, parameter in self.parameters.items():
            if masters:
                kept = self.inner_optimizer.state[masters[name]]
                values = [masters[name], *(kept[moment] for moment in MOMENTS)]
            else:
                moments = [safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS]
                values = [safe_get_full_fp32_param(parameter), *moments]
            shape = shape_of(parameter)
            for kind, value in zip(state, values if keep else ()):
                state[kind][name] = value.detach().float().reshape(shape).to("cpu", copy=True)
        return state

    def set_state(self, state: dict[str, dict[str, torch.Tensor]], steps_done: int):
        """Restore master weights and moments. The model's own weights must have been set before the engine was made."""
        self.updates = steps_done
        self.make_moments(steps_done)
        for name in self.parameters:
            self.set_full(name, state["weights"][name], None)
            for moment in MOMENTS:
                self.set_full(name, state[moment][name], moment)

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """Our AdamW, on whatever tensors DeepSpeed has put into it."""
        wrapper = self.deepspeed.optimizer
        return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer

    def whole_masters(self) -> dict[str, torch.Tensor]:
        """Stage 0, where nothing is cut up: the fp32 tensors that AdamW updates, by name: the parameters or, in 16
        bits, DeepSpeed's copies of them. Empty at other stages."""
        wrapper = self.deepspeed.optimizer
        if isinstance(wrapper, torch.optim.Optimizer):
            return self.parameters
        if not hasattr(wrapper, "fp32_groups"):
            return {}
        copies = zip(chain.from_iterable(wrapper.fp16_groups), chain.from_iterable(wrapper.fp32_groups), strict=True)
        master_of = {id(parameter): master for parameter, master in copies}
        return {name: master_of[id(parameter)] for name, parameter in self.parameters.items()}

    def make_moments(self, steps_done: int):
        """Torch's AdamW makes its moments at the first step; make them now so that they can be filled."""
        for tensor in self.optimized_tensors():
            self.inner_optimizer.state[tensor] = {
                "step": torch.tensor(float(steps_done)),
                **{moment: torch.zeros_like(tensor, memory_format=torch.preserve_format) for moment in MOMENTS},
            }
        self.link_moments()

    def link_moments(self):
        """DeepSpeed links parameters to their moments once, after the first group's first step, when those of the
        other groups are not made yet: link again."""
        wrapper = self.deepspeed.optimizer
        if hasattr(wrapper, "_lazy_init_hp_params_optimizer_state"):
            wrapper._hp_optimizer_states_linked = False
            wrapper._lazy_init_hp_params_optimizer_state()

    def optimized_tensors(self) -> list[torch.Tensor]:
        """What AdamW updates: whole fp32 tensors, or this rank's flat fp32 partitions."""
        wrapper = self.deepspeed.optimizer
        masters = self.whole_masters()
        if masters:
            return list(masters.values())
        for attribute in PARTITIONS:
            if hasattr(wrapper, attribute):
                return list(getattr(wrapper, attribute))
        raise AssertionError(f"{type(wrapper).__name__} keeps its fp32 partitions under a name unknown here")

    def set_full(self, name: str, value: torch.Tensor, moment: str | None):
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter, masters = self.parameters[name], self.whole_masters()
        if masters:
            target = masters[name] if moment is None else self.inner_optimizer.state[masters[name]][moment]
            with torch.no_grad():
                target.copy_(value)
        elif self.is_sharded:
            # DeepSpeed's "full" setter runs past the end where the ranks do not divide the size: cut our own part.
            size = parameter.ds_tensor.numel()
            padded = torch.zeros(size * self.world_size)
            padded[: value.numel()] = value.flatten()
            part = padded[self.deepspeed.global_rank * size :][:size]
            if moment is None:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, moment)
        elif moment is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, moment)

    def close(self):
        self.deepspeed.destroy()


