"""What the unit tests share."""

import hypothesis
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# No test asserts a time, and on two busy cores hypothesis' 200 ms for an example is one.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def characters():
    """Makes tokenizers of one id per character, its ASCII code, so that expected ids are written by hand:
    1 is `<s>` (beginning), 2 is `</s>` (end)."""

    def make(bos: str | None = "<s>", spare: str = "\x7f") -> PreTrainedTokenizerFast:
        """spare: one more character of the vocabulary, to make another tokenizer."""
        printable = {chr(code): code for code in (ord("\n"), *range(32, 127), ord(spare))}
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, **printable}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>")

    return make
