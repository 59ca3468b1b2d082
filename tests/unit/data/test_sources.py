"""Where entries and texts come from: folders, and the real client against a local server that answers as RCSB does."""

import io
import json
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from rcsb_server import RcsbServer, status

from proteingpt.data.build import BuildError, build
from proteingpt.data.shards import ShardSet, find_faults
from proteingpt.data.sources import SourceError, Sources, gather, merge_facts, rank_files
from proteingpt.data.structure import entry_of
from proteingpt.protein import Facts


@pytest.fixture
def server():
    with RcsbServer() as server:
        for name in ("1aaa", "2bbb", "3ccc", "4ddd", "5eee"):
            server.add_entry(name)
        yield server


def settings(server: RcsbServer, tmp_path: Path, **more) -> dict:
    fetching = dict(cache=tmp_path / "cache", addresses=vars(server.addresses), requests_per_second=1000.0)
    return {**fetching, "test_fraction": 0.2, **more}


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("1ABC.cif.gz", "1abc"),
        ("1abc.bcif", "1abc"),
        ("pdb1abc.ent.gz", "1abc"),
        ("pdb1abc.pdb", "pdb1abc"),
        ("AF-P29373-F1.cif", "af-p29373-f1"),
        ("model.v2.PDB", "model.v2"),
        ("no_extension", "no_extension"),
        # wwPDB's extended ids, as its archives of versions and of enriched files name them
        ("pdb_00001ABC.cif", "1abc"),
        ("pdb_00001abc_xyz_v1-2.cif.gz", "1abc"),
        ("pdb_00001abc_xyz-enrich.cif.gz", "1abc"),
        ("pdb_10001abc_xyz.bcif", "pdb_10001abc"),
        ("pdb_00001abc_mine.cif", "pdb_00001abc_mine"),
    ],
)
def test_the_entry_is_told_by_the_name_of_the_file(name, wanted):
    assert entry_of(Path(name)) == wanted


def test_binarycif_is_preferred_to_mmcif_to_pdb():
    files = [f"/data/{n}" for n in ("1abc.pdb", "1abc.cif", "b/1abc.bcif", "a/1abc.bcif", "2abc.ent", "2abc.mmcif")]
    ranked = rank_files((Path(file), file.removeprefix("/data/")) for file in files)
    assert {name: [file for _, file in found] for name, found in ranked.items()} == {
        "1abc": ["a/1abc.bcif", "b/1abc.bcif", "1abc.cif", "1abc.pdb"],
        "2abc": ["2abc.mmcif", "2abc.ent"],
    }
    assert ranked["2abc"][0][0] == Path("/data/2abc.mmcif")


def test_facts_of_rcsb_come_first_and_the_file_fills_what_is_unknown():
    merged = merge_facts(Facts(title="file", resolution=2.0), Facts(title="RCSB", num_models=0))
    assert merged == Facts(title="RCSB", resolution=2.0, num_models=0)
    assert merge_facts(Facts(title="file"), None) == Facts(title="file")


def test_entries_are_fetched_with_their_facts_and_abstracts_once(server, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("1AAA, 2bbb\n3ccc 9xyz\n")
    report = build(None, tmp_path / "out", rcsb=str(ids), **settings(server, tmp_path))
    assert report.num_samples == 3 and report.skipped_by_reason == {"not fetched": 1}
    sample = ShardSet(tmp_path / "out", "train").read(0)
    assert sample.description == f"An abstract about {sample.protein.id}."
    assert sample.metadata["facts"]["num_heavy_atoms"] == 20 and sample.metadata["facts"]["resolution"] == 1.5
    before = server.count()
    build(None, tmp_path / "again", rcsb="1aaa,2bbb,3ccc,9xyz", **settings(server, tmp_path))
    assert server.count() == before
    assert (tmp_path / "out/train-00000.tar").read_bytes() == (tmp_path / "again/train-00000.tar").read_bytes()


def test_all_entries_and_the_papers_funnel(server, tmp_path):
    """Five entries, of which one has no abstract: its structure is not even asked for."""
    server.entries["2bbb"]["pubmed"] = None
    report = build(None, tmp_path / "out", rcsb="all", require_abstract=True, **settings(server, tmp_path))
    assert report.funnel[:2] == [("entries", 5), ("has an abstract", 4)] and report.num_samples == 4
    assert server.count("2bbb.bcif") == 0


def test_an_entry_that_rcsb_does_not_have_is_not_said_to_lack_an_abstract(server, tmp_path):
    server.add_removed("6fff", "5eee")
    more = settings(server, tmp_path, require_abstract=True)
    report = build(None, tmp_path / "out", rcsb="1aaa,6fff", **more)
    (skip,) = report.skips
    assert (skip.entry, skip.reason) == ("6fff", "not fetched") and "replaced by 5eee" in skip.detail


def test_fetching_shows_bars_with_what_was_there_already_and_what_is_missing(server, tmp_path):
    said = io.StringIO()
    build(None, tmp_path / "one", rcsb="1aaa", **settings(server, tmp_path))
    build(None, tmp_path / "out", rcsb="1aaa,2bbb,9xyz", progress=said, **settings(server, tmp_path))
    lines = said.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("[")] == [
        "[####################] 3/3 annotations",
        "[####################] 3/3 structures",
        "[####################] 2/2 entries",
    ]
    assert "1 skipped" in lines[0] and "9xyz: RCSB has no such entry" in said.getvalue()


def test_a_build_that_the_network_ended_goes_on_where_it_was(server, tmp_path):
    server.fail("/graphql", *[status(403)] * 5)
    with pytest.raises(BuildError, match="start again to go on"):
        build(None, tmp_path / "out", rcsb="all", **settings(server, tmp_path))
    server._faults.clear()
    assert build(None, tmp_path / "out", rcsb="all", **settings(server, tmp_path)).num_samples == 5


def test_clusters_are_fetched_for_the_cluster_split(server, tmp_path):
    server.clusters = "1AAA_1 2BBB_1\n3CCC_1\n4DDD_1 5EEE_1\n"
    report = build(None, tmp_path / "out", rcsb="all", split="cluster", **settings(server, tmp_path))
    assert ShardSet(tmp_path / "out", "test").keys == ["3ccc_A"]
    file = tmp_path / "cache" / "clusters" / "clusters-by-entity-30.txt"
    assert report.options["clusters_from"] == f"{server.addresses.clusters}/{file.name}"
    assert report.options["source_sha256"] == {"clusters": [sha256(file.read_bytes()).hexdigest()]}
    assert report.leak["num_test_samples_in_train_clusters"] == 0


def test_texts_of_a_mirror_need_no_network(server, tmp_path):
    build(None, tmp_path / "net", rcsb="all", **settings(server, tmp_path))
    requests = server.count()
    cache = tmp_path / "cache"
    build(cache / "structures", tmp_path / "disk", facts=cache, test_fraction=0.2)
    assert server.count() == requests
    net, disk = (ShardSet(tmp_path / name, "train").read(0) for name in ("net", "disk"))
    assert (net.description, net.turns) == (disk.description, disk.turns)


def test_abstracts_may_be_texts_in_a_folder_and_questions_may_be_generated(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "1ABC.txt").write_text("We\nsolved it.\n")
    (tmp_path / "texts" / "more.json").write_text(json.dumps([{"pdb_id": "2abc", "caption": "We too."}]))
    (tmp_path / "pt").mkdir()
    for name in ("1abc", "2abc", "3abc"):
        torch.save(torch.ones(7, 1, 512), tmp_path / "pt" / f"{name}.pt")
    sources = Sources(abstracts=tmp_path / "texts", embeddings=tmp_path / "pt")
    jobs = gather(sources, require_abstract=True).jobs
    assert [(job.name, job.text.description) for job in jobs] == [("1abc", "We solved it."), ("2abc", "We too.")]


def test_what_is_given_as_alphafolds_has_its_plddt_whatever_the_file_says(tmp_path):
    """The program's raw output is MODEL, ATOM and TER records alone. Under --structures its B factors stay unknown."""
    atoms = [("N", 0.0), ("CA", 1.5), ("C", 2.5)]
    line = "ATOM      1  {:<3s} GLY A   1    {:8.3f}   0.000   0.000  1.00 56.06"
    lines = [line.format(*atom) for atom in atoms]
    (tmp_path / "af").mkdir()
    (tmp_path / "af" / "AF-Q18PI6-F1.pdb").write_text("\n".join(["MODEL     1", *lines, "TER", "ENDMDL", ""]))
    build(None, tmp_path / "one", alphafold=str(tmp_path / "af"), test_fraction=0)
    sample = ShardSet(tmp_path / "one", "train").read(0)
    assert sample.protein.confidence.tolist() == [pytest.approx(0.5606)]
    assert sample.metadata["facts"]["methodology"] == "computational"
    build(tmp_path / "af", tmp_path / "two", test_fraction=0)
    assert ShardSet(tmp_path / "two", "train").read(0).protein.confidence is None


def test_an_abstract_that_is_no_text_is_named(tmp_path):
    (tmp_path / "1abc.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SourceError, match="1abc.txt: not a text in UTF-8"):
        gather(Sources(abstracts=tmp_path, embeddings=tmp_path), require_abstract=False)


def test_a_list_of_ids_may_be_longer_than_the_name_of_a_file(server, tmp_path):
    """A path of more than 255 bytes is an error to the system, not just a file that is not there."""
    fetching = dict(cache=tmp_path / "cache", addresses=vars(server.addresses), requests_per_second=1000.0)
    listed = ",".join(["1aaa", "2bbb"] * 60)
    jobs = gather(Sources(rcsb=listed, **fetching), require_abstract=False).jobs
    assert [job.name for job in jobs] == ["1aaa", "2bbb"]
    with pytest.raises(SourceError, match="'NOPE' is not a UniProt accession"):
        gather(Sources(alphafold="NOPE " * 60, **fetching), require_abstract=False)


def test_published_embeddings_stand_in_for_structures(tmp_path):
    """Five residues are seven rows; neither sequence nor coordinates are known."""
    (tmp_path / "pt").mkdir()
    for name in ("1abc", "2abc", "3abc"):
        torch.save(torch.ones(7, 1, 512), tmp_path / "pt" / f"{name}.pt")
    (tmp_path / "qa.json").write_text(json.dumps({n: [{"Q": "Is it?", "A": "YES"}] for n in ("1abc", "2abc")}))
    report = build(None, tmp_path / "out", embeddings=tmp_path / "pt", qa=[tmp_path / "qa.json"], test_fraction=0)
    sample = ShardSet(tmp_path / "out", "train").read(0)
    assert sample.protein.sequence == "XXXXX" and not sample.protein.resolved.any() and sample.turns[0].answer == "YES"
    assert report.num_samples == 2 and [skip.entry for skip in report.skips] == ["3abc"]
    # Sequences that are not known are not taken for copies of each other.
    half = build(None, tmp_path / "half", embeddings=tmp_path / "pt", qa=[tmp_path / "qa.json"], test_fraction=0.5)
    assert half.samples == {"train": 1, "test": 1} and half.leak["num_test_sequences_in_train"] == 0
    assert find_faults(tmp_path / "out") == []


@pytest.mark.parametrize(
    "sources, message",
    [
        (Sources(structures=Path("/no/such")), "no directory /no/such"),
        (Sources(rcsb="1abc"), "give --cache DIR"),
        (Sources(rcsb="what?", cache=Path("cache")), "wanted all, ids such as"),
        (Sources(rcsb="1abc", cache=Path("cache"), addresses={"data": "ftp://x"}), "wanted one that begins with http"),
        (Sources(rcsb="all", cache=Path("cache"), released_until="2023"), "--released_until is '2023', wanted a day"),
        (Sources(rcsb="all", cache=Path("cache"), released_until="2023-02-30"), "wanted a day such as"),
        (Sources(rcsb="1abc", cache=Path("cache"), released_until="2023-05-17"), "goes with --rcsb all"),
    ],
)
def test_sources_that_cannot_be_used_are_named(sources, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=message):
        gather(sources, require_abstract=False)
