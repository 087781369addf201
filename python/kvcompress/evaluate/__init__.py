"""What compression costs a model: questions with known answers, agreement with the full cache, error of the attention.

samples = read_samples("tasks.jsonl.gz")
candidates = [Candidate("full", None), Candidate("snapkv", methods.create("snapkv", budget=0.1), 0.1)]
records = list(evaluate(model, tokenizer, samples, candidates))
for run in summarise(records): ...
"""

from __future__ import annotations

from kvcompress.evaluate.metrics import bootstrap, summarise, wilson
from kvcompress.evaluate.reading import Reading
from kvcompress.evaluate.runner import Candidate, Record, evaluate
from kvcompress.evaluate.tasks import Sample, read_samples, write_samples

__all__ = [
    "Candidate",
    "Reading",
    "Record",
    "Sample",
    "bootstrap",
    "evaluate",
    "read_samples",
    "summarise",
    "wilson",
    "write_samples",
]
