"""The example of a search: what it proposes is within its budget, and its plan shows it."""

from __future__ import annotations

from pathlib import Path

from minitron.cli.plan_summary import shown_plan
from minitron.compiler import make_search, plan_document
from minitron.specs import load_spec
from tests.output import conforms

SPEC = Path(__file__).resolve().parents[2] / "examples" / "search" / "spec.yaml"


def test_the_example_proposes_four_shapes_with_two_rates(tmp_path: Path) -> None:
    found = make_search(load_spec(SPEC), build=tmp_path / "build")
    assert len(found.candidates.found) == 8
    assert {one.lr for one in found.candidates.found} == {2e-3, 4e-3}
    assert len({tuple(one.written.items()) for one in found.candidates.found}) == 4
    for one in found.candidates.found:
        assert abs(one.costs.parameters - 1.2e6) <= 0.05 * 1.2e6 and one.costs.kv_cache_bytes_per_token <= 2048
        assert one.widths["num_attention_heads"] % 4 == 0, "what four devices share evenly"
    document = plan_document(found.plan(3))
    conforms("plan", document)
    assert document["search"]["candidate"] == 3 and document["student"]["widths"] == found.candidate(3).widths
    (search,) = [phase for phase in document["phases"] if phase["name"] == "search"]
    assert search["tokens"] > 60_000 and search["flops"] < document["phases"][-1]["flops"]
    titles = [section.title for section in shown_plan(document, full=False)]
    assert titles.index("Search") + 1 == titles.index("Candidates")
