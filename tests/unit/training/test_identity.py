"""Fingerprints: equal for the same, unlike for another."""

import pytest
from transformers import AutoTokenizer

from proteingpt.training.identity import identity_of, llm_fingerprint


@pytest.fixture
def llm(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return tmp_path


def change(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_another_head_or_tail_of_the_weights_is_another_llm(llm, at):
    before = llm_fingerprint(llm)
    assert llm_fingerprint(llm) == before
    change(llm / "model.safetensors", at)
    assert llm_fingerprint(llm) != before


def test_another_size_name_or_configuration_is_another_llm(llm):
    seen = {llm_fingerprint(llm)}
    (llm / "config.json").write_text("{} ")
    seen.add(llm_fingerprint(llm))
    with open(llm / "model.safetensors", "ab") as file:
        file.write(b"\0")
    seen.add(llm_fingerprint(llm))
    (llm / "model.safetensors").rename(llm / "other.safetensors")
    seen.add(llm_fingerprint(llm))
    assert len(seen) == 4


def test_each_part_changes_its_own_name_alone(demo_assets, qwen2, llm):
    def make(data=("a", "b"), tokenizer=qwen2, encoders=("e", "f")):
        return identity_of(
            data, AutoTokenizer.from_pretrained(tokenizer), llm, dict(zip(("esm2", "esm_if1"), encoders))
        )

    before = make()
    for changed, name in (
        (make(data=("a", "c")), "data"),
        (make(tokenizer=demo_assets / "llm"), "tokenizer"),
        (make(encoders=("x", "f")), "esm2"),
    ):
        assert [key for key in before if before[key] != changed[key]] == [name]
    assert "esm2" not in make(encoders=("", "f"))
