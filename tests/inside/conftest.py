"""A server of a tiny model whose inside is open."""

from __future__ import annotations

import pytest

from tests.openai.conftest import Serve, Server, serve  # noqa: F401

CALM = {"interventions": [{"module": "model.layers.0", "op": "add", "vector": [3.0] * 48, "scale": 4.0}]}
MODELS = [
    {"id": "tiny", "loader": "tests.openai.tiny_models:load_model", "variants": {"tiny+calm": CALM}},
    {
        "id": "shut",
        "loader": "tests.openai.tiny_models:load_model",
        "inside": "off",
    },
    {"id": "seen", "loader": "tests.openai.tiny_models:load_model", "inside": "capture"},
    {"id": "hooked", "loader": "tests.openai.tiny_models:load_model", "engine": {"kind": "generate"}},
    {"id": "inspected", "loader": "tests.inside.loaders:with_inspect"},
    {"id": "own", "loader": "tests.openai.scripted:load_model"},
]
KEYS = ["first", "second"]


@pytest.fixture(scope="session")
def inside(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Server:  # noqa: F811
    folder = tmp_path_factory.mktemp("inside")
    captures = {"dir": str(folder / "captures"), "per_choice_mib": 1, "inline_kib": 64}
    return serve(MODELS, api_keys=KEYS, captures=captures, record_dir=str(folder / "records"))
