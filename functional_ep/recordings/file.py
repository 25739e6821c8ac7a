"""A recording on disk: ``tensors.safetensors``, and ``recording.json`` that says what they are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from functional_ep.bits import digest, in_order
from functional_ep.recordings.trees import Json
from functional_ep.safetensors_file import (
    DTYPES,
    NAMES,
    make_header,
    read_header,
    read_into,
    write_from,
)
from functional_ep.sealed import Kind, seal, unseal
from sharding import Mesh
from sharding.comm import Op
from sharding.tape import Asked, Heard

# Version 1 had digests that did not see two flipped signs; 2 says of what a collective is.
KIND = Kind("functional-ep recording", 2, "Replay or compare another recording", oldest=2)
ABOUT, TENSORS = "recording.json", "tensors.safetensors"


class About(NamedTuple):
    """What ``recording.json`` says: all of a recording but the numbers, which have digests."""

    mesh: Mesh
    rank: int
    step: int
    device: str
    threads: int
    before: Json
    collectives: list[Json]
    tensors: dict[str, Json]
    result: dict[str, str]
    ended: str


def folder_of(directory: str | Path, rank: int, step: int) -> Path:
    """Where the recording of a rank in a step lies: ``rank-00003/step-00000100``."""
    return Path(directory) / f"rank-{rank:05d}" / f"step-{step:08d}"


def digests(xs: Sequence[Tensor]) -> list[str]:
    """A text for each tensor, which is another if a bit is."""
    return [f"{int(digest([x])) % 2**64:016x}" for x in xs]


def check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what the file format has no name for."""
    odd = [f"{name} ({x.dtype})" for name, x in tensors.items() if x.dtype not in NAMES]
    if odd:
        raise ValueError(f"{odd[0]}: this dtype has no place in a safetensors file")


def write(folder: Path, about: About, tensors: Mapping[str, Tensor]) -> None:
    """Write a recording, in place of one that is there; it is complete or not there at all."""
    check_dtypes(tensors)
    plain = {name: in_order(x.detach().cpu()) for name, x in tensors.items()}
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    header, places, size = make_header(part / TENSORS, plain)
    with open(part / TENSORS, "wb") as file:
        file.write(header)
        file.truncate(size)
    for place in places:
        write_from(part / TENSORS, place.start, plain[place.name])
    entries = about._replace(tensors={name: _entry(x) for name, x in tensors.items()})._asdict()
    body = {"format": KIND.format, "version": KIND.version} | entries
    (part / ABOUT).write_bytes(seal(body | {"mesh": list(about.mesh.sizes)}))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def read_about(folder: Path) -> About:
    """What a recording says of itself.

    Raises:
        ValueError: no recording, a damaged one, or one of another version.
    """
    path = folder / ABOUT
    if not path.is_file():
        raise ValueError(
            f"{folder} is no recording: it has no {ABOUT}. A recording is a folder such as "
            f"{folder_of('RUN', 3, 100)}, written by record(step, comm, 'RUN')"
        )
    return unseal(path.read_bytes(), path, KIND, _parsed)


def _parsed(body: Json) -> About:
    entries: Json = {name: x for name, x in body.items() if name not in ("format", "version")}
    entries["mesh"] = Mesh(**dict(body["mesh"]))
    return About(**entries)


def read_tensors(
    folder: Path, about: About, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Tensors of a recording, all by default, on the kind of device they came from if it is here.

    Raises:
        ValueError: a file that is not whole, or numbers that are not those that were written.
    """
    header = read_header(folder / TENSORS)
    found: dict[str, Tensor] = {}
    for name in about.tensors if names is None else names:
        if name not in header:
            raise ValueError(f"{folder / TENSORS} is not of this recording: it has no {name}")
        stored = header[name]
        x = torch.empty(stored.shape, dtype=DTYPES[stored.kind])
        read_into(stored.path, stored.start, x)
        if digests([x]) != [about.tensors[name]["digest"]]:
            raise ValueError(f"{stored} is damaged: its digest is not that of what was recorded")
        found[name] = _as_it_was(x, about.tensors[name])
    return found


def _entry(x: Tensor) -> Json:
    return {
        "digest": digests([x])[0],
        "device": x.device.type,
        "stride": list(x.stride()),
    }


def _as_it_was(x: Tensor, entry: Json) -> Tensor:
    """With its strides, by which kernels are chosen, and so the order in which they add."""
    device = entry["device"] if entry["device"] == "cpu" or torch.cuda.is_available() else "cpu"
    y = torch.empty_strided(x.shape, entry["stride"], dtype=x.dtype, device=device)
    once, source = y, x
    for dim, stride in enumerate(entry["stride"]):
        if stride == 0 and x.shape[dim] > 1:  # an expanded dim has one number
            once, source = once.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    once.copy_(source)
    return y


def of_heard(number: int, heard: Heard, tensors: dict[str, Tensor]) -> Json:
    """A collective as JSON; what was received goes to ``tensors``."""
    names: list[str] | None = None
    if heard.received is not None:
        names = [f"received/{number}/{i}" for i in range(len(heard.received))]
        tensors.update(zip(names, heard.received, strict=True))
    op, sent = heard.asked
    shapes = [[NAMES[dtype], list(shape)] for dtype, shape in sent]
    return op._asdict() | {"sent": shapes, "digests": heard.digests, "received": names}


def to_heard(entry: Json, tensors: Mapping[str, Tensor]) -> Heard:
    """The inverse of :func:`of_heard`."""
    heard = Heard(asked_of(entry), entry["digests"])
    if entry["received"] is not None and all(name in tensors for name in entry["received"]):
        heard.received = [tensors[name] for name in entry["received"]]
    return heard


def asked_of(entry: Json) -> Asked:
    """Which collective an entry is of."""
    axes, send, receive = (tuple(entry[key]) for key in ("axes", "send", "receive"))
    op = Op(entry["kind"], axes, send, receive, entry["of"])
    return Asked(op, tuple((DTYPES[kind], tuple(shape)) for kind, shape in entry["sent"]))
