"""Which files make up a model: one rule for compiler and runtime, transformers' own, and a refusal where it is not clear."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs import weight_files
from minitron.specs.errors import UsageError, WorkError
from minitron.specs.weight_files import INDEX, SINGLE, find_weight_files, read_header, read_headers

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(path: Path, **tensors: bytes) -> Path:
    """A safetensors file of tensors of bytes."""
    header, at = {}, 0
    for name, content in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(content)], "data_offsets": [at, at + len(content)]}
        at += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(tensors.values()))
    return path


def shards(folder: Path, one: bytes = b"11", two: bytes = b"22", metadata: bool = True) -> None:
    write(folder / FIRST, a=one)
    write(folder / SECOND, b=two)
    index: dict[str, object] = {"metadata": {"total_size": 4}} if metadata else {}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": {"a": FIRST, "b": SECOND}}))


def names(folder: Path) -> list[str]:
    return [path.name for path in find_weight_files(folder).paths]


def test_shards_of_an_index_and_a_single_file(tmp_path: Path) -> None:
    shards(tmp_path)
    assert names(tmp_path) == [FIRST, SECOND] and not find_weight_files(tmp_path).remarks
    alone = tmp_path / "alone"
    alone.mkdir()
    assert find_weight_files(alone).paths == ()
    write(alone / SINGLE, a=b"1")
    assert names(alone) == [SINGLE] and not find_weight_files(alone).remarks


def test_an_index_whose_shards_are_gone_is_ignored_and_named(tmp_path: Path) -> None:
    """save_pretrained leaves it where a model that was saved in shards is saved whole."""
    shards(tmp_path)
    (tmp_path / FIRST).unlink()
    (tmp_path / SECOND).unlink()
    write(tmp_path / SINGLE, a=b"33")
    assert names(tmp_path) == [SINGLE]
    (remark,) = find_weight_files(tmp_path).remarks
    assert remark == f"the weights are those of {SINGLE}; ignored: {INDEX}, whose shards are not there"


def test_two_copies_of_one_model_are_one(tmp_path: Path) -> None:
    shards(tmp_path)
    write(tmp_path / SINGLE, a=b"11", b=b"22")
    assert names(tmp_path) == [SINGLE]
    (remark,) = find_weight_files(tmp_path).remarks
    assert remark == f"the weights are those of {SINGLE}; ignored: {INDEX}; {FIRST}, {SECOND}"


@pytest.mark.parametrize("tensors", [{"a": b"11", "b": b"23"}, {"a": b"11"}, {"a": b"11", "b": b"22", "c": b""}])
def test_two_models_in_one_folder_are_refused(tmp_path: Path, tensors: dict[str, bytes]) -> None:
    shards(tmp_path)
    write(tmp_path / SINGLE, **tensors)
    words = f"holds two models: {SINGLE} and the 2 shards of {INDEX}, which differ in [bc]; remove the one"
    with pytest.raises(WorkError, match=words):
        find_weight_files(tmp_path)


def test_other_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, a=b"11")
    for name in ("consolidated", "x", "y", "z"):
        write(tmp_path / f"{name}.safetensors", a=b"99")
    (remark,) = find_weight_files(tmp_path).remarks
    assert remark.endswith("ignored: consolidated.safetensors, x.safetensors, y.safetensors and 1 more")


def test_the_file_that_the_configuration_names_counts(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, a=b"11")
    write(tmp_path / "ema.safetensors", a=b"22")
    (tmp_path / "config.json").write_text('{"transformers_weights": "ema.safetensors"}')
    assert names(tmp_path) == ["ema.safetensors"]
    shards(tmp_path)
    (tmp_path / INDEX).rename(tmp_path / "ema.safetensors.index.json")
    (tmp_path / "config.json").write_text('{"transformers_weights": "ema.safetensors.index.json"}')
    assert names(tmp_path) == [FIRST, SECOND]


@pytest.mark.parametrize("name", ["../other.safetensors", "weights.bin", 7])
def test_a_configuration_that_names_no_weight_file(tmp_path: Path, name: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": name}))
    with pytest.raises(WorkError, match=r"as its weights \(transformers_weights\); write a \.safetensors file"):
        find_weight_files(tmp_path)


def test_a_configuration_that_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / SINGLE, a=b"11")
    (tmp_path / "config.json").write_text('{"transformers_weights": "ema.safetensors"}')
    with pytest.raises(WorkError, match=r"names ema\.safetensors as its weights .* it is not there; copy it there"):
        find_weight_files(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    write(tmp_path / SECOND, b=b"22", a=b"11")
    assert read_headers(find_weight_files(tmp_path)).keys() == {"a", "b"}
    write(tmp_path / SECOND, b=b"22", a=b"12")
    with pytest.raises(WorkError, match=f"a is in {FIRST} and, with other values, in {SECOND}; one of the files"):
        read_headers(find_weight_files(tmp_path))


def test_an_index_without_metadata(tmp_path: Path) -> None:
    shards(tmp_path, metadata=False)
    with pytest.raises(
        WorkError, match=r'has no "metadata", without which transformers does not load the model; write'
    ):
        find_weight_files(tmp_path)


@pytest.mark.parametrize("whole", [True, False], ids=["beside weights", "alone"])
def test_an_adapter_is_no_model(tmp_path: Path, whole: bool) -> None:
    if whole:
        write(tmp_path / SINGLE, a=b"11")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    words = (
        "beside its weights .* or remove the adapter_" if whole else "is an adapter of org/base .* not a whole model"
    )
    with pytest.raises(UsageError, match=words):
        find_weight_files(tmp_path)


def test_documents_without_bounds_end_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = time.monotonic()
    deep = b'{"weight_map":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    shards(tmp_path)
    (tmp_path / INDEX).write_bytes(deep)
    with pytest.raises(WorkError, match=r"is broken .*nested too deeply"):
        find_weight_files(tmp_path)
    (tmp_path / INDEX).unlink()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(deep)) + deep)
    with pytest.raises(WorkError, match=r"not a whole safetensors file \(it is nested too deeply\)"):
        read_header(tmp_path / SINGLE)
    monkeypatch.setattr(weight_files, "HEADER_LIMIT", 1000)
    with pytest.raises(WorkError, match=r"its header has \d+ bytes, and none of a model has more than 1000"):
        read_header(tmp_path / SINGLE)
    monkeypatch.setattr(weight_files, "INDEX_LIMIT", 1000)
    (tmp_path / INDEX).write_bytes(deep)
    (tmp_path / SINGLE).unlink()
    with pytest.raises(WorkError, match="larger than 1000 bytes"):
        find_weight_files(tmp_path)
    assert time.monotonic() - started < 20


def test_a_tensor_whose_bytes_are_not_those_of_its_shape(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(WorkError, match=r"a tensor of \[3\] in F32 does not have 8 bytes"):
        read_header(tmp_path / SINGLE)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"), st.binary(max_size=40))
)
def test_headers_say_where_the_bytes_are(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, bytes]) -> None:
    path = write(tmp_path_factory.mktemp("any") / SINGLE, **tensors)
    content = path.read_bytes()
    found = read_header(path)
    assert {name: content[info.start : info.start + info.nbytes] for name, info in found.items()} == tensors
