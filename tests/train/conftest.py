from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.models import supernet


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A supernet's folder with a tokenizer that gives each letter a token, and a text."""
    folder = tmp_path_factory.mktemp("source")
    supernet(layers=2).save_pretrained(folder / "model")
    letters = Tokenizer(models.WordLevel({chr(32 + index): index for index in range(61)}, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token=" ").save_pretrained(folder / "model")
    (folder / "text.txt").write_text("THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG. " * 20)
    return folder
