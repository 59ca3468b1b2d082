"""RUN/model as training exports it, of the demo's tiny encoders and LLM, untrained: its answers are noise, always the
same. And what tests of models say of one whose encoders are not there."""

from pathlib import Path

import torch

from proteingpt.config import EncodersConfig, ModelConfig
from proteingpt.data.prompts import TEMPLATES
from proteingpt.encoders.pair import Encoders
from proteingpt.model import assemble


STRUCTURE_WIDTH, SEQUENCE_WIDTH, WIDTH = 12, 20, 32


def make_info(llm) -> assemble.ModelInfo:
    return assemble.ModelInfo(
        llm=str(llm), esm2="esm2.pt", esm_if1="esm_if1.pt", esm2_fingerprint="a", esm_if1_fingerprint="b",
        weights_dir="weights", encoder_dtype="float32", structure_width=STRUCTURE_WIDTH, sequence_width=SEQUENCE_WIDTH,
        template=TEMPLATES["released", "instruct"], stage="instruct",
    )  # fmt: skip


def changed(model) -> dict[str, torch.Tensor]:
    """As if trained: every trainable weight moved. Returns the weights as a checkpoint holds them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return {name: p.detach().float().clone() for name, p in model.named_parameters() if p.requires_grad}


def export_model(directory: Path, assets: Path, seed: int, esm2: str | None = None, esm_if1: str | None = None) -> Path:
    """assets: of demo.assets.make_assets. esm2, esm_if1: `none` leaves one out."""
    config = EncodersConfig(
        esm2=esm2 or str(assets / "esm2_demo.pt"), esm_if1=esm_if1 or str(assets / "esm_if1_demo.pt"), dtype="float32"
    )
    pair = Encoders.load(config, torch.device("cpu"))
    llm = str(assets / "llm")
    widths = pair.structure.width, pair.sequence.width
    model = assemble.build_model(ModelConfig(llm=llm, train="projector"), *widths, torch.float32, seed)
    info = assemble.ModelInfo(
        llm=llm, esm2=config.esm2, esm_if1=config.esm_if1, esm2_fingerprint=pair.sequence.fingerprint,
        esm_if1_fingerprint=pair.structure.fingerprint, weights_dir="weights", encoder_dtype="float32",
        structure_width=widths[0], sequence_width=widths[1], template=TEMPLATES["released", "instruct"],
        stage="instruct",
    )  # fmt: skip
    # Larger than a projector begins with, so that another protein gives another answer.
    weights = {f"projector.{name}": 20 * value for name, value in model.projector.state_dict().items()}
    assemble.export(directory, weights, info, assemble.load_tokenizer(llm), torch.float32)
    return directory
