"""`minitron init --teacher`: a spec of one's own teacher and data that plans at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from minitron.cli.init_command import described
from minitron.cli.main import command_line
from minitron.specs import load_spec, recipe_names, recipe_text
from minitron.specs.data_files import resolve, sources_as_read
from minitron.specs.documents import iter_documents
from tests import models


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration without weights, and some text."""
    folder = tmp_path_factory.mktemp("own")
    models.save_teacher(folder / "teacher", models.tiny_config("llama", num_hidden_layers=2, intermediate_size=64))
    (folder / "a.txt").write_text(models.text(150))
    (folder / "b.txt").write_text(models.text(50, seed=1))
    return folder


def test_a_spec_for_a_teacher_plans_at_once(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(teacher)
    given = ["init", "--teacher", "teacher", "--target", "60%", "--data", "a.txt", "--held-out", "b.txt"]
    assert command_line([*given, "-o", "specs/own.yaml"]) == 0
    out, err = capsys.readouterr()
    assert out == "specs/own.yaml\n" and "next: minitron plan specs/own.yaml" in err
    loaded = load_spec(teacher / "specs" / "own.yaml")
    spec = loaded.spec
    assert spec.teacher.model == "../teacher" and spec.distill is not None and spec.importance.data is not None
    assert spec.distill.data.text == ("../a.txt",) == spec.importance.data.text
    assert spec.evaluate is not None and spec.evaluate.held_out is not None
    assert spec.evaluate.held_out.text == ("../b.txt",)
    assert spec.distill.sequence_length <= models.POSITIONS
    assert spec.distill.tokens // (spec.distill.sequence_length * spec.distill.global_batch_size) >= 100
    # What it says of the student is what the plan says.
    assert command_line(["plan", "specs/own.yaml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # So short a training takes the best of three rates.
    assert spec.search is not None and spec.search.rank.tokens == pytest.approx(spec.distill.tokens / 5, rel=0.1)
    assert len({one["lr"] for one in plan["search"]["candidates"]}) == 3 == len(plan["search"]["candidates"])
    share = plan["student"]["parameters"] / plan["teacher"]["parameters"]
    assert f"{100 * share:.1f}%" in err and abs(share - 0.6) < 0.15
    assert (teacher / "specs" / "minitron.schema.json").is_file()
    assert (teacher / "specs" / ".gitignore").read_text() == "builds/\n"


@pytest.mark.parametrize(
    ("name", "documents", "joined", "held", "document"),
    [
        ("many.jsonl", 2000, None, True, None),
        ("few.jsonl", 200, None, True, None),
        ("fewer.jsonl", 30, None, True, None),
        ("stories.txt", 1200, "\n\n", True, "paragraph"),
        ("one.txt", 1, "\n\n", False, "file"),
        ("one.jsonl", 3, None, False, None),
    ],
)
def test_documents_are_held_out_where_no_other_are_named(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    documents: int,
    joined: str | None,
    held: bool,
    document: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [f"{number}: {models.text(20, seed=number)}" for number in range(documents)]
    lines = [json.dumps({"text": one}) for one in texts]
    Path(name).write_text("\n".join(lines) if joined is None else joined.join(texts))
    assert command_line(["init", "--teacher", str(teacher / "teacher"), "--data", name]) == 0
    said = capsys.readouterr().err
    spec = load_spec(tmp_path / "spec.yaml").spec
    assert spec.distill is not None and spec.distill.data.document == document
    assert ("each paragraph is a document" in said) == (document == "paragraph")
    if not held:
        assert spec.evaluate is None and "name text with --held-out" in said and spec.search is None
        return
    assert spec.evaluate is not None and spec.evaluate.held_out is not None and spec.search is not None
    share = spec.evaluate.held_out.fraction
    assert share is not None and 0.01 <= share <= 0.2 and (share < 0.1 or documents < 1000)
    read = dict(sources_as_read(spec))
    sides = [len(list(iter_documents(resolve(read[at], tmp_path)))) for at in ("distill.data", "evaluate.held_out")]
    assert sum(sides) == documents and sides[1] >= (8 if documents > 100 else 2)
    assert command_line(["plan", "spec.yaml"]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"messages": []}\n', ":1: has no field `text`, and has `messages`"),
        ('{"text": "a"}\n{"text"\n', ":2: is not JSON; each line must hold one JSON object"),
        ("\n", "it has too few documents; name text with --held-out"),
    ],
)
def test_data_that_cannot_be_read_is_not_said_to_be_too_little(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text(content)
    command_line(["init", "--teacher", str(teacher / "teacher"), "--data", "data.jsonl"])
    said = capsys.readouterr().err
    reason = next(line for line in said.splitlines() if line.startswith("no share of --data could be held out: "))
    assert words in reason and ("too few documents" in said) == ("too few" in words)


@pytest.mark.parametrize(
    ("row", "option"),
    [
        (
            {"messages": [{"role": "user", "content": "TEXT"}, {"role": "assistant", "content": "TEXT"}]},
            "messages_field",
        ),
        ({"conversations": [{"role": "user", "content": "TEXT"}]}, "messages_field"),
        ({"prompt": "TEXT", "completion": "TEXT"}, "prompt_field"),
        ({"text": "TEXT", "prompt": "TEXT", "completion": "TEXT"}, None),
    ],
)
def test_the_field_of_the_documents_is_found(
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    row: dict[str, object],
    option: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher / "teacher", "chats")
    (tmp_path / "chats" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    lines = [json.dumps(row).replace("TEXT", f"the cat saw {number} birds") for number in range(200)]
    Path("rows.jsonl").write_text("\n".join(lines))
    assert command_line(["init", "--teacher", "chats", "--data", "rows.jsonl"]) == 0, capsys.readouterr().err
    data = load_spec(tmp_path / "spec.yaml").spec.distill.data  # type: ignore[union-attr]
    found = {one: getattr(data, one) for one in ("messages_field", "prompt_field") if getattr(data, one) is not None}
    assert found == ({} if option is None else {option: next(iter(row))})
    assert (f"read with `{option}: " in capsys.readouterr().err) == (option is not None)


def test_rows_without_a_usual_field(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "one"}\n')
    given = ["--teacher", str(teacher / "teacher"), "--data", str(tmp_path / "rows.jsonl")]
    assert command_line(["init", *given, "-o", str(tmp_path / "spec.yaml")]) == 2
    assert "has no field `text`; there is `body`: write one of them as `text_field`" in capsys.readouterr().err


def test_what_is_there_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".gitignore").write_text("*.tmp\n")
    assert command_line(["init", "-o", str(tmp_path / "spec.yaml")]) == 0
    assert (tmp_path / ".gitignore").read_text() == "*.tmp\n"
    assert "does not name builds/" in capsys.readouterr().err
    assert load_spec(tmp_path / "spec.yaml") and (tmp_path / "minitron.schema.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--teacher", "teacher", "--parameters", "1T"], "ask for fewer"),
        (["--teacher", "teacher", "--target", "120%"], "a student is smaller than its teacher"),
        (["--teacher", "teacher", "--target", "half"], "`half` is not a percentage; write 50%"),
        (["--teacher", "teacher", "--parameters", "0"], "write 4B"),
        (["--teacher", "teacher", "--target", "5%", "--parameters", "4B"], "one of --parameters and --target"),
        (["--teacher", "teacher", "--data", "a.txt", "--data", "b.jsonl"], "files of several kinds (jsonl, text)"),
        (["--teacher", "teachr"], "there is no folder"),
        (["--teacher", "teacher", "--data", "none.txt"], "--data none.txt: matches no file; paths are relative to"),
        (["--teacher", "teacher", "--held-out", "n*.txt"], "--held-out n*.txt: matches no file"),
        (["--target", "50%"], "say more of a --teacher"),
    ],
)
def test_wrong_calls_say_what_to_write(
    teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(teacher)
    assert command_line(["init", *arguments, "-o", "none.yaml"]) == 2
    assert words in capsys.readouterr().err
    assert not list(teacher.glob("*none*")) and not list(teacher.glob(".*none*"))


def test_recipes_are_listed_with_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["init", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipe_names())
    assert all(described(recipe_text(name)) for name in recipe_names())
