"""Datasets: reading and checking rows, text to token ids, and the order of training. Imports no torch: the driver uses it.

The names below are the public ones, with the modules batching (micro-batches), samples (SampleRefs) and step_inputs, which the
driver shares with workers, and probes (whether two models tokenize alike).
"""

from workers.data.encoding import Prompts, Turns, encode_demonstrations, encode_preferences, encode_prompts
from workers.data.messages import Message, Prompt
from workers.data.order import batches, epoch_order
from workers.data.rows import Answer, Row, RowKind, read_rows
from workers.data.samples import Sample
from workers.data.sources import DataError
from workers.data.templates import ChatTemplate
from workers.data.tokenization import Codec, end_tokens, load_tokenizer
from workers.data.tokens import Counts, Preference, Preferences, Sequences

__all__ = [
    "Answer",
    "ChatTemplate",
    "Codec",
    "Counts",
    "DataError",
    "Message",
    "Preference",
    "Preferences",
    "Prompt",
    "Prompts",
    "Row",
    "RowKind",
    "Sample",
    "Sequences",
    "Turns",
    "batches",
    "encode_demonstrations",
    "encode_preferences",
    "encode_prompts",
    "end_tokens",
    "epoch_order",
    "load_tokenizer",
    "read_rows",
]
