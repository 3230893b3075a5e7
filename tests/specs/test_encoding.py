"""One framing for all: BOS and EOS once, conversations by the template, what of them is learnt, within time and memory."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minitron.specs.documents import Conversation, Piece, TokenIds
from minitron.specs.encoding import Encoded, Encoder, EncodingRecipe, recipe_of
from minitron.specs.encoding import chat as chat_module
from minitron.specs.encoding.pool import Pool, encode_all, process_memory
from minitron.specs.errors import WorkError

CHAT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on"},
    {"role": "user", "content": "a mat"},
    {"role": "assistant", "content": "while two"},
]
# ChatML with a default system message, as SmolLM2 has it.
CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
FORGETFUL = (
    "{% for m in messages %}{% if loop.last %}{{ m.content | upper }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on a mat while two dogs ran around"], trainer)
    return made


@pytest.fixture
def recipe(tokenizer: Tokenizer) -> EncodingRecipe:
    return EncodingRecipe(tokenizer.to_str(), 0, 1, MARKED, None, {"bos_token": "<s>", "eos_token": "</s>"})


def changed(recipe: EncodingRecipe, **changes: Any) -> Encoder:
    return Encoder(EncodingRecipe(**(recipe.to_json() | changes)))


def chatml(recipe: EncodingRecipe) -> Encoder:
    return changed(recipe, template=CHATML, bos=None, eos=3, special_tokens={"eos_token": "<|im_end|>"})


def one(encoder: Encoder, content: Any, **options: Any) -> Encoded:
    (encoded,) = encoder.encode([Piece(content, "a.jsonl:7", **options)])
    return encoded


def text(encoder: Encoder, encoded: Encoded) -> str:
    assert encoder.recipe.tokenizer is not None
    return str(Tokenizer.from_str(encoder.recipe.tokenizer).decode(encoded.ids.tolist(), skip_special_tokens=False))


def learnt(encoder: Encoder, encoded: Encoded) -> str:
    """What is trained on, with a bar where something is left out."""
    assert encoded.learnt is not None and encoder.recipe.tokenizer is not None
    library, parts, before = Tokenizer.from_str(encoder.recipe.tokenizer), [], False
    for id_, mark in zip(encoded.ids.tolist(), encoded.learnt.tolist(), strict=True):
        if mark:
            parts.append(("" if before else "|") + library.decode([id_], skip_special_tokens=False))
        before = mark
    return "".join(parts)


def test_text_stands_between_bos_and_eos_once_each(recipe: EncodingRecipe) -> None:
    encoder = Encoder(recipe)
    assert text(encoder, one(encoder, "the cat")) == "<s>the cat</s>"
    assert text(encoder, one(encoder, "<s>the cat</s>")) == "<s>the cat</s>"
    assert text(encoder, one(encoder, "the cat", ends=False)) == "<s>the cat"
    assert text(encoder, one(encoder, "sat", begins=False)) == "sat</s>"
    bare = changed(recipe, bos=None, eos=None)
    assert text(bare, one(bare, "the cat")) == "the cat"


def test_token_ids_are_taken_as_they_are(recipe: EncodingRecipe) -> None:
    assert one(Encoder(recipe), TokenIds([5, 6, 7])).ids.tolist() == [5, 6, 7]


def test_a_conversation_is_framed_once_whatever_the_template_writes(recipe: EncodingRecipe) -> None:
    encoder = Encoder(recipe)
    assert text(encoder, one(encoder, Conversation(CHAT[:2]))) == "<s>user: the cat</s><s>assistant: sat on</s>"
    encoder = chatml(recipe)
    shown = text(encoder, one(encoder, Conversation(CHAT[:2])))
    assert shown.endswith("<|im_start|>assistant\nsat on<|im_end|>\n"), "no second end behind the line break"
    plain = changed(recipe, template="{% for m in messages %}{{ m.content }} {% endfor %}")
    assert text(plain, one(plain, Conversation(CHAT[:2]))) == "<s>the cat sat on </s>"


@pytest.mark.parametrize("kind", ["marks", "prefixes"])
def test_the_loss_is_on_the_assistant_s_tokens(recipe: EncodingRecipe, kind: str) -> None:
    encoder, end, space = (Encoder(recipe), "</s>", " ") if kind == "marks" else (chatml(recipe), "<|im_end|>", "")
    encoded = one(encoder, Conversation(CHAT, train_on="assistant"))
    assert learnt(encoder, encoded) == f"|{space}sat on{end}|{space}while two{end}"
    assert text(encoder, encoded) == text(encoder, one(encoder, Conversation(CHAT)))
    assert one(encoder, Conversation(CHAT)).learnt is None
    assert learnt(encoder, one(encoder, Conversation(CHAT[:1], train_on="assistant"))) == ""


def test_pairs_do_without_a_template(recipe: EncodingRecipe) -> None:
    encoder = changed(recipe, template=None)
    pair = Conversation(CHAT[:2], train_on="assistant", pair=True)
    assert text(encoder, one(encoder, pair)) == "<s>the catsat on</s>"
    assert learnt(encoder, one(encoder, pair)) == "|sat on</s>"
    with pytest.raises(WorkError, match=r"a\.jsonl:7: is a conversation and the tokenizer has no chat template; add"):
        one(encoder, Conversation(CHAT))


def test_tools_have_a_template_of_their_own(recipe: EncodingRecipe) -> None:
    encoder = changed(recipe, tool_template="{{ tools[0]['name'] }}")
    assert text(encoder, one(encoder, Conversation(CHAT, tools=[{"name": "clock"}]))) == "<s>clock</s>"


def test_a_template_that_does_not_tell_what_is_whose(recipe: EncodingRecipe) -> None:
    encoder = changed(recipe, template=FORGETFUL)
    one(encoder, Conversation(CHAT))
    with pytest.raises(
        WorkError, match=r"a\.jsonl:7: the chat template does not tell .* message 2 .*write `train_on: all`"
    ):
        one(encoder, Conversation(CHAT, train_on="assistant"))


def test_a_template_that_does_not_know_contents_in_parts(recipe: EncodingRecipe) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat"}]}]
    knows = "{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}"
    encoder = changed(recipe, template=knows)
    assert text(encoder, one(encoder, Conversation(parts))) == "<s>the cat</s>"
    encoder = changed(recipe, template="{{ messages[0]['content'] }}")
    with pytest.raises(WorkError, match=r"writes a message's content, which is in parts, as a Python list: join them"):
        one(encoder, Conversation(parts))
    empty = changed(recipe, template="a[]{{ messages[1]['content'] }}")  # brackets that are not of the empty content
    assert text(empty, one(empty, Conversation([{"role": "user", "content": []}, CHAT[1]]))) == "<s>a[]sat on</s>"


def test_a_template_that_refuses_a_document(recipe: EncodingRecipe) -> None:
    encoder = changed(recipe, template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        WorkError, match=r"a\.jsonl:7: .* cannot render this document \(roles must alternate\); check its"
    ):
        one(encoder, Conversation(CHAT))
    left_out = one(encoder, Conversation(CHAT), lenient=True)
    assert not len(left_out.ids) and "roles must alternate" in str(left_out.error)


ENDLESS = (
    "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}{% endfor %}"
)
# All at once: memory that is asked for and not written to takes no time, however busy the machine is.
GREEDY = "{% set a = namespace(x='aaaaaaaa') %}{{ a.x * 400000000 }}"


def test_an_endless_template_is_ended(recipe: EncodingRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_module, "RENDER_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(WorkError, match=r"a\.jsonl:7: .* takes longer than 0\.3 seconds; check it for endless loops"):
        one(changed(recipe, template=ENDLESS), Conversation(CHAT))
    assert time.monotonic() - start < 5


def test_a_template_that_takes_all_memory_ends_in_its_own_process(recipe: EncodingRecipe) -> None:
    with pytest.raises(WorkError, match=r"a\.jsonl:7: .* takes more than 2 GiB of memory; check it for loops"):
        list(encode_all(changed(recipe, template=GREEDY), [Piece(Conversation(CHAT), "a.jsonl:7")]))


def test_several_processes_keep_the_order(recipe: EncodingRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.specs.encoding.pool._BATCH_CHARACTERS", 300)
    encoder = Encoder(recipe)

    def documents() -> Iterator[Piece]:
        for number in range(200):
            content: Any = f"the cat {number} sat on \u00e9 mat"
            if number % 7 == 3:
                content = Conversation(CHAT, train_on="assistant")
            yield Piece(TokenIds([number]) if number % 11 == 5 else content, f"a:{number}")

    def flat(batches: Iterator[list[Encoded]]) -> list[Any]:
        return [(e.where, e.ids.tolist(), None if e.learnt is None else e.learnt.tolist()) for b in batches for e in b]

    here = flat(iter([encoder.encode(list(documents()))]))
    assert flat(encode_all(encoder, documents(), processes=2, small=0)) == here
    assert flat(encode_all(encoder, documents(), processes=2, small=0, skip=150)) == here[150:]


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("wrong", ["reading", "encoding"])
def test_all_that_lies_before_an_error_comes_first(
    recipe: EncodingRecipe, monkeypatch: pytest.MonkeyPatch, processes: int, wrong: str
) -> None:
    """However far others have read ahead, and wherever batches begin: what is read before an error is always the same."""
    monkeypatch.setattr("minitron.specs.encoding.pool._BATCH_CHARACTERS", 300)

    def documents() -> Iterator[Piece]:
        for number in range(100):
            if number == 57 and wrong == "reading":
                raise WorkError("a:57: is not text")
            content: Any = f"the cat {number} sat on a mat"
            yield Piece(Conversation([{"role": 5}]) if number in (57, 58) else content, f"a:{number}")  # type: ignore[dict-item]

    found: list[str] = []
    with pytest.raises(WorkError, match="a:57"):
        for batch in encode_all(
            changed(recipe, template="{{ messages[0].role.x.y }}"), documents(), processes=processes, small=0, skip=3
        ):
            found += [encoded.where for encoded in batch]
    assert found == [f"a:{number}" for number in range(3, 57)]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read there")
def test_the_memory_of_a_process_is_what_the_plan_says(recipe: EncodingRecipe) -> None:
    """For a batch as large as they come, of bytes: what has the most tokens."""
    text = "the cat sat on a mat while two " * 16_384
    pool = Pool(Encoder(recipe), 1)
    try:
        assert len(pool._ask([Piece(text[: len(text) // 2], "a"), Piece(text[len(text) // 2 :], "b")])) == 2
        (process,) = pool.started
        status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        peak = 1024 * int(status["VmHWM"].split()[0])
    finally:
        pool.close()
    estimate = process_memory(recipe)
    assert estimate is not None and 0.5 * estimate < peak < 1.3 * estimate
    assert process_memory(replace(recipe, tokenizer=None)) is None


def test_a_reader_that_stops_early_leaves_no_process(recipe: EncodingRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    started: list[Any] = []
    real = subprocess.Popen

    def popen(*args: Any, **options: Any) -> Any:
        started.append(real(*args, **options))
        return started[-1]

    monkeypatch.setattr("minitron.specs.encoding.pool.subprocess.Popen", popen)
    monkeypatch.setattr("minitron.specs.encoding.pool._BATCH_CHARACTERS", 100)
    batches = encode_all(Encoder(recipe), (Piece("the cat", str(n)) for n in range(10**6)), processes=2, small=0)
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert started and all(process.poll() is not None for process in started)


def test_a_recipe_is_that_of_the_tokenizer(tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=MARKED)
    assert (recipe_of(fast).bos, recipe_of(fast).eos) == (None, 1), "this one puts no BOS by itself"
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.backend_tokenizer.enable_truncation(2)  # as an earlier call may have left it
    recipe = recipe_of(fast)
    assert (recipe.bos, recipe.template, recipe.tool_template) == (0, MARKED, MARKED)
    encoder = Encoder(recipe)
    fast.backend_tokenizer.no_truncation()
    whole = fast.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ours = one(encoder, Conversation(CHAT, train_on="assistant"))
    assert ours.ids.tolist() == whole["input_ids"]
    assert ours.learnt is not None and ours.learnt.tolist() == [bool(mark) for mark in whole["assistant_masks"]]


def test_a_tokenizer_in_python_is_called_as_it_is(recipe: EncodingRecipe) -> None:
    class Letters:
        def __call__(self, texts: list[str], add_special_tokens: bool) -> Any:
            assert not add_special_tokens
            return type("Encoding", (), {"input_ids": [[ord(letter) for letter in text] for text in texts]})

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    encoder = Encoder(EncodingRecipe(None, 0, 1, "{{ messages[0].content }}", None, {}), Letters())
    assert one(encoder, "ab").ids.tolist() == [0, 97, 98, 1]
    assert encoder.cut_rule is None
    (batch,) = encode_all(encoder, [Piece("ab", "x"), Piece(Conversation(CHAT), "y")])
    assert batch[1].ids.tolist() == [0, *map(ord, "the cat"), 1]
    with pytest.raises(WorkError, match="does not tell where its tokens lie in the text"):
        one(Encoder(EncodingRecipe(None, 0, 1, MARKED, None, {}), Letters()), Conversation(CHAT, train_on="assistant"))


def test_messages_travel_as_json(recipe: EncodingRecipe) -> None:
    from minitron.specs.encoding.worker import answer, read_answer, request

    assert json.loads(request([Piece("a\u2028b\n", "x:1", ends=False, lenient=True)])) == [
        ["str", "a\u2028b\n", "x:1", True, False, True]
    ]
    left_out = Encoded.failed(Piece("", "y"), WorkError("no"))
    given = [Encoded(np.asarray([1, 2], np.uint32), np.asarray([True, False]), "x", True), left_out]
    back = read_answer(io.BytesIO(answer(given)))
    assert back[0].ids.tolist() == [1, 2] and back[0].learnt is not None and back[0].learnt.tolist() == [True, False]
    assert back[1].error == "no"
