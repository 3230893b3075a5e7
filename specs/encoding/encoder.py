"""Encodes pieces of documents as token ids: BOS before each document and EOS behind it, once each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from minitron.specs.documents.kinds import Conversation, Piece, TokenIds
from minitron.specs.documents.opening import BLOCK, cut
from minitron.specs.encoding.chat import Span, render
from minitron.specs.encoding.cuts import TAIL, CutRule, cut_rule
from minitron.specs.encoding.recipe import EncodingRecipe
from minitron.specs.errors import WorkError

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_NO_ID = -1


@dataclass(frozen=True)
class Encoded:
    """The tokens of a piece, uint32."""

    ids: Array
    learnt: Array | None
    """Marks the tokens whose prediction is trained, bool; None: all."""

    where: str
    ends: bool
    error: str | None = None
    """The reason why there are no tokens: the document is left out."""

    @classmethod
    def failed(cls, piece: Piece, error: WorkError) -> Encoded:
        return cls(np.zeros(0, np.uint32), None, piece.where, True, str(error))


class Encoder:
    """Applies a recipe. `tokenizer` is the one that the recipe was made from; a tokenizer written in Python is needed
    itself."""

    def __init__(self, recipe: EncodingRecipe, tokenizer: Any = None) -> None:
        self.recipe, self._python = recipe, tokenizer
        assert recipe.tokenizer is not None or tokenizer is not None

    @cached_property
    def _library(self) -> Any:
        from tokenizers import Tokenizer

        return None if self.recipe.tokenizer is None else Tokenizer.from_str(self.recipe.tokenizer)

    @cached_property
    def cut_rule(self) -> CutRule | None:
        """Returns the rule by which long texts are cut; None if they have to stay whole."""
        return None if self._library is None else cut_rule(self._library)

    def prepare(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Yields the pieces as this tokenizer can take them: long texts cut if that leaves the tokens unchanged, else
        joined."""
        kept: list[str] = []
        for piece in pieces:
            text = piece.content
            if not isinstance(text, str) or (piece.begins and piece.ends and len(text) <= 2 * BLOCK):
                yield piece
            elif self.cut_rule is None:
                kept.append(text)
                if piece.ends:
                    yield Piece("".join(kept), piece.where, lenient=piece.lenient)
                    kept = []
            else:
                parts = cut(text)
                for index, part in enumerate(parts):
                    begins, ends = piece.begins and index == 0, piece.ends and index == len(parts) - 1
                    yield Piece(part, piece.where, begins=begins, ends=ends, lenient=piece.lenient)

    def encode(self, pieces: Sequence[Piece]) -> list[Encoded]:
        """Returns the tokens of prepared pieces. WorkError, with its place, for a document that the chat template
        refuses; a lenient piece is left out instead."""
        done: list[Encoded | None] = [None] * len(pieces)
        texts: list[str] = []
        places: list[int] = []
        spans: dict[int, list[Span] | None] = {}
        for index, piece in enumerate(pieces):
            content = piece.content
            if isinstance(content, TokenIds):
                done[index] = Encoded(np.asarray(content.ids, np.uint32), None, piece.where, piece.ends)
                continue
            if isinstance(content, Conversation):
                try:
                    content, spans[index] = render(content, self.recipe, piece.where)
                except WorkError as error:
                    if not piece.lenient:
                        raise
                    done[index] = Encoded.failed(piece, error)
                    continue
            texts.append(self._whole(piece, content))
            places.append(index)
        offsets = any(one is not None for one in spans.values())
        for index, (ids, found) in zip(places, self._tokenize(texts, offsets=offsets), strict=True):
            done[index] = self._framed(pieces[index], ids, found, spans.get(index))
        return [one for one in done if one is not None]

    def _whole(self, piece: Piece, text: str) -> str:
        """Returns a part of a text with the stand-ins for its neighbouring parts."""
        if self.cut_rule is None or (piece.begins and piece.ends):
            return text
        return ("" if piece.begins else self.cut_rule.context) + text + ("" if piece.ends else TAIL)

    def _tokenize(self, texts: list[str], *, offsets: bool) -> Iterator[tuple[Array, Array | None]]:
        """Yields the ids of each text and, if asked for, the character offsets [tokens, 2] of each token."""
        if self._library is None:
            for ids in self._python(texts, add_special_tokens=False).input_ids if texts else []:
                yield np.asarray(ids, np.uint32), None
            return
        run: Callable[..., Any] = self._library.encode_batch if offsets else self._library.encode_batch_fast
        for encoding in run(texts, add_special_tokens=False):
            found = np.asarray(encoding.offsets, np.int64).reshape(-1, 2) if offsets else None
            yield np.asarray(encoding.ids, np.uint32), found

    def _framed(self, piece: Piece, ids: Array, offsets: Array | None, spans: list[Span] | None) -> Encoded:
        if not (piece.begins and piece.ends) and self.cut_rule is not None:
            before_it = () if piece.begins else self.cut_rule.tokens
            behind_it = () if piece.ends else self.cut_rule.tail
            ids, own = ids[len(before_it) : len(ids) - len(behind_it)], ids
            assert (*before_it, *ids.tolist(), *behind_it) == tuple(own.tolist()), (
                "a cut that was proved changes no token"
            )
        learnt = None if spans is None else self._learnt(piece, ids, offsets, spans)
        bos, eos = self.recipe.bos, self.recipe.eos
        before = [bos] if piece.begins and bos is not None and _first(ids) != bos else []
        after = [eos] if piece.ends and eos is not None and not self._ended(ids, piece) else []
        if learnt is not None:
            last = bool(len(learnt) and learnt[-1])
            learnt = np.concatenate([np.zeros(len(before), bool), learnt, np.full(len(after), last)])
        return Encoded(np.concatenate([before, ids, after]).astype(np.uint32), learnt, piece.where, piece.ends)

    def _learnt(self, piece: Piece, ids: Array, offsets: Array | None, spans: list[Span]) -> Array:
        """Marks the tokens that are trained on; a token that begins with a space before the assistant's first word
        belongs to the assistant."""
        if offsets is None:
            raise WorkError(
                f"{piece.where}: this tokenizer does not tell where its tokens lie in the text, so `train_on: assistant` "
                "cannot be followed; write `train_on: all`"
            )
        learnt = np.zeros(len(ids), bool)
        for start, end in spans:
            learnt |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        return learnt

    def _ended(self, ids: Array, piece: Piece) -> bool:
        """Checks whether EOS is already there: a chat template may have written it, followed by a line break."""
        if len(ids) and int(ids[-1]) == self.recipe.eos:
            return True
        if not isinstance(piece.content, Conversation):
            return False
        found = np.flatnonzero(ids == self.recipe.eos)
        return len(found) > 0 and not self._decode(ids[found[-1] + 1 :]).strip()

    def _decode(self, ids: Array) -> str:
        return str((self._library or self._python).decode(ids.tolist()))


def _first(ids: Array) -> int:
    return int(ids[0]) if len(ids) else _NO_ID
