"""Wrong data, training, measurements and searches, each with the line, the path and the words that its user is shown."""

from __future__ import annotations

import pytest

from tests.specs.conftest import Errors
from tests.specs.specimens import SEARCH, SHORTEST, SMALL
from tests.specs.wrong import DISTILL, Wrong

WRONG = {
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
    "a weight that no loss can carry": Wrong(
        DISTILL + "  loss: {cross_entropy: 1e300}\n",
        "8:25",
        "distill.loss.cross_entropy",
        "`1e300` is out of range",
        "write a number of at most 1000000",
    ),
    "a temperature that flattens all": Wrong(
        DISTILL + "  loss: {logits: {temperature: 1e300}}\n",
        "8:32",
        "distill.loss.logits.temperature",
        "`1e300` is out of range",
        "write a number of at most 1000",
    ),
    "a temperature of nearly nothing": Wrong(
        DISTILL + "  loss: {logits: {temperature: 1e-300}}\n",
        "8:32",
        "distill.loss.logits.temperature",
        "`1e-300` is out of range",
        "write a number of at least 0.001",
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
    "a block of less than two sequences": Wrong(
        DISTILL + "  shuffle: {block: 5000}\n",
        "8:20",
        "distill.shuffle.block",
        "5000 tokens hold fewer than two sequences of 4096",
        "write at least 8192",
    ),
    "no order": Wrong(DISTILL + "  shuffle: al\n", "8:12", "distill.shuffle", "`al` is not", "did you mean `all`?"),
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
        "where `optimizer.states: int8` is too slow",
        "write `cpu_offload: false`, or `optimizer.states: float32`",
    ),
    "muon in host memory": Wrong(
        DISTILL + "  optimizer: {name: muon}\n  layout: {cpu_offload: true}\n",
        "9:25",
        "distill.layout.cpu_offload",
        "where `optimizer.name: muon` is too slow",
        "write `cpu_offload: false`, or `optimizer.name: adamw`",
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
        "without a temperature the 20 answers would all be the same",
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
    wrong.is_told(errors_of)
