"""Several shard sets as one: every sample is its set's own, under its set's name, and weighted in the plan."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from proteingpt.config import ConfigError, DataConfig, StageConfig
from proteingpt.data.index import build_index, join_indexes
from proteingpt.data.loader import Share, StageData, TrainingPlan
from proteingpt.data.mixture import Mixture, name_sets, open_split, parts_of
from proteingpt.data.prompts import TEMPLATES, Prompt
from proteingpt.data.shards import ShardError, ShardSet, write_shards
from proteingpt.evaluation.held_out import choose
from proteingpt.protein import Protein, Sample, Turn

STAGE = StageConfig(
    template="released", epochs=4, samples_per_step=6, questions_per_group=2, max_answer_tokens=16, warmup_steps=0,
    warmup_lr=0.0, init_lr=1e-3, min_lr=0.0, betas=(0.9, 0.98), weight_decay=0.0,
)  # fmt: skip


def sample(name: str, number: int, length: int) -> Sample:
    """Entry NUMBERabc, which both sets have, with other letters, coordinates and answers."""
    backbone = np.full((length, 3, 3), ord(name), np.float32)
    turns = tuple(Turn(f"{question}?", f"{name}{number}") for question in range(2))
    return Sample(Protein(f"{number}abc", "A", ("A" if name == "x" else "G") * length, backbone), "", turns)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """x: 8 training proteins in shards of 3; y: 5 in shards of 2, all of them with keys that x has as well."""
    root = tmp_path_factory.mktemp("sets")
    for name, number, per_shard in (("x", 8, 3), ("y", 5, 2)):
        splits = {"train": [sample(name, n, 3 + n) for n in range(number)], "test": [sample(name, 9, 4)]}
        write_shards(root / name, splits, samples_per_shard=per_shard, options={})
    return {name: str(root / name) for name in ("x", "y")}


@pytest.fixture
def stage_data(places, characters):
    prompt = Prompt(characters(), TEMPLATES["released", "instruct"], STAGE.max_answer_tokens)

    def make(weights: dict[str, float], split: str = "train", **options) -> StageData:
        shards = open_split(DataConfig(mixture={places[name]: weight for name, weight in weights.items()}), split)
        index = join_indexes([build_index(part, "instruct", prompt) for part in parts_of(shards)])
        return StageData(shards, index, prompt.prefix_ids, np.arange(len(shards)), **options)

    return make


def test_it_reads_as_the_sets_end_to_end_under_their_names(places):
    mixture = open_split(DataConfig(mixture={places["x"]: 1.0, places["y"]: 2.5}), "train")
    x, y = ShardSet(places["x"], "train"), ShardSet(places["y"], "train")
    assert list(mixture.keys) == [f"x/{key}" for key in x.keys] + [f"y/{key}" for key in y.keys] and len(mixture) == 13
    assert mixture.shard_starts.tolist() == [0, 3, 6, 8, 10, 12, 13]
    assert mixture.weights.tolist() == [1.0] * 3 + [2.5] * 3 and len(mixture.shards) == 6
    assert mixture.num_residues[0:13].tolist() == [*x.num_residues, *y.num_residues]
    for number, (part, own) in enumerate([(x, n) for n in range(8)] + [(y, n) for n in range(5)]):
        read, alone = mixture.read(number), part.read(own)
        assert read.key == mixture.keys[number] == mixture.read_protein(number).key
        assert np.array_equal(read.protein.backbone, alone.protein.backbone) and read.turns == alone.turns
        assert mixture.read_text(number) == part.read_text(own)
    with pytest.raises(IndexError):
        mixture.read(13)


def test_a_damaged_sample_is_named_with_its_set(places, tmp_path, stage_data, characters):
    import shutil

    shutil.copytree(places["y"], tmp_path / "y2")
    (shard,) = [path for path in (tmp_path / "y2").glob("train-00000.tar")]
    content = bytearray(shard.read_bytes())
    content[512 + 200] ^= 1  # in the coordinates of its first sample
    shard.write_bytes(content)
    mixture = open_split(DataConfig(mixture={places["x"]: 1.0, str(tmp_path / "y2"): 1.0}), "train")
    with pytest.raises(ShardError, match=f"{tmp_path}/y2/train-00000.tar, sample 0abc_A"):
        mixture.read_protein(8)
    assert mixture.read_protein(9).key == "y2/1abc_A"


def seen(plan: TrainingPlan, epoch: int) -> Counter:
    """{(sample, question): how often} over the steps of an epoch."""
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    packs = (pack for step in steps for pack in plan.packs(step)[0])
    return Counter((sample, turn) for pack in packs for sample, turns in pack for turn in turns)


def test_each_set_is_seen_as_its_weight_says_though_their_keys_are_the_same(stage_data):
    plan = TrainingPlan(stage_data({"x": 1.0, "y": 2.5}), STAGE, 42)
    assert plan.steps_per_epoch == 7  # 8 x 2 + 2.5 x 5 x 2 = 41 questions, six a step
    for epoch in range(4):
        counts = seen(plan, epoch)
        assert all(counts[sample, turn] == 1 for sample in range(8) for turn in range(2))
        assert all(counts[sample, 0] == counts[sample, 1] in (2, 3) for sample in range(8, 13))
    assert len({tuple(sorted(seen(plan, epoch).items())) for epoch in range(4)}) > 1


def test_what_a_rank_is_given_is_of_the_right_set(stage_data):
    """The letter of each set in sequence and answers, by the key under which an encoder would remember the protein."""
    data = stage_data({"y": 1.0, "x": 0.5})
    plan, found = TrainingPlan(data, STAGE, 42), set()
    for step in range(2 * plan.steps_per_epoch):
        for pack in plan.work(step, Share(0, [1.0], [None], False)).packs:
            for key, protein in zip(pack.keys, pack.proteins):
                assert key == protein.key and set(protein.sequence) == {"A" if key.startswith("x/") else "G"}
                found.add(key)
    assert {key for key in found if key.startswith("y/")} == {f"y/{n}abc_A" for n in range(5)}
    assert any(key.startswith("x/") for key in found)


def test_weights_sets_and_crops_are_in_the_fingerprint(stage_data):
    def fingerprint(*args, **options):
        return TrainingPlan(stage_data(*args, **options), STAGE, 42).fingerprint

    one = fingerprint({"x": 1.0, "y": 2.5})
    assert one == fingerprint({"x": 1.0, "y": 2.5})
    others = [
        fingerprint({"x": 1.0, "y": 2.4}), fingerprint({"x": 1.0}), fingerprint({"x": 2.5, "y": 1.0}),
        fingerprint({"x": 1.0, "y": 2.5}, max_residues=5),
    ]  # fmt: skip
    assert len({one, *others}) == 5


def test_held_out_proteins_come_from_all_sets_alike_whatever_their_weights(stage_data):
    chosen = [
        [(data.shards.keys[sample], turns) for sample, turns in choose(data, 42, 10, 5)]
        for data in (stage_data({"x": 1.0, "y": 9.0}, "test"), stage_data({"y": 0.1, "x": 1.0}, "test"))
    ]
    assert chosen[0] == chosen[1] and sorted(key for key, _ in chosen[0]) == ["x/9abc_A", "y/9abc_A"]


def test_long_proteins_are_cropped_to_what_the_plan_has_counted(stage_data):
    """Of ten residues at most to five: every pack is as long as the plan says, and the draw is another each epoch,
    while evaluation, without a draw, takes the middle."""
    data = stage_data({"x": 1.0}, max_residues=5)
    plan = TrainingPlan(data, dataclasses.replace(STAGE, tokens_per_pack=400), 42)
    keys = []
    for epoch in range(3):
        keys.append(set())
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            work = plan.work(step, Share(0, [1.0], [None], False))
            assert [pack.num_tokens for pack in work.packs] == plan.packs(step)[1]
            assert all(len(protein) <= 5 for pack in work.packs for protein in pack.proteins)
            keys[-1] |= {protein.key for pack in work.packs for protein in pack.proteins}
    assert all({"x/0abc_A", "x/1abc_A", "x/2abc_A"} <= of_epoch and len(of_epoch) == 8 for of_epoch in keys)
    assert keys[0] != keys[1] != keys[2]
    cropped = data.group(7, (0,))
    assert cropped.protein.key == "x/7abc[2:7]_A"
    # What notes a bad sample knows it again in another epoch, as another window.
    assert cropped.key == data.shards.keys[7] == "x/7abc_A"


def test_sets_are_named_by_the_last_part_of_their_place_unless_two_end_alike():
    assert name_sets(["shards/pdb", "s3://bucket/afdb/"]) == ["pdb", "afdb"]
    assert name_sets(["a/train", "b/train", "c"]) == ["a/train", "b/train", "c"]


def test_one_set_alone_is_no_mixture(places):
    assert isinstance(open_split(DataConfig(shards=places["x"]), "train"), ShardSet)
    assert isinstance(open_split(DataConfig(mixture={places["x"]: 2.0}), "train"), Mixture)
    assert parts_of(open_split(DataConfig(shards=places["x"]), "train"))[0].keys[0] == "0abc_A"


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(shards="a", mixture={"b": 1.0}), "shards, mixture .* one of the two"),
        (dict(mixture={}), "mixture .* one at least"),
        (dict(mixture={"a": 0.0}), r"mixture\['a'\] is 0.0, expected > 0"),
        (dict(mixture={"a": 1.0}, embeddings="e"), "embeddings .* null with a mixture"),
        (dict(shards="a", long_proteins="crop"), "max_residues is None"),
        (dict(shards="a", long_proteins="crop", max_residues=9, embeddings="e"), "embeddings .* null with crop"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        DataConfig(**settings)
