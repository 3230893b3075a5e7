"""Twenty and more ways to write a wrong spec: each is exit code 2, the right line, and never a traceback."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from minitron.cli.main import command_line

from .tiny import SPEC, Command

# (what is wrong, the lines in place, what stands there instead, a word that the message must contain). The line that
# the message has to name is the one that ends in `#!`.
OF_THE_LANGUAGE = [
    ("misspelled block", "student:\n", "studnet: #!\n", "student"),
    ("misspelled key", "  hidden_size: 24\n", "  hiden_size: 24 #!\n", "hidden_size"),
    ("unknown key", "  dtype: float32\n", "  colour: blue #!\n", "colour"),
    ("key given twice", "  hidden_size: 24\n", "  hidden_size: 24\n  hidden_size: 16 #!\n", "hidden_size"),
    ("block given twice", "evaluate:\n", "student: {hidden_size: 8} #!\nevaluate:\n", "student"),
    ("no teacher's model", "  model: teacher\n  dtype: float32\n", "  dtype: float32\n", "model"),
    ("a boolean for a width", "  hidden_size: 24\n", "  hidden_size: off #!\n", "off"),
    ("a word for a width", "  hidden_size: 24\n", "  hidden_size: narrow #!\n", "narrow"),
    ("a negative width", "  hidden_size: 24\n", "  hidden_size: -8 #!\n", "-8"),
    ("more than all", "  hidden_size: 24\n", "  hidden_size: 120% #!\n", "120%"),
    ("an unknown unit", "  tokens: 4096\n", "  tokens: 4 crates #!\n", "crates"),
    ("no tokens", "  tokens: 4096\n", "  tokens: 0 #!\n", "0"),
    ("a list for a number", "    samples: 8\n", "    samples: [8] #!\n", "samples"),
    ("an unknown choice", "importance:\n", "importance:\n  width: {batch: l3, sequence: mean} #!\n", "l3"),
    ("a divergence that is none", "  tokens: 4096\n", "  tokens: 4096\n  loss: {logits: {divergence: kl}} #!\n", "kl"),
    ("a learning rate below zero", "{lr: 1e-3, warmup_steps: 2}\n", "{lr: -1e-3, warmup_steps: 2} #!\n", "lr"),
    ("two sources of data", "document: line}\n  tokens", "document: line, jsonl: [a.jsonl]} #!\n  tokens", "jsonl"),
    ("a base that is not there", "name: tiny\n", "extends: base.yaml #!\nname: tiny\n", "base.yaml"),
    ("not YAML", "  hidden_size: 24\n", "\thidden_size: 24 #!\n", "tab"),
    ("layers both ways", "  num_hidden_layers: 2\n", "  layers: {drop: [0], keep: [1]} #!\n", "keep"),
    ("another version", "name: tiny\n", "apiVersion: minitron/v9 #!\nname: tiny\n", "minitron/v1"),
    ("a name that is no folder", "name: tiny\n", "name: a/b #!\n", "name"),
]
OF_THE_TEACHER = [
    ("wider than the teacher", "  hidden_size: 24\n", "  hidden_size: 64 #!\n", "32"),
    ("more layers than there are", "  num_hidden_layers: 2\n", "  num_hidden_layers: 9 #!\n", "3"),
    ("a layer that is not there", "  num_hidden_layers: 2\n", "  layers: {drop: [7]} #!\n", "7"),
    ("heads that do not divide", "  hidden_size: 24\n", "  num_attention_heads: 3 #!\n", "num_attention_heads"),
    ("what RoPE cannot express", "  hidden_size: 24\n", "  head_dim: 6 #!\n", "head_dim"),
    ("what this teacher has not", "  hidden_size: 24\n", "  num_experts: 2 #!\n", "num_experts"),
    (
        "a student layer to compare that will be dropped",
        "  tokens: 4096\n",
        "  tokens: 4096\n  loss: {hidden_states: {pairs: [[2, 1], [0, 2]]}} #!\n",
        "the student has 2 layers, and no layer 2; write at most 1",
    ),
    ("a teacher that is not there", "  model: teacher\n", "  model: ./nowhere #!\n", "nowhere"),
]


def written(folder: Path, old: str, new: str) -> tuple[Path, int | None]:
    """Writes the spec with `old` replaced and returns it with the line that must be named (None: any)."""
    assert SPEC.count(old) == 1, f"{old!r} has to stand once in the spec"
    text = SPEC.replace(old, new)
    marked = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith("#!")]
    path = folder / "wrong.yaml"
    path.write_text(text)
    return path, marked[0] if marked else None


def check(code: int, out: str, err: str, path: Path, line: int | None, word: str) -> None:
    assert code == 2, err
    assert out == "" and "Traceback" not in err
    places = [int(found) for found in re.findall(rf"^{re.escape(str(path))}:(\d+):\d+: ", err, flags=re.MULTILINE)]
    assert places, err
    assert line is None or line in places, err
    assert word in err, err


@pytest.mark.parametrize(
    ("old", "new", "word"), [case[1:] for case in OF_THE_LANGUAGE], ids=[c[0] for c in OF_THE_LANGUAGE]
)
def test_the_language(minitron: Command, tmp_path: Path, old: str, new: str, word: str) -> None:
    path, line = written(tmp_path, old, new)
    done = minitron("validate", path)
    check(done.returncode, done.stdout, done.stderr, path, line, word)


@pytest.mark.parametrize(
    ("old", "new", "word"), [case[1:] for case in OF_THE_TEACHER], ids=[c[0] for c in OF_THE_TEACHER]
)
def test_what_the_teacher_cannot(
    capfd: pytest.CaptureFixture[str], workshop: Path, old: str, new: str, word: str
) -> None:
    """In this process, for the seconds that importing torch takes."""
    path, line = written(workshop, old, new)
    code = command_line(["plan", str(path)])
    check(code, *capfd.readouterr(), path, line, word)


EVERYTHING = """\
teacher:
  model: broken
  dtype: float32
  colour: blue
student:
  hidden_size: 64
  num_attention_heads: 3
  num_key_value_heads: 2
  head_dim: 6
  num_experts: 2
importance:
  data: {text: [nowhere/*.txt], samples: 8, sequence_length: 4096}
distill:
  data: {jsonl: [rows.jsonl]}
  tokens: 7
  sequence_length: 32
  global_batch_size: 8
evaluate:
  held_out: {text: [empty.txt]}
  data_dir: nowhere
"""
# What each command leaves out: `plan` needs no data, and a device that no machine has is only one to plan for.
COMMANDS = {
    ("plan", "--device", "h300"): {(12, "importance.data.text.0"), (20, "evaluate.data_dir")},
    ("compile", "--device", "cpu"): {(0, "")},
}
EVERYWHERE = {
    (2, "teacher.model", "is not a whole safetensors file"),
    (2, "teacher.model", "its tokenizer knows `"),
    (4, "teacher.colour", "unknown key"),
    (6, "student.hidden_size", "64 is not between 1 and the teacher's 32"),
    (8, "student.num_key_value_heads", "cannot share 3 query heads"),
    (9, "student.head_dim", "cannot be narrowed"),
    (10, "student.num_experts", "has no num_experts"),
    (12, "importance.data.text.0", "matches no file"),
    (12, "importance.data.sequence_length", "more than the teacher's 128 positions"),
    (14, "distill.data", "has no field `text`; did you mean `texts`?"),
    (15, "distill.tokens", "less than one global batch"),
    (19, "evaluate.held_out", "there is no document"),
    (20, "evaluate.data_dir", "there is no folder"),
    (0, "", "--device h300: not a device"),
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_all_that_is_wrong_with_call_spec_data_and_teacher_comes_in_one_go(
    capfd: pytest.CaptureFixture[str], workshop: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    shutil.copytree(workshop / "teacher", tmp_path / "broken")
    config = json.loads((tmp_path / "broken" / "config.json").read_text())
    (tmp_path / "broken" / "config.json").write_text(json.dumps(config | {"vocab_size": 8}))
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "rows.jsonl").write_text('{"texts": "a cat"}')
    (tmp_path / "empty.txt").write_text("\n")
    path = tmp_path / "wrong.yaml"
    path.write_text(EVERYTHING)
    assert command_line([*command, str(path), "--json"]) == 2
    errors = json.loads(capfd.readouterr().out)["errors"]
    expected = {one for one in EVERYWHERE if one[:2] not in COMMANDS[command]}
    for line, where, words in expected:
        assert any((one["line"], one["path"]) == (line, where) and words in one["message"] for one in errors), where
    assert len(errors) == len(expected)


@pytest.mark.parametrize(
    ("importance", "distill", "wrong"),
    [
        ("{data: {txt: [a.txt]}}", "{data: {txt: [a.txt]}, tokens: 4096}", ["importance.data.txt", "distill.data.txt"]),
        ("{dta: {text: [a.txt]}}", "{dta: {text: [a.txt]}, tokens: 4096}", ["importance.dta", "distill.dta"]),
        ("{data: {text: 5}}", "{tokens: 4096}", ["importance.data.text", "distill.data"]),
    ],
)
def test_data_that_is_written_wrong_is_not_missed_as_well(
    capfd: pytest.CaptureFixture[str], workshop: Path, importance: str, distill: str, wrong: list[str]
) -> None:
    path = workshop / "wrong.yaml"
    blocks = f"student: {{hidden_size: 24}}\nimportance: {importance}\ndistill: {distill}\n"
    path.write_text(f"teacher: {{model: teacher, dtype: float32}}\n{blocks}")
    assert command_line(["compile", str(path), "--device", "cpu", "--json"]) == 2
    errors = json.loads(capfd.readouterr().out)["errors"]
    assert set(wrong) <= {one["path"] for one in errors}
    assert not any("no file" in one["message"] or "decided by scores" in one["message"] for one in errors)


def test_a_default_in_the_place_of_a_wrong_value_is_nobody_s_mistake(
    capfd: pytest.CaptureFixture[str], workshop: Path
) -> None:
    """What is left out would be longer than this teacher reads."""
    path = workshop / "wrong.yaml"
    blocks = 'student: {hidden_size: 24}\ndistill: {data: {text: [corpus.txt]}, tokens: 100K, sequence_length: "1e2"}\n'
    path.write_text(f"teacher: {{model: teacher, dtype: float32}}\n{blocks}")
    assert command_line(["plan", str(path), "--json"]) == 2
    ((error,),) = [json.loads(capfd.readouterr().out)["errors"]]
    assert error["path"] == "distill.sequence_length" and "is text" in error["message"]


def test_all_mistakes_come_at_once_and_in_order(minitron: Command, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(SPEC.replace("name: tiny", "name: a/b").replace("size: 24", "size: off").replace("4096", "0"))
    done = minitron("validate", path)
    lines = [int(found) for found in re.findall(r"wrong\.yaml:(\d+):", done.stderr)]
    assert done.returncode == 2 and lines == sorted(lines) and len(lines) == 3
