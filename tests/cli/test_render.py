"""One document, the same words in the same order in every rendering."""

from __future__ import annotations

import io
import json
import re
from typing import Any

from rich.console import Console

from minitron.cli.build_sections import training_section, verification_section
from minitron.cli.markdown import markdown
from minitron.cli.plan_sections import plan_sections
from minitron.cli.render import document, terminal
from minitron.cli.results_sections import results_sections
from minitron.cli.sections import Section
from minitron.cli.text import printable

WORD = re.compile(r"[\w.,%]+")


def on_terminal(sections: list[Section], width: int = 200) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(terminal(sections))
    return stream.getvalue()


def row(text: str, label: str) -> list[str]:
    """The cells of the line that begins with `label`, in either rendering."""
    line = next(one for one in text.splitlines() if one.strip(" |").startswith(label))
    return [cell.strip() for cell in re.split(r"\s{2,}|\|", line) if cell.strip()]


def test_terminal_and_markdown_say_the_same_in_the_same_order(plan: dict[str, Any], results: dict[str, Any]) -> None:
    sections = [*plan_sections(plan), *results_sections(results)]
    plain = WORD.findall(on_terminal(sections, width=400))
    assert len(plain) > 100
    assert plain == WORD.findall(re.sub(r"\\(.)", r"\1", markdown(sections)))


def test_a_plan_puts_teacher_and_student_side_by_side(plan: dict[str, Any]) -> None:
    text = on_terminal(plan_sections(plan))
    assert row(text, "hidden_size") == ["hidden_size", "64", "48", "75.0%"]
    assert row(text, "intermediate_size") == ["intermediate_size", "172", "128 x2, 96 x2", "65.1%"]
    assert row(text, "num_hidden_layers") == ["num_hidden_layers", "5", "4", "80.0%"]
    assert row(text, "parameters ") == ["parameters", "260,032", "130,016", "50.0%"]
    assert row(text, "parameters without") == ["parameters without embeddings", "227,264", "113,632", "50.0%"]
    assert row(text, "parameters active") == ["parameters active per token", "260,032", "130,016", "50.0%"]
    assert row(text, "weights") == ["weights", "1016 KiB", "508 KiB", "50.0%"]
    assert row(text, "KV cache") == ["KV cache per token", "1.25 KiB", "1.00 KiB", "80.0%"]
    assert row(text, "FLOPs per token") == ["FLOPs per token", "520k", "260k", "50.0%"]


def test_axes_have_a_status_and_a_reason_and_phases_their_costs(plan: dict[str, Any]) -> None:
    text = on_terminal(plan_sections(plan))
    assert row(text, "head_dim") == ["head_dim", "8", "8", "refused", "cos and sin are a buffer"]
    assert row(text, "calibrate") == ["calibrate", "65,536", "34.0G", "12.0 MiB", "0.004"]
    assert row(text, "distill") == ["distill", "3,000,000", "4.20T", "-", "-"]


def test_remarks_stand_below_the_models(plan: dict[str, Any]) -> None:
    assert plan_sections(plan)[0].notes == (f"spec /specs/tiny.yaml, sha256 {'ab' * 6}", "no weight files are there")
    plan["teacher"]["model"] = "org/large"
    assert plan_sections(plan)[0].notes[1] == "teacher org/large"
    plan["teacher"]["commit"] = "0123456789abcdef" * 2
    assert plan_sections(plan)[0].notes[1] == "teacher org/large at commit 0123456789ab"
    plan["spec"]["pins"] = {"teacher.revision": plan["teacher"]["commit"]}
    assert plan_sections(plan)[0].notes[1].endswith("0123456789ab, pinned by the lock file")
    plan["phases"][0]["device"] = "a card"
    assert "device-hours of a card" in on_terminal(plan_sections(plan))


def test_the_selection_is_shown_once_made_and_whether_it_fits_where_a_device_was_named(plan: dict[str, Any]) -> None:
    titles = [section.title for section in plan_sections(plan)]
    assert titles == ["Plan tiny", "Axes", "Phases", "Selection"]
    plan["costs"] = [{"name": "distill: gradients per device", "value": 2**30, "unit": "bytes", "basis": "exact"}]
    plan["fits"] = {"device": "h200x8", "ok": False, "nearest": "distill.micro_batch_size: 1", "reason": "too much"}
    del plan["selection"]
    sections = plan_sections(plan)
    assert [section.title for section in sections] == ["Plan tiny", "Axes", "Phases", "Costs", "Fits"]
    assert row(on_terminal(sections), "distill: gradients per device")[1:3] == ["1.00 GiB", "exact"]
    assert sections[-1].notes == (
        "does not fit h200x8: too much",
        "the nearest change that fits: distill.micro_batch_size: 1",
    )
    plan["fits"]["nearest"] = None
    assert plan_sections(plan)[-1].notes[-1] == "no change that was tried makes it fit"
    plan["fits"]["ok"] = True
    assert plan_sections(plan)[-1].notes == ("fits h200x8",)
    plan["fits"]["device"] = "this"
    assert plan_sections(plan)[-1].notes == ("fits this machine",)


def test_results_stand_in_the_order_teacher_pruned_distilled(results: dict[str, Any]) -> None:
    text = on_terminal(results_sections(results))
    assert row(text, "teacher") == ["teacher", "pruned", "distilled"]
    assert row(text, "held-out loss") == ["held-out loss", "1.25", "3.75", "1.5"]
    assert row(text, "held-out perplexity") == ["held-out perplexity", "3.49", "42.52", "4.482"]
    assert row(text, "tokens per second") == ["tokens per second", "1,400", "2,100", "2,100"]
    assert row(text, "benchmark") == ["benchmark", "shots", "teacher", "pruned", "distilled", "of teacher"]
    assert row(text, "arc") == ["arc (acc)", "25", "0.3", "-", "0.25 ± 0.013", "83.3%"]
    assert "published" not in text


def test_published_scores_stand_beside_ours(results: dict[str, Any]) -> None:
    results["published"] = {"source": "a paper, table 1", "scores": {"arc": 0.644}}
    text = on_terminal(results_sections(results))
    assert row(text, "arc")[-1] == "0.644" and "published: a paper, table 1" in text
    assert "recovered: 90.0% of the loss that pruning cost" in text
    assert row(text, "prompt") == ["prompt", "Once upon a time"]


def test_results_without_training_or_held_out_text_leave_them_out(results: dict[str, Any]) -> None:
    del results["models"]["distilled"], results["prompt"]
    results["recovered"] = None
    for model in results["models"].values():
        del model["held_out"]
    text = on_terminal(results_sections(results))
    assert row(text, "teacher") == ["teacher", "pruned"]
    assert "held-out" not in text and "recovered" not in text and "Continuations" not in text


def test_what_a_model_writes_is_neither_markup_nor_a_control_sequence(results: dict[str, Any]) -> None:
    sections = results_sections(results)
    assert "[bold]girl[/bold]\N{REPLACEMENT CHARACTER}[31m" in on_terminal(sections)
    assert "\x1b" not in on_terminal(sections) + markdown(sections)
    assert printable("a\r\nb\x07") == "a\N{REPLACEMENT CHARACTER}\nb\N{REPLACEMENT CHARACTER}"


def test_markdown_cells_cannot_leave_their_cell(plan: dict[str, Any], results: dict[str, Any]) -> None:
    results["models"]["pruned"]["continuation"] = "one\ntwo | three"
    text = markdown([*plan_sections(plan), *results_sections(results)])
    assert "one<br>two \\| three |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_a_failed_check_stands_out(verification: dict[str, Any]) -> None:
    assert "all checks passed" in on_terminal([verification_section(verification)])
    verification["passed"] = verification["checks"][0]["passed"] = False
    text = on_terminal([verification_section(verification)])
    assert row(text, "widths")[:2] == ["widths", "FAILED"]
    assert "verification FAILED" in text


def test_training_shows_the_first_and_the_last_step() -> None:
    records = [{"step": n, "tokens": 4096 * n, "loss": 3.0 / n, "tokens_per_second": 1500.25} for n in (1, 3)]
    text = on_terminal([training_section({"total_tokens": 3_000_000, "first": records[0], "last": records[1]})])
    assert row(text, "loss") == ["loss", "3", "1"]
    assert row(text, "tokens_per_second") == ["tokens_per_second", "1,500", "1,500"]
    assert "12,288 of 3,000,000 tokens, 0.4%" in text


def test_a_json_document_begins_with_its_format_version(plan: dict[str, Any]) -> None:
    text = document(plan)
    assert text.startswith('{\n  "format_version": 1,')
    assert json.loads(text) == plan
    assert json.loads(document({"errors": []})) == {"format_version": 1, "errors": []}
