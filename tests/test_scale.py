"""scripts/simulate_scale and the models it serves: what a larger cluster would do, on no GPU."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import queue
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from starlette.datastructures import Headers

from deployments.cli.serve_file import read_config
from deployments.config.api import ApiOptions
from deployments.config.engine import EngineOptions
from deployments.core.calls import SamplingParams
from deployments.core.errors import Unauthorized
from deployments.engine.base.protocol import EngineRequest
from deployments.openai.http.keys import ApiKeys
from model_loaders.examples.simulated import Device, Roofline, SimulatedEngine
from tests.faults.conftest import Say, say  # noqa: F401

ROOT = Path(__file__).parent.parent


def documented() -> list[Any]:
    """The YAML examples of docs/scaling.md."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs" / "scaling.md").read_text(), re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in blocks]


def test_the_kubernetes_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://cluster:10001")  # its paths are those of pods, not of this machine
    (manifest,) = [block for block in documented() if block.get("kind") == "RayService"]
    assert manifest["apiVersion"] == "ray.io/v1"
    spec = manifest["spec"]
    file = tmp_path / "serve.yaml"
    file.write_text(spec["serveConfigV2"])
    config, args = read_config(file)
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.host == "0.0.0.0"  # a Service reaches pods, not their loopback
    deployments = {d.name: d for d in schema.applications[0].deployments}
    assert set(deployments) == {"OpenAIIngress", *(f"ModelReplica-{name}" for name in args.pools), "ModelReplica"}
    cluster = spec["rayClusterConfig"]
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    gpus = 0
    for pod in pods:
        (container,) = pod["template"]["spec"]["containers"]
        assert all(set(entry) in ({"name", "value"}, {"name", "valueFrom"}) for entry in container["env"])
        assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in pod["template"]["spec"].get("volumes", [])}
        gpus += pod.get("replicas", 1) * container["resources"]["limits"].get("nvidia.com/gpu", 0)
    assert deployments["ModelReplica"].num_replicas == gpus


def test_the_keys_of_the_kubernetes_manifest(tmp_path: Path) -> None:
    """The keys that the commands make are those that the manifest's mounts and digest open; kubectl is not run."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    (commands,) = re.findall(r"^```bash\n(kubectl create secret.*?)^```", text, re.MULTILINE | re.DOTALL)
    made = "kubectl() { :; }\n" + commands
    printed = subprocess.run(["bash", "-euc", made], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    digest = f"sha256:{printed.split()[0]}"
    (manifest,) = [block for block in documented() if block.get("kind") == "RayService"]
    api = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"][0]["args"]["api"]
    mounts = [*pods_of(manifest)[0]["containers"][0]["volumeMounts"], *pods_of(manifest)[0]["volumes"]]
    assert [each["mountPath"] for each in mounts if "mountPath" in each] == ["/keys"]
    assert [each["secret"]["secretName"] for each in mounts if "secret" in each] == ["troupe-keys"]
    keys = ApiKeys(ApiOptions(api_keys_file=str(tmp_path / Path(api["api_keys_file"]).name), admin_keys=[digest]))
    keys.check(bearer((tmp_path / "api").read_text().strip()))
    keys.check_admin(bearer((tmp_path / "admin-key").read_text().strip()))
    with pytest.raises(Unauthorized):
        keys.check(bearer("guess"))


def pods_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = manifest["spec"]["rayClusterConfig"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def bearer(key: str) -> Headers:
    return Headers({"authorization": f"Bearer {key}"})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/simulate_scale as a module."""
    loader = importlib.machinery.SourceFileLoader("simulate_scale", str(ROOT / "scripts" / "simulate_scale"))
    spec = importlib.util.spec_from_loader("simulate_scale", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_scale"] = module  # where its dataclasses look for their annotations
    loader.exec_module(module)
    return module


def test_two_replicas_share_models_and_keep_conversations(cluster: str, script: ModuleType, say: Say) -> None:  # noqa: F811
    given = script.parser().parse_args(["--slowdown=4", "--models=4", "--places=4", "--clients=4", "--warmup=2"])
    given.seconds = 6.0
    figures: dict[str, Any] = script.simulate(cluster, 2, given)
    say(f"{figures['tokens']:.0f} tokens/s, {figures['turns']} turns, {figures['hits']:.0%} with their prefix")
    assert figures["turns"] >= 8
    assert figures["tokens"] > 0
    assert figures["loads"] <= 8
    assert figures["hits"] > 0.9
    assert 0 < figures["p50"] <= figures["p95"]


@pytest.mark.long
def test_eight_replicas_do_nearly_eight_times_as_much_as_one(cluster: str, script: ModuleType, say: Say) -> None:  # noqa: F811
    # In the warm-up every client must have begun, on all eight: time stretched further would take a longer one.
    given = script.parser().parse_args(["--slowdown=30", "--warmup=60", "--seconds=75"])
    one, eight = (script.simulate(cluster, count, given) for count in (1, 8))
    ratio = eight["tokens"] / one["tokens"]
    say(f"8 replicas: x{ratio:.2f}; {eight['hits']:.1%} with their prefix; cores {eight['busy']:.0%} busy")
    assert ratio > 7.6
    assert eight["hits"] > 0.95


def simulated(roofline: Roofline) -> SimulatedEngine:
    return SimulatedEngine(None, EngineOptions(), roofline, prefixes=4)  # type: ignore[arg-type]


def test_a_simulated_answer_takes_what_the_roofline_says() -> None:
    roofline = Roofline(slowdown=2.0)
    engine = simulated(roofline)
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    began = time.monotonic()
    engine.submit(
        EngineRequest(request_id="r", input_ids=[1] * 100, sampling=SamplingParams(max_tokens=20)), events.put
    )
    deltas = [events.get(timeout=10) for _ in range(20)]
    seconds = time.monotonic() - began
    engine.close()
    assert [delta.finish_reason for delta in deltas] == [None] * 19 + ["length"]
    assert seconds >= roofline.prefill(100) + 20 * roofline.decode(100)


def test_a_known_beginning_is_not_computed_again() -> None:
    engine = simulated(Roofline(slowdown=0.01))
    events: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for ids in ([1, 2, 3], [1, 2, 3, 4, 5], [7, 8]):
        engine.submit(EngineRequest(request_id="r", input_ids=ids, sampling=SamplingParams(max_tokens=1)), events.put)
        cached = events.get(timeout=10).cached_tokens
        assert cached == (3 if len(ids) == 5 else 0)
    engine.close()


def test_the_models_of_a_process_share_its_device() -> None:
    device = Device()
    assert device.book(10.0, 2.0) == 12.0
    assert device.book(10.5, 1.0) == 13.0
    assert device.book(20.0, 1.0) == 21.0
