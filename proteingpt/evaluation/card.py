"""The model card: README.md in RUN/model, with data, recipe, metrics and the blind baseline beside every accuracy.

Made from what lies on disk when training ends. A figure that is not known is said to be unknown, never left out in
silence.
"""

from collections.abc import Mapping
from pathlib import Path

import yaml

from proteingpt.config.addresses import without_secrets
from proteingpt.data.shards import ShardError, read_manifest
from proteingpt.model import assemble

CARD = "README.md"
COUNTS = {"samples": "proteins", "turns": "questions", "residues": "residues"}
# What became of the LLM, by model.train.
LLM = {"full": "trained", "lora": "with LoRA adapters, itself frozen", "projector": "frozen"}


def card_text(info: assemble.ModelInfo, report: Mapping, recipe: str, data: Mapping[str, Mapping | None]) -> str:
    """Markdown. report: the run's report.json; recipe: its YAML; data: {place: manifest of the shards there, None where
    they are gone}."""
    values = yaml.safe_load(recipe)
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
        "Answers questions about a protein from its structure and sequence (arXiv 2408.11363). It is a research model: "
        "its answers are not checked facts.",
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
        f"- language model: `{info.llm}`, {LLM[(values.get('model') or {}).get('train', 'projector')]}",
        f"- ESM-2: {encoder_text(info.esm2, info.esm2_fingerprint)}",
        f"- ESM-IF1: {encoder_text(info.esm_if1, info.esm_if1_fingerprint)}",
        f"- prompt: `{info.template.before!r}` protein `{info.template.after!r}`, an answer ends with "
        f"`{info.template.end or 'the end of sequence'!r}`",
        "",
        "## Data",
        "",
        *data_lines(data, (values.get("data") or {}).get("mixture") or {}),
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
        f"| lift over blind | {100 * (model - blind):+.1f} points |",
        "",
        "More proteins, more baselines and intervals: `python launch/evaluate.py --model DIR --out report`.",
    ]


def encoder_text(name: str, fingerprint: str) -> str:
    return f"`{name}`" + (f", sha256 {fingerprint[:16]}" if fingerprint else "")


def data_lines(data: Mapping[str, Mapping | None], weights: Mapping[str, float]) -> list[str]:
    """weights: of a mixture."""
    lines = []
    for place, manifest in data.items():
        lines.append(f"- `{place}`" + (f", weight {weights[place]:g}" if place in weights else ""))
        if manifest is None:
            lines.append("  - could not be read when this card was written: what it held is unknown")
            continue
        for split, totals in manifest["totals"].items():
            counts = ((totals[f"num_{key}"], name) for key, name in COUNTS.items())
            lines.append(f"  - {split}: " + ", ".join(f"{number} {name}" for number, name in counts))
        options = sorted(manifest.get("options", {}).items())
        lines += [f"  - {name}: `{value}`" for name, value in options if value is not None]
    return lines or ["The recipe names no shards."]


def write_card(directory: Path, report: Mapping, shards: str | None):
    """README.md of an exported model. shards: the directory of the data, where the recipe has no mixture."""
    info, recipe = assemble.read_info(directory), (directory / "recipe.yaml").read_text(encoding="utf-8")
    mixture = (yaml.safe_load(recipe).get("data") or {}).get("mixture")
    places = list(mixture) if mixture else [shards] if shards else []
    data = {without_secrets(place): manifest_of(place) for place in places}
    (directory / CARD).write_text(card_text(info, report, recipe, data), encoding="utf-8")


def manifest_of(place: str) -> Mapping | None:
    try:
        return read_manifest(place)
    except ShardError:
        return None
