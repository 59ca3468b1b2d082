"""The import of the published files, from small files written by hand in their form and in every broken form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from proteingpt.data.published import (
    PublishedDataError,
    PublishedText,
    embedding_files,
    published_samples,
    read_embedding,
    read_embeddings,
    read_split,
    read_texts,
)
from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.protein import Turn, prefix_length

GOOD_QA = '{"1ABC": [{"Q": "How many models?", "A": 4}, {"Q": "What wavelength?", "A": 1.0}, {"Q": "DNA?", "A": "NO"}]}'


def write(path, content: str):
    path.write_text(content, encoding="utf-8")
    return path


def save(path, tensor):
    torch.save(tensor, path)
    return path


def test_questions_and_abstracts_meet_under_the_lower_case_id_and_numbers_become_text(tmp_path):
    qa = write(tmp_path / "qa.json", GOOD_QA)
    abstracts = write(
        tmp_path / "abstract.json",
        '[{"pdb_id": "1abc", "caption": " About β-sheets.\\n"}, {"pdb_id": "2xyz", "caption": "Other."}]',
    )
    turns = (Turn("How many models?", "4"), Turn("What wavelength?", "1.0"), Turn("DNA?", "NO"))
    assert read_texts(qa, abstracts) == {
        "1abc": PublishedText("About β-sheets.", turns),
        "2xyz": PublishedText("Other.", ()),
    }
    assert read_texts(qa) == {"1abc": PublishedText(None, turns)}
    assert read_texts(abstracts=abstracts)["2xyz"] == PublishedText("Other.", ())


def test_turns_of_several_files_follow_one_another(tmp_path):
    closed = write(tmp_path / "qa_all.json", '{"1abc": [{"Q": "a?", "A": 1}]}')
    generated = write(tmp_path / "GPT_merged_summary.json", '{"1abc": [{"Q": "b?", "A": "two"}]}')
    assert read_texts([closed, generated])["1abc"].turns == (Turn("a?", "1"), Turn("b?", "two"))


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not JSON"),
        ("[]", "wanted an object"),
        ('{"1abc": {"Q": "a?", "A": "b"}}', "entry '1abc': an object, wanted a list"),
        ('{"1abc": [["a?", "b"]]}', "entry '1abc', turn 0: a list, wanted an object"),
        ('{"1abc": [{"Q": "a?", "A": "b"}, {"Q": "a?"}]}', "entry '1abc', turn 1: A missing"),
        ('{"1abc": [{"Q": "a?", "A": "b", "A": "c"}]}', "turn 0: A given twice"),
        ('{"1abc": [{"Q": "a?", "A": null}]}', "turn 0, A: null, wanted text"),
        ('{"1abc": [{"Q": "a?", "A": true}]}', "turn 0, A: true or false, wanted text"),
        ('{"1abc": [{"Q": "a?", "A": "  "}]}', "turn 0, A: empty"),
        ('{"1abc": [{"Q": 3, "A": "b"}]}', "turn 0, Q: a number, wanted text"),
        ('{"1abc": [{"Q": "a?", "A": NaN}]}', "NaN is no JSON number"),
        ('{"1abc": [{"Q": "a?", "A": 1e999}]}', "beyond what a float holds"),
        ('{"1abc": [{"Q": "a?", "A": "\\ud800"}]}', "half of a surrogate pair"),
        ('{"1abc": [{"Q": "a?", "A": "b"}, {"Q": "a?", "A": "c"}]}', "turn 1: asks 'a?' a second time"),
        ('{"1abc": [], "1ABC": []}', "entry '1ABC': occurs twice"),
        ('{"../x": []}', "'../x' is no entry id"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_malformed_question_file_is_refused_by_file_entry_and_fault(tmp_path, content, message):
    path = write(tmp_path / "qa.json", content)
    with pytest.raises(PublishedDataError) as error:
        read_texts(path)
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "wanted a list"),
        ('["1abc"]', "item 0: text, wanted an object"),
        ('[{"pdb_id": "1abc"}]', "item 0: caption missing"),
        ('[{"pdb_id": 1, "caption": "x"}]', "item 0: 1 is no entry id"),
        ('[{"pdb_id": "1abc", "caption": ""}]', "entry '1abc', caption: empty"),
        ('[{"pdb_id": "1abc", "caption": "x"}, {"pdb_id": "1ABC", "caption": "y"}]', "has a second caption, in item 1"),
    ],
)
def test_a_malformed_abstract_file_is_refused_by_file_entry_and_fault(tmp_path, content, message):
    path = write(tmp_path / "abstract.json", content)
    with pytest.raises(PublishedDataError) as error:
        read_texts(abstracts=path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_files_that_are_absent_or_no_text_are_refused_by_name(tmp_path):
    with pytest.raises(PublishedDataError, match="absent.json: cannot be read: No such file"):
        read_texts(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes(b'{"1abc": [{"Q": "a?", "A": "\xe9"}]}')
    with pytest.raises(PublishedDataError, match="latin.json: not UTF-8 text .* at byte 28"):
        read_texts(tmp_path / "latin.json")


def test_with_a_report_bad_entries_and_turns_are_set_aside_by_name_and_the_rest_is_read(tmp_path):
    qa = write(
        tmp_path / "qa.json",
        '{"1abc": [{"Q": "a?", "A": "first"}, {"Q": "a?", "A": "second"}, {"Q": "b?"}], "2abc": 3,'
        ' "1ABC": [{"Q": "c?", "A": "late"}], "3abc": [{"Q": "d?", "A": "kept"}]}',
    )
    abstracts = write(tmp_path / "a.json", '[{"pdb_id": "1abc"}, {"pdb_id": "3abc", "caption": "Good."}]')
    lines = []
    texts = read_texts(qa, abstracts, report=lines.append)
    assert texts == {
        "1abc": PublishedText(None, (Turn("a?", "first"),)),
        "3abc": PublishedText("Good.", (Turn("d?", "kept"),)),
    }
    assert len(lines) == 5
    for line, part in zip(lines, ("second time", "A missing", "'2abc'", "'1ABC': occurs twice", "caption missing")):
        assert part in line


def test_the_split_is_read(tmp_path):
    path = write(tmp_path / "dataset.json", '{"test": ["2abc"], "train": ["1ABC", "3abc.pt"]}')
    assert read_split(path) == {"1abc": "train", "3abc": "train", "2abc": "test"}


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"train": []}', 'wanted an object {"train"'),
        ('{"train": [], "test": [], "valid": []}', 'wanted an object {"train"'),
        ('{"train": "1abc", "test": []}', "train is text, wanted a list"),
        ('{"train": [7], "test": []}', "train, item 0: 7 is no entry id"),
        ('{"train": ["1abc", "1abc"], "test": []}', "1abc is twice in train"),
        ('{"train": ["1abc", "2abc"], "test": ["2abc", "1ABC"]}', "2abc, 1abc are in both train and test"),
        (
            json.dumps({"train": [f"{i}abc" for i in range(7)], "test": [f"{i}abc" for i in range(7)]}),
            "0abc, 1abc, 2abc, 3abc, 4abc and 2 more are in both",
        ),
    ],
)
def test_a_split_that_leaks_or_is_malformed_is_refused(tmp_path, content, message):
    path = write(tmp_path / "dataset.json", content)
    with pytest.raises(PublishedDataError) as error:
        read_split(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_with_a_report_an_id_on_both_sides_is_trained_on_and_never_tested(tmp_path):
    path = write(tmp_path / "dataset.json", '{"train": ["1abc", "1abc"], "test": ["1abc", "2abc"]}')
    lines = []
    assert read_split(path, report=lines.append) == {"1abc": "train", "2abc": "test"}
    assert len(lines) == 2 and "twice in train" in lines[0] and "both train and test" in lines[1]


def test_an_embedding_is_read_as_rows(tmp_path):
    values = torch.arange(5 * 512, dtype=torch.float32).reshape(5, 1, 512)
    rows = read_embedding(save(tmp_path / "1abc.pt", values))
    assert rows.dtype == np.float32 and rows.shape == (5, 512)
    assert rows[3, 7] == 3 * 512 + 7
    rows[0] = 0  # the caller's own


def test_embeddings_pickled_with_requires_grad_or_in_the_old_format_are_read(tmp_path):
    values = torch.ones(4, 1, 512)
    assert read_embedding(save(tmp_path / "1abc.pt", values.clone().requires_grad_())).sum() == 4 * 512
    torch.save(torch.nn.Parameter(values), tmp_path / "2abc.pt", _use_new_zipfile_serialization=False)
    assert read_embedding(tmp_path / "2abc.pt").sum() == 4 * 512


def test_an_embedding_pickled_with_a_cuda_tag_is_read_without_a_gpu(tmp_path, monkeypatch):
    """The tag is what torch's pickler asks of `location_tag`; a published file bears `cuda:0` there."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = save(tmp_path / "1abc.pt", torch.ones(4, 1, 512))
    monkeypatch.undo()
    assert b"cuda:0" in path.read_bytes()
    assert read_embedding(path).shape == (4, 512)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def bad_embeddings(directory):
    infinite = torch.zeros(4, 1, 512)
    infinite[1, 0, 3] = torch.inf
    return {
        "wrong width": (torch.zeros(4, 1, 2560), r"shape \(4, 1, 2560\)"),
        "two dimensions": (torch.zeros(4, 512), r"shape \(4, 512\)"),
        "a batch of two": (torch.zeros(4, 2, 512), r"shape \(4, 2, 512\)"),
        "no residue": (torch.zeros(2, 1, 512), r"shape \(2, 1, 512\)"),
        "half precision": (torch.zeros(4, 1, 512, dtype=torch.float16), "torch.float16"),
        "sparse": (torch.zeros(4, 1, 512).to_sparse(), "sparse"),
        "not finite": (infinite, "1 numbers are not finite"),
        "rows that are not there": (torch.zeros(1, 1, 512).expand(10**9, 1, 512), "does not hold them"),
        "a dict": ({"rows": torch.zeros(4, 1, 512)}, "holds a dict"),
        "a pickle that runs": (Trap(directory / "sprung"), "no tensor file that can be read safely"),
    }


@pytest.mark.parametrize("name", list(bad_embeddings(Path("anywhere"))))
def test_anything_else_is_refused_by_name(tmp_path, name):
    content, message = bad_embeddings(tmp_path)[name]
    path = save(tmp_path / "1abc.pt", content)
    with pytest.raises(PublishedDataError, match=message) as error:
        read_embedding(path)
    assert str(path) in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_damaged_empty_and_absent_embeddings_are_refused_by_name(tmp_path):
    whole = save(tmp_path / "1abc.pt", torch.zeros(4, 1, 512)).read_bytes()
    for content in (b"", b"not a tensor", whole[: len(whole) // 2], whole[:-30]):
        (tmp_path / "1abc.pt").write_bytes(content)
        with pytest.raises(PublishedDataError, match="1abc.pt: no tensor file"):
            read_embedding(tmp_path / "1abc.pt")
    with pytest.raises(PublishedDataError, match="2abc.pt: cannot be read: No such file"):
        read_embedding(tmp_path / "2abc.pt")


def test_a_folder_is_read_in_the_order_of_its_ids_and_a_bad_file_may_be_set_aside(tmp_path):
    save(tmp_path / "2abc.pt", torch.full((4, 1, 512), 2.0))
    save(tmp_path / "1abc.pt", torch.full((3, 1, 512), 1.0))
    assert [(name, rows.shape, rows[0, 0]) for name, rows in read_embeddings(tmp_path)] == [
        ("1abc", (3, 512), 1.0),
        ("2abc", (4, 512), 2.0),
    ]
    (tmp_path / "1xyz.pt").write_bytes(b"")
    with pytest.raises(PublishedDataError, match="1xyz.pt"):
        list(read_embeddings(tmp_path))
    lines = []
    assert [name for name, _ in read_embeddings(tmp_path, report=lines.append)] == ["1abc", "2abc"]
    assert len(lines) == 1 and "1xyz.pt" in lines[0]


def test_a_folder_without_embeddings_or_with_a_strange_name_is_refused(tmp_path):
    with pytest.raises(PublishedDataError, match="no directory"):
        embedding_files(tmp_path / "absent")
    with pytest.raises(PublishedDataError, match="no .pt file"):
        embedding_files(tmp_path)
    (tmp_path / "1ABC.pt").touch()
    with pytest.raises(PublishedDataError, match="1ABC.pt: the name is no entry id in lower case"):
        embedding_files(tmp_path)


def test_a_protein_known_by_its_embedding_alone_becomes_a_sample_that_a_shard_keeps(tmp_path):
    """L is the rows less BOS and EOS; sequence and backbone say that nothing else is known."""
    texts = {
        "1abc": PublishedText("About it.", (Turn("a?", "4"),)),
        "2abc": PublishedText(None, (Turn("b?", "5"),)),
        "4abc": PublishedText(None, ()),
    }
    embeddings = [(name, np.ones((length, 512), np.float32)) for name, length in
                  (("1abc", 9), ("2abc", 3), ("3abc", 5), ("4abc", 5))]  # fmt: skip
    samples = list(published_samples(texts, embeddings))
    assert [(s.key, s.description, s.turns) for s in samples] == [
        ("1abc_A", "About it.", (Turn("a?", "4"),)),
        ("2abc_A", "", (Turn("b?", "5"),)),
    ]
    first = samples[0]
    assert first.protein.sequence == "XXXXXXX" and prefix_length(len(first.protein)) == 2 * 9
    assert np.isnan(first.protein.backbone).all() and not first.protein.resolved.any()
    assert first.metadata == {"embedding": "1abc.pt", "source": "published"}
    write_shards(tmp_path / "shards", {"train": samples}, samples_per_shard=10, options={})
    read = ShardSet(tmp_path / "shards", "train").read(0)
    assert (read.metadata, read.turns, read.protein.sequence) == (first.metadata, first.turns, "XXXXXXX")
