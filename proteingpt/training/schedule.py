"""The learning rate as a pure function of the step: linear warm-up, then a cosine."""

import math

from proteingpt.config import StageConfig


def learning_rate(step: int, num_steps: int, stage: StageConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of a stage of `num_steps`.

    Below W = warmup_steps it is linear from warmup_lr to init_lr; then a cosine down to min_lr, reached at num_steps.
    With cosine_from "warmup" the curve is continuous. With "start" the cosine counts from step 0, as in the released
    code (LAVIS's LinearWarmupCosineLRScheduler), and the curve steps down a little where the two parts join.
    """
    warmup = stage.warmup_steps
    if step < warmup:
        return stage.warmup_lr + (stage.init_lr - stage.warmup_lr) * step / warmup
    origin = warmup if stage.cosine_from == "warmup" else 0
    progress = min(1.0, (step - origin) / max(1, num_steps - origin))
    return stage.min_lr + (stage.init_lr - stage.min_lr) / 2 * (1 + math.cos(math.pi * progress))
