"""Text metrics: against pairs worked out by hand, and against the definitions written out again."""

import math

import bert_score
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from proteingpt.evaluation.predictions import EvaluationError, Record
from proteingpt.evaluation.texts import (
    local_embedder,
    make_bertscore,
    make_bleu,
    make_cosine,
    make_meteor,
    make_rouge,
    pairs_of,
    paper_scores,
    score_pairs,
    strict_scores,
)

PAIRS = [("a helix binds zinc", "a helix binds iron"), ("yes", "yes"), ("no", "a helix")]


def test_rouge_by_hand():
    """3 of 4 words and 2 of 3 word pairs are in common, in order; one equal word; none."""
    found = make_rouge()(PAIRS)
    assert found["ROUGE-1"] == pytest.approx([3 / 4, 1, 0])
    assert found["ROUGE-2"] == pytest.approx([2 / 3, 0, 0])
    assert found["ROUGE-L"] == pytest.approx([3 / 4, 1, 0])


def test_bleu_by_hand():
    """Equal lengths, so no brevity penalty: geometric means of 3/4, 2/3, 1/2; the fourth order has no match and counts
    half of one, by sacrebleu's exponential smoothing."""
    found = make_bleu()(PAIRS[:2])
    precisions = [3 / 4, 2 / 3, 1 / 2, 1 / 2]
    for order in (1, 2, 3, 4):
        wanted = math.prod(precisions[:order]) ** (1 / order)
        assert found[f"BLEU-{order}"][0] == pytest.approx(wanted, rel=1e-6)
        assert found[f"BLEU-{order}"][1] == pytest.approx(1)  # one word: only the first order is there


def test_bleu_punishes_what_is_short():
    """One of four words, right: precision 1, brevity exp(1 - 4)."""
    assert make_bleu()([("helix", "helix binds zinc ions")])["BLEU-1"][0] == pytest.approx(math.exp(-3))


def test_meteor_by_hand(wordnet):
    """nltk's defaults: F = 10 P R / (R + 9 P), penalty 0.5 (chunks / matches) ** 3. Three of four words in one chunk;
    a synonym; nothing."""
    found = make_meteor(str(wordnet))([PAIRS[0], ("a spiral", "a helix"), ("no", "a helix")])["METEOR"]
    assert found == pytest.approx([0.75 * (1 - 0.5 / 27), 1 - 0.5 / 8, 0])


def test_bertscore_is_the_definition(distilbert):
    """Greedy matching of the layer's token vectors by cosine (Zhang et al. 2020, section 3)."""
    found = make_bertscore(str(distilbert), None, "cpu")(PAIRS)
    tokenizer, model = AutoTokenizer.from_pretrained(distilbert), AutoModel.from_pretrained(distilbert).eval()

    def vectors(text):
        with torch.no_grad():
            rows = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        return torch.nn.functional.normalize(rows, dim=1)

    for i, (prediction, answer) in enumerate(PAIRS):
        # In bert-score the two special tokens can be matched, and have weight 0 themselves.
        table = vectors(prediction) @ vectors(answer).T
        precision, recall = table.max(dim=1).values[1:-1].mean(), table.max(dim=0).values[1:-1].mean()
        assert found["BERTScore precision"][i] == pytest.approx(float(precision), abs=1e-4)
        assert found["BERTScore recall"][i] == pytest.approx(float(recall), abs=1e-4)
        assert found["BERTScore"][i] == pytest.approx(float(2 * precision * recall / (precision + recall)), abs=1e-4)
    assert found["BERTScore"][1] == pytest.approx(1, abs=1e-5)


def test_embeddings_are_token_means_whatever_the_batch(distilbert):
    texts = ["yes", "a helix binds zinc and iron", "no", "x" * 600]  # the last is cut at 512 tokens
    together = local_embedder(str(distilbert), "cpu", batch_size=3)(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(distilbert), AutoModel.from_pretrained(distilbert).eval()
    for text, vector in zip(texts, together, strict=True):
        with torch.no_grad():
            ids = torch.tensor([tokenizer(text, truncation=True, max_length=512)["input_ids"]])
            np.testing.assert_allclose(vector, model(ids).last_hidden_state[0].mean(dim=0).numpy(), atol=1e-5)


def test_cosines_by_hand():
    vectors = {"a": [1.0, 0.0], "b": [3.0, 4.0], "c": [0.0, 2.0]}
    score = make_cosine("GPT", lambda texts: np.array([vectors[text] for text in texts]))
    assert score([("a", "b"), ("b", "c"), ("a", "c"), ("b", "b")])["GPT"] == pytest.approx([0.6, 0.8, 0, 1])


# ------------------------------------------------------------------------------------------------------------- modes


RECORDS = [
    Record("p", 0, "Q0", "A0", "P0"), Record("p", 1, "Q1", "A1", "P1"), Record("p", 2, "Q2", "A2", "P2"),
    Record("q", 0, "Q0", "A0", "P9"),
]  # fmt: skip
TABLE = {  # prediction by answer
    ("P0", "A0"): 0.2, ("P0", "A1"): 0.9, ("P0", "A2"): 0.1,
    ("P1", "A0"): 0.3, ("P1", "A1"): 0.4, ("P1", "A2"): 0.2,
    ("P2", "A0"): 0.1, ("P2", "A1"): 0.5, ("P2", "A2"): 0.6,
    ("P9", "A0"): 0.5,
}  # fmt: skip


def test_strict_mode_by_hand():
    assert strict_scores(RECORDS, TABLE) == {"p": pytest.approx((0.2 + 0.4 + 0.6) / 3), "q": 0.5}


def test_paper_mode_by_hand():
    """The published scoring: P0 is wrong and scores 0.9, because it is near another question's answer. Rows' best: 0.9,
    0.4, 0.6; columns' best: 0.3, 0.9, 0.6."""
    found = paper_scores("PubMedBERT", RECORDS, TABLE)
    precision, recall = (0.9 + 0.4 + 0.6) / 3, (0.3 + 0.9 + 0.6) / 3
    assert found["PubMedBERT precision"] == {"p": pytest.approx(precision), "q": 0.5}
    assert found["PubMedBERT recall"] == {"p": pytest.approx(recall), "q": 0.5}
    assert found["PubMedBERT"] == {"p": pytest.approx(2 * precision * recall / (precision + recall)), "q": 0.5}
    assert paper_scores("BERTScore", RECORDS, TABLE) == {"BERTScore": {"p": pytest.approx(precision), "q": 0.5}}


def test_paper_mode_of_bertscore_is_bert_scores_own_reading_of_several_references(distilbert):
    """bert-score given all answers of the protein for each prediction takes the best of them."""
    answers = ["a helix binds iron", "yes", "no"]
    predictions = ["a helix binds zinc", "no", "helix"]
    mine = [Record("p", i, f"Q{i}", a, p) for i, (a, p) in enumerate(zip(answers, predictions, strict=True))]
    pairs = score_pairs(make_bertscore(str(distilbert), 2, "cpu"), pairs_of(mine, "paper"))
    theirs = bert_score.BERTScorer(model_type=str(distilbert), num_layers=2).score(predictions, [answers] * 3)
    for name, wanted in zip(("BERTScore precision", "BERTScore recall", "BERTScore"), theirs, strict=True):
        assert paper_scores(name, mine, pairs[name])[name]["p"] == pytest.approx(float(wanted.mean()), abs=1e-5)


def test_each_mode_asks_for_the_pairs_that_it_reads():
    assert pairs_of(RECORDS, "paper") == TABLE.keys()
    assert pairs_of(RECORDS, "strict") == {("P0", "A0"), ("P1", "A1"), ("P2", "A2"), ("P9", "A0")}
    asked = []
    score_pairs(lambda pairs: asked.append(pairs) or {"x": np.zeros(len(pairs))}, {("b", "a"), ("a", "a")})
    assert asked == [[("a", "a"), ("b", "a")]]


# ------------------------------------------------------------------------------------------------------ what is absent


@pytest.mark.parametrize(
    "make, setting",
    [
        (lambda d: make_bertscore(d, None, "cpu"), "--bertscore-model"),
        (lambda d: local_embedder(d, "cpu"), "--pubmedbert-model"),
        (make_meteor, "--wordnet"),
    ],
)
def test_an_absent_model_is_an_error_that_names_its_setting(make, setting, tmp_path):
    with pytest.raises(EvaluationError, match=f"{setting} is not set: give a local directory"):
        make(None)
    with pytest.raises(EvaluationError, match=f"{setting}: there is no directory"):
        make(str(tmp_path / "absent"))
    with pytest.raises((EvaluationError, OSError)) as error:
        make(str(tmp_path))  # there, and empty
    assert setting in str(error.value)
