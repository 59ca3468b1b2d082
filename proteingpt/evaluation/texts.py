"""Free texts: ROUGE, BLEU, METEOR, BERTScore and embedding cosines, in two modes.

`strict` holds each prediction to its own answer. `paper` is the published scoring: the answers of a protein are one
pool, and each prediction is matched with the best of them. Every metric scores pairs of (prediction, answer); each
distinct pair is scored once. Models come from local directories, and what is absent is an error that names its setting.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from proteingpt.evaluation.predictions import EvaluationError, Record

Pair = tuple[str, str]
Scorer = Callable[[Sequence[Pair]], dict[str, np.ndarray]]  # {score: (pairs,)}

# Layer of distilbert-base-uncased that bert-score chose by its correlation with people, its model2layers.
DISTILBERT_LAYER = 5
# The published scores: which models, by what setting they come, and what the report calls them.
BLEU_ORDERS = (1, 2, 3, 4)
COSINES = ("PubMedBERT", "GPT")  # recall is over the answers, precision over the predictions
METRICS = ("rouge", "bleu", "meteor", "bertscore", "pubmedbert", "gpt", "judge")
EXTRA = "pip install 'proteingpt[evaluation]'"


def need(library: str):
    """An optional library. EvaluationError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise EvaluationError(f"the metric needs {library}, which is not installed: {EXTRA}") from error


def model_directory(setting: str, directory: str | None, what: str) -> Path:
    """EvaluationError where a metric's model is not given or not there."""
    if directory is None:
        raise EvaluationError(f"{setting} is not set: give a local directory with {what}, or leave that metric out")
    if not Path(directory).is_dir():
        raise EvaluationError(f"{setting}: there is no directory {directory}; wanted one with {what}")
    return Path(directory)


def words(text: str) -> list[str]:
    return text.lower().split()


# ----------------------------------------------------------------------------------------------------------- scorers


def make_rouge() -> Scorer:
    """F-measure of ROUGE-1, -2 and -L by rouge-score, with its stemmer, as is usual."""
    scorer = need("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)

    def score(pairs):
        made = [scorer.score(answer, prediction) for prediction, answer in pairs]
        names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL"}
        return {name: np.array([one[key].fmeasure for one in made]) for name, key in names.items()}

    return score


def make_bleu() -> Scorer:
    """Sentence BLEU of orders up to 1, 2, 3 and 4 by sacrebleu, lower case, 0 to 1."""
    bleu = need("sacrebleu").BLEU
    metrics = {f"BLEU-{n}": bleu(max_ngram_order=n, effective_order=True, lowercase=True) for n in BLEU_ORDERS}

    def score(pairs):
        return {
            name: np.array([metric.sentence_score(prediction, [answer]).score / 100 for prediction, answer in pairs])
            for name, metric in metrics.items()
        }

    return score


def make_meteor(wordnet: str | None) -> Scorer:
    """METEOR by nltk, with its defaults, on lower-case words. wordnet: a directory of nltk's data, with
    corpora/wordnet."""
    what = "nltk's data, with WordNet unpacked in corpora/wordnet"
    data = model_directory("--wordnet", wordnet, what).resolve()
    root = data / "corpora" / "wordnet"
    if not (root / "data.noun").is_file():
        raise EvaluationError(f"--wordnet: {wordnet} holds no corpora/wordnet/data.noun; wanted {what}")
    # nltk reads only below the directories that it has been told of, and looks for WordNet there a second time itself.
    paths = need("nltk").data.path
    if str(data) not in paths:
        paths.insert(0, str(data))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is English only
        reader = need("nltk.corpus.reader.wordnet").WordNetCorpusReader(str(root), None)
    meteor = need("nltk.translate.meteor_score").single_meteor_score

    def score(pairs):
        return {
            "METEOR": np.array(
                [meteor(words(answer), words(prediction), wordnet=reader) for prediction, answer in pairs]
            )
        }

    return score


def make_bertscore(directory: str | None, layer: int | None, device) -> Scorer:
    """Precision, recall and F1 of bert-score. layer: None for bert-score's choice, 5 of distilbert-base-uncased's 6."""
    path = model_directory("--bertscore-model", directory, "distilbert-base-uncased")
    transformers = need("transformers")
    try:
        num_layers = layer or min(DISTILBERT_LAYER, transformers.AutoConfig.from_pretrained(path).num_hidden_layers)
        scorer = need("bert_score").BERTScorer(
            model_type=str(path), num_layers=num_layers, device=str(device), nthreads=1
        )
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"--bertscore-model: {path} cannot be loaded: {error}") from error

    def score(pairs):
        # An empty text has no tokens to match; it cannot occur as a prediction, which would be N/A.
        predictions, answers = zip(*pairs, strict=True)
        values = [part.double().numpy() for part in scorer.score(list(predictions), list(answers))]
        return dict(zip(("BERTScore precision", "BERTScore recall", "BERTScore"), values, strict=True))

    return score


def make_cosine(name: str, embed: Callable[[list[str]], np.ndarray]) -> Scorer:
    """Cosine of the embeddings. embed: texts -> (N, width)."""

    def score(pairs):
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = np.asarray(embed(texts), np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        at = {text: i for i, text in enumerate(texts)}
        left, right = (np.array([at[pair[side]] for pair in pairs]) for side in (0, 1))
        return {name: np.einsum("ij,ij->i", vectors[left], vectors[right])}

    return score


def local_embedder(directory: str | None, device, batch_size: int = 32) -> Callable[[list[str]], np.ndarray]:
    """Mean of the last hidden states over a text's tokens, special ones included, as sentence-transformers pools for
    pubmedbert-base-embeddings; at most 512 tokens. texts -> float32 (N, width)."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = model_directory("--pubmedbert-model", directory, "neuml/pubmedbert-base-embeddings")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        model = AutoModel.from_pretrained(path, local_files_only=True).eval().to(device)
    except (OSError, ValueError, KeyError) as error:
        raise EvaluationError(f"--pubmedbert-model: {path} cannot be loaded: {error}") from error

    @torch.no_grad()
    def embed(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        made: list[np.ndarray | None] = [None] * len(texts)
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = tokenizer(
                [texts[i] for i in chosen], padding=True, truncation=True, max_length=512, return_tensors="pt"
            ).to(device)
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            for i, vector in zip(chosen, means.float().cpu().numpy(), strict=True):
                made[i] = vector
        return np.stack(made)

    return embed


# ------------------------------------------------------------------------------------------------------------- modes


def by_protein(records: Sequence[Record]) -> dict[str, list[Record]]:
    proteins = defaultdict(list)
    for record in records:
        proteins[record.key].append(record)
    return proteins


def pairs_of(records: Sequence[Record], mode: str) -> set[Pair]:
    """Which pairs a mode looks at."""
    if mode == "strict":
        return {(record.prediction, record.answer) for record in records}
    return {(a.prediction, b.answer) for group in by_protein(records).values() for a in group for b in group}


def score_pairs(scorer: Scorer, pairs: set[Pair]) -> dict[str, dict[Pair, float]]:
    """{score: {pair: value}}, in an order of its own so that batches do not depend on who asks."""
    ordered = sorted(pairs)
    return {name: dict(zip(ordered, values.tolist())) for name, values in scorer(ordered).items()} if ordered else {}


def strict_scores(records: Sequence[Record], scores: dict[Pair, float]) -> dict[str, float]:
    """{protein: mean over its questions}."""
    return {
        key: float(np.mean([scores[record.prediction, record.answer] for record in group]))
        for key, group in by_protein(records).items()
    }


def paper_scores(name: str, records: Sequence[Record], scores: dict[Pair, float]) -> dict[str, dict[str, float]]:
    """{score: {protein: value}} against the pool of the protein's answers.

    Cosines: precision is the mean over predictions of the best answer, recall the mean over answers of the best
    prediction, and the score under its plain name their F1, as in the published code. Others: the mean over predictions
    of the best answer, which is what bert-score makes of several references.
    """
    made = defaultdict(dict)
    for key, group in by_protein(records).items():
        table = np.array([[scores[a.prediction, b.answer] for b in group] for a in group])
        precision, recall = float(table.max(axis=1).mean()), float(table.max(axis=0).mean())
        if name in COSINES:
            total = precision + recall
            made[name][key] = 2 * precision * recall / total if total else 0.0
            made[f"{name} precision"][key], made[f"{name} recall"][key] = precision, recall
        else:
            made[name][key] = precision
    return dict(made)
