"""A run folder: what was asked (config.json), how it went (metrics.jsonl), where it stands (checkpoint.safetensors).

A run continues after a kill, bit for bit on the CPU, and refuses a folder that belongs to another configuration.
Settings, checkpoints, weights and schedules are written whole or not at all, tensors as safetensors and everything else
as JSON, never as a pickle; of a .jsonl file a half-written last line is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path as File
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT, VERSION = "fewstep.run", 1
CHECKPOINT = "checkpoint.safetensors"
CHECKPOINT_FORMAT = "fewstep.checkpoint"
WIDTH = 128  # of a line of JSON


class NotARun(ValueError):
    """A folder whose config.json is somebody else's: a diffusers model has one too."""


class Resumable(Protocol):
    step: int

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def write_json(file: File, document: Any) -> None:
    draft = File(f"{file}.part")
    draft.write_text(laid_out(document) + "\n")
    os.replace(draft, file)


def laid_out(node: Any, indent: str = "") -> str:
    """JSON to be read and compared: what fits in a line is in one, and numbers and words beside each other share theirs."""
    line, deeper = json.dumps(node), indent + " "
    if not isinstance(node, dict | list | tuple) or len(indent) + len(line) <= WIDTH:
        return line
    if isinstance(node, dict):
        values, parts = list(node.values()), [json.dumps({k: None})[1:-5] + laid_out(v, deeper) for k, v in node.items()]
    else:
        values, parts = list(node), [laid_out(each, deeper) for each in node]
    lines, plain = [parts[0]], [not isinstance(value, dict | list | tuple) for value in values]
    for k, part in enumerate(parts[1:]):
        if plain[k] and plain[k + 1] and len(deeper) + len(lines[-1]) + len(part) + 3 <= WIDTH:
            lines[-1] += f", {part}"
        else:
            lines.append(part)
    opening, closing = "{}" if isinstance(node, dict) else "[]"
    return f"{opening}\n{deeper}" + f",\n{deeper}".join(lines) + f"\n{indent}{closing}"


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits that tell these tensors from others."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)  # no bfloat16 in numpy
    return digest.hexdigest()[:16]


def open_run(folder: str | File, command: str, config: dict[str, Any], defaults: Mapping[str, Any] = {}) -> File:
    """The folder, made for this command and configuration or found to belong to them. Call it before the first write.

    Raises ValueError, as `require_free` does.
    """
    folder = require_free(folder, command, config, defaults)
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"format": FORMAT, "version": VERSION, "command": command, "config": config})
    return folder


def require_free(folder: str | File, command: str, config: dict[str, Any], defaults: Mapping[str, Any] = {}) -> File:
    """The folder, which is this command's and configuration's, or nobody's yet. Changes nothing.

    defaults: what a setting was where an older fewstep, which did not know it yet, left it out. Raises ValueError, naming the
    first difference, where the folder belongs to others or is no run folder.
    """
    folder = File(folder)
    config, defaults = json.loads(json.dumps([config, dict(defaults)]))
    found = require_place(folder, command)
    if found is None:
        return folder
    for key in sorted({*found, *config}):
        was, now = found.get(key, defaults.get(key)), config.get(key)
        if was != now:
            raise ValueError(
                f"{folder} belongs to another configuration: {key} was {was!r}, now {now!r}; give another --out, or "
                "the options that it was made with"
            )
    return folder


def require_place(folder: File, command: str) -> dict[str, Any] | None:
    """The configuration of this command's folder, None of nobody's yet. Changes nothing.

    Raises ValueError where it is another command's, no run folder, or cannot be made; for commands that have work to do before
    they know all of their configuration.
    """
    if (folder / "config.json").exists():
        found = read_config(folder)
        if found["command"] != command:
            raise ValueError(f"{folder} belongs to `fewstep {found['command']}`, not `fewstep {command}`; give another --out")
        return found["config"]
    if folder.exists() and (not folder.is_dir() or any(file.suffix != ".part" for file in folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a run folder of fewstep; give another --out")
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{folder} cannot be made: {place} is no folder that can be written to; give another --out")
    return None


def read_config(folder: str | File) -> dict[str, Any]:
    """{"command": .., "config": ..} of a run folder; raises ValueError where it is none."""
    file = File(folder) / "config.json"
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{folder} is not a run folder: it has no config.json") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise NotARun(f"{folder} is not a run folder of fewstep: its config.json is somebody else's")
    if found.get("version") != VERSION:
        raise ValueError(f"{folder} was written by version {found.get('version')} of the format; this fewstep reads {VERSION}")
    if not isinstance(found.get("command"), str) or not isinstance(found.get("config"), dict):
        raise ValueError(f"{file} is damaged: it lacks its command or its config")
    return found


def read_lines(file: File) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, without a last line that a kill left half written; none where there is no file."""
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]] if file.exists() else []


def write_lines(file: File, rows: list[dict[str, Any]]) -> None:
    draft = File(f"{file}.part")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(draft, file)


def resume(folder: File, state: Resumable, writes: bool = True) -> None:
    """Load the checkpoint, if there is one, into the state, and, if this process writes, drop what was logged after it."""
    if (folder / CHECKPOINT).exists():
        try:
            state.load_state_dict(load_tree(folder / CHECKPOINT))
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CHECKPOINT} does not fit this run ({error}); remove it to start over") from error
    file = folder / "metrics.jsonl"
    if writes:
        write_lines(file, [row for row in read_lines(file) if row["step"] <= state.step])


def record(
    folder: File,
    state: Resumable,
    metrics: Iterable[dict[str, float]],
    log_every: int = 20,
    save_every: int = 100,
    tensorboard: bool = False,
) -> Iterator[dict[str, float]]:
    """Pass a training loop's metrics on, logging means over `log_every` iterations and saving every `save_every`.

    The last iteration is saved. What was logged since the last save is dropped by `resume`, and made again. tensorboard: the
    same numbers into folder/tensorboard as well (`require_tensorboard`).
    """
    window: dict[str, list[float]] = {}
    board = summary_writer(folder / "tensorboard", state.step) if tensorboard else nullcontext()
    with open(folder / "metrics.jsonl", "a") as log, board as scalars:

        def write() -> None:
            row = {k: sum(v) / len(v) for k, v in window.items()}
            log.write(json.dumps({"step": state.step} | row) + "\n")
            log.flush()
            if scalars is not None:
                for name, value in row.items():
                    scalars.add_scalar(name, value, state.step)
                scalars.flush()
            window.clear()

        for now in metrics:
            for name, value in now.items():
                window.setdefault(name, []).append(value)
            if state.step % log_every == 0:
                write()
            if state.step % save_every == 0:
                save_tree(folder / CHECKPOINT, state.state_dict())
            yield now
        if window:
            write()
    save_tree(folder / CHECKPOINT, state.state_dict())


def require_tensorboard() -> None:
    """Raises ValueError where it is not installed; to be asked before a run's folder is made."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError("--tensorboard needs TensorBoard: pip install 'fewstep[tensorboard]'") from error


def summary_writer(folder: File, step: int) -> Any:
    """TensorBoard's writer, which drops what it was told after `step`."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def save_tree(file: File, tree: dict[str, Any]) -> None:
    """Nested dicts and lists of tensors and plain values: tensors as safetensors, the rest as JSON in its header."""
    tensors: dict[str, Tensor] = {}

    def strip(node: Any, name: str) -> Any:
        if isinstance(node, Tensor):
            tensors[name] = node.detach().cpu().contiguous().clone()  # safetensors refuses tensors that share memory
            return {"tensor": name}
        if isinstance(node, dict):
            return {"dict": [[key, strip(child, f"{name}/{key}")] for key, child in node.items()]}
        if isinstance(node, (list, tuple)):
            return {"list": [strip(child, f"{name}/{k}") for k, child in enumerate(node)]}
        return node

    header = {"version": VERSION, "tree": strip(tree, "")}
    draft = File(f"{file}.part")
    save_file(tensors, draft, metadata={CHECKPOINT_FORMAT: json.dumps(header)})  # one key: the order of several varies
    os.replace(draft, file)


def load_tree(file: File) -> dict[str, Any]:
    """What save_tree wrote, on the CPU; raises ValueError for a truncated or foreign file."""
    try:
        with safe_open(file, "pt") as stored:
            header = json.loads((stored.metadata() or {}).get(CHECKPOINT_FORMAT, "{}"))
            if header.get("version") != VERSION:
                raise ValueError(f"{file} is not a checkpoint of this version of fewstep; nothing was changed")
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file ({error}); remove it to start over") from error

    def restore(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, content),) = node.items()
        if kind == "tensor":
            return tensors[content]
        return {k: restore(child) for k, child in content} if kind == "dict" else [restore(child) for child in content]

    return restore(header["tree"])
