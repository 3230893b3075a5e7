"""`evaluate.held_out: {fraction: 1%}`: whole documents by a hash, never trained on, the same wherever they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.specs import SpecInvalid, UsageError, WorkError
from minitron.specs.data import DataSource
from minitron.specs.data_files import resolve, sources_as_read
from minitron.specs.documents import Conversation, TokenIds, check_share, content_hash, iter_documents
from minitron.specs.documents.kinds import Document, Piece
from minitron.specs.documents.opening import BLOCK
from minitron.specs.documents.shares import chosen
from tests.specs.conftest import Load
from tests.specs.specimens import SMALL


def side(documents: list[Document], **share: float) -> list[Any]:
    source = DataSource(text=("a",), **share)
    return [piece.content for piece in chosen((Piece(one, "a") for one in documents), source)]


@settings(deadline=None)
@given(st.lists(st.text(min_size=1), unique=True), st.floats(0, 0.99), st.randoms())
def test_every_document_is_on_one_side_whatever_stands_beside_it(texts: list[str], share: float, draw: Any) -> None:
    documents: list[Document] = [*texts, *([Conversation([{"role": "user", "content": one}]) for one in texts])]
    held_out, trained = side(documents, only=share), side(documents, leave_out=share)
    assert len(held_out) + len(trained) == len(documents) and not [one for one in held_out if one in trained]
    turned = documents[::-1]
    draw.shuffle(turned)
    again = side(turned, only=share)
    assert all(one in again for one in held_out) and len(again) == len(held_out)


def test_the_share_is_that_of_the_documents() -> None:
    documents: list[Document] = [TokenIds([number]) if number % 2 else f"document {number}" for number in range(20_000)]
    assert abs(len(side(documents, only=0.05)) - 1000) < 4 * 31  # four standard deviations
    assert len(side(documents, only=0.0)) == 0 and len(side(documents, leave_out=0.0)) == 20_000


def test_a_long_document_goes_one_way(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Number {number}\n" + "Line of a long text\n" * (BLOCK // 5))
    texts = [file.read_text() for file in sorted(tmp_path.glob("*.txt"))]
    base = DataSource.model_validate({"text": "*.txt"})
    found = [
        list(iter_documents(resolve(base.model_copy(update=share), tmp_path)))
        for share in ({"only": 0.5}, {"leave_out": 0.5})
    ]
    assert sorted(found[0] + found[1]) == sorted(texts) and all(found)


def test_held_out_documents_are_taken_from_the_training_data(load: Load, tmp_path: Path) -> None:
    blend = (
        "distill: {data: {blend: [{weight: 1, jsonl: a.jsonl}, {weight: 1, text: b.txt, document: line}]}, tokens: 1B}"
    )
    spec = (
        SMALL.replace("distill: {data: {text: [a.txt]}, tokens: 1B}", blend) + "evaluate: {held_out: {fraction: 20%}}\n"
    )
    rows = [f"row {number}" for number in range(100)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    (tmp_path / "b.txt").write_text("\n".join(f"line {number}" for number in range(100)))
    sources = dict(sources_as_read(load(spec).spec))
    assert list(sources) == ["importance.data", "distill.data", "evaluate.held_out"]
    trained, held_out = (resolve(sources[at], tmp_path) for at in ("distill.data", "evaluate.held_out"))
    assert content_hash(trained) != content_hash(held_out)
    sides = [set(iter_documents(one)) for one in (trained, held_out)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 200 and 20 < len(sides[1]) < 60
    assert DataSource.model_validate(trained.model_dump(mode="json")) == trained, "as it stands in training.yaml"


def test_a_share_without_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one document")
    alone = resolve(DataSource.model_validate({"text": "a.txt", "only": 0.0}), tmp_path)
    with pytest.raises(
        WorkError, match=r"there is no document in `text: .*a\.txt`, of which only 0 is read; name other"
    ):
        list(iter_documents(alone))


@pytest.mark.parametrize(("share", "side"), [(0.0, "held out"), (1.0, "trained on")])
def test_a_share_that_leaves_one_side_empty(tmp_path: Path, share: float, side: str) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"document {number}" for number in range(40)))
    source = resolve(DataSource.model_validate({"text": "a.txt", "document": "paragraph"}), tmp_path)
    check_share(source, 0.5)
    with pytest.raises(UsageError, match=rf"of 40 documents in .*a\.txt` none would be {side}.*; write another share"):
        check_share(source, share)
    whole = resolve(DataSource.model_validate({"text": "a.txt"}), tmp_path)
    with pytest.raises(UsageError, match=r"of 1 document in .*`document: paragraph` or `line` makes more of a text"):
        check_share(whole, share)


@pytest.mark.parametrize(
    ("distill", "held_out", "message"),
    [
        (
            "{data: {text: [a.txt]}, tokens: 1B}",
            "{fraction: 0}",
            "0% leaves no document to hold out; write a share such as 1%",
        ),
        (
            "{data: {text: [a.txt]}, tokens: 1B}",
            "{fraction: 1%, text: b.txt}",
            "says both `fraction` and `text`; keep one",
        ),
        ("{data: {text: [a.txt]}, tokens: 1B}", "{fraction: 200%}", "write a share between 0% and 100%"),
        ("{data: {megatron: a.bin}, tokens: 1B}", "{fraction: 1%}", "no document of them can be left out; name other"),
        ("null", "{fraction: 1%}", "is a share of `distill.data`, which is missing; name a source"),
    ],
)
def test_fractions_that_are_none(load: Load, distill: str, held_out: str, message: str) -> None:
    spec = SMALL.replace("distill: {data: {text: [a.txt]}, tokens: 1B}", f"distill: {distill}")
    with pytest.raises(SpecInvalid, match=message):
        load(spec + f"evaluate: {{held_out: {held_out}}}\n")


@pytest.mark.parametrize(
    ("learnt", "held_out", "apart"),
    [
        ("leave_out: 1%", "only: 1%", True),
        ("leave_out: 2%", "only: 1%", True),
        ("only: 90%", "leave_out: 90%", True),
        ("leave_out: 1%", "only: 2%", False),
        ("leave_out: 1%", "leave_out: 1%", False),
        ("leave_out: 1%, document: line", "only: 1%", False),  # other documents of the same file
        ("on_error: skip", "only: 1%", False),
    ],
)
def test_the_shares_of_a_file_that_are_written_apart(load: Load, learnt: str, held_out: str, apart: bool) -> None:
    spec = SMALL.replace("distill: {data: {text: [a.txt]}", f"distill: {{data: {{text: [a.txt], {learnt}}}")
    spec += f"evaluate: {{held_out: {{text: [a.txt], {held_out}}}}}\n"
    if apart:
        load(spec)
    else:
        with pytest.raises(
            SpecInvalid, match=r"evaluate\.held_out: `a\.txt` is trained on as well, under `distill\.data`"
        ):
            load(spec)


def test_what_is_only_trained_on_needs_no_held_out_document(tmp_path: Path) -> None:
    """The data of a phase: documents are left out of it that are held out of the training's."""
    (tmp_path / "a.txt").write_text("one document")
    alone = resolve(DataSource.model_validate({"text": "a.txt"}), tmp_path)
    check_share(alone, 0.0, held_out=False)
    with pytest.raises(UsageError, match=r"of 1 document in .*a\.txt` none would be trained on"):
        check_share(alone, 1.0, held_out=False)
