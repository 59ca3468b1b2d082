"""A model to talk to."""

import pytest
from exported import export_model

from proteingpt.inference.assistant import Assistant


@pytest.fixture(scope="session")
def assistant(tmp_path_factory, demo_assets):
    directory = export_model(tmp_path_factory.mktemp("assistant") / "model", demo_assets, seed=1)
    return Assistant.load(directory, device="cpu", max_new_tokens=12)
