"""What a run leaves: RUN/model, RUN/model-best where the best is not the last, and the report.

`run` is training.run's, whose stages are done. Rank 0 writes; what is written can be made again from the checkpoints,
so that a run which is cut off here only repeats it.
"""

import logging
from pathlib import Path

from safetensors import SafetensorError

from proteingpt.config import save_recipe
from proteingpt.data.prompts import TEMPLATES
from proteingpt.demo.assets import EXAMPLE
from proteingpt.distributed import on_first_rank
from proteingpt.evaluation.held_out import Evaluation
from proteingpt.model import assemble
from proteingpt.training import checkpoint
from proteingpt.training.engine import precision
from proteingpt.training.ledger import summary_text
from proteingpt.training.progress import duration

log = logging.getLogger("proteingpt")


def finish(run, stage: str, newest: Path, evaluation: Evaluation, num_steps: dict[str, int], num_skipped: int) -> dict:
    """Exports checkpoint `newest` of the last stage, and the best. The report, on every rank."""
    on_first_rank(lambda: export(run, stage, newest, run.output / "model"))
    best = on_first_rank(lambda: export_best(run, stage, newest))
    return {**report(run, stage, evaluation, num_steps), "skipped_steps": num_skipped, "best": best}


def export_best(run, stage: str, newest: Path) -> dict | None:
    """RUN/model-best, where the best is kept and is not the last. What is known of it."""
    best = checkpoint.read_best(newest.parent) if run.config.checkpoint.keep_best else None
    if best is None:
        return None
    path = newest.parent / best["checkpoint"]
    if path != newest:
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError as error:  # the last one is exported already
            log.warning("the best checkpoint is not exported: %s", error)
            return None
        export(run, stage, path, run.output / "model-best")
    directory = run.output / ("model" if path == newest else "model-best")
    return {"step": checkpoint.step_of(path), best["metric"]: best["value"], "model": str(directory)}


def export(run, stage: str, path: Path, directory: Path):
    config, encoders = run.config, run.encoders.encoders
    info = assemble.ModelInfo(
        llm=str(Path(assemble.base_llm(config.model)).absolute()),
        esm2=absolute_if_there(config.encoders.esm2),
        esm_if1=absolute_if_there(config.encoders.esm_if1),
        esm2_layer=config.encoders.esm2_layer,
        esm2_fingerprint=encoders.sequence.fingerprint,
        esm_if1_fingerprint=encoders.structure.fingerprint,
        weights_dir=str(Path(config.encoders.weights_dir).absolute()),
        encoder_dtype=config.encoders.dtype,
        structure_width=encoders.structure.width,
        sequence_width=encoders.sequence.width,
        template=TEMPLATES[config.stages[stage].template, stage],
        stage=stage,
        projector=config.model.projector,
        projector_tokens=config.model.projector_tokens,
        projector_width=config.model.projector_width,
    )
    adapter = config.model.lora if config.model.train == "lora" else None
    try:
        assemble.export(
            directory, checkpoint.read_weights(path), info, run.tokenizer, precision(run.ds_config), adapter
        )
    except SafetensorError as error:  # its way to say that the disk is full
        raise checkpoint.CheckpointError(f"the model cannot be written to {directory}: {error}") from None
    save_recipe(config, directory / "recipe.yaml")


def absolute_if_there(name_or_path: str) -> str:
    return str(Path(name_or_path).absolute()) if Path(name_or_path).exists() else name_or_path


# ---------------------------------------------------------------------------------------------------------- report


def report(run, stage: str, evaluation: Evaluation, num_steps: dict[str, int]) -> dict:
    """What report.json holds. accuracy and blind_accuracy are null after align, which has no questions."""
    asked = [(p.question, p.answer) for p in evaluation.predictions] if stage == "instruct" else []
    return {
        "recipe": run.config.recipe,
        "stage": stage,
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy if asked else None,
        "blind_accuracy": on_first_rank(lambda: run.blind.accuracy(asked)) if asked else None,
        "num_questions": len(asked),
        "num_proteins": evaluation.num_proteins,
        "steps": sum(num_steps.values()),
        "steps_by_stage": num_steps,
        "ranks": run.rank.world_size,
        "model": str(run.output / "model"),
        "tensorboard": str(run.output / "tensorboard"),
        **(example(run, evaluation.predictions) if run.config.demo else {}),
    }


def example(run, predictions) -> dict:
    """A structure file and a question to begin with: on real data the user has his own."""
    directory = run.config.demo.directory
    if run.config.data.shards != directory or not predictions:
        return {}
    return {"example_structure": str(Path(directory) / EXAMPLE), "example_question": predictions[0].question}


def best_text(best: dict | None) -> list[str]:
    if best is None:
        return []
    metric, value = next((name, value) for name, value in best.items() if name in ("loss", "accuracy"))
    return [f"  best                   {best['model']}: held-out {metric} {value:.4f}, after step {best['step']}"]


def report_text(report: dict) -> str:
    """The short report that ends a run."""
    lines = [
        f"{report['recipe']}: {report['steps']} steps on {report['ranks']} rank(s), {duration(report['seconds'])}",
        f"  held-out loss          {report['loss']:.4f} nats per answer token, {report['num_proteins']} proteins",
    ]
    if report["accuracy"] is not None:
        lines += [
            f"  exact-match accuracy   {report['accuracy']:.1%} of {report['num_questions']} held-out questions",
            f"  blind baseline         {report['blind_accuracy']:.1%} (for each question, the commonest training "
            "answer)",
        ]
    structure, question = report.get("example_structure", "FILE"), report.get("example_question", "...")
    lines += [
        f"  model                  {report['model']}",
        *best_text(report.get("best")),
        f"  ask it                 python launch/chat.py --model {report['model']} --structure {structure} "
        f'--question "{question}"',
        f"  curves                 tensorboard --logdir {report['tensorboard']}",
        *([f"  time                   {summary_text(report['goodput'])}"] if "goodput" in report else []),
    ]
    return "\n".join(lines)
