"""Wrong keys, words, numbers, teachers and widths, each with the line, the path and the words that its user is shown."""

from __future__ import annotations

import pytest

from tests.specs.conftest import Errors
from tests.specs.specimens import SHORTEST, SMALL
from tests.specs.wrong import DISTILL, Wrong

WRONG = {
    "a misspelled key": Wrong(
        SHORTEST + "recovery: {refitt: none}\n", "3:12", "recovery.refitt", "unknown key", "did you mean `refit`?"
    ),
    "a key with dots": Wrong(
        SHORTEST + "distill.optimizer.lrr: 1\n",
        "3:1",
        "distill.optimizer.lrr",
        "unknown key",
        "keys are nested: write `distill: {optimizer: {lr: ...}}`",
    ),
    "a letter of another alphabet": Wrong(
        SHORTEST + "recovery: {r\u0435fit: none}\n",
        "3:12",
        "recovery.r\u0435fit",
        "unknown key",
        "did you mean `refit`? (the `\u0435` in it is U+0435, a letter of another alphabet)",
    ),
    "a space that is none of YAML's": Wrong(
        SHORTEST + "recovery: {refit: none\u00a0}\n",
        "3:19",
        "recovery.refit",
        "`none\\xa0` is not a valid value",
        "did you mean `none`?",
    ),
    "a misspelled block": Wrong(SHORTEST + "importanse: {}\n", "3:1", "importanse", "unknown key", "`importance`"),
    "a key of another block": Wrong(SHORTEST + "tokens: 3B\n", "3:1", "tokens", "unknown key", "`distill`"),
    "a key of no block": Wrong(
        SHORTEST + "recovery:\n  qqq: 1\n",
        "4:3",
        "recovery.qqq",
        "unknown key",
        "write one of refit, merge_heads or merge_experts",
    ),
    "a vocabulary": Wrong(
        SHORTEST.replace("{layers", "{vocab_size: 8, layers"),
        "2:11",
        "student.vocab_size",
        "never changed",
        "leave it out",
    ),
    "a misspelled word": Wrong(
        SHORTEST + "recovery: {refit: least_square}\n",
        "3:19",
        "recovery.refit",
        "`least_square` is not a valid value",
        "did you mean `least_squares`? possible are none or least_squares",
    ),
    "a word that is nothing like": Wrong(
        SHORTEST + "importance: {width: {batch: max}}\n",
        "3:29",
        "importance.width.batch",
        "`max` is not a valid value",
        "write l2, mean or var",
    ),
    "another version": Wrong(
        "apiVersion: minitron/v2\n" + SHORTEST,
        "1:13",
        "apiVersion",
        "`minitron/v2` is not a valid value",
        "minitron/v1",
    ),
    "off where text belongs": Wrong(
        SHORTEST.replace("teacher}", "teacher, revision: off}"),
        "1:41",
        "teacher.revision",
        "`off` is a truth value to some YAML readers",
        'write "off" in quotes',
    ),
    "a commit that is all digits": Wrong(
        SHORTEST.replace("teacher}", "teacher, revision: 1234567}"),
        "1:41",
        "teacher.revision",
        "`1234567` is a number",
        'write "1234567" in quotes',
    ),
    "a phase that is not offered": Wrong(
        SHORTEST + "recovery: {blocks: {tokens: 1M, lr: 1e-4}}\n",
        "3:12",
        "recovery.blocks",
        "block-local distillation is not offered: at equal tokens it gave no more than",
        "leave it out, and write `hidden_states: {coordinates: kept}`",
    ),
    "yes for a truth value": Wrong(
        SHORTEST + "recovery: {merge_heads: yes}\n",
        "3:25",
        "recovery.merge_heads",
        "neither true nor false",
        "write true",
    ),
    "no for a word": Wrong(
        SHORTEST + "recovery: {refit: no}\n",
        "3:19",
        "recovery.refit",
        "`no` is not a valid value",
        "possible are none or least_squares",
    ),
    "text for a number": Wrong(
        DISTILL + "  seed: abc\n", "8:9", "distill.seed", "`abc` is not a whole number", "write a whole number"
    ),
    "a quoted number": Wrong(
        DISTILL + '  optimizer: {lr: "1e-4"}\n',
        "8:19",
        "distill.optimizer.lr",
        '"1e-4" is text',
        "write 1e-4 without quotes",
    ),
    "a fraction of a sequence": Wrong(
        DISTILL + "  sequence_length: 0.5\n",
        "8:20",
        "distill.sequence_length",
        "`0.5` is not a whole number",
        "write a whole number",
    ),
    "a wrong unit": Wrong(
        SMALL.replace("1B", "24GiB"), "5:42", "distill.tokens", "`GiB` in `24GiB` is not one of the units", "380B|8.0B"
    ),
    "a unit in small letters": Wrong(
        SMALL.replace("1B", "3b"), "5:42", "distill.tokens", "did you mean `3B`", "such as 8.0B"
    ),
    "half a token": Wrong(SMALL.replace("1B", "0.5"), "5:42", "distill.tokens", "`0.5` is not a count", "whole number"),
    "no value": Wrong(DISTILL + "  seed:\n", "8:8", "distill.seed", "nothing is written here", "write a whole number"),
    "no tokens": Wrong(
        SMALL.replace(", tokens: 1B", ""),
        "5:1",
        "distill.tokens",
        "`tokens` is missing",
        "add `tokens:` (the number of tokens",
    ),
    "no data": Wrong(
        SMALL.replace("data: {text: [a.txt]}, tok", "tok"), "5:1", "distill.data", "is missing", "add `data:`"
    ),
    "a list for a block": Wrong(
        SHORTEST + "recovery: [refit]\n", "3:1", "recovery", "a list stands here, and a mapping is wanted", "refit"
    ),
    "a word for a list": Wrong(
        DISTILL + "  optimizer: {betas: 0.9}\n", "8:22", "distill.optimizer.betas", "a list is wanted", "write ["
    ),
    "too few betas": Wrong(
        DISTILL + "  optimizer: {betas: [0.9]}\n", "8:15", "distill.optimizer.betas.1", "too short", "write two values"
    ),
    "too many in a pair": Wrong(
        DISTILL + "  loss: {hidden_states: {pairs: [[1, 2, 3]]}}\n",
        "8:34",
        "distill.loss.hidden_states.pairs.0",
        "3 values",
        "write 2",
    ),
    "an empty list": Wrong(
        SHORTEST.replace("[2]", "[]"), "2:20", "student.layers.drop", "the list is empty", "leave the key out"
    ),
    "an infinite rate": Wrong(
        DISTILL + "  optimizer: {lr: .inf}\n", "8:19", "distill.optimizer.lr", "`.inf` is not a finite number", "finite"
    ),
    "a negative warm-up": Wrong(
        DISTILL + "  optimizer: {warmup_steps: -1}\n",
        "8:29",
        "distill.optimizer.warmup_steps",
        "`-1` is out of range",
        "at least 0",
    ),
    "a beta of one": Wrong(
        DISTILL + "  optimizer: {betas: [0.9, 1.0]}\n",
        "8:28",
        "distill.optimizer.betas.1",
        "`1.0` is out of range",
        "less than 1",
    ),
    "a name that is a path": Wrong("name: ../up\n" + SHORTEST, "1:7", "name", "cannot name a build folder", "letters"),
    # widths
    "a width of nothing": Wrong(
        SMALL.replace("48", "0"), "3:24", "student.hidden_size", "0 is not a width", "such as 4096"
    ),
    "a negative width": Wrong(
        SMALL.replace("48", "-48"), "3:24", "student.hidden_size", "-48 is not a width", "such as 4096"
    ),
    "a share as a number": Wrong(
        SMALL.replace("48", "0.8"), "3:24", "student.hidden_size", "`0.8` is not a width", '"80%"'
    ),
    "more than the teacher": Wrong(
        SMALL.replace("48", "120%"), "3:24", "student.hidden_size", "`120%` is not between 0% and 100%", '"80%"'
    ),
    "a list without a search": Wrong(
        SMALL.replace("48", "[32, 48]"), "3:11", "student.hidden_size", "a list of widths needs `search`", "one width"
    ),
    "a width twice": Wrong(
        SMALL.replace("48", "[32, 32]"), "3:11", "student.hidden_size", "names a width twice", "keep one of them"
    ),
    "no target": Wrong(
        "teacher: {model: a}\nstudent: {multiple_of: 8}\n", "2:1", "student", "says no target", "hidden_size"
    ),
    "no student": Wrong("teacher: {model: a}\n", "1:1", "student", "`student` is missing", "add `student:`"),
    "no teacher": Wrong("student: {layers: {drop: [2]}}\n", "1:1", "teacher", "`teacher` is missing", "add `teacher:`"),
    "an empty teacher": Wrong(
        "teacher:\nstudent: {layers: {drop: [2]}}\n", "1:9", "teacher", "nothing is written here", "teacher:"
    ),
    "two teachers": Wrong(
        SHORTEST.replace("teacher}", "teacher, spec: b.yaml}"),
        "1:37",
        "teacher.spec",
        "both name the teacher",
        "keep one",
    ),
    "layers named twice": Wrong(
        SHORTEST.replace("[2]}", "[2]}, num_hidden_layers: 4"),
        "2:51",
        "student.num_hidden_layers",
        "already says",
        "keep",
    ),
    "layers dropped and kept": Wrong(
        SHORTEST.replace("[2]}", "[2], keep: [1]}"), "2:11", "student.layers", "both `drop` and `keep`", "write one"
    ),
    "a layer dropped twice": Wrong(
        SHORTEST.replace("[2]", "[2, 2]"), "2:20", "student.layers.drop", "layer 2 stands in the list twice", "keep one"
    ),
    "a negative layer": Wrong(
        SHORTEST.replace("[2]", "[-1]"), "2:27", "student.layers.drop.0", "`-1` is out of range", "at least 0"
    ),
    "groups that do not divide": Wrong(
        SMALL.replace("hidden_size: 48", "num_attention_heads: 8, num_key_value_heads: 3"),
        "3:56",
        "student.num_key_value_heads",
        "3 key-value groups cannot share 8 query heads",
        "such as 2",
    ),
    # data
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_one_mistake_is_one_error_at_its_place(errors_of: Errors, wrong: Wrong) -> None:
    wrong.is_told(errors_of)


MANY = """\
name: many words
teacher:
  modle: foo
  dtype: bfloat
student:
  hidden_size: [48, 64]
  intermediate_size: 0.8
  layers: {drop: [1, x]}
  layers: {keep: 1}
importance:
  width: {batch: l3}
  data: {txt: a}
recovery: 4
distill:
  data: {text: [a], jsonl: b}
  tokns: 3
  optimizer: {lr: 1e-4, min_lr: 1e-3, betas: [0.9], warmup_steps: -1}
"""


def test_all_mistakes_come_in_one_go_and_in_order(errors_of: Errors) -> None:
    errors = errors_of(MANY)
    assert [(error.line, error.path) for error in errors] == [
        (1, "name"),
        (3, "teacher.modle"),
        (4, "teacher.dtype"),
        (6, "student.hidden_size"),
        (7, "student.intermediate_size"),
        (8, "student.layers.drop.1"),
        (9, ""),
        (11, "importance.width.batch"),
        (12, "importance.data.txt"),
        (13, "recovery"),
        (15, "distill.data"),
        (16, "distill.tokns"),
        (17, "distill.optimizer.min_lr"),
        (17, "distill.optimizer.betas.1"),
        (17, "distill.optimizer.warmup_steps"),
    ]
    assert "stands twice, first at line 8" in errors[6].message


def test_a_mistake_hides_what_only_follows_from_it(errors_of: Errors) -> None:
    """Without its misspelled `hidden_size` the student has no target, and `tokens` is not missing but misspelled."""
    text = SMALL.replace("hidden_size", "hiden_size").replace("tokens", "tokns")
    assert [error.path for error in errors_of(text)] == ["student.hiden_size", "distill.tokns"]
