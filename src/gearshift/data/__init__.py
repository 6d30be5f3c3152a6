"""Text to batches of tokens."""

from gearshift.data.batch import Batch
from gearshift.data.corpus import Boundaries, ChatSource, Corpus, DataSource, open_chats, open_corpus
from gearshift.data.python_text import python_text
from gearshift.data.readers import read_text
from gearshift.data.sequences import Sequences, TokenSequences, load_sequences

__all__ = [
    "Batch",
    "Boundaries",
    "ChatSource",
    "Corpus",
    "DataSource",
    "Sequences",
    "TokenSequences",
    "load_sequences",
    "open_chats",
    "open_corpus",
    "python_text",
    "read_text",
]
