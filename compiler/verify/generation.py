"""The `generation` check: with a cache the student says what it says without one, as far as its teacher does."""

from __future__ import annotations

from typing import Any

import torch

from minitron.compiler.capture.models import quiet
from minitron.compiler.verify.checks import Check, exactly, skipped
from minitron.compiler.verify.comparison import Floor, compare, distance
from minitron.compiler.verify.hugging_face import NotRunnable, logits_of
from minitron.compiler.verify.routes import Routes
from minitron.specs.errors import first_line

# One from the prompt, one with the cache that the prompt left, one with the cache that a single token left.
STEPS = 3
# A student may be this many times further off its own logits than the teacher is off its own.
AS_FAR = 4.0
# Places by which the prompt is turned, to see how far the teacher is off. Where equal values are ranked (a sparse attention
# that picks keys by scores cut at zero), their order depends on how many there are, and only some prompts show it.
TURNS = (0, 1, 2, 3, 5, 8)


class CannotGenerate(NotRunnable):
    """Raised where a model that runs does not generate, with transformers' words."""


def generation(routes: Routes) -> Check:
    """Compares a few steps with a cache with the same tokens read at once. What the teacher itself cannot do is not asked."""
    name, detail = "generation", "steps with a cache against the same tokens without one"
    wrong = "with a cache the student's next tokens have other logits than without one"
    trouble = ""
    try:
        got, wanted = routes.wide.run(lambda _: steps(routes.model, routes.prompt))
    except CannotGenerate as error:
        trouble = str(error)
    if not trouble:
        check = compare(name, got, wanted, detail, routes.floor.typical(got))
        if check.passed:
            return check

    def turned(_: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [steps(routes.teacher.model, routes.prompt.roll(turn, 1)) for turn in TURNS]

    try:
        teachers = routes.teacher.wide.run(turned)
    except NotRunnable as error:
        return skipped(name, f"the teacher itself cannot: {error}")
    if trouble:
        return exactly(name, f"the teacher generates, and the student does not: {trouble}", "")
    off = max(
        float((distance(ours, theirs) / routes.teacher.floor.typical(ours).allowed).max()) for ours, theirs in teachers
    )
    floor = routes.floor.typical(got)
    return compare(name, got, wanted, detail, Floor(floor.rows * max(1.0, AS_FAR * off)), wrong=wrong)


def steps(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits [B, STEPS, V] of the most likely continuation, with a cache and without one."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()  # the folder's settings are for users
    settings = GenerationConfig(
        max_new_tokens=STEPS, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    try:
        with quiet(), torch.no_grad():
            prompt = prompt.to(model.device)
            found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)
    except Exception as error:  # modelling files raise anything
        raise CannotGenerate(f"generate() fails with {first_line(error)}") from None
    finally:
        model.generation_config = own
    return torch.stack(found.logits, 1).float().cpu(), logits_of(model, found.sequences[:, :-1])[:, -STEPS:]
