"""A long text is cut between lines only where its tokens stay the same; tokenizers of all kinds, over real text."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from minitron.specs.documents import Piece
from minitron.specs.documents import opening as opening
from minitron.specs.encoding.cuts import cut_rule
from minitron.specs.encoding.encoder import Encoder
from minitron.specs.encoding.patterns import crosses, splits_line
from minitron.specs.encoding.recipe import EncodingRecipe

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
EXPRESSIONS = {
    "digits kept in threes": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + END,
    "case by case": rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    rf"{CONTRACTIONS}?|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|" + END,
    "punctuation before words": r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + END,
}


def split(expression: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior)


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


def corpus() -> list[str]:
    from minitron.specs.stdlib_corpus import stdlib_files

    return [file.read_text(encoding="utf-8") for file in stdlib_files("held_out")[:12]]


def trained(pre_tokenizer: Any = None, normalizer: Any = None, model: Any = None, **options: Any) -> Tokenizer:
    tokenizer = Tokenizer(model or models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    options = {
        "vocab_size": 600,
        "initial_alphabet": ["\n", *pre_tokenizers.ByteLevel.alphabet()],
        "special_tokens": ["<unk>", "<s>", "</s>"],
        "show_progress": False,
    } | options
    kind = trainers.UnigramTrainer if isinstance(model, models.Unigram) else trainers.BpeTrainer
    tokenizer.train_from_iterator([line for text in corpus()[:4] for line in text.splitlines()], kind(**options))
    return tokenizer


def sentencepiece(*, line_break: bool = True, **changes: Any) -> Tokenizer:
    """As Llama 2 and Gemma have it: one word without a pre-tokenizer, bytes for what is not in the vocabulary."""
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    spaces = trained(pre_tokenizers.Metaspace(), special_tokens=["<unk>", "<s>", "</s>", *bytes_], vocab_size=900)
    import json

    document = json.loads(spaces.to_str())
    document["pre_tokenizer"], document["normalizer"] = None, json.loads(_wrapped(marks))["normalizer"]
    document["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True} | changes
    document["added_tokens"] = document["added_tokens"][:3]
    if not line_break:
        document["model"]["vocab"] = {token: id for token, id in document["model"]["vocab"].items() if token != "\n"}
    return Tokenizer.from_str(json.dumps(document))


def _wrapped(normalizer: Any) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    return str(tokenizer.to_str())


SAFE: dict[str, Any] = {
    "bytes": lambda: trained(byte_level()),
    "a space in front": lambda: trained(byte_level(add_prefix_space=True)),
    "bytes and single digits": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    **{
        name: lambda expression=expression: trained(
            pre_tokenizers.Sequence(
                [split(r"\p{N}{1,3}"), split("[一-龥]+"), split(expression), byte_level(use_regex=False)]
            )
        )
        for name, expression in EXPRESSIONS.items()
    },
    "composed": lambda: trained(split(EXPRESSIONS["case by case"]), normalizers.NFC()),
    "one word with bytes": sentencepiece,
    "spaces before words": lambda: trained(
        pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")
    ),
    "a mark in front": lambda: trained(pre_tokenizers.Metaspace(prepend_scheme="first", split=True)),
}

PREFIXED = ("a space in front", "one word with bytes", "a mark in front")


@pytest.fixture(scope="module", params=SAFE)
def safe(request: pytest.FixtureRequest) -> Encoder:
    tokenizer = SAFE[request.param]()
    tokenizer.add_special_tokens([AddedToken("<|end|>", lstrip=True, rstrip=request.param not in PREFIXED)])
    return encoder(tokenizer)


def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(EncodingRecipe(tokenizer.to_str(), 1, 2, None, None, {}))


def tokens(encoder: Encoder, text: str, **prepared: Any) -> list[int]:
    pieces = list(encoder.prepare([Piece(text, "text")])) if not prepared else [Piece(text, "text")]
    return [token for one in encoder.encode(pieces) for token in one.ids.tolist()]


def small(monkeypatch: pytest.MonkeyPatch, characters: int) -> None:
    monkeypatch.setattr(opening, "BLOCK", characters)
    monkeypatch.setattr("minitron.specs.encoding.encoder.BLOCK", characters)


def test_cutting_real_text_changes_no_token(safe: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 40)
    assert safe.cut_rule is not None
    cuts = 0
    for text in [
        *corpus(),
        "One<|end|>\nTwo <|end|> \nThree\n<|end|>\nfour\n" * 50,
        "a\r\nb\r\n" * 100,
        "One.\n\nTwo\n \n\nThree\n  \nfour!\n\n\n" * 60,
    ]:
        cuts += len(opening.cut(text))
        assert tokens(safe, text) == tokens(safe, text, whole=True)
    assert cuts > 250


PIECES = [
    "a",
    "Zz",
    "\n",
    "\n\n",
    " ",
    "\t",
    "\r",
    ".",
    "'s",
    "12",
    "é",
    "e\u0301",
    "中",
    "_",
    "<s>",
    "<|end|>",
    "</",
    "\u2028",
    "=>",
]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=12, max_size=60))
@example(["a", "\n", "Zz"] * 12)
def test_no_text_is_changed_by_a_cut(safe: Encoder, parts: list[str]) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        small(patch, 3)
        assert tokens(safe, text) == tokens(safe, text, whole=True)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: trained(split(r"\s?\p{L}+|\s+|[^\s\p{L}]+"), vocab_size=3000), id="a match over lines"),
        pytest.param(lambda: trained(split(r"[^ ]+| +")), id="words with line breaks"),
        pytest.param(lambda: trained(split(r"(?<=a)b|\s|\S")), id="looks behind"),
        pytest.param(lambda: trained(split(r"\n", "merged_with_next")), id="line breaks before words"),
        pytest.param(lambda: trained(byte_level(), normalizers.Strip()), id="stripped"),
        pytest.param(lambda: trained(byte_level(), normalizers.Replace(Regex(r"\s+"), " ")), id="spaces merged"),
        pytest.param(lambda: sentencepiece(byte_fallback=False, line_break=False), id="unknown characters merged"),
        pytest.param(lambda: trained(None, None, models.Unigram(), unk_token="<unk>"), id="unigram"),
        pytest.param(lambda: trained(None, vocab_size=3000), id="merges over lines"),
    ],
)
def test_where_it_cannot_be_proved_a_text_stays_whole(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make()
    if (
        tokenizer.pre_tokenizer is None
        and isinstance(tokenizer.model, models.BPE)
        and tokenizer.model.unk_token is None
    ):
        text = "".join(f"{word}\n{word}" for word in ["word", "other"]) * 40
        tokenizer.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    whole = encoder(tokenizer)
    assert whole.cut_rule is None
    small(monkeypatch, 10)
    text = "First line\nSecond line\nThird line\n" * 5
    halves = [Piece(text[:11], "text", ends=False), Piece(text[11:], "text", begins=False)]
    assert [piece.content for piece in whole.prepare(halves)] == [text]


def test_an_added_token_that_holds_a_cut() -> None:
    tokenizer = trained(byte_level())
    assert cut_rule(tokenizer) is not None
    tokenizer.add_tokens([AddedToken("\nUser", normalized=False)])
    assert cut_rule(tokenizer) is None


@pytest.mark.parametrize(
    ("expression", "joins"),
    [
        (r"\n?[a-z]", True),
        (r"(\n|x)+y?z", True),
        (r"[^a]{2}", True),
        (r"[^a]", False),
        (r"\n[0-9]+[a-z]", False),
        (r"\n[0-9]*[a-z]", True),
        (r"(?:\r\n|\n)", False),
        (r"(?:a|\n){1,2}", True),
        (r"[^\W\d]+|\s+(?=\S)", False),
        (r"a(?=b)", None),
        (r"^a", None),
        (r"\ba", None),
        (r"(a)\1", None),
        (r"[a[b]]", None),
        (r"(?<!a)b", None),
        (r"[a", None),
        (r"(?x) a", None),
        (r"\p{L", None),
    ],
)
def test_expressions_as_far_as_a_cut_asks_for_them(expression: str, joins: bool | None) -> None:
    assert crosses(expression) is joins
    assert splits_line(expression) is (expression == r"[^\W\d]+|\s+(?=\S)"), "the others do not match every letter"


def test_no_match_that_is_said_not_to_cross_does(safe: Encoder) -> None:
    """Against the expressions themselves: over random texts, every place of a cut is the end of a match."""
    import regex

    draw = random.Random(0)
    for expression in EXPRESSIONS.values():
        compiled = regex.compile(expression)
        for _ in range(300):
            text = "".join(draw.choice(PIECES) for _ in range(30))
            ends = {found.end() for found in compiled.finditer(text)}
            assert all(found.start() in ends for found in re.finditer(r"(?<=\n)(?=[A-Za-z])", text))


@pytest.mark.shared
def test_a_real_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("no ../shared/data")
    real = encoder(Tokenizer.from_file(str(shared / "stories260K" / "tokenizer.json")))
    assert real.cut_rule is not None and real.cut_rule.context == "\n"
    small(monkeypatch, 500)
    text = (shared / "text" / "tinystories_sample.txt").read_text()
    assert tokens(real, text) == tokens(real, text, whole=True)
