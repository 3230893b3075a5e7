"""What a valid spec becomes: defaults, names, hashes, overrides and bases."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.specs import SpecInvalid, UsageError, load_spec
from minitron.specs.blocks.benchmarks import Benchmark
from minitron.specs.extends import merge
from minitron.specs.load import STAND_INS
from minitron.specs.shape import all_blocks
from minitron.specs.source import Mapping, plain, read_text
from minitron.specs.spec import Spec
from minitron.specs.units import Share
from tests.specs.conftest import Errors, Load
from tests.specs.specimens import SEARCH, SHORTEST, SMALL, WHOLE


def test_the_contract_s_own_example_is_valid_and_means_what_it_says(load: Load) -> None:
    spec = load(WHOLE).spec
    assert spec.search is not None and spec.search.budget.parameters == 8_000_000_000
    assert spec.search.budget.tolerance == 0.05
    assert spec.teacher_correction is not None and spec.teacher_correction.tokens == 127_000_000_000
    assert spec.distill is not None and spec.distill.tokens == 380_000_000_000
    assert spec.distill.optimizer.lr == 1e-4 and spec.distill.optimizer.min_lr == 4.5e-7
    assert spec.evaluate is not None and spec.evaluate.suite == "minitron-9"


def test_what_the_contract_writes_out_are_the_defaults(load: Load) -> None:
    """Everything else in the example that is not asked for by name may be left out without changing what is meant."""
    short = """
name: mistral-nemo-minitron-8b
teacher: {model: mistralai/Mistral-Nemo-Base-2407, revision: main, dtype: bfloat16}
student: {hidden_size: 4096, intermediate_size: 11520}
importance: {data: {text: corpus/*.txt, sequence_length: 8192}}
search: {budget: {parameters: 8e9}}
teacher_correction: {tokens: 127B}
distill: {data: {dataset: org/name}, tokens: 0.38T, sequence_length: 8192}
evaluate: {suite: minitron-9, held_out: {text: [corpus/valid.txt]}}
"""
    assert load(short).resolved == load(WHOLE).resolved
    assert load(short).sha256 == load(WHOLE).sha256


def test_resolved_has_every_default_and_is_itself_a_spec(load: Load, tmp_path: Path) -> None:
    loaded = load(WHOLE)
    assert loaded.resolved["distill"]["optimizer"]["betas"] == [0.9, 0.95]
    assert loaded.resolved["importance"]["depth"] == {"metric": "block_influence", "contiguous": False, "greedy": False}
    again = tmp_path / "resolved.yaml"
    again.write_text(json.dumps(loaded.resolved))
    assert load_spec(again).resolved == loaded.resolved
    assert load_spec(again).sha256 == loaded.sha256


def test_the_hash_changes_with_the_meaning_and_with_nothing_else(load: Load) -> None:
    base = load(SMALL).sha256
    assert load("# a comment\n" + SMALL.replace("1B", "1000M")).sha256 == base
    assert load(SMALL.replace("48", "47")).sha256 != base
    assert load(SMALL, "distill.seed=0").sha256 == base
    assert load(SMALL, "distill.seed=1").sha256 != base


def test_the_file_names_a_spec_that_does_not_name_itself(load: Load) -> None:
    assert load(SHORTEST).spec.name == "spec"
    assert load("name: other\n" + SHORTEST).spec.name == "other"


def test_widths_are_numbers_shares_or_lists_of_them(load: Load) -> None:
    text = SMALL.replace(
        "hidden_size: 48", 'hidden_size: [48, "50%"], intermediate_size: 62.5%, num_key_value_heads: 2'
    )
    student = load(text + SEARCH).spec.student
    assert dict(student.targets()) == {
        "hidden_size": (48, Share(Fraction(1, 2))),
        "intermediate_size": Share(Fraction(5, 8)),
        "num_key_value_heads": 2,
    }


def test_every_alternative_of_the_language_is_understood(load: Load) -> None:
    spec = load(
        """
teacher: {spec: larger.yaml, dtype: float32}
student: {num_experts: 4, moe_intermediate_size: 64, shared_expert_intermediate_size: 64, mamba_num_heads: 4,
          mamba_head_dim: 8, head_dim: 16, multiple_of: 16, layers: {keep: [0, 1, 3]}}
importance:
  data: {blend: [{weight: 0.7, text: a.txt, document: line}, {weight: 0.3, jsonl: [b.jsonl], messages_field: chat}]}
  selection: greedy
  hidden_basis: principal
recovery: {refit: least_squares, merge_heads: false}
distill:
  data: {parquet: c/*.parquet, text_field: body}
  tokens: 1e9
  teacher_logits: online
  loss:
    logits: {divergence: jsd}
    hidden_states: {pairs: [[29, 13]], distance: mse, embedding: false, weight: 0.5}
evaluate: {suite: [hellaswag, gsm8k], data_dir: benchmarks/, held_out: {text: "python-stdlib:held_out"}}
"""
    ).spec
    assert spec.importance.data is not None and spec.importance.data.blend is not None
    assert [part.kind for part in spec.importance.data.blend] == ["text", "jsonl"]
    assert spec.importance.data.blend[1].text_field is None
    assert spec.distill is not None and spec.distill.data.kind == "parquet"
    assert spec.distill.loss.hidden_states is not None
    assert spec.distill.loss.hidden_states.pairs == ((29, 13),)
    assert spec.evaluate is not None and spec.evaluate.suite == (Benchmark(task="hellaswag"), Benchmark(task="gsm8k"))


def test_samples_of_the_teacher_are_counted(load: Load) -> None:
    distill = load(SMALL.replace("tokens: 1B", "tokens: 1B, teacher_logits: {sampled: 12}")).spec.distill
    assert distill is not None and distill.teacher_logits != "online" and distill.teacher_logits.sampled == 12


def test_an_empty_block_is_one_that_was_left_out(load: Load) -> None:
    assert load(SHORTEST + "recovery:\nimportance:\ndistill:\n").resolved == load(SHORTEST).resolved


def test_a_spec_cannot_be_changed(load: Load) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(SHORTEST).spec.teacher.model = "other"  # type: ignore[misc]


def test_errors_found_later_stand_at_the_key_or_its_nearest_parent(load: Load, tmp_path: Path) -> None:
    loaded = load(WHOLE)
    file = str(tmp_path / "spec.yaml")
    assert str(loaded.error("student.hidden_size", "too wide", "write 64")) == (
        f"{file}:11:16: student.hidden_size: too wide; write 64"
    )
    assert loaded.error("importance.data.text.0", "x").column == 17
    assert loaded.error("importance.data.text.7", "x").column == 10
    parent = loaded.error("distill.micro_batch_size", "x")
    assert (parent.line, parent.column, parent.path) == (34, 1, "distill.micro_batch_size")
    assert loaded.error("nowhere.at.all", "x").line == 1


def test_relative_paths_start_at_the_spec_wherever_it_is_read_from(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(SHORTEST).folder == tmp_path
    monkeypatch.chdir(tmp_path)
    assert load_spec(Path("spec.yaml")).path == tmp_path / "spec.yaml"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone\.yaml: there is no such file; `minitron init -o"):
        load_spec(tmp_path / "gone.yaml")
    with pytest.raises(UsageError, match="is a folder"):
        load_spec(tmp_path)


# --- overrides ---


def test_an_override_replaces_or_adds_a_value_and_is_recorded(load: Load) -> None:
    overrides = (
        "student.hidden_size=32",
        "distill.optimizer.lr=2e-4",
        "evaluate.suite=[gsm8k]",
        "distill.data.text.0=b.txt",
    )
    loaded = load(SMALL, *overrides)
    assert loaded.overrides == overrides
    assert loaded.spec.student.hidden_size == 32
    assert loaded.spec.distill is not None and loaded.spec.distill.optimizer.lr == 2e-4
    assert loaded.spec.evaluate is not None and loaded.spec.evaluate.suite == (Benchmark(task="gsm8k"),)
    assert loaded.spec.distill.data.text == ("b.txt",)


def test_the_last_override_wins_and_null_takes_a_block_out(load: Load) -> None:
    assert load(SMALL, "student.hidden_size=1", "student.hidden_size=2").spec.student.hidden_size == 2
    assert load(SMALL, "distill=null").spec.distill is None
    assert load(SMALL, "name='a'").spec.name == "a"


def test_a_wrong_override_is_the_place_of_its_error(errors_of: Errors) -> None:
    errors = errors_of(SMALL, "student.hidden_sise=3", "distill.seed=no", "distill.loss={logits: {weight: -1}}")
    assert [str(error) for error in errors] == [
        "--set distill.loss={logits: {weight: -1}}: distill.loss.logits.weight: `-1` is out of range; "
        "write a number of at least 0",
        "--set distill.seed=no: distill.seed: `no` is not a whole number; write a whole number",
        "--set student.hidden_sise=3: student.hidden_sise: unknown key `hidden_sise`; did you mean `hidden_size`?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("student.hidden_size", "write --set path.in.spec=value"),
        ("=3", "write --set path.in.spec=value"),
        ("student..hidden_size=3", "write --set path.in.spec=value"),
        ("student.hidden_size.a=3", "`student.hidden_size` is `48` and has nothing below it; replace it"),
        ("distill.data.text.4=a", "`distill.data.text` is a list with places 0 to 0"),
        ("distill.data.text.a=a", "`distill.data.text` is a list with places 0 to 0"),
        ("distill.tokens=[1", "the value is wrong: not valid YAML"),
        ("distill.loss={a: 1, a: 2}", "the value is wrong: the key `a` stands twice"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(load: Load, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(SMALL, override)
    assert not isinstance(caught.value, SpecInvalid) and caught.value.exit_code == 2
    assert str(caught.value).startswith(f"--set {override}: ") and message in str(caught.value)


# --- bases ---


def write(folder: Path, **files: str) -> Path:
    """Writes NAME.yaml for each; returns the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_a_base_is_merged_and_what_is_written_replaces(tmp_path: Path) -> None:
    path = write(tmp_path, top="extends: base.yaml\nstudent: {hidden_size: 32}\ndistill: {seed: 7}\n", base=SMALL)
    spec = load_spec(path).spec
    assert spec.name == "small" and spec.student.hidden_size == 32
    assert spec.distill is not None and (spec.distill.seed, spec.distill.tokens) == (7, 10**9)


def test_bases_have_bases_and_the_written_out_spec_is_the_same(tmp_path: Path) -> None:
    path = write(
        tmp_path, c="extends: b.yaml\nname: c\n", b="extends: a.yaml\ndistill: {data: {text: [x, y]}}\n", a=SMALL
    )
    whole = write(
        tmp_path,
        whole=SMALL.replace("small", "c").replace("distill: {data: {text: [a.txt]}", "distill: {data: {text: [x, y]}"),
    )
    assert load_spec(path).resolved == load_spec(whole).resolved
    assert load_spec(path).sha256 == load_spec(whole).sha256


def test_null_takes_out_what_the_base_has(tmp_path: Path) -> None:
    path = write(
        tmp_path, top="extends: base.yaml\ndistill: null\nimportance: {data: {text: null, jsonl: b}}\n", base=SMALL
    )
    spec = load_spec(path).spec
    assert spec.distill is None
    assert spec.importance.data is not None and spec.importance.data.kind == "jsonl"


def test_a_hub_id_in_a_base_is_no_path(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", base=SMALL)
    assert load_spec(write(tmp_path, top="extends: shared/base.yaml\n")).spec.teacher.model == "org/teacher"


def test_errors_point_into_the_file_that_the_value_stands_in(tmp_path: Path) -> None:
    path = write(tmp_path, top="extends: base.yaml\nrecovery: {refit: x}\n", base=SMALL.replace("48", "-1"))
    with pytest.raises(SpecInvalid) as caught:
        load_spec(path)
    assert [(Path(error.file).name, error.line) for error in caught.value.errors] == [("base.yaml", 3), ("top.yaml", 2)]


def test_paths_in_a_base_stay_relative_to_the_base(tmp_path: Path) -> None:
    (tmp_path / "shared" / "model").mkdir(parents=True)
    base = (
        SMALL.replace("org/teacher", "model")
        + "evaluate: {data_dir: tasks, held_out: {text: 'python-stdlib:held_out'}}\n"
    )
    write(tmp_path / "shared", base=base)
    path = write(tmp_path, top="extends: shared/base.yaml\n")
    loaded = load_spec(path)
    assert loaded.spec.teacher.model == "shared/model"
    assert loaded.spec.distill is not None and loaded.spec.distill.data.text == ("shared/a.txt",)
    assert loaded.spec.evaluate is not None and loaded.spec.evaluate.data_dir == "shared/tasks"
    assert loaded.spec.evaluate.held_out is not None
    assert loaded.spec.evaluate.held_out.text == ("python-stdlib:held_out",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"}, "comes back to a file that already extends it"),
        ({"a": "extends: a.yaml\n"}, "comes back to a file that already extends it"),
        ({"a": "extends: gone.yaml\n"}, "`gone.yaml`: there is no such file"),
        ({"a": "extends: [b.yaml]\n"}, "the base is not a path"),
        ({"a": "extends: off\n"}, "the base is not a path"),
        ({"a": "extends: b.yaml\n", "b": ""}, "the file is empty"),
        ({"a": "extends: b.yaml\n", "b": "a: [\n"}, "not valid YAML"),
    ],
)
def test_bases_that_cannot_be(tmp_path: Path, files: dict[str, str], message: str) -> None:
    path = write(tmp_path, **files)
    with pytest.raises(SpecInvalid, match=message):
        load_spec(path)


# Capital keys hold mappings, small ones anything else, so that no value stands against a mapping.
LEAVES = st.integers() | st.lists(st.integers(), max_size=2) | st.none()
TREES = st.recursive(
    st.fixed_dictionaries({}, optional={"a": LEAVES, "b": LEAVES}),
    lambda inner: st.fixed_dictionaries({}, optional={"a": LEAVES, "b": LEAVES, "A": inner, "B": inner}),
    max_leaves=8,
)


def tree(value: dict[str, Any]) -> Mapping:
    node, _ = read_text(json.dumps(value), "a.yaml")
    assert isinstance(node, Mapping)
    return node


def merged(base: Any, over: Any) -> Any:
    return plain(merge(tree(base), tree(over)))


@given(TREES, TREES, TREES)
def test_merging_is_lawful(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    assert merged(a, {}) == a == merged({}, a) == merged(a, a)
    assert merged(merged(a, b), c) == merged(a, merged(b, c))
    both = merged(a, b)
    assert set(both) == set(a) | set(b)
    assert all(both[key] == b[key] for key in "ab" if key in b)


def test_a_value_replaces_a_mapping_and_a_mapping_a_value() -> None:
    assert merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}
    assert merged({"a": 2}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    assert merged({"a": [1, 2]}, {"a": [3]}) == {"a": [3]}


# --- the checker itself ---


def test_every_required_key_has_a_stand_in() -> None:
    """Or the search for further mistakes would stop at a missing one."""
    blocks = [block for _, block in all_blocks(Spec)]
    required = {key for block in blocks for key, field in block.model_fields.items() if field.is_required()}
    assert required == set(STAND_INS)
