"""A small RCSB and AlphaFold DB on 127.0.0.1: real HTTP, real files where there are any, and faults on demand.

    with RcsbServer() as server:
        server.add_entry("1abc", title="A made-up entry")
        server.fail("/1abc.bcif.gz", status(500), cut(100))      # its first two requests fail so
        Client(cache, server.addresses)

Structures come from `server.files`, else from ../shared/data/pdb, else are made here (five residues) for an id that has
been added; models likewise from ../shared/data/alphafold. GraphQL is answered in RCSB's schema: a query for a field
that is not in it, or of a shape that does not fit, is refused. Every request is written down in `server.requests`.
"""

import contextlib
import copy
import functools
import gzip
import io
import json
import os
import re
import threading
from collections import defaultdict, deque
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from proteingpt.data.rcsb import Addresses

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

# The part of RCSB's GraphQL schema (data.rcsb.org, CoreEntry) that is of use here; an object is a dict, a list of
# objects a list of one dict, everything else a leaf.
_INFO_FIELDS = """assembly_count branched_entity_count cis_peptide_count deposited_atom_count
    deposited_hydrogen_atom_count deposited_model_count deposited_modeled_polymer_monomer_count
    deposited_nonpolymer_entity_instance_count deposited_polymer_entity_instance_count deposited_polymer_monomer_count
    deposited_solvent_atom_count deposited_unmodeled_polymer_monomer_count diffrn_radiation_wavelength_maximum
    diffrn_radiation_wavelength_minimum disulfide_bond_count entity_count experimental_method experimental_method_count
    inter_mol_covalent_bond_count inter_mol_metalic_bond_count molecular_weight na_polymer_entity_types
    nonpolymer_bound_components nonpolymer_entity_count polymer_composition polymer_entity_count
    polymer_entity_count_DNA polymer_entity_count_RNA polymer_entity_count_nucleic_acid
    polymer_entity_count_nucleic_acid_hybrid polymer_entity_count_protein polymer_entity_taxonomy_count
    resolution_combined selected_polymer_entity_types software_programs_combined solvent_entity_count
    structure_determination_methodology""".split()
CORE_ENTRY = {
    "rcsb_id": None,
    "struct": {"title": None, "pdbx_descriptor": None},
    "struct_keywords": {"pdbx_keywords": None, "text": None},
    "exptl": [{"method": None}],
    "rcsb_accession_info": {"deposit_date": None, "initial_release_date": None, "status_code": None},
    "rcsb_primary_citation": {"year": None, "title": None, "pdbx_database_id_PubMed": None},
    "pubmed": {"rcsb_id": None, "rcsb_pubmed_abstract_text": None},
    "rcsb_entry_info": dict.fromkeys(_INFO_FIELDS),
    "polymer_entities": [
        {
            "rcsb_id": None,
            "rcsb_polymer_entity_container_identifiers": {"entity_id": None, "asym_ids": None, "auth_asym_ids": None},
            "rcsb_entity_source_organism": [{"ncbi_scientific_name": None, "scientific_name": None}],
        }
    ],
}


def make_entry(pdb_id: str, title: str = "A made-up entry", **info) -> dict:
    """A whole CoreEntry: one protein chain of five residues, by X-ray at 1.5 angstrom. info: of rcsb_entry_info."""
    return {
        "rcsb_id": pdb_id.upper(),
        "struct": {"title": title},
        "struct_keywords": {"pdbx_keywords": "HYDROLASE", "text": "HYDROLASE, made up"},
        "exptl": [{"method": "X-RAY DIFFRACTION"}],
        "rcsb_accession_info": {
            "deposit_date": "2001-02-03T00:00:00Z",
            "initial_release_date": "2002-03-04T00:00:00Z",
        },
        "rcsb_primary_citation": {"year": 2003},
        "pubmed": {"rcsb_pubmed_abstract_text": f"An abstract about {pdb_id.lower()}."},
        "rcsb_entry_info": {
            **dict.fromkeys(_INFO_FIELDS),
            **{name: 0 for name in _INFO_FIELDS if name.endswith("_count") or "_count_" in name},
            "assembly_count": 1,
            "deposited_atom_count": 20,
            "deposited_model_count": 1,
            "deposited_polymer_entity_instance_count": 1,
            "deposited_polymer_monomer_count": 5,
            "diffrn_radiation_wavelength_maximum": 0.9795,
            "diffrn_radiation_wavelength_minimum": 0.9795,
            "entity_count": 1,
            "molecular_weight": 0.5,
            "na_polymer_entity_types": "Other",
            "polymer_composition": "homomeric protein",
            "polymer_entity_count": 1,
            "resolution_combined": [1.5],
            "selected_polymer_entity_types": "Protein (only)",
            "software_programs_combined": ["PHENIX", "XDS"],
            "structure_determination_methodology": "experimental",
            **info,
        },
        "polymer_entities": [
            {
                "rcsb_id": f"{pdb_id.upper()}_1",
                "rcsb_polymer_entity_container_identifiers": {
                    "entity_id": "1",
                    "asym_ids": ["A"],
                    "auth_asym_ids": ["A"],
                },
                "rcsb_entity_source_organism": [
                    {"ncbi_scientific_name": "Homo sapiens", "scientific_name": "HOMO SAPIENS"}
                ],
            }
        ],
    }


# --- faults: each is done to one request, in place of the answer, or to it


@dataclass(frozen=True)
class Fault:
    """status, headers, body: what is sent instead. keep: only so many bytes of the body, and with `honest` the length
    of just these is announced. hang: after them, silence until the server closes. gate: the answer waits for it."""

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    keep: int | None = None
    honest: bool = False
    hang: bool = False
    gate: threading.Barrier | None = None


def status(code: int, body: bytes = b"no", **headers: str) -> Fault:
    """status(429, retry_after="7")"""
    return Fault(code, tuple((name.replace("_", "-").title(), value) for name, value in headers.items()), body)


def cut(num_bytes: int) -> Fault:
    """The connection ends after so many bytes of the body: fewer than announced."""
    return Fault(keep=num_bytes)


def truncated(num_bytes: int) -> Fault:
    """The body is cut, and the Content-Length is that of what is left."""
    return Fault(keep=num_bytes, honest=True)


def hang(num_bytes: int = 0) -> Fault:
    """So many bytes of the body, then nothing more. -1: not even a status line."""
    return Fault(keep=num_bytes, hang=True)


def together(num_requests: int) -> list[Fault]:
    """For so many requests that are answered, rightly, once all of them are under way; without the others, a 500."""
    return [Fault(gate=threading.Barrier(num_requests))] * num_requests


def answer(value) -> Fault:
    """This JSON instead."""
    return Fault(200, body=json.dumps(value).encode())


class RcsbServer:
    """requests: [(method, path, body)] in the order of arrival. max_under_way: the most there were at once.
    max_ids: of one GraphQL query, else it is refused. poison: an id about which there is an error whenever asked."""

    def __init__(self):
        self.entries: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}
        self.removed: dict[str, dict] = {}
        self.clusters = "1ABC_1 AF_AFP12345F1_1 2XYZ_2\n3DEF_1\n"
        self.alphafold_version = 6
        self.max_ids: int | None = None
        self.poison: str | None = None
        self.max_under_way = self._under_way = 0
        self.requests: list[tuple[str, str, bytes]] = []
        self.user_agents: set[str | None] = set()
        self.hanging = threading.Semaphore(0)
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._lock = threading.Lock()
        self._closing = threading.Event()

    def __enter__(self) -> "RcsbServer":
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        # A proxy of the machine must not see what is meant for 127.0.0.1, in this process or those it starts.
        self._no_proxy = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
        os.environ.update(dict.fromkeys(self._no_proxy, "127.0.0.1"))
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        for name, value in self._no_proxy.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    @property
    def addresses(self) -> Addresses:
        return Addresses(self.url, self.url, self.url, f"{self.url}/resources/sequence/clusters", self.url)

    def add_entry(self, pdb_id: str, **changes) -> dict:
        self.entries[pdb_id.lower()] = entry = make_entry(pdb_id, **changes)
        return entry

    def add_removed(self, pdb_id: str, *successors: str) -> None:
        self.removed[pdb_id.lower()] = {
            "rcsb_id": pdb_id.upper(),
            "rcsb_repository_holdings_removed": {
                "id_codes_replaced_by": [successor.upper() for successor in successors],
                "remove_date": "2003-04-05T00:00:00Z",
            },
        }

    def fail(self, path: str, *faults: Fault) -> None:
        """The next requests of this path fail so, one after the other; then all is well again."""
        with self._lock:
            self._faults[path].extend(faults)

    def count(self, pattern: str = "") -> int:
        """Requests whose path matches."""
        return sum(bool(re.search(pattern, path)) for _, path, _ in self.requests)

    def batch_sizes(self) -> list[int]:
        """Of the GraphQL queries, in the order of arrival."""
        return [len(json.loads(body)["variables"]["ids"]) for _, path, body in self.requests if path == "/graphql"]

    def note(self, method: str, path: str, body: bytes, user_agent: str | None) -> Fault | None:
        with self._lock:
            self.requests.append((method, path, body))
            self.user_agents.add(user_agent)
            return self._faults[path].popleft() if self._faults[path] else None

    @contextlib.contextmanager
    def under_way(self):
        with self._lock:
            self._under_way += 1
            self.max_under_way = max(self.max_under_way, self._under_way)
        yield
        with self._lock:
            self._under_way -= 1

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        for pattern, make in (
            (r"GET /(\w+)\.bcif\.gz", self._structure),
            (r"POST /graphql()", lambda _: self._graphql(json.loads(body))),
            (r"POST /rcsbsearch/v2/query()", lambda _: self._search(json.loads(body))),
            (r"GET /rest/v1/holdings/removed/(\w+)", lambda name: _as_json(self.removed.get(name.lower()))),
            (r"GET /resources/sequence/clusters/clusters-by-entity-\d+\.txt()", lambda _: self.clusters.encode()),
            (r"GET /api/prediction/(\w+)", self._prediction),
            (r"GET /files/AF-(\w+)-F1-model_v(?:\d+)\.cif", _alphafold_model),
        ):
            if match := re.fullmatch(pattern, f"{method} {path}"):
                made = make(match[1])
                if made is None:
                    return 404, b"not found"
                return made if isinstance(made, tuple) else (200, made)
        return 404, b"no such service"

    def _structure(self, name: str) -> bytes | None:
        if name in self.files:
            return self.files[name]
        real = SHARED_DATA / "pdb" / f"{name}.bcif.gz"
        if real.is_file():
            return real.read_bytes()
        return make_bcif(name) if name in self.entries else None

    def _graphql(self, request: dict) -> tuple[int, bytes]:
        ids = request["variables"]["ids"]
        if self.max_ids is not None and len(ids) > self.max_ids:
            return 200, _as_json({"errors": [{"message": f"maximum query complexity exceeded {len(ids)}"}]})
        if self.poison and self.poison.upper() in ids:
            return 200, _as_json({"errors": [{"message": f"cannot fetch {self.poison.upper()}"}], "data": None})
        try:
            selection = _parse_selection(request["query"])["entries"]
            found = [self.entries[name.lower()] for name in dict.fromkeys(ids) if name.lower() in self.entries]
            return 200, _as_json({"data": {"entries": [_select(e, selection, [CORE_ENTRY]) for e in found]}})
        except (KeyError, ValueError) as error:
            return 400, _as_json({"errors": [{"message": f"Validation error: {error}"}]})

    def _search(self, request: dict) -> tuple[int, bytes]:
        assert request["return_type"] == "entry" and request["request_options"]["return_all_hits"] is True
        condition = request["query"]["parameters"]
        until = condition["value"] if condition["operator"] == "less_or_equal" else "9999"
        hits = [
            name.upper()
            for name, entry in self.entries.items()
            if entry["rcsb_accession_info"]["initial_release_date"] <= until
        ]
        if not hits:
            return 204, b""
        return 200, _as_json({"query_id": "1", "result_type": "entry", "total_count": len(hits), "result_set": hits})

    def _prediction(self, accession: str) -> bytes | None:
        if _alphafold_model(accession) is None:
            return None
        isoform = {"entryId": f"AF-{accession}-2-F1", "uniprotAccession": f"{accession}-2", "latestVersion": 99}
        own = {"entryId": f"AF-{accession}-F1", "uniprotAccession": accession}
        return _as_json([isoform, {**own, "latestVersion": self.alphafold_version}])


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, server: RcsbServer, *args):
        self.rcsb = server
        super().__init__(*args)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def _answer(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.rcsb.note(method, self.path, body, self.headers.get("User-Agent")) or Fault()
        with self.rcsb.under_way():
            self._send(fault, *self._respond(method, body, fault))

    def _respond(self, method: str, body: bytes, fault: Fault) -> tuple[int, bytes]:
        try:
            if fault.gate is not None:
                fault.gate.wait(30)
            return self.rcsb.respond(method, self.path, body)
        except threading.BrokenBarrierError:
            return 500, b"alone"

    def _send(self, fault: Fault, code: int, content: bytes) -> None:
        if fault.body is not None:
            code, content = fault.status, fault.body
        if fault.keep == -1:
            return self._hang()
        sent = content if fault.keep is None else content[: fault.keep]
        with contextlib.suppress(ConnectionError):
            self.send_response(code)
            for name, value in fault.headers:
                self.send_header(name, value)
            if code != 204:
                self.send_header("Content-Length", str(len(sent if fault.honest else content)))
            self.end_headers()
            self.wfile.write(sent)
            self.wfile.flush()
            if fault.hang:
                self._hang()

    def _hang(self) -> None:
        self.rcsb.hanging.release()
        self.rcsb._closing.wait(60)

    def log_message(self, *_) -> None:
        pass


def _as_json(value) -> bytes | None:
    return None if value is None else json.dumps(value).encode()


def _alphafold_model(accession: str) -> bytes | None:
    real = SHARED_DATA / "alphafold" / f"AF-{accession}-F1.cif.gz"
    if real.is_file():
        return gzip.decompress(real.read_bytes())
    return b"data_AF-P12345-F1\n#\n_entry.id AF-P12345-F1\n#\n" if accession == "P12345" else None


# --- just enough of GraphQL: one query with nested selections and one list of ids


def _parse_selection(query: str) -> dict:
    """{field: its selection, or None for a leaf} of the query's body, arguments left out."""
    body = query[query.index("{") :]
    tokens = deque(re.findall(r"\w+|[{}]", re.sub(r"\([^)]*\)", "", body)))

    def selection() -> dict:
        assert tokens.popleft() == "{"
        fields, name = {}, None
        while tokens[0] != "}":
            if tokens[0] == "{":
                fields[name] = selection()
            else:
                name = tokens.popleft()
                fields[name] = None
        tokens.popleft()
        return fields

    return selection()


def _select(value, selection: dict | None, schema):
    """What was asked for of a value, checked against the schema."""
    kind = schema[0] if isinstance(schema, list) else schema
    if (selection is None) != (kind is None):
        raise ValueError("a leaf has no selection of its own, and an object needs one")
    if kind is None or value is None:
        return copy.copy(value)
    if isinstance(value, list):
        return [_select(item, selection, kind) for item in value]
    for name in selection:
        if name not in kind:
            raise ValueError(f"Field '{name}' is undefined")
    return {name: _select(value.get(name), inner, kind[name]) for name, inner in selection.items()}


# --- a structure by hand


def make_bcif(pdb_id: str) -> bytes:
    """A gzipped BinaryCIF of one chain A, GLY ALA SER LYS TRP, an extended backbone with all its atoms; N, CA, C, O."""
    from biotite.structure.io.pdbx import BinaryCIFBlock, BinaryCIFCategory, BinaryCIFFile

    residues, atoms = ["GLY", "ALA", "SER", "LYS", "TRP"], ["N", "CA", "C", "O"]
    n = len(residues) * len(atoms)
    number = np.repeat(np.arange(1, len(residues) + 1), len(atoms))
    offsets = np.array([[0.0, 0.0, 0.0], [1.2, 0.8, 0.0], [2.4, 0.0, 0.0], [2.4, -1.2, 0.0]])
    position = np.tile(offsets, (len(residues), 1)) + np.outer(3.6 * (number - 1), [1.0, 0.0, 0.0])
    name = pdb_id.upper()
    site = dict(
        group_PDB=["ATOM"] * n,
        id=np.arange(1, n + 1),
        type_symbol=[atom[0] for atom in atoms] * len(residues),
        label_atom_id=atoms * len(residues),
        label_alt_id=["."] * n,
        label_comp_id=np.repeat(residues, len(atoms)).tolist(),
        label_asym_id=["A"] * n,
        label_entity_id=["1"] * n,
        label_seq_id=number,
        pdbx_PDB_ins_code=["?"] * n,
        Cartn_x=position[:, 0],
        Cartn_y=position[:, 1],
        Cartn_z=position[:, 2],
        occupancy=np.ones(n),
        B_iso_or_equiv=np.full(n, 20.0),
        auth_seq_id=number,
        auth_comp_id=np.repeat(residues, len(atoms)).tolist(),
        auth_asym_id=["A"] * n,
        auth_atom_id=atoms * len(residues),
        pdbx_PDB_model_num=np.ones(n, int),
    )
    order = list(range(1, len(residues) + 1))
    tables = {
        "entry": dict(id=[name]),
        "struct": dict(entry_id=[name], title=["A made-up entry"]),
        "exptl": dict(entry_id=[name], method=["X-RAY DIFFRACTION"]),
        "entity": dict(id=["1"], type=["polymer"]),
        "entity_poly": dict(entity_id=["1"], type=["polypeptide(L)"], pdbx_strand_id=["A"]),
        "entity_poly_seq": dict(entity_id=["1"] * len(order), num=order, mon_id=residues, hetero=["n"] * len(order)),
        "struct_asym": dict(id=["A"], entity_id=["1"]),
        "pdbx_poly_seq_scheme": dict(
            asym_id=["A"] * len(order),
            entity_id=["1"] * len(order),
            seq_id=order,
            mon_id=residues,
            pdb_seq_num=order,
            auth_seq_num=order,
            pdb_mon_id=residues,
            auth_mon_id=residues,
            pdb_strand_id=["A"] * len(order),
            pdb_ins_code=["."] * len(order),
            hetero=["n"] * len(order),
        ),
        "atom_site": site,
    }
    block = BinaryCIFBlock({key: BinaryCIFCategory(columns) for key, columns in tables.items()})
    stream = io.BytesIO()
    BinaryCIFFile({name: block}).write(stream)
    return gzip.compress(stream.getvalue(), mtime=0)
