"""A tokenizer that gives each letter a token, so that a test can tell tokens by their text."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = 96


def letters(end: bool = True) -> PreTrainedTokenizerFast:
    """ASCII from the space on is 0 to 94; with `end`, token 96 ends a text."""
    vocabulary = {chr(32 + number): number for number in range(95)} | {"\n": 95, "<end>": END}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=" ", eos_token="<end>" if end else None)


def spelled(tokens) -> str:
    """Token ids as text; ends are `|`."""
    return "".join("|" if token == END else "\n" if token == 95 else chr(32 + token) for token in map(int, tokens))
