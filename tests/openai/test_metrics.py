"""GET /metrics: what Prometheus reads at the server's own address."""

from __future__ import annotations

import re
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from deployments.metrics import merged
from tests.openai.conftest import Serve

GRAFANA = Path(__file__).parent.parent.parent / "docs" / "grafana.json"


def samples(text: str) -> dict[tuple[str, str], float]:
    """Values by the name of a sample and its model."""
    families = text_string_to_metric_families(text)
    return {
        (sample.name, sample.labels.get("model", "")): sample.value for family in families for sample in family.samples
    }


def test_metrics_of_a_server_without_ray(serve: Serve) -> None:
    server = serve()
    model = "org/scripted"
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "stream": True}
    usage = {"stream_options": {"include_usage": True}}
    requests.post(f"{server.url}/v1/chat/completions", json={**body, **usage}, timeout=30).raise_for_status()
    for path in ("/metrics", "/v1/metrics"):
        answer = requests.get(server.url + path, timeout=30)
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        found = samples(answer.text)
        assert found["ray_troupe_requests_total", model] == 1
        assert found["ray_troupe_generated_tokens_total", model] == 3
        assert found["ray_troupe_time_to_first_token_seconds_count", model] == 1
        assert found["ray_troupe_model_loaded", model] == 1
        assert found["ray_troupe_model_loads_total", ""] == 1
        drawn = set(re.findall(r"ray_troupe_[a-z_]+", GRAFANA.read_text()))
        assert drawn <= set(re.findall(r"ray_troupe_[a-z_]+", answer.text))


def test_metrics_need_a_key_if_keys_are_set(serve: Serve) -> None:
    server = serve(api_keys=["secret"])
    assert requests.get(f"{server.url}/metrics", timeout=30).status_code == 401
    headers = {"Authorization": "Bearer secret"}
    assert requests.get(f"{server.url}/metrics", headers=headers, timeout=30).status_code == 200


def node(replica: str, application: str = "one") -> str:
    tags = f'application="{application}",replica="{replica}"'
    return (
        "# HELP ray_other Something of Ray.\n# TYPE ray_other gauge\nray_other 1.0\n"
        "# HELP ray_troupe_rows Choices being computed.\n# TYPE ray_troupe_rows gauge\n"
        f"ray_troupe_rows{{{tags}}} 2.0\n"
        "# HELP ray_troupe_request_seconds From a request to its end.\n# TYPE ray_troupe_request_seconds histogram\n"
        f'ray_troupe_request_seconds_bucket{{{tags},le="+Inf"}} 3.0\n'
        f"ray_troupe_request_seconds_count{{{tags}}} 3.0\nray_troupe_request_seconds_sum{{{tags}}} 0.5\n"
    )


def test_nodes_of_a_cluster_are_one_text() -> None:
    text = merged([node("a"), node("b"), node("c", "two")], "one")
    assert text.count("# TYPE ray_troupe_rows gauge") == 1
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert set(found) == {"ray_troupe_rows", "ray_troupe_request_seconds"}
    assert [sample.labels["replica"] for sample in found["ray_troupe_rows"].samples] == ["a", "b"]
    assert len(found["ray_troupe_request_seconds"].samples) == 6
    assert merged([node("c", "two")], "one") == ""
