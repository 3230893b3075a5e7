"""`train`: what it learns, what it writes, how it goes on, and what it refuses."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.cli.main import command_line
from minitron.runtime import checkpoint, train
from minitron.specs.errors import SpecInvalid, UsageError, WorkError
from minitron.specs.locks import LOCK, only_one
from minitron.specs.model_card import UNDISTILLED
from minitron.specs.progress import Progress, Silent
from tests.runtime import tiny
from tests.runtime.listening import AtStep, Messages
from tests.runtime.tiny import read_metrics


def run(build: Path, progress: Progress | None = None, **changes: Any) -> list[dict[str, Any]]:
    """Trains on the CPU and returns metrics.jsonl. `changes` are written to training.yaml first."""
    if changes:
        tiny.write_plan(build, **changes)
    train(build, device="cpu", progress=progress or Silent())
    return tiny.without_speed(read_metrics(build / "train" / "metrics.jsonl"))


def losses(build: Path, **changes: Any) -> list[float]:
    return [line["loss"] for line in run(build, **changes)]


def weights(build: Path) -> dict[str, torch.Tensor]:
    return load_file(build / "model" / "model.safetensors")


def test_the_student_comes_closer_to_the_teacher(build: Path) -> None:
    lines = run(build, tokens=64 * 40, optimizer__lr=1e-2)
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["loss"] == lines[-1]["forward_kl"]


def test_metrics_have_one_line_a_step(build: Path) -> None:
    lines = run(build)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, 13)]
    assert all({"loss", "forward_kl", "lr", "grad_norm"} <= line.keys() for line in lines)
    assert [line["step"] for line in lines if "held_out_loss" in line] == [6, 12]
    raw = read_metrics(build / "train" / "metrics.jsonl")
    assert all(line["tokens_per_second"] > 0 and line["memory_bytes"] > 1 << 20 for line in raw)
    assert not any("mfu" in line for line in raw), "the peak of a CPU is not known"
    assert raw[-1]["seconds_left"] == 0.0 and all(line["seconds_left"] >= 0 for line in raw)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_model_is_a_hugging_face_checkpoint(build: Path, dtype: str) -> None:
    run(build, student__dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(build / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(build / "model")
    assert model.dtype == getattr(torch, dtype)
    last = load_file(build / "train" / "checkpoints" / "step-00000012" / "model.safetensors")
    assert last.keys() == weights(build).keys()
    assert all(torch.equal(tensor.to(model.dtype), weights(build)[name]) for name, tensor in last.items())
    ids = tokenizer("the cat sat", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    card = (build / "model" / "README.md").read_text()
    assert "# tiny (pruned and distilled)" in card and "768 tokens: forward_kl to the teacher" in card


def test_the_card_keeps_what_the_pruned_one_says(build: Path) -> None:
    card = "---\ntags: [minitron, pruned]\nlicense: mit\n---\n\n# old title\n\nMade by pruning. " + UNDISTILLED
    (build / "student" / "README.md").write_text(card)
    run(build)
    new = (build / "model" / "README.md").read_text()
    assert new.startswith(
        "---\ntags: [minitron, pruned, distilled]\nlicense: mit\n---\n\n# tiny (pruned and distilled)\n"
    )
    assert "Made by pruning." in new and "old title" not in new and UNDISTILLED not in new


def test_the_same_training_twice_is_the_same_bit_for_bit(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    one, other = run(build), run(tmp_path / "there" / "build")
    assert one == other
    assert (build / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "there" / "build" / "model" / "model.safetensors"
    ).read_bytes()


def test_how_a_batch_is_cut_changes_nothing(build: Path, tmp_path: Path) -> None:
    results = []
    for micro in (1, 2, 4):
        here = tmp_path / f"micro{micro}"
        shutil.copytree(tmp_path / "here", here)
        results.append(losses(here / "build", micro_batch_size=micro))
    assert results[0] == pytest.approx(results[1], rel=1e-5) and results[0] == pytest.approx(results[2], rel=1e-5)


def test_recomputing_activations_changes_nothing(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert losses(build) == pytest.approx(losses(tmp_path / "there" / "build", gradient_checkpointing=True), rel=1e-5)


def test_compiled_layers_learn_the_same(build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the backend that traces forward and backward and runs them as they are: C++ takes a minute to compile."""
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    calls, real = [], torch.compile

    def compiled(function: Any) -> Any:
        calls.append(function)
        return real(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiled)
    expected = losses(build)
    assert not calls
    assert losses(tmp_path / "there" / "build", compile=True) == pytest.approx(expected, rel=1e-5)
    widths = [call.__self__.self_attn.q_proj.in_features for call in calls]
    assert sorted(widths) == [16, 16, 24, 24], "the layers of the student, and those of the teacher"


def test_bf16_computes_nearly_the_same(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    exact = losses(build)
    rounded = losses(tmp_path / "there" / "build", compute_dtype__cpu="bfloat16", teacher__dtype="bfloat16")
    assert exact != rounded and exact == pytest.approx(rounded, rel=0.05)


def test_tied_weights_and_a_softcap(tmp_path: Path) -> None:
    head = tiny.HEAD | {"softcap": 3.0}
    build = tiny.make_build(
        tmp_path, tiny.gemma2(24), tiny.gemma2(16), student__head=head, teacher__head=head, tokens=64 * 30
    )
    lines = run(build)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    before, after = load_file(build / "student" / "model.safetensors"), weights(build)
    assert before.keys() == after.keys() and "lm_head.weight" not in after
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


def test_cross_entropy_alone_needs_no_teacher(build: Path) -> None:
    shutil.rmtree(build.parent / "teacher")
    lines = run(build, loss={"logits": {"weight": 0.0}, "cross_entropy": 1.0}, tokens=64 * 20)
    assert lines[-1]["loss"] < lines[0]["loss"] and lines[-1]["cross_entropy"] == lines[-1]["loss"]
    assert "forward_kl" not in lines[-1]


def test_both_terms_are_written_down_without_their_weights(build: Path) -> None:
    terms = {"logits": {"divergence": "jsd", "weight": 0.5, "temperature": 2.0}, "cross_entropy": 0.1}
    for line in run(build, loss=terms):
        assert line["loss"] == pytest.approx(0.5 * 4 * line["jsd"] + 0.1 * line["cross_entropy"])


def test_documents_are_the_same_whatever_they_are_stored_in(build: Path, tmp_path: Path) -> None:
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    lines = (build.parent / "train.txt").read_text().splitlines()
    (build.parent / "train.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"text": lines}), build.parent / "train.parquet")
    datasets.Dataset.from_dict({"text": lines}).save_to_disk(build.parent / "saved")
    found = [losses(build)]
    for number, source in enumerate(
        ({"jsonl": ["../train.jsonl"], "text_field": "body"}, {"parquet": "../train.parquet"}, {"dataset": "../saved"})
    ):
        shutil.copytree(build.parent, tmp_path / str(number), ignore=shutil.ignore_patterns("train", "model"))
        found.append(losses(tmp_path / str(number) / "build", data=source))
    assert found[1:] == [found[0]] * 3


def test_a_streamed_data_set_is_read_as_far_as_it_is_needed(build: Path) -> None:
    pytest.importorskip("datasets")
    lines = (build.parent / "train.txt").read_text().splitlines()
    (build.parent / "folder").mkdir()
    (build.parent / "folder" / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    streamed = {"dataset": "../folder", "streaming": True}
    run(build, data={"blend": [{"weight": 3, "text": ["../train.txt"]}, {"weight": 1, **streamed}]})
    sizes = [json.loads(path.read_text())["tokens"] for path in (build / "train" / "data").glob("*/stream.json")]
    assert 768 // 4 + 1 in sizes  # a quarter of the tokens, and one more to predict


def test_a_blend_of_sources(build: Path) -> None:
    parts = [{"weight": 3, "text": ["../train.txt"]}, {"weight": 1, "text": ["../valid.txt"], "document": "line"}]
    assert len(run(build, data={"blend": parts}, held_out=None)) == 12


def interrupted(build: Path, step: int, number: int = signal.SIGINT) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(build, device="cpu", progress=AtStep(step, lambda: signal.raise_signal(number)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_saves_and_goes_on_bit_for_bit(build: Path, tmp_path: Path, number: int) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "whole")
    whole = run(tmp_path / "whole" / "build")
    interrupted(build, 3, number)
    assert [folder.name for folder in (build / "train" / "checkpoints").iterdir()] == ["step-00000003"]
    assert not (build / "model").exists()
    progress = Messages()
    assert run(build, progress) == whole
    assert "going on from step 3 of 12" in progress.texts
    assert weights(build).keys() == weights(tmp_path / "whole" / "build").keys()
    assert all(torch.equal(w, weights(tmp_path / "whole" / "build")[name]) for name, w in weights(build).items())


def test_dropout_is_part_of_what_is_repeated(tmp_path: Path) -> None:
    student = tiny.llama(16, attention_dropout=0.3)
    tiny.make_build(tmp_path / "whole", student=student)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    whole = run(tmp_path / "whole" / "build")
    interrupted(tmp_path / "parts" / "build", 5)
    torch.rand(17)
    assert run(tmp_path / "parts" / "build") == whole


def test_training_leaves_the_random_state_of_its_caller_alone(build: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(build)
    assert torch.equal(torch.rand(3), expected)


def test_a_finished_training_is_left_alone(build: Path) -> None:
    run(build)
    before = {path: path.stat().st_mtime_ns for path in build.rglob("*") if path.name != LOCK}
    progress = Messages()
    run(build, progress)
    assert progress.texts == [
        f"already trained: {build / 'model'}; delete {build / 'train'} to train from the beginning"
    ]
    assert {path: path.stat().st_mtime_ns for path in build.rglob("*") if path.name != LOCK} == before


def test_a_deleted_model_is_written_again(build: Path) -> None:
    run(build)
    before = weights(build)
    shutil.rmtree(build / "model")
    run(build)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(build).items())


@pytest.mark.parametrize("steps", [3, 12])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 7},
            r"training\.yaml:\d+:7: seed: was 0 when this training began and is now 7; write 0 again, or delete ",
        ),
        ({"tokens": 6400}, "tokens: was 768 when this training began and is now 6400"),
        ({"global_batch_size": 8}, "global_batch_size: was 4 when"),
        ({"loss__logits": {"divergence": "jsd"}}, r"loss\.logits\.divergence: was forward_kl when"),
        ({"fingerprint": "9"}, "fingerprint: the pruned student changed since this training began"),
        ({"data": {"text": ["../train.txt"]}}, "data: the training data or its tokenizer changed since"),
    ],
)
def test_another_plan_is_not_the_same_training(build: Path, steps: int, changes: dict[str, Any], message: str) -> None:
    if steps < 12:
        interrupted(build, steps)
    else:
        run(build)
    with pytest.raises(SpecInvalid, match=message):
        run(build, **changes)


def test_another_teacher_is_not_the_same_training_and_another_place_is(build: Path) -> None:
    interrupted(build, 3)
    (build.parent / "teacher").rename(build.parent / "moved")
    assert len(run(build, teacher__model="../moved", tokens=768)) == 12
    shutil.rmtree(build / "train")
    interrupted(build, 3)
    tiny.save_model(tiny.llama(24), build.parent / "moved", seed=5)
    with pytest.raises(SpecInvalid, match=r"teacher\.model: the teacher changed since this training began; bring back"):
        run(build)


def test_a_machine_may_change_on_the_way(build: Path) -> None:
    interrupted(build, 3)
    lines = run(build, micro_batch_size=4, gradient_checkpointing=True, checkpoint={"every_tokens": 64, "keep_last": 1})
    assert len(lines) == 12 and len(list((build / "train" / "checkpoints").iterdir())) == 1


def test_a_half_written_line_of_metrics_is_mended(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "whole")
    whole = run(tmp_path / "whole" / "build")
    interrupted(build, 3)
    with (build / "train" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tokens": 1, "loss": 9}\n{"step": 5, "tok')
    assert run(build) == whole
    assert len((build / "train" / "metrics.jsonl").read_text().splitlines()) == 12


def edit(file: Path, change: Any) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_loss_that_is_no_number_stops_and_keeps_the_batch(build: Path) -> None:
    edit(build / "student" / "model.safetensors", lambda tensors: tensors["lm_head.weight"][5].fill_(torch.nan))
    tiny.verify(build)
    with pytest.raises(WorkError, match=r"the loss is nan at step 1: .* saved as .*not-finite-step-1\.safetensors"):
        run(build, loss__logits={"divergence": "reverse_kl"})
    batch = load_file(build / "train" / "not-finite-step-1.safetensors")
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 16)
    assert not (build / "train" / "checkpoints").exists()


def test_what_a_user_sees_when_a_loss_is_no_number(build: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(build / "student" / "model.safetensors", lambda tensors: tensors["lm_head.weight"][5].fill_(torch.nan))
    tiny.verify(build)
    assert command_line(["train", str(build), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert f"error: the loss is nan at step 1: no checkpoint was written yet and the batch was saved as {build}" in said
    assert "so it is not the learning rate: look for values that are not finite in the weights" in said
    assert "Traceback" not in said


def test_what_a_user_sees_when_the_disk_is_full(
    build: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, written = checkpoint.save_file, []

    def fills_up(tensors: Any, path: Path, *more: Any) -> None:
        written.append(path)
        if len(written) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, *more)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    assert command_line(["train", str(build), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "error: the checkpoint of step 8 could not be written" in said and "step-00000004, was kept" in said


def test_a_gradient_that_is_no_number_stops_too(build: Path) -> None:
    with pytest.raises(WorkError, match=r"at step [0-9]+: "):
        run(build, optimizer__lr=1e30, optimizer__clip_grad_norm=None, optimizer__warmup_steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student__model": "gone"}, r"student\.model: there is no folder .*gone; write where the model is"),
        ({"teacher__model": "../gone"}, r"teacher\.model: there is no folder"),
        ({"student__head": tiny.HEAD | {"backbone": "gone"}}, r"student\.head\.backbone: the model has no `gone`"),
        ({"teacher__head": tiny.HEAD | {"weight": "gone.w"}}, r"teacher\.head\.weight: the model has no `gone\.w`"),
        (
            {"teacher__head": tiny.HEAD | {"scale": 2.0}},
            r"teacher\.head: does not give the logits that the model gives",
        ),
        ({"student__head": tiny.HEAD | {"softcap": 1.0}}, r"student\.head: does not give the logits that the model"),
        (
            {"sequence_length": 512},
            r"sequence_length: 512 tokens are more than the 256 that the models can read; write",
        ),
        ({"data": {"text": ["../gone.txt"]}}, r"data\.text\.0: there is no file `\.\./gone\.txt`"),
    ],
)
def test_a_plan_that_does_not_fit_the_build(build: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecInvalid, match=message):
        run(build, **changes)


def test_another_vocabulary(build: Path) -> None:
    tiny.save_model(tiny.llama(24, vocabulary=330), build.parent / "teacher", seed=1)
    with pytest.raises(
        SpecInvalid, match=r"teacher\.model: the teacher has a vocabulary of 330 tokens and the student one of 320"
    ):
        run(build)


def test_a_tokenizer_with_more_tokens_than_the_model(build: Path) -> None:
    tiny.save_model(tiny.llama(24, vocabulary=280), build.parent / "teacher", seed=1)
    tiny.save_model(tiny.llama(16, vocabulary=280), build / "student", seed=2)
    tiny.verify(build)
    with pytest.raises(
        SpecInvalid, match=r"train\.txt:\d+ holds token 29\d \(`.+`\), and the models have a vocabulary of 280"
    ):
        run(build)


def test_another_tokenizer_of_the_same_size(build: Path) -> None:
    file = build / "student" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    tiny.verify(build)
    with pytest.raises(SpecInvalid, match="tokenizer: its tokens are not those of the teacher's tokenizer"):
        run(build)


def test_weights_cut_short(build: Path) -> None:
    file = build / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    tiny.verify(build)
    with pytest.raises(WorkError, match="student cannot be loaded as a language model"):
        run(build)


def test_weights_with_a_tensor_missing(build: Path) -> None:
    edit(build / "student" / "model.safetensors", lambda tensors: tensors.pop("model.norm.weight"))
    tiny.verify(build)
    with pytest.raises(WorkError, match=r"the weights of model\.norm\.weight \(1 missing\) are not in its files"):
        run(build)


def test_weights_that_are_no_safetensors_are_never_opened(build: Path) -> None:
    (build / "student" / "model.safetensors").rename(build / "student" / "pytorch_model.bin")
    with pytest.raises(WorkError, match=r"has no model\.safetensors; only safetensors weights are read"):
        run(build)


def test_a_damaged_checkpoint_is_passed_over(build: Path, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "here", tmp_path / "whole")
    whole = run(tmp_path / "whole" / "build")
    interrupted(build, 9)
    newest = build / "train" / "checkpoints" / "step-00000009" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    progress = Messages()
    assert run(build, progress) == whole
    assert any("step-00000009 is damaged" in text for text in progress.texts)
    assert "going on from step 8 of 12" in progress.texts


def test_two_at_once_are_refused(build: Path) -> None:
    with (
        only_one(build, "training"),
        pytest.raises(UsageError, match=r"another process is training \(process \d+ on .*\) in .*; wait for"),
    ):
        run(build)


def test_tensorboard_events_where_it_is_installed(build: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = run(build)
    events = EventAccumulator(str(build / "train" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in lines]


def test_without_tensorboard_one_line_says_so(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.runtime.trackers.installed", lambda name: False)
    progress = Messages()
    assert len(run(build, progress)) == 12
    assert any("TensorBoard is not installed (pip install 'minitron[tensorboard]')" in text for text in progress.texts)


@pytest.mark.parametrize(
    ("device", "message"), [("tpu", "not a device"), ("mps", "does not train on `mps`"), ("cuda:99", "(?i)cuda")]
)
def test_a_device_that_is_not_there(build: Path, device: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(build, device=device, progress=Silent())


def test_a_world_without_an_address(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="start with torchrun, or unset WORLD_SIZE"):
        run(build)
