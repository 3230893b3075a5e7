"""Renders conversations with a chat template and finds the spans that the assistant wrote.

A template is a program that came with a model: it runs in the sandbox of transformers, in a process of its own
(`specs.encoding.worker`), within RENDER_SECONDS and RENDER_BYTES.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minitron.specs.documents.kinds import Conversation
from minitron.specs.encoding.recipe import EncodingRecipe
from minitron.specs.errors import WorkError, first_line

RENDER_SECONDS = 10.0
"""The time for one conversation; real templates take milliseconds."""

RENDER_BYTES = 2 << 30
"""Memory that the process may take beyond what it has when it begins to render."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
"""From one character to before another."""


def render(conversation: Conversation, recipe: EncodingRecipe, where: str) -> tuple[str, list[Span] | None]:
    """Returns the text of a conversation and the spans of the assistant; None for the spans if all tokens are trained
    on. WorkError, with the document's place, if the template refuses the conversation."""
    template = recipe.tool_template if conversation.tools else recipe.template
    spans = conversation.train_on == "assistant"
    if template is None and conversation.pair:
        prompt, completion = (str(message["content"]) for message in conversation.messages[-2:])
        system = "".join(f"{message['content']}\n\n" for message in conversation.messages[:-2])
        before = system + prompt
        return before + completion, [(len(before), len(before) + len(completion))] if spans else None
    if template is None:
        raise WorkError(
            f"{where}: is a conversation and the tokenizer has no chat template; add chat_template.jinja to the tokenizer's "
            "folder, or name a `text_field`"
        )
    with _errors(where), _time_limit():
        if not spans:
            return _rendered(conversation.messages, conversation, template, recipe), None
        if _MARKS.search(template):
            return _by_marks(conversation, template, recipe)
        return _by_prefixes(conversation, template, recipe, where)


def _rendered(
    messages: list[dict[str, Any]], conversation: Conversation, template: str, recipe: EncodingRecipe, **options: Any
) -> str:
    texts, _ = _call(messages, conversation, template, recipe, **options)
    return str(texts)


def _call(
    messages: list[dict[str, Any]], conversation: Conversation, template: str, recipe: EncodingRecipe, **options: Any
) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    # As `apply_chat_template` does: many templates write None where a key is there without a value.
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    texts, spans = render_jinja_template(
        [plain], tools=conversation.tools, chat_template=template, **options, **recipe.special_tokens
    )
    for content in (message.get("content") for message in plain):
        if isinstance(content, list | dict) and content and str(content) in texts[0]:
            raise ValueError(
                "it writes a message's content, which is in parts, as a Python list: join them to one text"
            )
    return str(texts[0]), [(int(start), int(end)) for start, end in spans[0]] if spans else []


def _by_marks(conversation: Conversation, template: str, recipe: EncodingRecipe) -> tuple[str, list[Span]]:
    """Renders a conversation and takes the assistant's spans from the template's own `{% generation %}` marks."""
    return _call(conversation.messages, conversation, template, recipe, return_assistant_tokens_mask=True)


def _by_prefixes(
    conversation: Conversation, template: str, recipe: EncodingRecipe, where: str
) -> tuple[str, list[Span]]:
    """Finds the assistant's spans by rendering prefixes: each message adds the text behind the prompt for it, provided
    that the whole text begins with that prompt."""
    messages, spans = conversation.messages, []
    whole = _rendered(messages, conversation, template, recipe)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = (
            _rendered(messages[:index], conversation, template, recipe, add_generation_prompt=True) if index else ""
        )
        after = _rendered(messages[: index + 1], conversation, template, recipe)
        if not (index and after.startswith(before) and whole.startswith(after)):
            raise WorkError(
                f"{where}: the chat template does not tell which tokens of message {index + 1} are the assistant's: it has no "
                "`generation` marks and renders the messages before it otherwise when they stand alone; write `train_on: all`"
            )
        spans.append((len(before), len(before) + len(_turn(after[len(before) :], recipe))))
    return whole, spans


def _turn(text: str, recipe: EncodingRecipe) -> str:
    """Returns an assistant's turn up to the token that ends it: the line break behind it is never generated."""
    end = recipe.special_tokens.get("eos_token")
    bare = text.rstrip()
    return bare if end and bare.endswith(end) else text


@contextmanager
def _errors(where: str) -> Iterator[None]:
    try:
        yield
    except WorkError:
        raise
    except TimeoutError:
        raise WorkError(
            f"{where}: the tokenizer's chat template takes longer than {RENDER_SECONDS:g} seconds; check it for endless loops"
        ) from None
    except MemoryError:
        raise WorkError(
            f"{where}: the tokenizer's chat template takes more than {RENDER_BYTES >> 30} GiB of memory; check it for loops"
        ) from None
    except Exception as error:  # a template is a program: it raises what it likes
        reason = first_line(error)
        raise WorkError(
            f"{where}: the tokenizer's chat template cannot render this document ({reason}); check its messages"
        ) from None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises TimeoutError if rendering takes too long. An operation that Python cannot interrupt ends the process after
    twice that time."""

    def expire(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS)
    signal.setitimer(signal.ITIMER_PROF, 2 * RENDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGALRM, before)
