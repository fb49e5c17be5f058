"""The models that are written: shapes, seeds, text that is worth comparing, and the forward in fp32."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from servers.answers import Answer
from servers.models import tensors, weights
from servers.models.architectures import MODELS, Tensor, tiny
from servers.models.reference import Reference
from servers.models.weights import written
from servers.prompts import prompts

COMPARABLE = [name for name in MODELS if name != "eagle"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # several test processes share two cores


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for file in folder.glob("*.safetensors") for name, each in tensors.read(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_written(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "SHARD", 20_000)  # several files
    model = tiny(name)
    folder = written(model, tmp_path, "cpu")
    found = read(folder)
    assert found.keys() == model.tensors().keys()
    for each, tensor in model.tensors().items():
        assert found[each].shape == tensor.shape
        assert torch.isfinite(found[each].float()).all()
        if tensor.deviation and tensor.kind == "bf16" and not tensor.signs and torch.Size(tensor.shape).numel() > 500:
            assert abs(found[each].float().std() / tensor.deviation - 1) < 0.2
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    assert len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in found.values())
    assert written(model, tmp_path) == folder


def test_another_seed_gives_other_weights_and_the_same_the_same() -> None:
    tensor = Tensor((64, 64), 1.0)
    assert torch.equal(weights.made(1, "a", tensor, "cpu"), weights.made(1, "a", tensor, "cpu"))
    assert not torch.equal(weights.made(1, "a", tensor, "cpu"), weights.made(2, "a", tensor, "cpu"))
    assert not torch.equal(weights.made(1, "a", tensor, "cpu"), weights.made(1, "b", tensor, "cpu"))


def test_sizes_at_full_length() -> None:
    """As many parameters as such models have, and what two ranks share divides by two."""
    large = replace(MODELS["llama"], layers=32)
    assert 6.9e9 < sum(torch.Size(each.shape).numel() for each in large.tensors().values()) < 7.4e9
    assert MODELS["gpt_oss"].hidden == 2880
    for model in MODELS.values():
        assert [x % 2 for x in (model.heads, model.kv_heads, model.inner, model.vocabulary)] == [0, 0, 0, 0]
        assert (model.hidden * 2) % 16 == 0


@pytest.mark.parametrize("name", COMPARABLE)
def test_greedy_text_is_worth_comparing(name: str, tmp_path: Path) -> None:
    """No few tokens in turn, and first choices that are mostly no ties."""
    model = tiny(name)
    truth, text = Reference(written(model, tmp_path, "cpu")), prompts(1, 16, 16, model.vocabulary)[0]
    margins = []
    for _ in range(32):
        best = truth.logprobs([text])[0][-1].topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        text.append(int(best.indices[0]))
    assert not Answer(text[16:], []).is_degenerate()
    assert sorted(margins)[16] > 0.1
    assert max(margins) > 0.5


def test_two_tokens_in_turn_are_found() -> None:
    assert Answer([5, 9] * 16, []).is_degenerate()
    assert Answer([*range(16), *[4] * 16], []).is_degenerate()


@pytest.mark.parametrize("name", COMPARABLE)
def test_every_weight_matters(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward changes with each tensor, so none is left out, nor read under another name."""
    model = tiny(name)
    truth, text = Reference(written(model, tmp_path, "cpu")), [prompts(1, 200, 200, model.vocabulary)[0]]
    right = truth.logprobs(text)[0]
    for each, stored in list(truth._stored.items()):
        if "weight_scale" in each:
            changed = stored * 2
        elif stored.dtype is torch.float8_e4m3fn:
            changed = (-stored.float()).to(torch.float8_e4m3fn)
        else:
            changed = torch.flip(stored.float(), [0]).to(stored.dtype) if stored.dim() else stored * 3
        monkeypatch.setitem(truth._stored, each, changed)
        assert not torch.equal(truth.logprobs(text)[0], right), each
        monkeypatch.setitem(truth._stored, each, stored)
    assert torch.equal(truth.logprobs(text)[0], right)


@pytest.mark.parametrize("name", MODELS)
def test_files_are_safetensors(name: str, tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    folder = written(tiny(name), tmp_path, "cpu")
    for file in folder.glob("*.safetensors"):
        ours = tensors.read(file)
        found = theirs.load_file(file)
        assert found.keys() == ours.keys()
        assert all(torch.equal(found[each].float(), ours[each].float()) for each in ours)


@pytest.mark.parametrize("name", [each for each in COMPARABLE if each != "llama_fp8"])
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = tiny(name)
    folder = written(model, tmp_path, "cpu")
    text = prompts(1, 300, 300, model.vocabulary)[0]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        right = theirs(torch.tensor([text])).logits[0].log_softmax(-1)
    assert (Reference(folder).logprobs([text])[0] - right).abs().max() < 1e-3
