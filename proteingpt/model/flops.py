"""What the matrix products of a language model cost, by its configuration alone, for MFU and for estimates.

2 FLOPs for each parameter and token forward, 2 backward to the activations and, where the weight trains, 2 to the
weight. What activation checkpointing computes a second time is no work done (MFU in Chowdhery et al. 2022, arXiv
2204.02311, B); attention's scores, a few per cent at these lengths, encoders, projector and adapters are left out as
well.
"""

import json
from functools import lru_cache

import torch
from torch import nn
from transformers import AutoModelForCausalLM

FROZEN, TRAINED = 4.0, 6.0  # FLOPs for each parameter and token


@lru_cache(maxsize=8)
def _linear_parameters(text: str, config_class) -> tuple[int, int]:
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config_class.from_dict(json.loads(text)))
    head = llm.get_output_embeddings()
    maps = sum(m.weight.numel() for m in llm.modules() if isinstance(m, nn.Linear) and m is not head)
    return maps, head.weight.numel()


def linear_parameters(config) -> tuple[int, int]:
    """(of the layers' linear maps, of the head) of any LLM, by making it without bytes."""
    return _linear_parameters(config.to_json_string(use_diff=False), type(config))


def matrix_flops(config, num_tokens: int, num_answer_tokens: int, passes: float = 4, head_passes: float = 4) -> float:
    """For each parameter and token of the layers' linear maps, and of the head's for answer tokens. 4: frozen."""
    layers, head = linear_parameters(config)
    return float(passes * layers * num_tokens + head_passes * head * num_answer_tokens)


def flops_of_tokens(config, train: str) -> tuple[float, float]:
    """FLOPs of a token in the layers, and of an answer token in the head, which sees no others. train: model.train;
    LoRA's adapters are a thousandth, so that their LLM counts as frozen."""
    passes = TRAINED if train == "full" else FROZEN
    return matrix_flops(config, 1, 0, passes, passes), matrix_flops(config, 0, 1, passes, passes)
