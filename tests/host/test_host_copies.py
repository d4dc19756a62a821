"""Models that lost their place and come back from host memory, and what is not proved again."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deployments.config.model import ModelEntry
from deployments.core.calls import GenerateCall
from deployments.core.events import Delta, Finished
from deployments.engine.verify import capabilities
from deployments.engine.verify.generate_probe import GenerateProbe
from deployments.engine.verify.proofs import FORWARD, Proofs
from deployments.engine.verify.refused import Different, Refused
from deployments.host.host import ModelHost
from deployments.host.memory import host_copies
from deployments.host.memory.kind import model_kind
from deployments.host.memory.storages import Storages, Unmovable
from model_loaders.contract import as_model_info
from tests.host.test_host import LOADED, call, entry, events_of, host_of, load_model, run
from tests.tiny import byte_tokenizer, gpt2, llama

BATCHING = {"engine": {"kind": "auto", "pack_linears": None}}
CLOSED: list[str] = []


def load_closing(seed: int = 0) -> dict[str, Any]:
    return {**load_model(seed), "close": lambda: CLOSED.append("closed")}


def with_a_buffer(seed: int = 0) -> dict[str, Any]:
    """A bfloat16 Llama with a buffer that is not saved."""
    given = load_model(seed)
    given["model"].to(torch.bfloat16).register_buffer("shift", torch.ones(3), persistent=False)
    return given


async def text(host: ModelHost, asked: GenerateCall) -> str:
    events = await events_of(host, asked)
    assert isinstance(events[-1], Finished), events[-1]
    return "".join(event.text for event in events if isinstance(event, Delta))


def kept(host: ModelHost) -> list[str]:
    return [copy["id"] for copy in host.snapshot()["host_copies"]]


def test_a_second_visit_calls_no_loader_and_proves_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "troupe.engine")

    async def main() -> None:
        async with host_of(
            entry("a", with_a_buffer, **BATCHING), entry("b", kwargs={"seed": 1}), host_memory_gib=1
        ) as host:
            first = await text(host, call("a"))
            fingerprint = host.resolve("a").fingerprint
            await text(host, call("b"))
            assert kept(host) == ["a"]
            assert len(LOADED) == 2
            monkeypatch.setattr(capabilities.Capabilities, "measure", None)
            monkeypatch.setattr("deployments.engine.build.compare_with_generate", None)
            caplog.clear()
            assert await text(host, call("a")) == first
            assert host.resolve("a").fingerprint == fingerprint
            assert kept(host) == ["b"]
            assert (len(LOADED), host.snapshot()["restored"]) == (2, 1)
            (line,) = [record.message for record in caplog.records if "was checked at load" in record.message]
            for name in ("forward", "inside", "the answers of generate"):
                assert f"{name} (" in line
            packs = "packed linears (" in line  # what this processor has kernels for
            assert line.count("as before") == 3 + packs, line

    run(main())


def test_another_model_of_the_kind_is_not_proved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without host memory: the next checkpoint of a run, and the same model after a whole load."""

    async def main() -> None:
        async with host_of(entry("a", **BATCHING), entry("b", **BATCHING)) as host:
            first = await text(host, call("a"))
            monkeypatch.setattr(capabilities.Capabilities, "measure", None)
            assert [await text(host, call(name)) for name in "ba"] == [first, first]
            assert kept(host) == []
            assert len(LOADED) == 3

    run(main())


def test_other_arguments_are_another_kind() -> None:
    """They may change what the loader makes of the model."""
    kinds = [
        model_kind(
            ModelEntry.model_validate(entry("a", kwargs=kwargs, **more)), as_model_info(load_model(seed), "load_model")
        )
        for seed, kwargs, more in ((0, {}, {}), (1, {}, {}), (0, {"a": 1}, {}), (0, {}, BATCHING))
    ]
    assert [kind == kinds[0] for kind in kinds] == [True, True, False, False]
    half = as_model_info({**load_model(), "model": llama().bfloat16()}, "load_model")
    assert model_kind(ModelEntry.model_validate(entry("a")), half) != kinds[0]


def test_the_generate_engine_proves_nothing_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "troupe.engine")

    async def main() -> None:
        async with host_of(entry("a"), entry("b")) as host:
            await text(host, call("a"))
            monkeypatch.setattr(GenerateProbe, "batches", None)
            monkeypatch.setattr(GenerateProbe, "resumable", None)
            caplog.clear()
            await text(host, call("b"))
            (line,) = [record.message for record in caplog.records if "was checked at load" in record.message]
            assert [name in line for name in ("together, as before", "yes, as before")] == [True, True], line

    run(main())


def test_the_least_recently_used_copy_goes_and_its_loader_is_told() -> None:
    def bytes_of(model: nn.Module) -> int:
        return Storages(model).nbytes

    async def main() -> None:
        CLOSED.clear()
        size = bytes_of(llama())
        async with host_of(
            *(entry(name, load_closing, kwargs={"seed": i}) for i, name in enumerate("abcd")),
            host_memory_gib=2.5 * size / (1 << 30),
        ) as host:
            for name, held in (("a", []), ("b", ["a"]), ("c", ["a", "b"]), ("d", ["b", "c"])):
                await text(host, call(name))
                assert kept(host) == held
            assert len(CLOSED) == 1
            await text(host, call("b"))
            assert kept(host) == ["c", "d"]
            await host.unload("b")
            assert kept(host) == ["c", "d"], "what is unloaded by name is freed"
            assert len(CLOSED) == 2
        assert len(CLOSED) == 4

    run(main())


def test_a_rewritten_folder_is_never_served_from_its_old_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.registry.watch.LOOK_EVERY_S", 0.0)
    folder = tmp_path / "run"
    for i in range(2):
        llama(seed=i).save_pretrained(tmp_path / f"made{i}")
        byte_tokenizer().save_pretrained(tmp_path / f"made{i}")
    shutil.copytree(tmp_path / "made0", folder)
    auto = {"loader": "model_loaders.auto:load_model", "engine": {"kind": "auto"}}

    async def main() -> None:
        async with host_of(
            {"id": "a", "kwargs": {"model_name": str(folder)}, **auto}, entry("b"), host_memory_gib=1, settle_s=0
        ) as host:
            old = await text(host, call("a"))
            await text(host, call("b"))
            assert kept(host) == ["a"]
            shutil.copytree(tmp_path / "made1", folder, dirs_exist_ok=True)
            for file in folder.iterdir():
                file.touch()
            new = await text(host, call("a"))
            assert new != old
            assert host.snapshot()["restored"] == 0
            await text(host, call("b"))
            await text(host, call("a"))
            assert kept(host) == ["b"], "the copy of the old files is gone"

    run(main())


def test_other_bits_after_the_way_back_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with host_of(entry("a", **BATCHING), entry("b"), host_memory_gib=1) as host:
            first = await text(host, call("a"))
            await text(host, call("b"))
            reference = LOADED[0]()
            with torch.no_grad():
                reference.lm_head.weight.mul_(1.5)
            del reference
            assert await text(host, call("a")) == first
            assert len(LOADED) == 3

    run(main())


def test_storages_go_and_come_back() -> None:
    """What is done on a GPU, here with pieces smaller than a tensor."""
    model = gpt2()
    model.register_buffer("unsaved", torch.arange(7.0), persistent=False)
    model.plain = torch.arange(3)
    model.view = model.plain[1:]
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        before = model(ids).logits
    storages = Storages(model, chunk=1 << 10)
    tied = model.lm_head.weight
    assert storages.nbytes == sum(parameter.nbytes for parameter in model.parameters()) + 7 * 4 + 3 * 8
    storages.release()
    assert all(not parameter.numel() for parameter in model.parameters())
    storages.restore()
    assert model.lm_head.weight is tied is model.transformer.wte.weight
    assert model.unsaved.tolist() == list(range(7))
    model.plain += 1
    assert model.view.tolist() == [2, 3], "views share their memory as before"
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, before)


def test_a_tensor_that_something_else_holds_is_noticed() -> None:
    model = gpt2()
    view = model.lm_head.weight.detach()[:2]
    with pytest.raises(Unmovable, match="something beside its parameters and buffers"):
        Storages(model).release()
    assert view.numel()


def test_what_cannot_be_moved_is_named() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    with pytest.raises(Unmovable, match="tensors of the type Tensor"):
        Storages(model)


def test_a_model_larger_than_the_key_is_freed(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with host_of(entry("a"), entry("b"), host_memory_gib=1e-6) as host:
            await text(host, call("a"))
            await text(host, call("b"))
            assert kept(host) == []
        assert "host_memory_gib is 1e-06" in caplog.text

    run(main())


def test_nothing_is_kept_where_the_host_has_little_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(host_copies, "free_bytes", lambda: 1)

    async def main() -> None:
        async with host_of(entry("a"), entry("b"), host_memory_gib=1) as host:
            await text(host, call("a"))
            await text(host, call("b"))
            assert kept(host) == []
        assert "less than a fifth" in caplog.text

    run(main())


def test_what_passes_is_proved_again_and_what_differs_is_not() -> None:
    known: dict[str, Any] = {}
    asked: list[type[Exception]] = []

    def prove(error: type[Exception]) -> str:
        asked.append(error)
        raise error("its answers differ")

    for error in (Refused, Different, Different):
        with pytest.raises(error, match="its answers differ"):
            Proofs(known).recall(FORWARD, lambda error=error: prove(error))  # type: ignore[misc]
    assert asked == [Refused, Different]
