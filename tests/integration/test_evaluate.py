"""launch/evaluate.py: everyone compared, on any number of ranks, killed and gone on with; and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from commands import REPOSITORY, execute
from exported import export_model
from openai_server import OpenAIServer
from ranks import RankError

from proteingpt.data.shards import ShardSet, write_shards
from proteingpt.distributed import stop
from proteingpt.evaluation import run as evaluation
from proteingpt.evaluation.contestants import TITLES
from proteingpt.inference.chat import Assistant

NUM_TEST = 4  # proteins of the demo's test split


@pytest.fixture(scope="module")
def place(tmp_path_factory, demo_assets):
    """Two models, and shards in which the first two test proteins have a predicted structure."""
    root = tmp_path_factory.mktemp("evaluate")
    export_model(root / "model", demo_assets, seed=1)
    export_model(root / "stage1", demo_assets, seed=2)
    test = ShardSet(demo_assets, "test")
    write_shards(root / "alphafold", {"all": [test.read(i) for i in range(2)]}, samples_per_shard=10, options={})
    return root


def arguments(place, assets, out, *more):
    common = ["--model", place / "model", "--data", assets, "--out", out, "--max-new-tokens", "4"]
    return [str(value) for value in (*common, *more)]


def predictions(out: Path, name: str) -> dict:
    lines = [line for path in (out / "predictions" / name).glob("*.jsonl") for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    found = {(record["key"], record["turn"]): record["prediction"] for record in records}
    assert len(found) == len(records)  # nothing twice
    return found


@pytest.fixture(scope="module")
def whole(place, demo_assets):
    """(OUT, what the command printed) of one evaluation against everyone, on one rank."""
    out = place / "report"

    def answer(prompt: str) -> str:
        return json.dumps({"answers": ["yes"] * int(prompt.split(" questions:")[0].split()[-1])})

    with OpenAIServer(answer=answer) as server:
        done = execute(
            "python launch/evaluate.py "
            + " ".join(arguments(
                place, demo_assets, out, "--compare", "all", "--align-model", place / "stage1", "--predicted",
                place / "alphafold", "--chat-endpoint", server.url, "--chat-model", "m", "--metrics", "rouge",
            )),
            REPOSITORY,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_command_compares_everyone_and_ends_with_the_report(whole):
    out, done = whole
    lines = done.stdout.splitlines()
    assert "lift over blind" in lines[1] and lines[-1].split()[-1] == str(out / "index.html")
    figures = json.loads((out / "scores.json").read_text())
    assert list(figures["contestants"]) == list(TITLES)
    assert f"model: {NUM_TEST}/{NUM_TEST} proteins" in done.stderr
    assert figures["contestants"]["predicted"]["num_proteins"] == 2
    assert all(figures["contestants"][name]["num_proteins"] == NUM_TEST for name in TITLES if name != "predicted")
    for name in ("index.html", "report.md", "table.tex", "tensorboard/model"):
        assert (out / name).exists(), name


def test_predictions_are_those_of_asking_one_by_one(place, demo_assets, whole):
    """The same protein and question through the assistant that people talk to."""
    assistant = Assistant.load(place / "model", device="cpu", max_new_tokens=4)
    test, found = ShardSet(demo_assets, "test"), predictions(whole[0], "model")
    for i in range(NUM_TEST):
        sample = test.read(i)
        for turn, asked in enumerate(sample.turns):
            assert found[sample.key, turn] == assistant.ask(sample.protein, [asked.question])[0]
    assert len(found) == sum(len(test.read(i).turns) for i in range(NUM_TEST))


def test_what_is_shown_makes_the_difference(whole):
    """A predicted structure that is the same file gives the same answers; another protein, none or one half do not
    all."""
    model, same = predictions(whole[0], "model"), predictions(whole[0], "predicted")
    assert same and all(model[key] == text for key, text in same.items())
    for name in ("shuffled", "no-protein", "structure-only", "sequence-only", "plain-llm", "align"):
        assert predictions(whole[0], name).keys() == model.keys()
        assert predictions(whole[0], name) != model, name
    assert set(predictions(whole[0], "chat").values()) == {"yes"}


def test_blind_and_nearest_by_the_definition(demo_assets, whole):
    train, test = ShardSet(demo_assets, "train"), ShardSet(demo_assets, "test")
    given: dict[str, list[str]] = {}
    for i in range(len(train)):
        for turn in train.read(i).turns:
            given.setdefault(turn.question, []).append(turn.answer)
    blind = predictions(whole[0], "blind")
    nearest = predictions(whole[0], "nearest")

    def words(sequence):
        return {sequence[i : i + 3] for i in range(len(sequence) - 2)}

    for i in range(NUM_TEST):
        sample = test.read(i)
        mine = words(sample.protein.sequence)
        shares = [
            len(mine & other) / len(mine | other)
            for other in (words(train.read(j).protein.sequence) for j in range(len(train)))
        ]
        answers = {turn.question: turn.answer for turn in train.read(shares.index(max(shares))).turns}
        for turn, asked in enumerate(sample.turns):
            assert given[asked.question].count(blind[sample.key, turn]) == max(
                map(given[asked.question].count, given[asked.question])
            )
            assert nearest[sample.key, turn] == answers[asked.question]


def run_on_rank(rank, device, argv: list[str]) -> None:
    evaluation.run(evaluation.make_parser().parse_args(argv), rank, device)


def test_two_ranks_go_on_where_a_killed_one_was(place, demo_assets, whole, worlds, tmp_path):
    """Left behind: half of the model's predictions, the last line cut. Nothing is asked twice, and the report is the
    same."""
    out = tmp_path / "report"
    made = whole[0] / "predictions" / "model"
    shutil.copytree(made, out / "predictions" / "model")
    (path,) = (out / "predictions" / "model").glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20])
    worlds(2)(run_on_rank, arguments(place, demo_assets, out, "--compare", "shuffled"))
    for name in ("model", "shuffled"):
        texts = [p.read_text() for p in (out / "predictions" / name).glob("rank-0000[01].jsonl")]
        assert len(texts) == 2 and all(texts)
        left = out / "predictions" / name
        for p in left.glob("*.jsonl"):  # the cut line stays, and does not count
            p.write_text("\n".join(line for line in p.read_text().splitlines() if line.endswith("}")))
        assert predictions(out, name) == predictions(whole[0], name)
    figures, alone = (json.loads((o / "scores.json").read_text()) for o in (out, whole[0]))
    assert figures["headline"]["lift"] == alone["headline"]["lift"]


def test_several_sets_and_crops_as_in_training(place, demo_assets, worlds, tmp_path):
    """The recipe beside the model names two sets and a length to crop to; the report says all of it."""
    assert max(ShardSet(demo_assets, "test").num_residues) > 40
    samples = {split: [ShardSet(demo_assets, split).read(i) for i in range(2)] for split in ("train", "test")}
    write_shards(tmp_path / "few", samples, samples_per_shard=10, options={})
    model = shutil.copytree(place / "model", tmp_path / "model")
    data = {"mixture": {str(demo_assets): 1.0, str(tmp_path / "few"): 0.5}, "max_residues": 40, "long_proteins": "crop"}
    (model / "recipe.yaml").write_text(yaml.safe_dump({"recipe": "mine", "data": data}))
    out = tmp_path / "report"
    argv = ["--model", model, "--out", out, "--max-new-tokens", "3", "--compare", "nearest"]
    worlds(1)(run_on_rank, [str(value) for value in argv])
    figures = json.loads((out / "scores.json").read_text())
    sets = {row["label"]: row["num_proteins"] for row in figures["breakdowns"]["shard set"]}
    assert sets == {demo_assets.name: NUM_TEST, "few": 2}
    assert figures["about"]["data"] == list(data["mixture"])
    assert figures["about"]["long_proteins"].startswith("cropped to their middle 40 residues: ")
    asked = predictions(out, "model")
    for (key, turn), text in asked.items():  # the same protein in both sets, of the same answers
        if key.startswith("few/"):
            assert asked[f"{demo_assets.name}/{key.removeprefix('few/')}", turn] == text
    assert sum(row["num_proteins"] for row in figures["breakdowns"]["length"]) == NUM_TEST + 2


def refused(capsys, argv) -> str:
    assert evaluation.main(argv) == 1
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "more, says",
    [
        (("--compare", "blnd"), "--compare names blnd; known are"),
        (("--compare", "align"), "--compare align needs --align-model"),
        (("--compare", "chat"), "--compare chat needs --chat-endpoint and --chat-model"),
        (("--metrics", "rogue"), "--metrics names rogue"),
        (("--metrics", "judge"), "--metrics judge needs --judge-endpoint"),
        (("--metrics", "gpt"), "--metrics gpt needs --embedding-endpoint"),
        (("--modes", "both"), "--modes is 'both'"),
        (("--proteins", "0"), "--proteins is 0"),
        (("--temperature", "-1"), "temperature -1.0"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_loaded(place, demo_assets, tmp_path, capsys, more, says):
    said = refused(capsys, arguments(place, demo_assets, tmp_path / "out", *more))
    assert said.startswith("error: ") and says in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, says",
    [
        (("--metrics", "bertscore"), "--bertscore-model is not set"),
        (("--split", "validation"), "no split 'validation'"),
        (("--model", "nowhere"), "nowhere holds no model.json"),
    ],
)
def test_what_is_absent_is_named(place, demo_assets, tmp_path, capsys, more, says):
    try:
        assert says in refused(capsys, arguments(place, demo_assets, tmp_path / "out", *more))
    finally:
        stop()


def test_predictions_of_another_model_are_not_mixed_in(place, demo_assets, whole, worlds):
    with pytest.raises(RankError, match="holds predictions made with other settings .model"):
        worlds(1)(run_on_rank, arguments(place, demo_assets, whole[0], "--model", place / "stage1"))
