"""A Ray Serve configuration file, checked before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.cli.main import main
from deployments.cli.serve_file import base_url, read_config, troupe_applications
from deployments.core.errors import ConfigError
from tests.adapters.lora import write_adapter
from tests.tiny import llama

ROOT = Path(__file__).parent.parent.parent
DEMO = {"id": "a", "loader": "model_loaders.demo:load_model"}
AUTO = {"id": "a", "loader": "model_loaders.auto:load_model"}


def write(folder: Path, loader: str = DEMO["loader"], **more: Any) -> Path:
    """A configuration with one model; `more` are further keys of the file, `app` of its application."""
    app = {"import_path": "deployments.app:build_app", "args": {"models": [{**DEMO, "loader": loader}]}}
    app |= more.pop("app", {})
    file = folder / "my_models.yaml"
    file.write_text(yaml.safe_dump({"applications": [app], **more}))
    return file


def deployment(**options: Any) -> dict[str, Any]:
    """The `deployments` of an application: its replicas, with these options."""
    return {"deployments": [{"name": "ModelReplica", **options}]}


def refused(file: Path) -> str:
    """The message that a configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert str(caught.value).startswith(str(file))
    return str(caught.value)


def test_the_shipped_configuration_is_valid_and_stays_on_this_machine() -> None:
    written = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    assert written["http_options"]["host"] == "127.0.0.1"
    config, args = read_config(ROOT / "serve_config.yaml")
    assert base_url(config) == "http://127.0.0.1:8000"
    assert [entry.id for entry in args.models] == ["demo"]
    assert args.by_name()["gpt-3.5-turbo-0613"].engine.max_batch_size == 16


@pytest.mark.parametrize(
    ("given", "variable", "host"),
    [
        (None, None, "127.0.0.1"),
        ({"port": 80}, None, "127.0.0.1"),
        ({"host": "10.0.0.1"}, None, "10.0.0.1"),
        ({"host": "127.0.0.1"}, "0.0.0.0", "0.0.0.0"),
        (None, "", "127.0.0.1"),
    ],
)
def test_the_host_is_this_machine_unless_said_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, variable: str | None, host: str
) -> None:
    if variable is not None:
        monkeypatch.setenv("TROUPE_HOST", variable)
    config, _ = read_config(write(tmp_path, http_options=given))
    assert config["http_options"]["host"] == host


def test_a_container_chooses_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUPE_PORT", "7088")
    file = write(tmp_path, http_options={"port": 8001})
    config, _ = read_config(file)
    assert config["http_options"]["port"] == 7088
    assert base_url(config) == "http://127.0.0.1:7088"
    monkeypatch.setenv("TROUPE_PORT", "http")
    with pytest.raises(ConfigError, match="TROUPE_PORT 'http': write a port's number"):
        read_config(file)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"http_options": {"prot": 1}}, "http_options.prot: unknown key (did you mean 'port'?)"),
        ({"http_option": {}}, "http_option: unknown key (did you mean 'http_options'?)"),
        (
            {"app": {"deployments": [{"name": "ModelReplicas"}]}},
            "deployments: there is none named 'ModelReplicas' (did you mean 'ModelReplica'?)",
        ),
        ({"app": {"args": {"models": [DEMO], "maxx": 1}}}, "maxx: unknown key"),
        (
            {"app": {"args": {"models": [{**DEMO, "api": {"tool_parser": "hermess"}}]}}},
            "models[0].api.tool_parser: there is no parser 'hermess' (did you mean 'hermes'?); known: ",
        ),
        (
            {"app": {"args": {"models": [{**DEMO, "api": {"reasoning_parser": "deepseek_r1"}}]}}},
            "models[0].api.reasoning_parser: there is no parser 'deepseek_r1'; known: think, ",
        ),
    ],
)
def test_a_fault_names_the_file_the_key_and_the_fix(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    file = write(tmp_path, **more)
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "while parsing"),
        ("just text", "'applications'"),
        (
            "applications: [{name: x, import_path: other:app}]",
            "no application has import_path deployments.app:build_app",
        ),
    ],
)
def test_a_file_that_is_not_a_configuration(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(file)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        ("no_such_module:load", "there is no module named 'no_such_module'"),
        ("model_loaders.nothing:load_model", "there is no module named 'model_loaders.nothing'"),
        ("no/such/file.py:load", "there is no file "),
        ("beside.py:lod", "beside.py has no 'lod' (did you mean 'load'?)"),
        ("beside.py", "name the function, such as beside.py:load."),
        ("model_loaders.demo:load_modle", "model_loaders.demo has no 'load_modle' (did you mean 'load_model'?)"),
    ],
)
def test_a_loader_that_is_not_there(tmp_path: Path, loader: str, said: str) -> None:
    (tmp_path / "beside.py").write_text("raise SystemExit('imported')\ndef load(): ...\n")
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path, loader))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "def load(): ...",
        "import json as load",
        "from json import loads as load",
        "load = print",
        "if True:\n    def load(): ...",
        "try:\n    from a import load\nexcept ImportError:\n    load = None",
        "from somewhere import *",
        "def __getattr__(name): return print",
        "a, (load, b) = 1, (2, 3)",
        "class load: ...",
    ],
)
def test_a_loader_beside_the_file_is_found_without_importing_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "beside.py").write_text(text)
    read_config(write(tmp_path, "beside.py:load"))
    read_config(write(tmp_path, "beside:load"))
    assert "beside" not in sys.modules


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"app": {"route_prefx": "/"}}, "applications[0].route_prefx: unknown key (did you mean 'route_prefix'?)"),
        ({"app": deployment(num_replica=2)}, "deployments[0].num_replica: unknown key (did you mean 'num_replicas'?)"),
        ({"app": deployment(ray_actor_options={"num_gpu": 1})}, "ray_actor_options.num_gpu: unknown key (did you mean"),
        (
            {"app": deployment(autoscaling_config={"min_replica": 1})},
            "autoscaling_config.min_replica: unknown key (did you mean 'min_replicas'?)",
        ),
        (
            {"app": deployment(request_router_config={"request_router_clas": "x"})},
            "request_router_clas: unknown key (did you mean 'request_router_class'?)",
        ),
        ({"app": deployment(logging_config={"log_levl": "INFO"})}, "logging_config.log_levl: unknown key (did you"),
        ({"grpc_options": {"prt": 1}}, "grpc_options.prt: unknown key (did you mean 'port'?)"),
        ({"logging_config": {"log_levl": "INFO"}}, "logging_config.log_levl: unknown key (did you mean 'log_level'?)"),
        ({"app": {"runtime_env": {"env_var": {}}}}, "runtime_env.env_var: unknown key (did you mean 'env_vars'?)"),
        (
            {"app": deployment(ray_actor_options={"runtime_env": {"pipp": []}})},
            "ray_actor_options.runtime_env.pipp: unknown key (did you mean 'pip'?)",
        ),
        ({"app": {"autoscaling_policy": {"policy_functio": "x"}}}, "autoscaling_policy.policy_functio: unknown key"),
        (
            {"app": {"deployments": [{"name": "ModelReplica"}, {"name": "ModelReplica", "num_replicas": 2}]}},
            "applications[0].deployments: 'ModelReplica' is there twice",
        ),
    ],
)
def test_a_key_that_ray_serve_would_ignore(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    assert said in refused(write(tmp_path, **more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"http_options": {"port": "abc"}}, "http_options.port 'abc': write a port's number, from 1 to 65535"),
        ({"http_options": {"port": None}}, "http_options.port None: write a port's number"),
        ({"http_options": {"port": 99999}}, "http_options.port 99999: write a port's number"),
        ({"http_options": {"port": True}}, "http_options.port True: write a port's number"),
        ({"grpc_options": {"port": -1}}, "grpc_options.port -1: write a port's number"),
        ({"http_options": {"host": 127}}, "http_options.host: input should be a valid string (got 127)"),
        ({"http_options": [1]}, "http_options: write a mapping of options"),
        ({"http_options": "x"}, "http_options: write a mapping of options"),
        ({"proxy_location": "EveryNod"}, "proxy_location: input should be 'Disabled', 'HeadOnly' or 'EveryNode' (got"),
        ({"proxy_location": "Disabled"}, "proxy_location: Disabled leaves no HTTP server"),
        (
            {"http_options": {"ssl_certfile": "a.pem", "ssl_keyfile": "a.key"}},
            "http_options.ssl_keyfile: there is no file",
        ),
        ({"app": deployment(num_replicas=True)}, "deployments[0].num_replicas: write a number (got true)"),
        ({"app": deployment(ray_actor_options={"num_gpus": True})}, "num_gpus: write a number (got true)"),
        ({"app": deployment(ray_actor_options={"resources": {"a": "x"}})}, "resources.a: write a number (got 'x')"),
        ({"app": deployment(num_replicas="two")}, "deployments[0]: `num_replicas` must be an int"),
        ({"app": deployment(num_replicas=-1)}, "deployments[0].num_replicas: input should be greater than 0 (got -1)"),
        (
            {"app": deployment(ray_actor_options={"num_cpus": "x"})},
            "ray_actor_options.num_cpus: input should be a valid",
        ),
        ({"app": deployment(ray_actor_options=[1])}, "ray_actor_options: input should be an object"),
        (
            {"app": deployment(autoscaling_config={"min_replicas": "x"})},
            "autoscaling_config.min_replicas: input should",
        ),
        ({"app": deployment(autoscaling_config={"min_replicas": 3, "max_replicas": 2})}, "autoscaling_config: "),
        ({"logging_config": {"log_level": "INFOO"}}, 'logging_config.log_level: got "INFOO" for log_level'),
        ({"app": {"runtime_env": {"env_vars": {"A": 1}}}}, "runtime_env.env_vars.A: write a text, in quotes (got 1)"),
        (
            {"app": {"route_prefix": "x"}},
            "route_prefix of application 'default': write a path such as / or /a (got 'x')",
        ),
        ({"app": {"route_prefix": None}}, "route_prefix of application 'default': write a path"),
        ({"app": {"deployments": 3}}, "deployments: "),
        ({"app": {"args": [1]}}, "args:"),
    ],
)
def test_a_wrong_value_of_ray_serves_own_options(tmp_path: Path, more: dict[str, Any], said: str) -> None:
    assert said in refused(write(tmp_path, **more))


def test_what_ray_serve_knows_is_left_alone(tmp_path: Path) -> None:
    options = {
        "num_replicas": "auto",
        "max_ongoing_requests": 8,
        "user_config": {"anything": 1},
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "policy": {"policy_function": "not:imported"}},
        "ray_actor_options": {
            "num_gpus": 0.5,
            "resources": {"mine": 1},
            "runtime_env": {"env_vars": {"anything": "1"}},
        },
        "logging_config": {"log_level": "DEBUG"},
    }
    read_config(write(tmp_path, app=deployment(**options), grpc_options={"port": 9001}, proxy_location="HeadOnly"))


def two_applications(folder: Path, **second: Any) -> Path:
    """A configuration with the applications `a` at /a, and `b` at /b with these arguments beside its model."""
    app = {"import_path": "deployments.app:build_app", "args": {"models": [DEMO]}}
    more = {"import_path": "deployments.app:build_app", "args": {"models": [DEMO], **second.pop("args", {})}, **second}
    file = folder / "two.yaml"
    both = [{"name": "a", "route_prefix": "/a", **app}, {"name": "b", "route_prefix": "/b", **more}]
    file.write_text(yaml.safe_dump({"applications": both}))
    return file


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"args": {"maxx": 1}}, "args of application 'b':\n  maxx: unknown key"),
        ({"args": {"models": [{"id": "x", "loader": "no_such_module:load"}]}}, "there is no module named"),
        (
            {
                "args": {
                    "models": [
                        {**DEMO, "loader": "model_loaders.auto:load_model", "kwargs": {"model_name": "./nowhere"}}
                    ]
                }
            },
            "'nowhere'",
        ),
        ({"deployments": [{"name": "ModelReplicas"}]}, "there is none named 'ModelReplicas'"),
        ({"name": "a"}, "a"),
        ({"route_prefix": "/a"}, "route"),
    ],
)
def test_every_application_is_checked(tmp_path: Path, second: dict[str, Any], said: str) -> None:
    assert said in refused(two_applications(tmp_path, **second))


def test_keys_of_every_application_are_hidden_and_its_address_is_told(tmp_path: Path) -> None:
    config, _ = read_config(
        two_applications(tmp_path, args={"api": {"api_keys": ["secret"], "admin_keys": ["secret"]}})
    )
    assert "secret" not in str(config)
    urls = [base_url(config, app) for app in troupe_applications(config)]
    assert urls == ["http://127.0.0.1:8000/a", "http://127.0.0.1:8000/b"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"api": {"default_model": "b"}}, "api.default_model: there is no model 'b' (known: a)"),
        ({"api": {"api_keys_file": "none.txt"}}, "none.txt' cannot be read: No such file or directory"),
        ({"api": {"api_keys_file": "."}}, "cannot be read: Is a directory"),
        ({"api": {"record_dir": "plain/records"}}, "plain' is a file"),
        ({"api": {"record_dir": "plain"}}, "plain' is a file"),
        ({"api": {"record_dir": "/proc/x"}}, "'/proc' is not writable"),
        ({"state_dir": "/proc/x"}, "'/proc' is not writable"),
        ({"api": {"admin_roots": ["plian"]}}, "api.admin_roots: plian: there is no 'plian'"),
        (
            {"models": [{**AUTO, "kwargs": {"model_name": "org/x", "dtype": "flaot16"}}]},
            "model 'a', kwargs.dtype: there is no 'flaot16' (did you mean 'float16'?)",
        ),
        ({"models": [DEMO, DEMO]}, "models: two models have the id 'a'; give one of them another"),
        ({"folders": [{"lik": "a", "glob": "x"}]}, "folders[0].lik: unknown key (did you mean 'like'?)"),
        ({"models": [DEMO, {"id": "b", "base": "c", "adapter": "x"}]}, "args:\n  models[1].base: there is no model"),
        ({"models": [{**DEMO, "id": "a\nb"}]}, "models[0].id: remove the control characters of 'a\\nb'"),
        ({"models": [{**DEMO, "profile_dir": "plain/x"}]}, "model 'a', profile_dir: "),
        ({"folder": "nowhere"}, "args.folder: there is no folder "),
        (
            {"models": [{**DEMO, "kwargs": {"devcie": "cpu"}}]},
            "model 'a', kwargs.devcie: loader model_loaders.demo:load",
        ),
        ({"models": [{**DEMO, "kwargs": {"devcie": "cpu"}}]}, "(did you mean 'device'?)"),
        ({"models": [AUTO]}, "needs 'model_name'; add it"),
    ],
)
def test_a_value_that_cannot_be_right(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    (tmp_path / "plain").write_text("")
    assert said in refused(write(tmp_path, app={"args": {"models": [DEMO], **args}}))


def test_paths_start_from_the_folder_of_the_arguments(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "beside.py").write_text("def load(): ...")
    (there / "keys.txt").write_text("a-key\n")
    api = {"api_keys_file": "keys.txt", "record_dir": "new/records"}
    models = [{"id": "a", "loader": "beside.py:load"}]
    read_config(write(tmp_path, app={"args": {"models": models, "api": api, "folder": "there"}}))
    assert not (there / "new").exists()


@pytest.mark.parametrize(
    ("text", "kwargs", "said"),
    [
        ("load = 3", {}, "load is 3; name a function"),
        ("load: str = 'x'", {}, "load is 'x'; name a function"),
        ("load = [1]", {}, "load is [1]; name a function"),
        ("def load(a, b=1): ...", {"b": 2}, "needs 'a'"),
        ("def load(*, a, b=1): ...", {}, "needs 'a'"),
        ("def load(a=1): ...", {"b": 2}, "kwargs.b: loader beside.py:load does not have this argument"),
        ("def load(device): ...", {}, None),
        ("def load(a, **more): ...", {"a": 1, "b": 2}, None),
        ("@decorated\ndef load(a): ...", {"b": 2}, None),
        ("try:\n    def load(a): ...\nexcept E:\n    def load(b): ...", {"b": 1}, None),
        ("load = make(3)", {"b": 1}, None),
        ("load = {'model': 1}", {}, None),
    ],
)
def test_a_loader_is_compared_with_its_arguments(tmp_path: Path, text: str, kwargs: Any, said: str | None) -> None:
    (tmp_path / "beside.py").write_text(text)
    models = [{"id": "a", "loader": "beside.py:load", "kwargs": kwargs}]
    file = write(tmp_path, app={"args": {"models": models}})
    if said is None:
        read_config(file)
    else:
        assert said in refused(file)


def test_keys_do_not_reach_the_arguments_that_ray_logs(tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    api = {"api_keys": ["secret-client", digest], "admin_keys": ["secret-admin"]}
    config, args = read_config(write(tmp_path, app={"args": {"models": [DEMO], "api": api}}))
    assert "secret" not in str(config)
    assert config["applications"][0]["args"]["api"]["api_keys"][1] == digest
    assert args.api.admin_keys == ("secret-admin",)


def test_a_number_that_is_too_small_is_one_fault(tmp_path: Path) -> None:
    said = refused(write(tmp_path, app=deployment(num_replicas=0)))
    assert "greater than 0 (got 0)" in said
    assert "valid string" not in said


def test_the_check_alone_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployments.cli.main", "serve", "--check"]
    file = write(tmp_path)
    fine = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (fine.returncode, fine.stdout, fine.stderr) == (0, f"{file}: no mistake was found.\n", "")
    file = write(tmp_path, http_options={"prot": 1})
    wrong = subprocess.run([*command, str(file)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2
    assert wrong.stderr == f"troupe: {file}: http_options.prot: unknown key (did you mean 'port'?)\n"


def test_an_adapter_that_is_torn_is_named_and_does_not_stop_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_adapter(llama(), tmp_path / "mine", ["q_proj"]) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    models = [DEMO, {"id": "mine", "base": "a", "adapter": "mine"}]
    file = write(tmp_path, app={"args": {"models": models}})
    with pytest.raises(SystemExit) as ended:
        main(["serve", str(file), "--check"])
    assert not ended.value.code
    assert "The adapter 'mine' cannot be served: " in capsys.readouterr().err
