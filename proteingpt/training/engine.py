"""DeepSpeed behind one class: the only module that imports it.

The loss of a step is a sum over answer tokens, divided by those of the whole step, so accumulation and batch sizes mean
nothing here and are fixed at 1. Weights and Adam moments go in and out by parameter name, whole, whatever the ZeRO stage
and the number of ranks, so that a checkpoint knows of neither.
"""

import os
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from proteingpt.config import ConfigError, StageConfig

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.AdamW's names

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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's groups: what trains, with no decay on biases, norms and other vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Engine:
    def __init__(self, model: nn.Module, stage: StageConfig, ds_config: dict):
        deepspeed = import_deepspeed()
        groups = parameter_groups(model, stage.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=stage.betas)  # `step` sets the rate of each step
        # Names survive sharding; the parameter objects are the same afterwards.
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=model,
                optimizer=optimizer,
                model_parameters=[p for group in groups for p in group["params"]],
                config={"gradient_clipping": 1.0, **ds_config, **FIXED},  # DeepSpeed's own default, in sight
                dist_init_required=False,
            )
        except ValueError as error:
            if type(error).__name__ != "ValidationError":  # pydantic's, which DeepSpeed reads its JSON with
                raise
            raise ConfigError(f"DeepSpeed does not take the ds_config: {error}; see ds_configs/ for ones it takes") from error
        self.world_size = self.deepspeed.world_size
        self.grad_norm = float("nan")
        self.marks_last = False
        # DeepSpeed's wrapper of 16-bit stage 0 takes a step of its own when it is made: set the optimizer back to rest.
        self.make_moments(steps_done=0)

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def is_sharded(self) -> bool:
        """ZeRO 3: every forward is a collective, so every rank must run the same number of them."""
        return self.deepspeed.zero_optimization_stage() == 3

    def forward(self, pack, structure_rows, sequence_rows) -> torch.Tensor:
        """This rank's sum of answer-token losses."""
        return self.deepspeed(pack, structure_rows, sequence_rows)

    @contextmanager
    def accumulating(self, several: bool):
        """Around a step's forwards and backwards; their gradients are reduced once. several: some rank has more than
        one, which every rank knows, so that all go the same way.

        Under ZeRO 1 to 3 DeepSpeed coalesces the reduction at the end of the block, which pairs up whatever the ranks'
        counts are. Where it cannot (stage 0, and its BF16_Optimizer), `backward` marks the last one.
        """
        self.marks_last = several and not hasattr(self.deepspeed.optimizer, "_coalesce_grad_reduction")
        if several and not self.marks_last:
            with self.deepspeed.coalesce_grad_reduction():
                yield
        else:
            yield

    def backward(self, loss_sum: torch.Tensor, answer_tokens: int, is_last: bool):
        """Gradient of loss_sum / answer_tokens. The engine averages over ranks, so a sum is scaled by their number."""
        if self.marks_last:
            self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss_sum * (self.world_size / answer_tokens), scale_wrt_gas=False)

    def step(self, learning_rate: float):
        """One optimizer step with the gradients of the block before."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        unsharded_norm = self.norm_of_gradients() if self.deepspeed.zero_optimization_stage() == 0 else None
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        self.grad_norm = float(unsharded_norm if norm is None else norm)

    def norm_of_gradients(self) -> float:
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients)) if gradients else float("nan")

    # ------------------------------------------------------------------------------------------- state by name

    def get_state(self) -> dict[str, dict[str, torch.Tensor]]:
        """{"weights" | "exp_avg" | "exp_avg_sq": {parameter name: float32 CPU tensor}}. A collective."""
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
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for kind, value in zip(state, values):
                state[kind][name] = value.detach().float().reshape(shape).cpu().clone()
        return state

    def set_state(self, state: dict[str, dict[str, torch.Tensor]], steps_done: int):
        """Restore master weights and moments. The model's own weights must have been set before the engine was made."""
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
        for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
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


