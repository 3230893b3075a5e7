"""The sections of a search: the funnel from the grid to the first rung, and the table of all candidates."""

from __future__ import annotations

from typing import Any

from minitron.cli import figures
from minitron.cli.sections import Column, Document, Section, entries, part


def search_sections(search: Document) -> list[Section]:
    """Returns the sections of the `search` of a plan or of results; none where there was no search."""
    found = []
    if entries(search, "funnel"):
        found.append(_funnel(search))
    if entries(search, "candidates"):
        found.append(candidates_section(search))
    return found


def _funnel(search: Document) -> Section:
    rows = tuple((str(one.get("words", "")), figures.count(one.get("shapes"))) for one in entries(search, "funnel"))
    notes = [
        f"rung {one.get('number')}: {figures.plural(int(one.get('enter') or 0), 'candidate')} up to "
        f"{figures.short(one.get('tokens'))} tokens, the best {figures.count(one.get('leave'))} "
        f"{'stays' if one.get('leave') == 1 else 'stay'}"
        for one in entries(search, "rungs")
    ]
    return Section("Search", (Column("shapes"), Column("", right=True)), rows, tuple(notes))


def candidates_section(search: Document) -> Section:
    """Returns the table of the candidates: what they differ in, their costs, and how they were judged so far."""
    found = entries(search, "candidates")
    widths = list(dict.fromkeys(key for one in found for key in part(one, "widths")))
    differing = [key for key in widths if len({part(one, "widths").get(key) for one in found}) > 1]
    settings = [key for key in ("lr", "global_batch_size") if len({one.get(key) for one in found}) > 1]
    timed = any(one.get("milliseconds_per_token") is not None for one in found)
    judged = any(one.get("zero_shot") for one in found)
    rungs = max((len(one.get("rungs") or ()) for one in found), default=0)
    columns = [Column("candidate"), *(Column(_LABELS.get(key, key), right=True) for key in (*differing, *settings))]
    columns += [Column("parameters", right=True), Column("KV cache", right=True), Column("FLOPs", right=True)]
    columns += [Column("ms a token", right=True)] if timed else []
    columns += [Column("zero-shot", right=True)] if judged else []
    columns += [Column(f"rung {number}", right=True) for number in range(1, rungs + 1)]
    columns += [Column("")] if search.get("winner") or search.get("candidate") else []
    rows = []
    for one in found:
        row = [str(one.get("number"))]
        row += [figures.width(part(one, "widths").get(key)) for key in differing]
        row += [f"{one[key]:g}" for key in settings]
        row += [figures.short(one.get("parameters")), figures.size(one.get("kv_cache_bytes_per_token"))]
        row += [figures.short(one.get("flops_per_token"))]
        row += [figures.decimal(one.get("milliseconds_per_token"), 3)] if timed else []
        row += [_judged(part(one, "zero_shot"))] if judged else []
        row += [_judged(rung) for rung in one.get("rungs") or ()]
        row += [""] * (rungs - len(one.get("rungs") or ()))
        if search.get("winner") or search.get("candidate"):
            row.append(_mark(search, one))
        rows.append(tuple(row))
    notes = (
        ["divergence from the teacher on held-out text, nats a token; zero-shot figures decide nothing"]
        if judged
        else []
    )
    return Section("Candidates", tuple(columns), tuple(rows), (*notes, *_expected(search)))


_LABELS = {
    "hidden_size": "hidden",
    "intermediate_size": "FFN",
    "num_attention_heads": "heads",
    "num_key_value_heads": "groups",
    "num_hidden_layers": "layers",
    "num_experts": "experts",
    "global_batch_size": "batch",
    "lr": "rate",
}


def _judged(judged: Document) -> str:
    return figures.decimal(judged["kl"]) if judged.get("kl") is not None else ("diverged" if judged else "")


def _mark(search: Document, one: Document) -> str:
    words = []
    if one.get("number") == search.get("winner"):
        words.append("the best")
    if one.get("number") == search.get("candidate") != search.get("winner"):
        words.append("this plan")
    return ", ".join(words)


def _expected(search: Document) -> list[str]:
    """Returns the sentence on what the whole training is expected to reach, where rungs have shown it."""
    forecast: dict[str, Any] = part(search, "forecast")
    if not forecast:
        return []
    return [
        f"expected after {figures.short(forecast.get('tokens'))} tokens: a divergence of "
        f"{figures.decimal(forecast.get('kl'))} ({figures.decimal(forecast.get('low'))} to "
        f"{figures.decimal(forecast.get('high'))}), from L = {figures.decimal(forecast.get('floor'))} + "
        f"{figures.decimal(forecast.get('factor'))} / D^{figures.decimal(forecast.get('exponent'))} over "
        f"{figures.plural(int(forecast.get('points') or 0), 'rung')}, which misses them by "
        f"{figures.percent(forecast.get('error'))}"
    ]
