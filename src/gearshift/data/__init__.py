"""Text to packed token batches."""

from gearshift.data.python_text import python_text
from gearshift.data.sequences import TokenSequences, load_sequences, read_text

__all__ = ["TokenSequences", "load_sequences", "python_text", "read_text"]
