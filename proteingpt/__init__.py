"""ProteinGPT (arXiv 2408.11363): from protein structures and questions to a model that answers them.

The front door: `load` a model that training has exported, `read_protein` from a structure file, and ask.
"""


def load(directory, *, device=None, max_new_tokens: int = 300):
    """The model in RUN/model, with its encoders, ready to be asked: `load(DIR).ask(protein, ["What is it?"])`.

    On a GPU in bf16, on a CPU in fp32. Raises ModelError, or what its encoders raise, for what cannot be loaded.
    """
    from proteingpt.inference.assistant import Assistant

    return Assistant.load(directory, device=device, max_new_tokens=max_new_tokens)


def read_protein(path, chain: str = "A"):
    """A chain of a structure file: mmCIF, BinaryCIF or PDB, plain or gzipped. Raises StructureError."""
    from proteingpt.data.structure import read_entry

    return read_entry(path).protein(chain)
