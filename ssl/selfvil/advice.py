"""Messages about wrong keys and values of a recipe, with the key that was probably intended.

It is found by similar names, by the names in other programs, and by the same name in another section.
"""

import difflib
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 60

SYNONYMS = {
    "optim.base_lr": "lr learning_rate learningrate rate max_lr peak_lr blr",
    "optim.batch_size": "batch bs batchsize global_batch_size images_per_step",
    "optim.accumulate": "accum accum_iter accumulation gradient_accumulation gradient_accumulation_steps grad_accum",
    "optim.weight_decay": "wd decay",
    "optim.warmup": "warmup_epochs warmup_steps warmup_ratio",
    "optim.clip_norm": "clip clip_grad grad_clip max_grad_norm gradient_clip",
    "optim.schedule": "scheduler lr_schedule lr_scheduler",
    "optim.min_lr": "end_lr final_lr lr_end eta_min",
    "budget.steps": "max_steps iterations iters num_steps train_steps",
    "budget.epochs": "num_epochs max_epochs n_epochs epoch",
    "budget.samples": "images num_samples num_images",
    "budget.pause_minutes": "time_limit max_minutes minutes",
    "data.train": "path paths dataset data_path data_dir root shards folder train_data images_dir",
    "data.workers": "num_workers nworkers n_workers",
    "model.name": "model arch architecture backbone network",
    "model.img_size": "image_size resolution size input_size crop_size",
    "model.in_chans": "channels in_channels num_channels",
    "model.embed_dim": "dim width hidden_size",
    "model.depth": "layers num_layers blocks num_blocks",
    "model.num_heads": "heads",
    "model.drop_path_rate": "drop_path dropout stochastic_depth",
    "model.start_from": "checkpoint weights pretrained init_from load_from",
    "run.out": "output out_dir output_dir outdir save_dir log_dir dir run_dir",
    "run.seed": "random_seed",
    "run.precision": "amp dtype fp16 mixed_precision bf16 autocast",
    "run.checkpoint_every": "save_every save_freq checkpoint_interval save_steps",
    "monitor.log_every": "log_freq log_interval log_steps print_freq",
    "monitor.wandb": "wandb_project project",
    "objective.name": "loss method ssl",
    "objective.mask_ratio": "mask masking masking_ratio",
}
"""Key -> its names in other programs."""

_BY_WORD = {word: key for key, words in SYNONYMS.items() for word in words.split()}
_OTHER_SECTIONS = {
    "model": "backbone network",
    "data": "dataset",
    "objective": "ssl loss method",
    "optim": "optimizer optimiser training train",
    "budget": "schedule",
    "run": "output trainer",
    "monitor": "logging log",
    "eval": "evaluation",
}
_BY_SECTION = {word: section for section, words in _OTHER_SECTIONS.items() for word in words.split()}


def suggestion(section: str, key: str, fields: Mapping[str, Iterable[str]]) -> str:
    """` (did you mean optim.base_lr?)` for an unknown key, or ` (valid keys: ...)` if no key is similar.

    fields: section -> its keys.
    """
    valid = list(fields.get(section, ()))
    meant = _BY_WORD.get(key.lower(), "")
    candidates = [meant] if meant and meant.partition(".")[2] in fields.get(meant.partition(".")[0], ()) else []
    candidates += [f"{other}.{key}" for other, keys in fields.items() if other != section and key in keys]
    own = [f"{section}.{name}" for name in near(key, valid)]
    found = (own or candidates) if not meant else (candidates or own)
    if not found:
        found = [f"{other}.{name}" for other, keys in fields.items() for name in near(key, keys, 0.75)]
    if found:
        return f" (did you mean {' or '.join(list(dict.fromkeys(found))[:2])}?)"
    return f" (valid keys: {', '.join(valid)})"


def nearest_section(section: str, key: str, sections: Sequence[str]) -> str:
    """` (did you mean optim?)` for an unknown section, or the list of all."""
    meant = _BY_SECTION.get(section.lower()) or next(iter(near(section, sections)), None)
    return f" (did you mean {meant}?)" if meant else f" (sections: {', '.join(sections)})"


def near(name: str, valid: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to four valid names that begin with `name` or are similar to it, the most similar first."""
    names = [str(each) for each in valid]
    begins = [each for each in names if len(name) > 3 and each.lower().startswith(name.lower())]
    return list(dict.fromkeys([*begins, *difflib.get_close_matches(name, names, n=4, cutoff=cutoff)]))[:4]


def explain_errors(
    error: ValidationError, model: type[BaseModel], fields: Mapping[str, Iterable[str]], prefix: str = ""
) -> Iterator[tuple[str, str]]:
    """(key, sentence) for each key with a problem; the key is a section if several keys do not fit together.

    prefix: the section that `model` describes; empty for the whole recipe.
    """
    merged: dict[str, str] = {}
    for problem in error.errors():
        location = _field_path(model, problem["loc"], unknown=problem["type"] == "extra_forbidden")
        path = [*([prefix] if prefix else []), *location]
        key = ".".join(path)
        value = _shown.repr(problem["input"])
        if problem["type"] == "extra_forbidden":
            section = path[0] if len(path) > 1 else ""
            if not section:
                sentence = f"unknown section {key}{nearest_section(key, '', list(fields))}"
            else:
                sentence = f"unknown key {_shorten(key, 80)} = {value}{suggestion(section, path[-1], fields)}"
        elif problem["type"] == "missing":
            sentence = f"missing {'key' if len(path) > 1 else 'section'} {key}"
        elif problem["type"] == "value_error":
            sentence = f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            if key in merged and merged[key].startswith(f"{key} = "):  # alternatives of a union
                if message not in merged[key]:
                    merged[key] += f", or {message}"
                continue
            sentence = f"{key} = {value}: {message}"
        merged[key] = f"{merged[key]}; {sentence}" if key in merged and sentence not in merged[key] else sentence
    yield from merged.items()


def report(problems: list[tuple[str, str]], where: str, given: dict[str, str]) -> str:
    """All problems in one message of limited length, each with the override or the file that causes it."""
    lines: dict[str, list[str]] = {}
    for key, sentence in problems:
        own = given.get(key)
        beside = [text for name, text in given.items() if not key or name.startswith(f"{key}.")]
        if own is not None:
            origin = f"override {own[:100]!r}"
        elif beside:  # a problem of several keys of a section
            origin = f"{where} with {' '.join(beside)[:200]}"
        else:
            origin = where
        lines.setdefault(origin, []).append(sentence)
    shown = [f"{origin}: {_shorten('; '.join(dict.fromkeys(sentences)), 600)}" for origin, sentences in lines.items()]
    rest = f"; and {len(shown) - 3} more" if len(shown) > 3 else ""
    return _shorten("; ".join(shown[:3]), 900) + rest


def _field_path(model: type[BaseModel], location: Sequence[Any], unknown: bool) -> list[str]:
    """The field names of an error's location, without the positions in lists and names of types in unions."""
    path: list[str] = []
    current: Any = model
    for part in location:
        known = isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields
        if not known:
            if unknown and isinstance(current, type) and issubclass(current, BaseModel):
                path.append(str(part))
            break
        path.append(str(part))
        current = current.model_fields[str(part)].annotation
    return path


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
