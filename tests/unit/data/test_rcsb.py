"""The client against a local server that is in good health.

A server in trouble is the subject of tests/faults/test_rcsb_server.py.
"""

import gzip
import itertools

import pytest
from rcsb_server import SHARED_DATA, RcsbServer

from proteingpt.data.annotations import read_annotations
from proteingpt.data.fetching import USER_AGENT, NotFound
from proteingpt.data.rcsb import Addresses, Client
from proteingpt.data.splits import read_clusters


@pytest.fixture
def server():
    with RcsbServer() as server:
        yield server


def client(tmp_path, server, **options) -> Client:
    return Client(tmp_path, server.addresses, **{"requests_per_second": 1e4, "timeout": 10, **options})


def test_the_cache_of_annotations_is_a_mirror(tmp_path, server):
    ids = ["1abc", "2abc", "7xyz"]
    for name in ids:
        server.add_entry(name)
    fetched = client(tmp_path, server).fetch_annotations(ids)
    assert (tmp_path / "annotations" / "xy" / "7xyz.json").is_file()
    assert read_annotations(tmp_path) == fetched == read_annotations(tmp_path / "annotations")


def test_annotations_come_in_batches_in_the_order_asked_each_once(tmp_path, server):
    ids = ["".join(letters) for letters in itertools.product("12345", "a", "bc", "d")]
    for name in ids:
        server.add_entry(name)
    asked = []
    fetch = client(tmp_path, server, batch_size=4).fetch_annotations
    annotations = fetch([*ids, *reversed(ids)], num_threads=1, progress=lambda name, came: asked.append((name, came)))
    assert list(annotations) == ids and asked == [(name, True) for name in ids]
    assert server.batch_sizes() == [4, 4, 2]
    assert fetch(ids) == annotations and len(server.batch_sizes()) == 3


def test_a_structure_is_fetched_once_into_the_two_letter_layout(tmp_path, server):
    server.files["1abc"] = rcsb_file = gzip.compress(b"structure")
    path = client(tmp_path, server).fetch_structure("1ABC")
    assert path == tmp_path / "structures" / "ab" / "1abc.bcif.gz"
    assert path.read_bytes() == rcsb_file
    assert client(tmp_path, server).fetch_structure("1abc") == path
    assert server.count() == 1
    assert server.user_agents == {USER_AGENT} and "proteingpt" in USER_AGENT


@pytest.mark.skipif(not (SHARED_DATA / "pdb").is_dir(), reason="no ../shared/data/pdb")
def test_real_entries_arrive_byte_for_byte(tmp_path, server):
    ids = [path.name[:4] for path in sorted((SHARED_DATA / "pdb").glob("*.bcif.gz"))[:12]]
    assert client(tmp_path, server).prefetch(ids, num_threads=4) == {}
    for name in ids:
        stored = (tmp_path / "structures" / name[1:3] / f"{name}.bcif.gz").read_bytes()
        assert stored == (SHARED_DATA / "pdb" / f"{name}.bcif.gz").read_bytes()


def test_the_newest_alphafold_model_of_the_accession_itself_is_taken(tmp_path, server):
    """The server lists an isoform first, of another version."""
    path = client(tmp_path, server).fetch_alphafold("p12345")
    assert path == tmp_path / "alphafold" / "34" / "AF-P12345-F1-model_v6.cif"
    assert path.read_bytes().startswith(b"data_AF-P12345-F1")
    assert client(tmp_path, server).fetch_alphafold("P12345") == path
    assert server.count() == 2


def test_an_accession_without_a_model_is_remembered(tmp_path, server):
    for _ in range(2):
        with pytest.raises(NotFound, match="no model"):
            client(tmp_path, server).fetch_alphafold("Q99999")
    assert server.count() == 1
    assert client(tmp_path, server).missing("alphafold") == {"Q99999": "AlphaFold DB has no model of it"}


def test_clusters_are_fetched_once(tmp_path, server):
    for _ in range(2):
        path = client(tmp_path, server).fetch_clusters(30)
        assert read_clusters(path) == {"1ABC_1": 0, "2XYZ_2": 0, "3DEF_1": 1}
    assert [path for _, path, _ in server.requests] == ["/resources/sequence/clusters/clusters-by-entity-30.txt"]


def test_all_ids_are_asked_once_and_may_end_at_a_day(tmp_path, server):
    for name, day in (("2abc", "2023-05-17"), ("1abc", "1999-01-01"), ("3abc", "2023-05-18")):
        server.add_entry(name)["rcsb_accession_info"]["initial_release_date"] = f"{day}T00:00:00Z"
    for _ in range(2):
        assert client(tmp_path, server).all_ids() == ["1abc", "2abc", "3abc"]
        assert client(tmp_path, server).all_ids(released_until="2023-05-17") == ["1abc", "2abc"]
    assert server.count() == 2
    assert client(tmp_path, server).all_ids(released_until="1990-01-01") == []


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda c: c.fetch_structure("../../etc"), "not the id of a PDB entry"),
        (lambda c: c.fetch_annotations(["AF_AFP68871F1"]), "not the id of a PDB entry"),
        (lambda c: c.fetch_alphafold("../P12345"), "not a UniProt accession"),
        (lambda c: c.fetch_clusters(25), "RCSB has clusters at 30, 40"),
        (lambda c: c.all_ids("17 May 2023"), "wanted a day such as 2023-05-17"),
        (lambda c: Client(c.cache, requests_per_second=0), "requests_per_second is 0"),
        (lambda c: Client(c.cache, retries=-1), "retries is -1"),
        (lambda c: Addresses(files="models.rcsb.org"), "address of files"),
        (lambda c: Addresses(data="file:///etc"), "address of data"),
    ],
)
def test_a_wrong_argument_is_named_before_anything_is_asked(tmp_path, server, call, named):
    with pytest.raises(ValueError, match=named):
        call(client(tmp_path, server))
    assert server.count() == 0


def test_an_address_may_end_in_a_slash():
    assert Addresses(files="https://mirror.example/pdb/").files == "https://mirror.example/pdb"
