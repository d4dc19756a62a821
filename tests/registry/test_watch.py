"""The version of a folder that is written while it is looked at."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from deployments.config.model import ModelEntry
from deployments.core.errors import LoadTimeout, Unavailable
from deployments.registry import watch as watching
from deployments.registry.digest import files_digest
from deployments.registry.files import model_files
from deployments.registry.version import Version
from deployments.registry.watch import Watch
from tests.in_loop import in_loop


def write(folder: Path, value: float) -> bytes:
    """A checkpoint whose weights all have one value; the bytes of its weights."""
    folder.mkdir(exist_ok=True)
    save_file({"a": torch.full((2000,), value)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return (folder / "model.safetensors").read_bytes()


def watch(folder: Path, settle_s: float = 0.1, **fields: Any) -> Watch:
    entry = {"id": "m", "loader": "x:y", "kwargs": {"model_name": str(folder)}, **fields}
    return Watch(ModelEntry.model_validate(entry), settle_s)


def digest(folder: Path) -> str:
    kwargs = {"model_name": str(folder)}
    return files_digest(model_files(kwargs), kwargs)


async def now(looker: Watch) -> Version:
    looker.expire()
    return await looker.current()


async def still_waits(task: asyncio.Task[Version]) -> bool:
    done, _ = await asyncio.wait({task}, timeout=0.4)
    return not done


@in_loop
async def test_a_copy_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, 1)
    looker = watch(folder)
    old = await looker.current()
    content = write(tmp_path / "new", 2)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(content[:5000])
        file.flush()
        task = asyncio.create_task(now(looker))
        assert await still_waits(task)
        file.write(content[5000:])
    new = await task
    assert new.digest == digest(tmp_path / "new") != old.digest
    assert new.key != old.key


@in_loop
async def test_writes_that_go_on_are_waited_for(tmp_path: Path) -> None:
    """Every state on the way is complete; the one that stays is the version."""
    looker = watch(tmp_path / "run", settle_s=1)
    write(tmp_path / "run", 0)
    task = asyncio.create_task(now(looker))
    for value in range(1, 4):
        assert await still_waits(task)
        write(tmp_path / "run", value)
    write(tmp_path / "last", 3)
    assert (await task).digest == digest(tmp_path / "last")


@in_loop
async def test_old_files_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "run", 1)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    looker = watch(tmp_path / "run", settle_s=600)
    assert (await asyncio.wait_for(looker.current(), 30)).digest


@in_loop
async def test_files_that_are_touched_keep_their_version(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    looker = watch(tmp_path / "run")
    old = await looker.current()
    for file in (tmp_path / "run").iterdir():
        os.utime(file, (1, 1))
    new = await now(looker)
    assert new.key == old.key
    assert await looker.is_current(new)
    assert not await looker.is_current(old)


@in_loop
async def test_a_folder_that_is_gone_keeps_its_version_until_another_comes(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    looker = watch(tmp_path / "run")
    old = await looker.current()
    (tmp_path / "run").rename(tmp_path / "away")
    assert await now(looker) == old
    write(tmp_path / "run", 2)
    assert (await now(looker)).key != old.key


@in_loop
async def test_a_folder_that_nobody_completes(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    os.truncate(tmp_path / "run" / "model.safetensors", 100)
    looker = watch(tmp_path / "run")
    with pytest.raises(Unavailable, match=r"model\.safetensors has 100 bytes"):
        await looker.current()
    write(tmp_path / "run", 1)
    assert (await looker.current()).digest == digest(tmp_path / "run")


@in_loop
async def test_a_folder_that_is_written_for_longer_than_a_load_may_take(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    looker = watch(tmp_path / "run", settle_s=3, load_timeout_s=0.1)
    with pytest.raises(LoadTimeout, match="have been written for"):
        await looker.current()


@in_loop
async def test_a_marker_comes_last(tmp_path: Path) -> None:
    write(tmp_path / "run", 1)
    looker = watch(tmp_path / "run", marker="DONE")
    task = asyncio.create_task(now(looker))
    assert await still_waits(task)
    (tmp_path / "run" / "DONE").touch()
    assert (await task).digest


@in_loop
async def test_a_file_system_that_hangs_does_not_stop_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "run", 1)
    looker = watch(tmp_path / "run")
    version = await looker.current()
    hangs = asyncio.Event()

    async def look(*_: Any) -> Any:
        await hangs.wait()
        return [], version.stamp

    monkeypatch.setattr(watching, "LOOK_LIMIT_S", 0.05)
    monkeypatch.setattr(asyncio, "to_thread", look)
    assert await now(looker) == version
    assert "do not answer" in caplog.text
    hangs.set()
    assert await now(looker) == version
