"""Files of tensors with a key and a checksum: what is read is what was written, or nothing."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minitron.compiler.importance.tensor_file import read_tensors, write_tensors

TENSORS = {
    "scores": torch.arange(12, dtype=torch.float64).reshape(3, 4),
    "none": torch.zeros(0, 4),
    "one": torch.tensor(1.5, dtype=torch.bfloat16),
    "kept": torch.tensor([True, False]),
    "columns": torch.arange(6.0).reshape(2, 3).T.contiguous(),
}


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", "key", TENSORS, done="3")
    found = read_tensors(tmp_path / "file", "key")
    assert found is not None and found[1]["done"] == "3" and found[0].keys() == TENSORS.keys()
    assert all(torch.equal(found[0][name], tensor) for name, tensor in TENSORS.items())


def test_another_key_or_no_file_is_nothing(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", "key", TENSORS)
    assert read_tensors(tmp_path / "file", "other") is None and read_tensors(tmp_path / "missing", "key") is None


@given(st.data())
def test_a_changed_bit_is_noticed_wherever_it_is(tmp_path_factory: object, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("bits")  # type: ignore[attr-defined]
    write_tensors(folder / "file", "key", TENSORS, done="3")
    content = bytearray((folder / "file").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "file").write_bytes(content)
    found = read_tensors(folder / "file", "key")
    if found is not None:  # a bit of the header that says the same, such as a blank
        assert found[1]["done"] == "3" and all(torch.equal(found[0][name], TENSORS[name]) for name in TENSORS)


def test_the_same_values_in_another_shape_or_under_another_name_are_noticed(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", "key", TENSORS)
    from safetensors import safe_open

    with safe_open(tmp_path / "file", framework="pt") as handle:
        metadata = handle.metadata()
    tensors = load_file(tmp_path / "file")
    for changed in (
        tensors | {"scores": tensors["scores"].reshape(4, 3)},
        {("other" if name == "one" else name): tensor for name, tensor in tensors.items()},
    ):
        save_file(changed, tmp_path / "changed", metadata)
        assert read_tensors(tmp_path / "changed", "key") is None
