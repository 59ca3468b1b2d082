"""The RCSB client against a server in trouble, and a client that is killed: real HTTP, counted requests, no clocks.

Waits are recorded instead of slept. Timeouts are real, and short.
"""

import email.utils
import gzip
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rcsb_server import Fault, RcsbServer, answer, cut, hang, status, together, truncated

from proteingpt.data.annotations import read_annotations
from proteingpt.data.fetching import FetchError, NotFound
from proteingpt.data.rcsb import MAX_FAILURES_IN_A_ROW, Client
from proteingpt.data.splits import read_clusters

FINE = Fault()
STRUCTURE = gzip.compress(b"".join(i.to_bytes(4, "big") for i in range(20_000)))
PATH = "/1abc.bcif.gz"
REMOVED = "/rest/v1/holdings/removed/1ABC"


@pytest.fixture
def server():
    with RcsbServer() as server:
        server.files["1abc"] = STRUCTURE
        yield server


@pytest.fixture
def waits():
    """Seconds of every wait that a client of `make` was told to do."""
    return []


@pytest.fixture
def make(tmp_path, server, waits):
    def make(cache=tmp_path, **options) -> Client:
        defaults = {"requests_per_second": 1e6, "retries": 3, "timeout": 10, "sleep": waits.append}
        return Client(cache, server.addresses, **{**defaults, **options})

    return make


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


# --- one file


@pytest.mark.parametrize(
    "faults, reason",
    [
        ([status(500), status(503)], "HTTP 50"),
        ([cut(1000), cut(0)], "truncated"),
        ([truncated(1000), truncated(0)], "gzip"),
        ([status(200, b"<html>Please come back later</html>")] * 2, "gzip"),
        ([Fault(200, body=STRUCTURE[:5000] + b"??" + STRUCTURE[5002:])] * 2, "gzip"),
        ([status(429), status(408)], "HTTP 4"),
    ],
    ids=["5xx", "connection cut", "body truncated, length right", "a page instead", "damaged", "too many requests"],
)
def test_a_passing_failure_is_tried_again(server, make, tmp_path, waits, faults, reason):
    server.fail(PATH, *faults)
    path = make(backoff_seconds=8).fetch_structure("1abc")
    assert path.read_bytes() == STRUCTURE
    assert server.count() == 3
    pauses = [seconds for seconds in waits if seconds > 1]  # the others are those of the rate limit
    assert len(pauses) == 2 and 4 <= pauses[0] <= 8 and 8 <= pauses[1] <= 16
    assert files_in(tmp_path) == ["1abc.bcif.gz"]

    server.fail("/2abc.bcif.gz", *faults, *faults)
    server.files["2abc"] = STRUCTURE
    with pytest.raises(FetchError, match=rf"/2abc\.bcif\.gz: .*{reason}.*\(4 tries\)") as error:
        make().fetch_structure("2abc")
    assert error.value.tries == 4 and error.value.url == f"{server.url}/2abc.bcif.gz"
    assert server.count("2abc") == 4
    assert files_in(tmp_path) == ["1abc.bcif.gz"], "something of the failed file is left"


def test_waits_are_drawn_from_the_seed(server, make, waits, tmp_path):
    drawn = []
    for number, seed in enumerate((1, 1, 2)):
        server.fail(PATH, status(500), status(500), status(500))
        client = make(cache=tmp_path / str(number), backoff_seconds=9, seed=seed)
        client.fetch_structure("1abc")
        drawn.append([seconds for seconds in waits if seconds > 1])
        waits.clear()
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 3


@pytest.mark.parametrize("fault", [hang(-1), hang(0), hang(1000)], ids=["no answer", "headers only", "midway"])
def test_silence_is_a_timeout_and_tried_again(server, make, fault):
    server.fail(PATH, fault)
    assert make(timeout=0.2).fetch_structure("1abc").read_bytes() == STRUCTURE
    assert server.count() == 2


def test_lasting_silence_is_named(server, make):
    server.fail(PATH, *[hang(10)] * 2)
    with pytest.raises(FetchError, match=r"timeout \(2 tries\)"):
        make(timeout=0.2, retries=1).fetch_structure("1abc")


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_what_is_waited(server, make, waits, as_date):
    value = email.utils.formatdate(time.time() + 500, usegmt=True) if as_date else "500"
    server.fail(PATH, status(429, retry_after=value))
    make(backoff_seconds=0.001).fetch_structure("1abc")
    assert server.count() == 2
    assert 400 < max(waits) < 501


def test_a_retry_after_beyond_the_time_in_all_ends_it(server, make, waits):
    server.fail(PATH, status(503, retry_after="5000"))
    with pytest.raises(FetchError, match="HTTP 503.*next try in 5000 s would exceed the 60 s in all"):
        make(total_seconds=60).fetch_structure("1abc")
    assert server.count() == 1 and not [seconds for seconds in waits if seconds > 1]


def test_waits_end_at_the_time_in_all(server, make):
    server.fail(PATH, *[status(500)] * 50)
    with pytest.raises(FetchError, match=r"would exceed the 5 s in all \(1 try\)"):
        make(total_seconds=5, backoff_seconds=20, retries=50).fetch_structure("1abc")
    assert server.count() == 1


@pytest.mark.parametrize("code", [400, 401, 403])
def test_a_refusal_is_not_tried_again_and_not_remembered(server, make, code):
    server.fail(PATH, status(code))
    with pytest.raises(FetchError, match=rf"HTTP {code} .*\(1 try\)"):
        make().fetch_structure("1abc")
    assert make().fetch_structure("1abc").is_file()
    assert server.count() == 2


def test_no_server_at_all_is_named(make):
    with RcsbServer() as gone:
        addresses = gone.addresses
    with pytest.raises(FetchError, match=r"ConnectionRefused.*\(3 tries\)"):
        Client(make().cache, addresses, retries=2, requests_per_second=1e6, backoff_seconds=0).fetch_structure("1abc")


@pytest.mark.parametrize("code", [404, 410])
def test_what_is_not_there_is_remembered_with_its_reason(server, make, code):
    server.fail(PATH, status(code))
    server.add_removed("1abc", "5xyz", "6xyz")
    reason = "obsolete entry, removed 2003-04-05, replaced by 5xyz, 6xyz"
    for num_tries in (1, 0, 0):  # each time another client, as after a restart
        with pytest.raises(NotFound, match=reason) as error:
            make().fetch_structure("1abc")
        assert error.value.tries == num_tries
    assert server.count(PATH) == 1 and server.count(REMOVED) == 1
    assert make().missing("structures") == {"1abc": reason}

    make().forget_missing()
    assert make().fetch_structure("1abc").read_bytes() == STRUCTURE


def test_the_reason_of_a_404_survives_that_it_cannot_be_looked_up(server, make):
    server.fail("/7xyz.bcif.gz", status(404))
    server.fail("/rest/v1/holdings/removed/7XYZ", *[status(500)] * 4)
    with pytest.raises(NotFound, match="RCSB has no such entry: HTTP 404"):
        make().fetch_structure("7xyz")


def test_a_file_beyond_the_bound_is_refused_at_once(server, make, tmp_path):
    with pytest.raises(FetchError, match=r"more than the 5000 bytes allowed \(1 try\)"):
        make(max_bytes=5000).fetch_structure("1abc")
    assert server.count() == 1 and files_in(tmp_path) == []


def test_a_fault_of_our_own_disk_is_not_taken_for_one_of_the_server(server, make, tmp_path):
    (tmp_path / "structures").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        make().fetch_structure("1abc")
    assert server.count() == 1
    assert files_in(tmp_path) == ["structures"]


@pytest.mark.parametrize("end", [b"2XYZ_1 3XYZ", b""], ids=["midway", "nothing"])
def test_a_cluster_file_cut_with_the_right_length_is_tried_again(server, make, end):
    server.fail("/resources/sequence/clusters/clusters-by-entity-30.txt", status(200, end), status(200, b"<html>\n"))
    assert read_clusters(make().fetch_clusters())["3DEF_1"] == 1
    assert server.count() == 3


def test_an_alphafold_model_that_is_cut_is_tried_again(server, make):
    server.fail("/api/prediction/P12345", truncated(20))
    server.fail("/files/AF-P12345-F1-model_v6.cif", truncated(10), cut(3))
    assert make().fetch_alphafold("P12345").read_bytes().endswith(b"#\n")
    assert server.count("prediction") == 2 and server.count("files") == 3


def test_a_list_of_ids_that_is_not_whole_is_tried_again(server, make):
    for name in ("1abc", "2abc"):
        server.add_entry(name)
    server.fail("/rcsbsearch/v2/query", answer({"total_count": 2, "result_set": ["1ABC"]}), answer([]), truncated(30))
    assert make().all_ids() == ["1abc", "2abc"]
    assert server.count() == 4


# --- many files


def test_prefetch_fetches_all_it_can_and_gives_the_reasons_for_the_rest(server, make):
    ids = [f"{n}abc" for n in range(1, 10)]
    for name in ids[:7]:
        server.files[name] = STRUCTURE
    server.fail("/3abc.bcif.gz", *[status(500)] * 4)
    done = []
    reasons = make().prefetch(ids, num_threads=3, progress=lambda name, came: done.append((name, came)))
    assert set(reasons) == {"3abc", "8abc", "9abc"} and "HTTP 500" in reasons["3abc"]
    assert sorted(done) == [(name, name not in reasons) for name in ids]
    assert server.max_under_way <= 3

    assert set(make().prefetch(ids, num_threads=3)) == {"8abc", "9abc"}
    assert server.count(r"/[1245679]abc\.bcif") == 7 and server.count("/3abc.bcif") == 5


def test_prefetch_has_as_many_downloads_under_way_as_asked(server, make):
    """Each answer waits for the others: a client that asks one after the other never gets them."""
    for name, fault in zip(("1abc", "2abc", "3abc"), together(3)):
        server.files[name] = STRUCTURE
        server.fail(f"/{name}.bcif.gz", fault)
    assert make(retries=0).prefetch(["1abc", "2abc", "3abc"], num_threads=3) == {}


def test_prefetch_gives_up_when_one_after_the_other_fails(server, make):
    ids = [f"1{a}{b}z" for a in "abcdefgh" for b in "abcdefgh"]
    for name in ids:
        server.fail(f"/{name}.bcif.gz", status(500))
    with pytest.raises(FetchError, match="HTTP 500"):
        make(retries=0).prefetch(ids, num_threads=2)
    assert MAX_FAILURES_IN_A_ROW <= server.count() < MAX_FAILURES_IN_A_ROW + 8


def test_threads_that_want_one_file_all_get_a_whole_one(make):
    clients = [make() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda i: clients[i % 4].fetch_structure("1abc").read_bytes(), range(16)))
    assert set(paths) == {STRUCTURE}


# --- annotations


IDS = [f"{n}abc" for n in range(1, 9)]


@pytest.fixture
def entries(server):
    for name in IDS:
        server.add_entry(name)


ERRORS = answer({"errors": [{"message": "Exception while fetching data"}], "data": {"entries": [{"rcsb_id": "1ABC"}]}})


@pytest.mark.parametrize(
    "fault",
    [status(500), status(429), cut(100), truncated(100), answer([]), answer({"data": None}), ERRORS],
    ids=["500", "429", "cut", "truncated", "no object", "no data", "errors"],
)
def test_a_passing_failure_of_graphql_is_tried_again(server, make, entries, fault):
    server.fail("/graphql", fault, fault)
    assert list(make().fetch_annotations(IDS)) == IDS
    assert server.batch_sizes() == [8, 8, 8]


def test_ids_missing_in_an_answer_are_not_found_and_not_asked_again(server, make, entries):
    server.add_removed("7old", "1abc")
    for _ in range(2):
        assert list(make().fetch_annotations([*IDS[:3], "7old", "8new"])) == IDS[:3]
    assert server.batch_sizes() == [5] and server.count("removed") == 2
    missing = make().missing("annotations")
    assert missing["7old"].startswith("obsolete entry") and missing["8new"].startswith("RCSB has no such entry")


def test_a_query_too_complex_is_halved_until_it_is_not_and_stays_so(server, make, entries):
    server.max_ids = 2
    assert list(make(batch_size=4).fetch_annotations(IDS, num_threads=1)) == IDS
    assert server.batch_sizes() == [4, 2, 2, 2, 2]


@pytest.mark.parametrize("fault", [status(413), status(504), status(400, b"Query too complex"), hang(0)])
def test_a_server_that_is_overtaxed_is_asked_about_half_at_once(server, make, entries, fault):
    server.fail("/graphql", fault)
    assert list(make(timeout=0.2).fetch_annotations(IDS)) == IDS
    assert server.batch_sizes() == [8, 4, 4]


def test_a_query_that_is_refused_as_wrong_is_not_repeated(server, make, entries):
    server.fail("/graphql", status(400, b"Validation error: Field 'titel' is undefined"))
    with pytest.raises(FetchError, match=r"HTTP 400 .*titel.*\(1 try\)"):
        make().fetch_annotations(IDS)
    assert server.batch_sizes() == [8]


def test_an_entry_that_the_server_cannot_answer_about_is_set_aside_alone(server, make, entries):
    server.poison = "5abc"
    client = make(retries=1)
    assert list(client.fetch_annotations(IDS)) == [name for name in IDS if name != "5abc"]
    assert list(client.missing("annotations")) == ["5abc"]
    assert "cannot fetch 5ABC" in client.missing("annotations")["5abc"]
    server.poison = None  # the server's fault, so the next client asks again
    assert list(make().fetch_annotations(IDS)) == IDS


def test_an_entry_in_another_schema_is_set_aside_by_name(server, make, entries):
    server.entries["2abc"]["rcsb_entry_info"]["entity_count"] = "three"
    client = make()
    assert "2abc" not in client.fetch_annotations(IDS)
    assert "entity_count is 'three'" in client.missing("annotations")["2abc"]
    assert "2abc.json" not in files_in(client.cache)


def test_what_came_before_a_failure_is_kept(server, make, entries):
    server.fail("/graphql", FINE, *[status(500)] * 4)
    with pytest.raises(FetchError, match="graphql: HTTP 500"):
        make(batch_size=4).fetch_annotations(IDS, num_threads=1)
    assert list(make(batch_size=4).fetch_annotations(IDS)) == IDS
    asked = [json.loads(body)["variables"]["ids"] for _, path, body in server.requests if path == "/graphql"]
    assert asked[0] == ["1ABC", "2ABC", "3ABC", "4ABC"] and all(ids == [f"{n}ABC" for n in "5678"] for ids in asked[1:])


def test_a_damaged_annotation_of_the_cache_is_fetched_again(server, make, entries):
    before = make().fetch_annotations(IDS)
    (make().cache / "annotations" / "ab" / "3abc.json").write_text('{"rcsb_id": "3A')
    assert make().fetch_annotations(IDS) == before
    assert server.batch_sizes() == [8, 1]


# --- a killed client

CHILD = """
import sys
from proteingpt.data.rcsb import Addresses, Client
url, cache, what, *ids = sys.argv[1:]
client = Client(cache, Addresses(url, url, url, url, url), requests_per_second=1e6, timeout=60, batch_size=2)
if what == "structures":
    client.prefetch(ids, num_threads=1)
else:
    client.fetch_annotations(ids, num_threads=1)
"""


def start_child(server, cache, what, ids) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(cache), what, *ids])


def kill_in_the_middle(server, cache, what, ids, when=lambda: True) -> None:
    """Starts a child and kills it when the server has fallen silent in the middle of an answer, and `when` is true."""
    child = start_child(server, cache, what, ids)
    try:
        assert server.hanging.acquire(timeout=60), "the child never came to the answer that hangs"
        for _ in range(3000):
            if when():
                break
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_a_client_killed_while_downloading_leaves_whole_files_and_goes_on(server, make, tmp_path):
    ids = IDS[:6]
    for name in ids:
        server.files[name] = STRUCTURE
    server.fail("/4abc.bcif.gz", hang(len(STRUCTURE) // 2))
    partial = tmp_path / "partial"
    kill_in_the_middle(server, tmp_path, "structures", ids, lambda: any("4abc" in name for name in files_in(partial)))
    kept = [path for path in (tmp_path / "structures").rglob("*") if path.is_file()]
    assert sorted(path.name for path in kept) == [f"{name}.bcif.gz" for name in ids[:3]]
    assert all(path.read_bytes() == STRUCTURE for path in kept)
    assert len(files_in(partial)) == 1

    child = start_child(server, tmp_path, "structures", ids)
    assert child.wait() == 0
    paths = [re.sub(r"\D", "", path) for _, path, _ in server.requests]
    assert paths == ["1", "2", "3", "4", "4", "5", "6"]
    assert files_in(tmp_path) == [f"{name}.bcif.gz" for name in ids], "and what was half written is cleared away"


def test_a_client_killed_while_asking_keeps_the_answers_it_had(server, tmp_path, entries):
    server.fail("/graphql", FINE, FINE, hang(50))
    kill_in_the_middle(server, tmp_path, "annotations", IDS)
    assert list(read_annotations(tmp_path)) == IDS[:4]

    assert start_child(server, tmp_path, "annotations", IDS).wait() == 0
    assert list(read_annotations(tmp_path)) == IDS
    assert server.batch_sizes() == [2, 2, 2, 2, 2]
