"""The report: one HTML page, and the same figures as JSON, Markdown, LaTeX and TensorBoard.

No clock enters, so the same figures give the same bytes.
"""

import json
import os
from pathlib import Path

from proteingpt.evaluation.report_html import html
from proteingpt.evaluation.report_text import cell, latex, markdown, terminal_text

__all__ = ["html", "latex", "markdown", "terminal_text", "write"]


def write(figures: dict, out: Path):
    """scores.json, report.md, table.tex, tensorboard/ and, last, index.html."""
    write_text(out / "scores.json", json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write_text(out / "report.md", markdown(figures))
    write_text(out / "table.tex", latex(figures))
    write_tensorboard(figures, out / "tensorboard")
    write_text(out / "index.html", html(figures))


def write_text(path: Path, text: str):
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_tensorboard(figures: dict, directory: Path):
    """Every score, lift and the examples, at step 0 of a run named after the contestant. Replaces an earlier
    report's."""
    from torch.utils.tensorboard import SummaryWriter

    for name, contestant in figures["contestants"].items():
        for old in (directory / name).glob("events.out.*"):
            old.unlink()
        with SummaryWriter(directory / name) as writer:
            for kind in ("scores", "lift"):
                for metric, figure in contestant[kind].items():
                    if figure["value"] is not None:
                        writer.add_scalar(
                            f"evaluation/{kind}/{metric}".replace(", ", "/").replace(" ", "_"), figure["value"], 0
                        )
            if name == "model":
                for kind, found in figures["examples"].items():
                    for i, example in enumerate(found):
                        text = "\n\n".join(
                            f"{part}: {cell(example[part])}" for part in ("question", "answer", "prediction")
                        )
                        writer.add_text(f"evaluation/{kind}_{i}", text, 0)
