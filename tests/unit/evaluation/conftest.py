"""Small models and word lists in the formats that the metrics read."""

import pytest
import torch
from transformers import BertTokenizerFast, DistilBertConfig, DistilBertModel

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-/"


@pytest.fixture(scope="session")
def distilbert(tmp_path_factory):
    """A directory as distilbert-base-uncased's, with random weights, one token per letter and three words."""
    directory = tmp_path_factory.mktemp("distilbert")
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *LETTERS,
        *(f"##{c}" for c in LETTERS),
        "yes",
        "no",
        "helix",
    ]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    BertTokenizerFast(str(directory / "vocab.txt"), model_max_length=512).save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DistilBertConfig(vocab_size=len(vocabulary), dim=16, n_layers=2, n_heads=2, hidden_dim=32)
        model = DistilBertModel(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(0, 0.3)
        model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def wordnet(tmp_path_factory):
    """A WordNet of one synonym pair, helix and spiral, in the files of WordNet 3."""
    root = tmp_path_factory.mktemp("nltk_data") / "corpora" / "wordnet"
    root.mkdir(parents=True)
    for name in (
        "cntlist.rev",
        "index.sense",
        *(f"{kind}.{pos}" for kind in ("index", "data") for pos in ("adj", "adv", "verb")),
    ):
        (root / name).write_text("")
    (root / "data.adj").write_text("  1 WordNet 3.0 Copyright 2006\n")  # nltk reads the version here
    for pos in ("adj", "adv", "noun", "verb"):
        (root / f"{pos}.exc").write_text("")
    (root / "lexnames").write_text("".join(f"{number:02d}\tfile.{number}\t1\n" for number in range(4)))
    (root / "data.noun").write_text("00000000 03 n 02 helix 0 spiral 0 000 | a curve\n")
    (root / "index.noun").write_text("helix n 1 0 1 0 00000000  \nspiral n 1 0 1 0 00000000  \n")
    return root.parents[1]
