"""Wrong specs, each with the line, the path and the words that its user is shown."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from tests.specs.conftest import Errors
from tests.specs.specimens import SEARCH, SHORTEST, SMALL


class Wrong(NamedTuple):
    """A spec and its one error; `place` is line:column."""

    text: str
    place: str
    path: str
    message: str
    hint: str


DISTILL = SMALL.replace(
    "distill: {data: {text: [a.txt]}, tokens: 1B}", "distill:\n  data: {text: [a.txt]}\n  tokens: 1B"
)

WRONG = {
    "a misspelled key": Wrong(
        SHORTEST + "recovery: {refitt: none}\n", "3:12", "recovery.refitt", "unknown key", "did you mean `refit`?"
    ),
    "a misspelled block": Wrong(SHORTEST + "importanse: {}\n", "3:1", "importanse", "unknown key", "`importance`"),
    "a key of another block": Wrong(SHORTEST + "tokens: 3B\n", "3:1", "tokens", "unknown key", "`distill`"),
    "a key of no block": Wrong(
        SHORTEST + "recovery:\n  qqq: 1\n", "4:3", "recovery.qqq", "unknown key", "write one of refit or merge_heads"
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
        SMALL.replace(", tokens: 1B", ""), "5:1", "distill.tokens", "`tokens` is missing", "add `tokens:` (how many"
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
    "two sources": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {text: [a.txt], jsonl: b.jsonl}, tok"),
        "5:11",
        "distill.data",
        "says `text` and `jsonl`",
        "keep one of them",
    ),
    "no source": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {}, tok"),
        "5:11",
        "distill.data",
        "no source",
        "write one of text, jsonl, parquet, dataset, megatron or blend",
    ),
    "a misspelled source": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {txt: [a.txt]}, tok"),
        "5:18",
        "distill.data.txt",
        "unknown key",
        "did you mean `text`?",
    ),
    "an option of another source": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {jsonl: b.jsonl, document: line}, tok"),
        "5:11",
        "distill.data",
        "`document` goes with `text`, not with `jsonl`",
        "leave it out",
    ),
    "text and messages": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {jsonl: b, text_field: a, messages_field: b}, tok"),
        "5:11",
        "distill.data",
        "both `text_field` and `messages_field`",
        "keep one",
    ),
    "an unknown part of the library": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", '{data: {text: ["python-stdlib:heldout"]}, tok'),
        "5:25",
        "distill.data.text.0",
        "no part `heldout`",
        "did you mean `python-stdlib:held_out`?",
    ),
    "a weight of zero": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {blend: [{weight: 0, text: a}]}, tok"),
        "5:35",
        "distill.data.blend.0.weight",
        "`0` is out of range",
        "greater than 0",
    ),
    "a blend in a blend": Wrong(
        SMALL.replace("{data: {text: [a.txt]}, tok", "{data: {blend: [{weight: 1, blend: []}]}, tok"),
        "5:38",
        "distill.data.blend.0.blend",
        "unknown key",
        "it belongs under",
    ),
    "held-out text that is trained on": Wrong(
        SMALL + "evaluate: {held_out: {text: [a.txt]}}\n",
        "6:12",
        "evaluate.held_out",
        "`a.txt` is trained on as well",
        "nothing is trained on",
    ),
    # training
    "a rate that rises": Wrong(
        DISTILL + "  optimizer: {lr: 1e-4, min_lr: 1e-3}\n",
        "8:33",
        "distill.optimizer.min_lr",
        "0.001 is higher than `lr`, 0.0001",
        "write at most 0.0001",
    ),
    "less than a batch": Wrong(
        SMALL.replace("1B", "1K"), "5:42", "distill.tokens", "1 x 4096 = 4096 tokens", "at least 4096"
    ),
    "a replicated student in host memory": Wrong(
        DISTILL + "  layout: {student: replicated, cpu_offload: true}\n",
        "8:46",
        "distill.layout.cpu_offload",
        "a student that is replicated stays on its device",
        "write `student: sharded`",
    ),
    "narrow moments in host memory": Wrong(
        DISTILL + "  optimizer: {states: int8}\n  layout: {cpu_offload: true}\n",
        "9:25",
        "distill.layout.cpu_offload",
        "`optimizer.states` is narrow so that it can",
        "write `cpu_offload: false`, or float32 for optimizer.states",
    ),
    "a word for recomputation": Wrong(
        DISTILL + "  gradient_checkpointing: layers\n",
        "8:27",
        "distill.gradient_checkpointing",
        "`layers` is not a valid value",
        "write true, attention or false",
    ),
    "nothing to learn": Wrong(
        DISTILL + "  loss: {logits: {weight: 0}}\n", "8:3", "distill.loss", "every weight is 0", "weight: 1.0"
    ),
    "samples for what needs the whole distribution": Wrong(
        DISTILL + "  teacher_logits: {sampled: 12}\n  loss: {logits: {divergence: jsd}}\n",
        "9:31",
        "distill.loss.logits.divergence",
        "`jsd` needs the teacher's whole distribution, and `teacher_logits` are samples",
        "write forward_kl, or `teacher_logits: online`",
    ),
    "samples for what needs the teacher itself": Wrong(
        DISTILL + "  teacher_logits: {sampled: 12}\n  loss: {hidden_states: {}}\n",
        "9:10",
        "distill.loss.hidden_states",
        "hidden states need the teacher itself",
        "write null, or `teacher_logits: online`",
    ),
    "more samples than are counted": Wrong(
        DISTILL + "  teacher_logits: {sampled: 100000}\n",
        "8:29",
        "distill.teacher_logits.sampled",
        "100000",
        "65535",
    ),
    "a pair of layers twice": Wrong(
        DISTILL + "  loss: {hidden_states: {pairs: [[1, 1], [2, 2], [1, 1]]}}\n",
        "8:50",
        "distill.loss.hidden_states.pairs.2",
        "[1, 1] stands in the list twice",
        "keep one of them",
    ),
    "a dynamic weight of nothing": Wrong(
        DISTILL + "  loss: {logits: {weight: 0}, hidden_states: {}}\n",
        "8:31",
        "distill.loss.hidden_states.weight",
        "scaled to the logit loss, whose weight is 0",
        "write a number",
    ),
    "a misspelled alternative": Wrong(
        DISTILL + "  teacher_logits: onlin\n",
        "8:19",
        "distill.teacher_logits",
        "`onlin` is not a valid value",
        "did you mean `online`? write online or {sampled: 12}",
    ),
    "a misspelled suite": Wrong(
        SHORTEST + "evaluate: {suite: minitron9}\n",
        "3:19",
        "evaluate.suite",
        "`minitron9`",
        "did you mean `minitron-9`?",
    ),
    "a requirement that is no bound": Wrong(
        SHORTEST + "evaluate: {suite: [mmlu], require: {mmlu: 0.95}}\n",
        "3:43",
        "evaluate.require.mmlu",
        "`0.95` is not a bound",
        'write ">= 0.95x teacher"',
    ),
    "a requirement of what is not measured": Wrong(
        SHORTEST + "evaluate: {suite: [mmlu], require: {mmul: '>= 0.6'}}\n",
        "3:43",
        "evaluate.require.mmul",
        "is not measured",
        "did you mean `mmlu`? write one of held_out_loss, recovered, mmlu",
    ),
    "a loss that must be reached on no text": Wrong(
        SHORTEST + "evaluate: {require: {held_out_loss: '<= 1.05x teacher'}}\n",
        "3:37",
        "evaluate.require.held_out_loss",
        "needs held-out text",
        "add `held_out: {text: [valid.txt]}`",
    ),
    "a benchmark twice": Wrong(
        SHORTEST + "evaluate: {suite: [mmlu, {task: mmlu, shots: 5}]}\n",
        "3:26",
        "evaluate.suite.1",
        "`mmlu` stands in the list twice",
        "keep one of them",
    ),
    "many equal answers": Wrong(
        SHORTEST + "evaluate: {suite: [{task: humaneval, samples: 20}]}\n",
        "3:20",
        "evaluate.suite.0",
        "20 answers that are the most likely ones are all the same",
        "add `temperature: 0.2`",
    ),
    "a benchmark that is a number": Wrong(
        SHORTEST + "evaluate: {suite: [5]}\n",
        "3:20",
        "evaluate.suite.0",
        "`5` is not a benchmark",
        "write a task such as",
    ),
    "requirements in a list": Wrong(
        SHORTEST + "evaluate: {require: [mmlu]}\n",
        "3:12",
        "evaluate.require",
        "a mapping is wanted",
        "write `key: value`",
    ),
    "no budget": Wrong(
        SMALL.replace("48", "[32, 48]") + SEARCH.replace("memory: 1GiB", ""),
        "6:10",
        "search.budget",
        "says no limit",
        "`parameters`",
    ),
    "a search without data": Wrong(
        SMALL.replace("48", "[32, 48]").replace("distill: {data: {text: [a.txt]}, tokens: 1B}", "") + SEARCH,
        "6:1",
        "search",
        "trains on the data of `distill`",
        "add `distill:`",
    ),
    "a correction of less than a batch": Wrong(
        SMALL + "teacher_correction: {tokens: 1K}\n",
        "6:30",
        "teacher_correction.tokens",
        "1K tokens",
        "at least 3145728",
    ),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_one_mistake_is_one_error_at_its_place(errors_of: Errors, wrong: Wrong) -> None:
    errors = errors_of(wrong.text)
    assert [error.path for error in errors] == [wrong.path]
    (error,) = errors
    assert f"{error.line}:{error.column}" == wrong.place, str(error)
    assert wrong.message in error.message
    assert any(hint in error.hint for hint in wrong.hint.split("|")), error.hint


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_messages_speak_the_language_of_the_spec(errors_of: Errors, wrong: Wrong) -> None:
    shown = str(errors_of(wrong.text)[0])
    assert not re.search(r"pydantic|Input should|validation error|https?://|<word>|<longer>|class|None", shown)
    assert re.match(r".*spec\.yaml:\d+:\d+: [\w.]+: \S.*; \S", shown)


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
