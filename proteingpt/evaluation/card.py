"""The model card: README.md in RUN/model, with data, recipe, metrics and the blind baseline beside every accuracy.

Made from what lies on disk when training ends. A figure that is not known is said to be unknown, never left out in
silence.
"""

from collections.abc import Mapping
from pathlib import Path

from proteingpt.data.shards import ShardError, read_manifest
from proteingpt.model import assemble

CARD = "README.md"


def card_text(info: assemble.ModelInfo, report: Mapping, recipe: str, data: Mapping | None) -> str:
    """Markdown. report: the run's report.json; recipe: its YAML; data: the shards' manifest, None where it is gone."""
    name = report["recipe"]
    lines = [
        "---",
        "library_name: proteingpt",
        "pipeline_tag: text-generation",
        "tags: [protein, ProteinGPT]",
        "---",
        "",
        f"# ProteinGPT, recipe {name}",
        "",
        "Answers questions about a protein from its structure and sequence (arXiv 2408.11363). It is a research "
        "model: its "
        "answers are not checked facts.",
        "",
        "```python",
        "import proteingpt",
        'assistant = proteingpt.load("THIS DIRECTORY")',
        'print(assistant.ask(proteingpt.read_protein("1cbs.cif", chain="A"), ["What is it?"]))',
        "```",
        "",
        "## Metrics",
        "",
        *metric_lines(report),
        "",
        "## Parts",
        "",
        f"- language model: `{info.llm}`{', trained' if 'train: full' in recipe else ', frozen'}",
        f"- ESM-2: {encoder_text(info.esm2, info.esm2_fingerprint)}",
        f"- ESM-IF1: {encoder_text(info.esm_if1, info.esm_if1_fingerprint)}",
        f"- prompt: `{info.template.before!r}` protein `{info.template.after!r}`, an answer ends with "
        f"`{info.template.end or 'the end of sequence'!r}`",
        "",
        "## Data",
        "",
        *data_lines(data),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip().replace("```", "'''"),
        "```",
    ]
    return "\n".join(lines) + "\n"


def metric_lines(report: Mapping) -> list[str]:
    steps = ", ".join(f"{stage} {number}" for stage, number in report["steps_by_stage"].items())
    lines = [
        f"- trained for {report['steps']} steps ({steps})",
        f"- held-out loss: {report['loss']:.4f} nats per answer token, {report['num_proteins']} proteins",
    ]
    if report["accuracy"] is None:
        return [*lines, "- accuracy: not measured, since stage align asks no questions"]
    model, blind = report["accuracy"], report["blind_accuracy"]
    return [
        *lines,
        "",
        f"| exact match, {report['num_questions']} held-out questions | |",
        "|---|---|",
        f"| this model | {model:.1%} |",
        f"| blind: for each question the commonest training answer | {blind:.1%} |",
        f"| lift: what comes from the protein | {100 * (model - blind):+.1f} points |",
        "",
        "More proteins, more baselines and intervals: `python launch/evaluate.py --model DIR --data SHARDS --out "
        "report`.",
    ]


def encoder_text(name: str, fingerprint: str) -> str:
    return f"`{name}`" + (f", sha256 {fingerprint[:16]}" if fingerprint else "")


def data_lines(manifest: Mapping | None) -> list[str]:
    if manifest is None:
        return ["The shards are no longer where the recipe says: what they held is unknown."]
    splits = [
        f"- {split}: {totals['num_samples']} proteins, {totals['num_turns']} questions, {totals['num_residues']} "
        f"residues"
        for split, totals in manifest["totals"].items()
    ]
    options = [
        f"- {name}: `{value}`" for name, value in sorted(manifest.get("options", {}).items()) if value is not None
    ]
    return [*splits, *options]


def write_card(directory: Path, report: Mapping, shards: str | None):
    """README.md of an exported model. shards: the directory of the data."""
    info, recipe = assemble.read_info(directory), (directory / "recipe.yaml").read_text(encoding="utf-8")
    try:
        data = read_manifest(shards) if shards else None
    except ShardError:
        data = None
    (directory / CARD).write_text(card_text(info, report, recipe, data), encoding="utf-8")
