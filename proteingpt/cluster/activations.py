"""What forward and backward hold at their fullest moment, counted rather than derived.

The real model runs on torch's meta device, where tensors have shapes and no bytes, and what would be alive at each
moment is summed. So any LLM that transformers knows is counted as it is, with or without checkpointing. Where a device
runs a kernel of its own, a stand-in keeps what that kernel keeps: on GPUs FlexAttention and one kernel for each RMS
norm; on CPUs SDPA group by group. Given up: kernels' own scratch.
"""

import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM

from proteingpt.cluster.memory import Activations, Sizes
from proteingpt.config import ModelConfig
from proteingpt.data.collate import Pack
from proteingpt.model import assemble, attention
from proteingpt.model.norms import PLAIN
from proteingpt.model.protein_gpt import ProteinGPT

COUNTED = "counted"  # the attention that stands in on the meta device
FEW = 0.01  # gradients, as a share of the peak, that are not counted twice to tell what the peak is without them


class Alive(TorchDispatchMode):
    """Bytes of the meta tensors that are alive, and the most there were. A storage counts once, until it is freed;
    those of `model`, of which an operation may return a view, never."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.storages: dict[int, tuple[int, weakref.ref | None]] = {}
        self.now = self.peak = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self.storages[tensor.untyped_storage()._cdata] = (0, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.count(tensor.untyped_storage())
        return made

    def count(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = (storage.nbytes(), weakref.ref(storage, lambda _: self.forget(key)))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def forget(self, key: int):
        self.now -= self.storages.pop(key)[0]


# ----------------------------------------------------------------------------------------------- what stands in on meta


class CountedAttention(torch.autograd.Function):
    """What flash kernels and FlexAttention keep: queries, keys, values, output and a float32 a head and token; SDPA on
    a CPU also its mask, as numbers."""

    @staticmethod
    def forward(ctx, query, key, value, mask):
        output = torch.empty_like(query)
        sums = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums, mask)
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def counted_attention(module, query, key, value, attention_mask=None, layout=None, **_):
    """layout None: the whole row by one kernel; else the parts of attention.shared_prefix_attention."""
    if layout is None:
        return CountedAttention.apply(query, key, value, None).transpose(1, 2), None
    outputs = [
        CountedAttention.apply(
            query[:, :, part.begin : part.end],
            attention.joined(key, part.spans),
            attention.joined(value, part.spans),
            None if part.mask is None else torch.empty(part.mask.shape, dtype=query.dtype, device=query.device),
        )
        for part in layout.parts
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(COUNTED, counted_attention)


class CountedNorm(torch.autograd.Function):
    """What the kernel of F.rms_norm keeps: its input, its weight and a float32 a row."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight, torch.empty(hidden.shape[:-1], dtype=torch.float32, device=hidden.device))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def count_norms(llm: torch.nn.Module, on_cpu: bool):
    """On a CPU they are transformers' own, whose `forward` ProteinGPT has put another before."""
    for module in llm.modules():
        if type(module).__name__ in PLAIN:
            del module.forward
            if not on_cpu:
                module.forward = lambda hidden, weight=module.weight: CountedNorm.apply(hidden, weight)


@contextmanager
def layout_given(layout):
    """Instead of one made from token ids, of which meta tensors have none."""
    make_layout = attention.make_layout
    attention.make_layout = lambda *_, **__: layout
    try:
        yield
    finally:
        attention.make_layout = make_layout


# ------------------------------------------------------------------------------------------------------------- counting


def meta_model(
    llm_config, settings: ModelConfig, widths: tuple[int, int], dtype: torch.dtype, on_cpu: bool = False
) -> ProteinGPT:
    """The model of a run without its bytes. widths: of the structure's and the sequence's rows, 0 for none."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=dtype, attn_implementation=COUNTED)
        projector = assemble.make_projector(settings, *widths, llm.config.hidden_size).to(dtype)
        assemble.prepare_llm(llm, replace(settings, init_from=None), 0, dtype, nullcontext)
    if settings.activation_checkpointing:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = ProteinGPT(projector, llm, "sdpa").train()
    count_norms(llm, on_cpu)
    return model


def sizes_of(model: torch.nn.Module) -> Sizes:
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    modules = [sum(p.numel() for p in module.parameters(recurse=False)) for module in model.modules()]
    return Sizes(frozen, sum(trained), max(trained), max(modules))


def activation_bytes(model: ProteinGPT, pack: Pack, widths: tuple[int, int], on_cpu: bool = False) -> Activations:
    """Of a forward and backward over the pack. widths: as the model's."""
    layout = attention.make_layout(pack.group_starts, pack.branch_ids, "sdpa") if on_cpu else None
    masks = sum(part.mask.nbytes for part in layout.parts if part.mask is not None) if layout else 0
    on_meta = pack.to("meta")
    dtype = next(model.parameters()).dtype
    rows = [[torch.empty(len(p) + 2, width, dtype=dtype, device="meta") for p in pack.proteins] for width in widths]
    trained = [p for p in model.parameters() if p.requires_grad]

    def counted(keeps: bool) -> int:
        handles = [p.register_post_accumulate_grad_hook(drop_gradient) for p in ([] if keeps else trained)]
        with layout_given(layout), Alive(model) as alive:
            model(on_meta, *rows).backward()
        for handle in handles:
            handle.remove()
        model.zero_grad()
        return alive.peak + masks

    with_gradients = counted(keeps=True)
    are_few = sum(p.nbytes for p in trained) < FEW * with_gradients
    return Activations(with_gradients, with_gradients if are_few else counted(keeps=False))


def drop_gradient(parameter: torch.nn.Parameter):
    parameter.grad = None
