"""Whatever bit of whatever file flips, wherever a file ends too early: it is refused, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import MemoryDisk
from hypothesis import given
from hypothesis import strategies as st
from states import a_plan, alone, same, state_of

from functional_ep import restore, save
from functional_ep.checkpoint import digest, parts, verify
from functional_ep.checkpoint.folder import read_manifest
from functional_ep.sealed import seal
from sharding import Comm, Mesh, Plan, simulate, zero3

ROOT, SEED = Path("/c"), 3
MANIFEST = ROOT / "manifest.json"
ONE, OTHER = alone(), a_plan(Mesh(ep=3), dict.fromkeys(a_plan().rules, zero3("ep")))


@pytest.fixture(scope="module")
def whole() -> MemoryDisk:
    """A checkpoint of two ranks whose pieces have several blocks, with a file of the user's."""
    plan, disk = a_plan(Mesh(ep=2), dict.fromkeys(a_plan().rules, zero3("ep"))), MemoryDisk()

    def program(comm: Comm) -> None:
        state = state_of(plan, comm.rank, SEED)
        save(ROOT, state, plan, comm, files={"note": b"hello"}, metadata={"a": "b"}, disk=disk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "BLOCK", 16)
        patch.setattr(parts, "SHARE", 16)
        simulate(program, plan.mesh)
    return disk


def files(disk: MemoryDisk) -> list[Path]:
    return [ROOT / name for name in disk.names(ROOT) or ()]


def flipped(disk: MemoryDisk, path: Path, place: int, bit: int = 0) -> MemoryDisk:
    damaged = disk.after_crash(None)
    damaged.nodes[path].data[place] ^= 1 << bit
    return damaged


def error_of(disk: MemoryDisk, plan: Plan = ONE) -> str:
    """What restoring says on all ranks, or nothing if it gives the state; else it fails here."""

    def program(comm: Comm) -> str:
        try:
            found = restore(ROOT, plan, comm, disk=disk)
        except (ValueError, OSError) as error:
            return str(error)
        assert same(found, state_of(plan, comm.rank, SEED)), "wrong numbers were restored"
        return ""

    (message,) = set(simulate(program, plan.mesh))
    return message


def problems_of(disk: MemoryDisk) -> str:
    try:
        return "\n".join(verify(ROOT, disk=disk).problems)
    except (ValueError, OSError) as error:
        return str(error)


def pieces(disk: MemoryDisk) -> dict[str, dict[str, tuple[int, int]]]:
    """For each payload, the bytes of each of its tensors."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for path in files(disk):
        if path.suffix == ".safetensors":
            data = bytes(disk.nodes[path].data)
            first = 8 + int.from_bytes(data[:8], "little")
            header = json.loads(data[8:first])
            header.pop("__metadata__")
            found[path.name] = {
                name: (first + entry["data_offsets"][0], first + entry["data_offsets"][1])
                for name, entry in header.items()
            }
    return found


def test_what_is_whole_is_restored(whole: MemoryDisk) -> None:
    assert error_of(whole) == error_of(whole, OTHER) == problems_of(whole) == ""


def test_every_byte_of_every_payload_is_watched(whole: MemoryDisk) -> None:
    """Length field, header, its padding, every block: by restoring and by verifying."""
    for file, tensors in pieces(whole).items():
        for place in range(len(whole.nodes[ROOT / file].data)):
            damaged = flipped(whole, ROOT / file, place, place % 8)
            for message in (error_of(damaged), problems_of(damaged)):
                assert file in message, f"byte {place} of {file} is not watched"
                for name, (start, stop) in tensors.items():
                    if start <= place < stop:  # params/w[0:6], or a moment
                        role, leaf = name[: name.index("[")].split("/")
                        assert f"params['{leaf}'] {name[name.index('[') :]}".replace("]", "") in (
                            message.replace("]", "")
                        )
                        assert (f"moment '{role}'" in message) == (role != "params")


def test_every_byte_of_the_manifest_is_watched(whole: MemoryDisk) -> None:
    for place in range(len(whole.nodes[MANIFEST].data)):
        damaged = flipped(whole, MANIFEST, place, place * 5 % 8)
        for message in (error_of(damaged), problems_of(damaged)):
            assert "manifest.json" in message, f"byte {place} of the manifest is not watched"


@given(st.data())
def test_any_bit_anywhere_is_watched_on_another_mesh(
    whole: MemoryDisk, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from([f for f in files(whole) if not f.name.startswith("file-")]))
    place = data.draw(st.integers(0, len(whole.nodes[path].data) - 1))
    message = error_of(flipped(whole, path, place, data.draw(st.integers(0, 7))), OTHER)
    assert path.name in message


def test_a_file_of_the_user_is_watched(whole: MemoryDisk) -> None:
    (path,) = (path for path in files(whole) if path.name.startswith("file-"))
    for place in range(5):
        assert "note, is damaged" in problems_of(flipped(whole, path, place))


@given(st.data())
def test_a_file_that_ends_anywhere_is_noticed(whole: MemoryDisk, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(files(whole)))
    damaged = whole.after_crash(None)
    del damaged.nodes[path].data[data.draw(st.integers(0, len(whole.nodes[path].data) - 1)) :]
    assert path.name in problems_of(damaged)
    if not path.name.startswith("file-"):
        assert path.name in error_of(damaged) and path.name in error_of(damaged, OTHER)


@given(st.data())
def test_a_file_that_goes_on_or_is_missing_is_noticed(
    whole: MemoryDisk, data: st.DataObject
) -> None:
    path = data.draw(st.sampled_from(files(whole)))
    longer, missing = whole.after_crash(None), whole.after_crash(None)
    longer.nodes[path].data.extend(data.draw(st.binary(min_size=1, max_size=9)))
    del missing.nodes[path]
    for damaged in (longer, missing):
        message = problems_of(damaged)
        assert path.name in message or (path == MANIFEST and "no checkpoint" in message)


def test_files_of_another_run_are_noticed(whole: MemoryDisk) -> None:
    """Under their own names they are not asked for; under those of this run they do not fit."""
    names = sorted(pieces(whole))
    for one, other in zip(names, names[1:] + names[:1], strict=True):
        damaged = whole.after_crash(None)
        damaged.nodes[ROOT / one] = damaged.nodes[ROOT / other]
        assert one in error_of(damaged) and "of another run" in problems_of(damaged)


def test_without_verifying_flipped_numbers_pass_and_so_the_digests_are_what_catches_them(
    whole: MemoryDisk,
) -> None:
    file, tensors = next(iter(pieces(whole).items()))
    start, _ = tensors[next(iter(tensors))]
    damaged = flipped(whole, ROOT / file, start)

    def program(comm: Comm) -> bool:
        found = restore(ROOT, ONE, comm, verify=False, disk=damaged)
        return same(found, state_of(ONE, 0, SEED))

    assert simulate(program, ONE.mesh) == [False]


CONTRADICTIONS: dict[str, tuple[Callable[[dict], object], str]] = {  # pyright: ignore
    "a gap": (lambda m: m["leaves"][0]["tensors"]["params"]["pieces"].pop(), "pieces hold"),
    "a way out": (
        lambda m: m["payloads"].update({"../../passwd": [99, 9, ""]}),
        "is no file of a checkpoint",
    ),
    "one leaf twice": (lambda m: m["leaves"].append(m["leaves"][0]), "two leaves have one path"),
    "negative": (lambda m: m["leaves"][0]["shape"].append(-1), "is no count"),
    "a dtype": (
        lambda m: m["leaves"][0]["tensors"]["params"].update(dtype="Q7"),
        "KeyError\\('Q7'\\)",
    ),
    "no digests": (
        lambda m: m["leaves"][0]["tensors"]["params"]["pieces"][0][3].clear(),
        "digests of",
    ),
    "no file": (
        lambda m: m["leaves"][0]["tensors"]["params"]["pieces"][0].__setitem__(2, 99),
        "IndexError",
    ),
    "a step": (lambda m: m.update(step="x"), "invalid literal"),
    "a huge header": (
        lambda m: next(iter(m["payloads"].values())).__setitem__(1, 1 << 60),
        "header is longer",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_manifest_that_was_made_to_mislead_is_refused(whole: MemoryDisk, name: str) -> None:
    """Its digest is right: anyone can compute it. What it says has to hold together as well."""
    change, message = CONTRADICTIONS[name]
    body = json.loads(bytes(whole.nodes[MANIFEST].data))
    del body["digest"]
    change(body)
    damaged = whole.after_crash(None)
    damaged.nodes[MANIFEST].data[:] = seal(body)
    with pytest.raises(ValueError, match=f"manifest.json is damaged.*{message}"):
        read_manifest(ROOT, damaged)


def test_deep_nesting_and_foreign_texts_are_refused(whole: MemoryDisk) -> None:
    for text in (b"[" * 100_000, b"{}", b"\xff\xfe", b"null", b'{"format": 1}', b"9" * 10_000, b""):
        damaged = whole.after_crash(None)
        damaged.nodes[MANIFEST].data[:] = text
        with pytest.raises(
            ValueError, match=r"manifest.json is damaged, or no functional-ep check"
        ):
            read_manifest(ROOT, damaged)
