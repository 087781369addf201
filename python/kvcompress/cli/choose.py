"""What the words of a command line stand for: methods with their numbers, models, files."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

import kvcompress
from kvcompress import methods
from kvcompress.cli.console import fail

if TYPE_CHECKING:
    from kvcompress.methods import Method

__all__ = [
    "bundled", "device", "fits", "load_model", "method", "named", "parameters", "parse_budget", "read_text", "refused",
    "takes", "writable",
]  # fmt: skip


def named(text: str, option: str) -> list[str]:
    """The words of a comma-separated option, of which there must be one."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        fail(f"{option} names nothing", "give at least one, or leave the option out")
    return words


def writable(path: Path, option: str) -> None:
    """Ends the command before its work where the result could not be written."""
    if not path.parent.is_dir():
        fail(f"{option} {path}: there is no folder {path.parent}", "make it first, or write into another one")
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        fail(f"{option} {path} cannot be written: {error.strerror}", "give a file in a folder that you may write to")
    if is_new:
        path.unlink()


def read_text(path: Path, option: str, *, or_else: str = "") -> str:
    """A text file. `or_else` is what else the option takes."""
    if not path.is_file():
        fail(f"{option} {path}: no such file", f"give a text file{or_else}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{option} {path} cannot be read: {error}", "give a text file in UTF-8")


def parse_budget(text: str, option: str = "--budget") -> int | float:
    """ "1024" counts entries, "0.1" is a share of the prompt."""
    try:
        budget: int | float = int(text)
    except ValueError:
        try:
            budget = float(text)
        except ValueError:
            budget = -1
    if budget > 0 and (isinstance(budget, int) or budget <= 1):
        return budget
    fail(
        f"{option} {text} is neither a number of entries nor a share",
        "give the entries to keep, like 1024, or their share of the prompt with a point, like 0.1 (at most 1.0)",
    )


def parameters(words: str) -> set[str]:
    """The names of all parameters of "A+B"."""
    return {field.name for cls in _chain(words, "--method") for field in fields(cls)}


def method(words: str, budget: int | float, settings: Sequence[str] = (), option: str = "--method") -> Method | None:
    """A method by its name, "squeeze_attention+snapkv" for one inside the other, "FILE.json" for a profile, None for "full".

    Each of `settings` is "key=value"; it goes to the outermost method that has such a parameter. `option` is where the words
    come from.
    """
    if words.endswith(".json"):
        return _profile(words, settings, option)
    chain, given = _chain(words, option), dict(_setting(text, option) for text in settings)
    unknown = given.keys() - parameters(words)
    if unknown:
        known = ", ".join(sorted(parameters(words))) or "no parameters"
        fail(f"{option}: {words} has no parameter {', '.join(sorted(unknown))}", f"it has: {known}")
    own: list[dict[str, Any]] = []
    for cls in chain:
        names = {field.name for field in fields(cls)}
        own.append({key: given.pop(key) for key in names & given.keys()})
    built: Method | None = None
    for cls, numbers in reversed(list(zip(chain, own))):
        inner = {} if built is None else {"inner": built}
        try:
            built = methods.create(cls.name, **{"budget": budget, **inner, **numbers})
        except ValueError as error:
            fail(f"{option}: {error}", f"`kvcompress methods {cls.name}` explains the parameters")
        except TypeError:
            own_words = ", ".join(f"{key}={value!r}" for key, value in numbers.items())
            fail(
                f"{option}: a parameter of {cls.name} has a value of another type than it takes, got {own_words}",
                f"`kvcompress methods {cls.name}` explains the parameters",
            )
    return built


def _profile(path: str, settings: Sequence[str], option: str) -> Method:
    """What `kvcompress tune` found; the budget is its own."""
    if settings:
        fail(f"--set {settings[0]}: the profile {path} has all its numbers", "edit the file, or name a method instead")
    if not Path(path).is_file():
        fail(f"{option} {path}: no such file", "give a profile that `kvcompress tune --out` wrote")
    try:
        return methods.load_profile(path)
    except ValueError as error:
        fail(str(error), "give a profile that `kvcompress tune --out` wrote")


def _chain(words: str, option: str) -> list[type[Method]]:
    if words == "full":
        return []
    registry = methods.available()
    for name in words.split("+"):
        if name not in registry:
            known = ", ".join(["full", *registry])
            fail(
                f"{option}: no method is called {name!r}",
                f"choose among: {known}; or A+B, as in squeeze_attention+snapkv",
            )
    return [registry[name] for name in words.split("+")]


def _setting(text: str, option: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        example = "--set window=16" if option == "--method" else f"{option} NAME:window=16"
        fail(f"{option}: {text} is not key=value", f"write it like {example}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def device(name: str | None) -> torch.device:
    """The named device; without a name the GPU, or the CPU where there is none."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        fail(f"--device {name} is not a device", "give cpu, cuda or cuda:1")
    if wanted.type not in ("cpu", "cuda"):
        fail(f"--device {name}: the ops run on cpu and cuda alone", "give cpu, cuda or cuda:1")
    if wanted.type == "cuda" and not torch.cuda.is_available():
        fail(f"--device {name}: torch sees no GPU", "use --device cpu; `kvcompress doctor` says what is missing")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs", "count them from cuda:0 on")
    return wanted


def bundled(name: str, option: str) -> Path:
    """A file or folder of the repository's models/, which the wheel does not carry."""
    folders = [Path(package).parents[1] / "models" for package in kvcompress.__path__] + [Path("models")]
    if "KVCOMPRESS_MODELS" in os.environ:
        folders.insert(0, Path(os.environ["KVCOMPRESS_MODELS"]))
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    fail(
        f"the bundled {name} was not found",
        f"run this in the source tree, set KVCOMPRESS_MODELS to its folder models/, or give {option}",
    )


@contextmanager
def refused() -> Iterator[None]:
    """What the library does not do, with this model or method, ends the command with the library's own sentence."""
    try:
        yield
    except NotImplementedError as error:
        fail(str(error), "choose another method, or a model whose layers attend in full")


def fits(model: Any, chosen: Mapping[str, Method | None], option: str) -> None:
    """Ends the command before its work where the model cannot give what a method wants of it."""
    from kvcompress.models import CompressedCache, attach

    with attach(model) as attachment:
        for name, built in chosen.items():
            try:
                CompressedCache(model.config, built).check(attachment)
            except (NotImplementedError, ValueError) as error:
                fail(f"{option} {name}: {error}", "leave it out, or choose another model")


def takes(model: Any, tokenizer: Any, prompts: Iterable[Sequence[int]], option: str, *, new: int = 0) -> None:
    """Ends the command before its work where a prompt and `new` tokens do not go into the model: learned positions end, as rotary
    ones do not, and a tokenizer of another model has tokens of its own."""
    learned = any(
        isinstance(module, torch.nn.Embedding) and ("position" in name or "wpe" in name)
        for name, module in model.named_modules()
    )
    embedded = model.get_input_embeddings().weight.shape[0]
    if not learned and len(tokenizer) <= embedded:
        return
    for ids in prompts:
        if learned and len(ids) + new > model.config.max_position_embeddings:
            fail(
                f"{option}: {len(ids) + new} tokens are more than the {model.config.max_position_embeddings} positions that the model "
                "has learned",
                "give less text, or another model",
            )
        if max(ids) >= embedded:
            fail(
                f"{option}: the tokenizer gives token {max(ids)}, and the model embeds {embedded}",
                "put the model's own tokenizer into its folder",
            )


def load_model(model: str, on: torch.device, dtype: str) -> tuple[Any, Any]:
    """A causal LM and its tokenizer, from a folder or by its hub id."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").exists():
            fail(f"--model {model} is a folder without config.json", "give the folder that save_pretrained() wrote")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        fail(f"--model {model}: no such folder", "give a folder with config.json, or a hub id like org/name")
    try:
        import safetensors
        import transformers
    except ModuleNotFoundError:
        fail("transformers is not installed", "pip install 'kvcompress[hf]'")
    wanted = {"auto": torch.float32 if on.type == "cpu" else "auto"}.get(dtype) or getattr(torch, dtype, None)
    if wanted != "auto" and not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        fail(f"--dtype {dtype} is not a float dtype", "give auto, float32, float16 or bfloat16")
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        if Path(model).is_dir():
            reason = str(error).strip().splitlines()[0]
            fail(
                f"--model {model} has no tokenizer that loads: {reason}",
                "put one there with tokenizer.save_pretrained(FOLDER)",
            )
        _not_loaded(model, error)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=wanted)
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        _not_loaded(model, error)
    from kvcompress.models import CompressedCache, attach

    try:
        CompressedCache(loaded.config)
        attach(loaded).detach()
    except (ValueError, NotImplementedError) as error:
        fail(
            f"--model {model}: {error}",
            "choose a model with layers that attend in full, by attention functions that can be set",
        )
    return loaded.to(on).eval(), tokenizer


def _not_loaded(model: str, error: Exception) -> NoReturn:
    reason = str(error).strip().splitlines()[0]
    fail(f"--model {model} did not load: {reason}", "give a folder with config.json, or a hub id that you can reach")
