"""`troupe check` finds what is wrong with a loader, and says how to repair it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from PIL import Image

from deployments.cli.doctor.checkup import NEEDED, STEPS
from deployments.cli.doctor.codes import CODES
from deployments.cli.main import main
from tests.adapters.lora import write_adapter
from tests.tiny import byte_tokenizer, llama
from tests.whisper import as_file, recording, save_whisper

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "check.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOOKS = "tests.cli.faulty:"
KEYS = {"loader", "model", "device", "status", "exit_status", "steps"}
STEP_KEYS = {"step", "status", "code", "finding", "fix", "details", "figures", "seconds"}

Capture = pytest.CaptureFixture[str]


def run(*arguments: str) -> int:
    """The exit status of `troupe check`, in this process, whose folder it may change."""
    with contextlib.chdir("."), pytest.raises(SystemExit) as end:
        main(["check", *arguments, "--device", "cpu"])
    return int(end.value.code or 0)


def report(capture: Capture, loader: str, *options: str, keep: str | None = None) -> dict[str, Any]:
    """The report on a loader.

    Args:
        keep: the step to make beside those that others build on; None makes all but the measurement of speed.
    """
    left_out = [step for step in STEPS if step not in (*NEEDED, keep) and (keep or step == "speed")]
    status = run(loader, "--json", "--max-tokens", "12", *options, *(part for s in left_out for part in ("--skip", s)))
    found: dict[str, Any] = json.loads(capture.readouterr().out)
    assert found["exit_status"] == status
    return found


def step_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    (step,) = [step for step in found["steps"] if step["step"] == name]
    return dict(step)


def configuration(folder: Path, name: str, **entry: Any) -> str:
    """A configuration file with one of the faulty models, and a second one."""
    models = [{"id": "it", "loader": HOOKS + name, **entry}, {"id": "other", "loader": HOOKS + "sound"}]
    application = {"name": "a", "import_path": "deployments.app:build_app", "args": {"models": models}}
    (folder / "its.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    return str(folder / "its.yaml")


# The step that finds it, the code, and a part of the finding and of the fix.
FAULTS = {
    "raises": ("loader", "loader-failed", "ValueError: torn (faulty.py, line", "--traceback"),
    "returns_none": ("loader", "loader-contract", "returned NoneType (None); expected a ModelInfo", "docs/loaders.md"),
    "unknown_key": ("loader", "loader-contract", "'tokeniser' (did you mean 'tokenizer'?)", "docs/loaders.md"),
    "template_returns_dict": ("hooks", "hook-contract", "Hook apply_chat_template returned dict; expected str", ""),
    "encodes_out_of_vocabulary": ("hooks", "hook-contract", "Hook encode returned the token id 99999", ""),
    "embeds_nothing": ("hooks", "hook-contract", "Hook embed returned torch.float32 of shape (4,)", ""),
    "generates_one_dimension": ("generate", "hook-contract", "Hook generate returned torch.int64 of shape (3,)", ""),
    "generates_out_of_vocabulary": ("generate", "hook-contract", "the token id 99999", ""),
    "generate_raises": ("generate", "request-failed", "500 model_error: Hook generate failed: KeyError", ""),
    "not_finite": (
        "weights",
        "weights-not-finite",
        "1 of 21 tensors of weights have NaN or infinity: lm_head",
        "dtype",
    ),
    "too_many_tokens": ("vocabulary", "tokens-without-embedding", "1 of 262 tokens have none: <more>", "resize_token"),
    "stop_in_prompt": ("prompt-end", "stop-in-prompt", "of a completion ends with <|eos|> (257)", "add_eos_token"),
    "double_bos": ("bos", "double-bos", "The prompt of a chat begins with 2 x <|bos|>.", "encode_kwargs"),
    "missing_bos": ("bos", "missing-bos", "that of a chat does not", "{{ bos_token }}"),
    "no_generation_prompt": ("generation-prompt", "no-generation-prompt", r"'<|im_start|>assistant\n'", "if add_gen"),
    "no_template": (
        "template",
        "no-chat-template",
        "400 chat_template_error: Model 'faulty' has no",
        "`chat_template`",
    ),
    "template_fails": ("template", "template-fails", "fails on any conversation", "chat template"),
    "decodes_backwards": ("round-trip", "round-trip", "another text", "same tokenizer"),
    "loses_characters": ("characters", "lossy-text", r"'\n'", "belongs to the model"),
    "refuses_system": ("system", "system-refused", "400 chat_template_error: The chat template of model", "system"),
    "refuses_answers": ("turns", "turns-refused", "one turn only", "messages of the assistant"),
    "refuses_consecutive": ("consecutive-users", "consecutive-refused", "roles must", "merge_consecutive_roles: true"),
    "refuses_empty": ("empty-user", "empty-refused", "empty", "writes empty messages"),
    "refuses_tools": ("tools", "tools-refused", "no tools today", "writes the tools"),
    "sound": ("tools", "no-tools", "no place for tools", "writes the tools"),
    "takes_tools": ("tool-format", "tool-format-unknown", "They are read as <tool_call>", "tool_parser"),
    "drops_tool_calls": ("tool-results", "tool-results-refused", "does not write the tool call", "role `tool`"),
    "turn_end_does_not_stop": ("turn-end", "turn-end-not-stop", "'</turn>'", "{default_params: {stop: ['</turn>']}}"),
    "turn_end_is_no_special_token": ("turn-end", "turn-end-not-stop", "'</turn>'", "`stop_token_ids: [261]`"),
    "never_ends": ("stop-tokens", "no-stop-tokens", "No stop token is in force", "`stop_token_ids`"),
    "mixes_sequences": ("batch", "batch-dependent", "differs beside 7 requests", "rows of a batch"),
    "tips_scales": ("batch", "batch-rounding", "the two tokens are 0 apart", "deterministic: true"),
    "counts_up": ("batch", "not-repeatable", "when the request is sent again", "randomness"),
    "other_tokens": ("parity", "not-parity", "differs from that of generate", "kind: generate"),
    "other_of_a_tie": ("parity", "parity-rounding", "the two tokens are 0 apart", "float32"),
    "uncached": ("engine", "not-batched", "other results with a cache than without", "of `generate`"),
    "says_nothing": ("generate", "empty-answer", "The answer is empty", "trained on"),
    "image_without_a_place": ("images", "media-failed", "400", "place of the image"),
}
IN_A_FILE = {
    "no-engine": ("counts_up", {"engine": {"kind": "continuous_batching"}}, "engine", "has a generate hook"),
    "context-cut": ("sound", {"engine": {"memory_gib": 0.0001}}, "memory", "The model's context has 512 tokens"),
    "load-warnings": ("sound", {"engine": {"static_cache": True}}, "load-log", "static_cache=True has no effect"),
    "tool-parser-differs": ("calls_as_hermes", {"api": {"tool_parser": "kimi"}}, "tool-format", "shows <tool_call>"),
    "reasoning-parser-differs": ("sound", {"api": {"reasoning_parser": "think"}}, "reasoning-format", "'<think>'"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, capsys: Capture) -> None:
    step, code, finding, fix = FAULTS[name]
    found = report(capsys, HOOKS + name, keep=step)
    made = step_of(found, step)
    assert (made["code"], made["status"]) == (code, CODES[code].status)
    assert finding in made["finding"]
    assert fix in made["fix"]
    assert found["exit_status"] == {"error": 1, "warning": 3, "skipped": 0}[made["status"]]
    if made["status"] == "error":
        assert found["status"] == "error"


@pytest.mark.parametrize("code", IN_A_FILE)
def test_a_fault_of_a_configuration_is_found(code: str, tmp_path: Path, capsys: Capture) -> None:
    loader, entry, step, finding = IN_A_FILE[code]
    made = step_of(report(capsys, configuration(tmp_path, loader, **entry), "--model", "it", keep=step), step)
    assert (made["code"], made["status"]) == (code, CODES[code].status)
    assert finding in made["finding"]


# The fix of a finding, applied: the step is then ok.
REPAIRED = [
    ("refuses_consecutive", {"api": {"merge_consecutive_roles": True}}, "consecutive-users"),
    ("turn_end_does_not_stop", {"api": {"default_params": {"stop": ["</turn>"]}}}, "turn-end"),
    ("turn_end_is_no_special_token", {"api": {"default_params": {"stop_token_ids": [261]}}}, "turn-end"),
    ("never_ends", {"api": {"default_params": {"stop": "\n"}}}, "stop-tokens"),
    ("reasons", {}, "reasoning-format"),
    ("takes_tools", {"api": {"tool_parser": "hermes"}}, "tool-format"),
    ("mixes_sequences", {"engine": {"kind": "generate"}}, "batch"),
    ("tips_scales", {"engine": {"deterministic": True}}, "batch"),
    ("bos_in_the_template", {}, "bos"),
]


@pytest.mark.long
@pytest.mark.parametrize(("loader", "entry", "step"), REPAIRED)
def test_a_fix_repairs(loader: str, entry: dict[str, Any], step: str, tmp_path: Path, capsys: Capture) -> None:
    made = step_of(report(capsys, configuration(tmp_path, loader, **entry), "--model", "it", keep=step), step)
    assert (made["status"], made["code"]) == ("ok", None), made


def test_every_code_has_a_planted_fault() -> None:
    planted = {code for _, code, _, _ in FAULTS.values()} | set(IN_A_FILE) | {"adapter-refused"}
    assert set(CODES) - planted == {"check-failed"}


def test_adapters_of_a_configuration(tmp_path: Path, capsys: Capture) -> None:
    write_adapter(llama(), tmp_path / "good", ["q_proj", "v_proj"])
    write_adapter(llama(), tmp_path / "whole", ["q_proj"])
    weights = tmp_path / "whole" / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    file = Path(configuration(tmp_path, "sound"))
    config = yaml.safe_load(file.read_text())
    over = [{"id": name, "base": "it", "adapter": name} for name in ("good", "whole")]
    config["applications"][0]["args"]["models"] += over
    file.write_text(yaml.safe_dump(config))
    made = step_of(report(capsys, str(file), "--model", "good", keep="adapters"), "adapters")
    assert made["status"] == "ok"
    assert made["finding"].startswith("Adapter good: LoRA of rank 4 on 4 modules; its requests share batches with")
    assert [adapter["id"] for adapter in made["figures"]["adapters"]] == ["good"]
    made = step_of(report(capsys, str(file), "--model", "it", keep="adapters"), "adapters")
    assert (made["code"], made["figures"]["refused"]) == ("adapter-refused", 1)
    assert made["finding"].startswith(
        "The adapter 'whole' cannot be served: its weights are a pickle (adapter_model.bin)"
    )
    assert made["details"][0].startswith("Adapter good: ")


def test_a_sound_model_has_no_fault(capsys: Capture) -> None:
    found = report(capsys, HOOKS + "sound")
    assert (found["status"], found["exit_status"]) == ("ok", 0)
    assert {step["status"] for step in found["steps"]} == {"ok", "skipped"}


def test_the_report_as_json(capsys: Capture) -> None:
    found = report(capsys, HOOKS + "refuses_system")
    assert set(found) == KEYS
    assert [step["step"] for step in found["steps"]] == list(STEPS)
    assert all(set(step) == STEP_KEYS for step in found["steps"])
    for step in found["steps"]:
        assert step["status"] in ("ok", "warning", "error", "skipped")
        assert (step["code"] is None) == (step["fix"] is None)
        assert step["finding"].endswith((".", "?")) or step["code"], step
        assert step["seconds"] >= 0
    assert step_of(found, "memory")["figures"]["parameters"] == sum(p.numel() for p in llama().parameters())
    assert step_of(found, "stop-tokens")["figures"]["stop_token_ids"] == [257, 260]
    assert step_of(found, "tokens")["figures"]["token_ids"][0] == 259
    assert step_of(found, "system")["figures"] == {
        "error": {"status": 400, "code": "chat_template_error", "param": "messages[0]"}
    }
    assert step_of(found, "speed")["finding"] == "Left out by --skip."


def test_a_prompt_with_its_special_tokens(capsys: Capture) -> None:
    assert run(HOOKS + "sound", "--message", "Hi", "--skip", "speed", "--skip", "batch") == 0
    said = capsys.readouterr().out
    assert r"'<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'" in said
    assert r"259 <|im_start|>   84 'u'   82 's'" in said
    assert "Answers end with: <|eos|> (257), <|im_end|> (260)." in said
    assert re.search(r"^35 steps: \d+ ok, \d+ skipped\. Exit status 0\.$", said, re.MULTILINE)


def test_markers_that_the_tokenizer_does_not_know(capsys: Capture) -> None:
    made = step_of(report(capsys, HOOKS + "unknown_markers", keep="tokens"), "tokens")
    assert made["details"][-1] == "written as ordinary text, not as one token: <|turn|>"
    assert made["figures"]["markers_as_text"] == ["<|turn|>"]


def test_the_place_of_an_exception_in_the_users_file(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import json\n\n\ndef load_model():\n    return json.loads('[')\n")
    assert run(f"{file}:load_model") == 1
    said = capsys.readouterr()
    assert "failed: JSONDecodeError: Expecting value" in said.out
    assert f"{file}, line 5 in load_model: return json.loads('[')" in said.out
    assert "Traceback" not in said.out + said.err
    assert run(f"{file}:load_model", "--traceback") == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_what_a_loader_prints_is_not_in_the_json(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "mine.py"
    file.write_text("print('loading')\nfrom tests.cli.faulty import sound as load_model\n")
    assert report(capsys, f"{file}:load_model", keep="tokens")["exit_status"] == 0


def test_a_folder(tmp_path: Path, capsys: Capture) -> None:
    llama().save_pretrained(tmp_path / "my-model")
    byte_tokenizer().save_pretrained(tmp_path / "my-model")
    found = report(capsys, str(tmp_path / "my-model"), "--kwargs", "{dtype: bfloat16}", keep="memory")
    assert (found["model"], found["exit_status"]) == ("my-model", 0)
    assert step_of(found, "memory")["figures"]["dtypes"] == {"bfloat16": 66768}


def test_a_folder_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "my-model"
    llama().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    code = "from transformers import LlamaForCausalLM\n\n\nclass Mine(LlamaForCausalLM): ...\n"
    (folder / "modeling_mine.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    found = report(capsys, str(folder), "--trust-remote-code", keep="memory")
    assert "returned model Mine" in step_of(found, "loader")["finding"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.py:load"], "there is no 'nope.py'"),
        ([HOOKS + "sounds"], "tests.cli.faulty has no 'sounds' (did you mean 'sound'?)"),
        ([HOOKS + "sound", "--kwargs", "model_name=x"], "--kwargs 'model_name=x': write a mapping"),
        ([HOOKS + "sound", "--skip", "sped"], "--skip sped: there is no such step (did you mean 'speed'?)."),
        ([HOOKS + "sound", "--skip", "engine"], "--skip engine: there is no such step"),
        ([HOOKS + "sound", "--image", "nope.png"], "nope.png"),
        (["{its}"], "choose one of its models with --model: it, other."),
        (["{its}", "--model", "mine"], "it has no model 'mine': it, other."),
        (["{its}", "--model", "it", "--trust-remote-code"], "--trust-remote-code is for a model that the command line"),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: Capture) -> None:
    file = configuration(tmp_path, "sound")
    assert run(*(argument.replace("{its}", file) for argument in arguments)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_an_image_and_a_recording_of_the_user(tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    found = report(capsys, HOOKS + "sees", "--image", str(tmp_path / "red.png"), keep="images")
    assert step_of(found, "images")["finding"] == f"{tmp_path}/red.png adds 4 tokens to the prompt."
    assert step_of(report(capsys, HOOKS + "sees", keep="parity"), "parity")["figures"]["prompts"] == 2
    refused = report(capsys, HOOKS + "sound", "--image", str(tmp_path / "red.png"), keep="images")
    assert step_of(refused, "images")["code"] == "media-failed"
    (tmp_path / "text.png").write_text("no image")
    broken = report(capsys, HOOKS + "sees", "--image", str(tmp_path / "text.png"), keep="images")
    assert "invalid_image" in step_of(broken, "images")["finding"]


def test_a_whisper_writes_down_a_tone(tmp_path: Path, capsys: Capture) -> None:
    folder = save_whisper(tmp_path / "w", seed=5)
    found = report(capsys, str(folder))
    assert found["exit_status"] == 0
    heard = step_of(found, "audio")["figures"]
    assert (heard["audio_s"], heard["window_s"], heard["languages"]) == (2, 30, ["de", "en", "ms", "zh"])
    assert step_of(found, "generate")["finding"] == "The model turns recordings into text."
    (tmp_path / "three.wav").write_bytes(as_file(recording(3.0)))
    found = report(capsys, str(folder), "--audio", str(tmp_path / "three.wav"), keep="audio")
    assert step_of(found, "audio")["figures"]["audio_s"] == 3


def test_a_model_that_only_embeds(capsys: Capture) -> None:
    found = report(capsys, HOOKS + "encoder")
    assert (found["exit_status"], step_of(found, "embeddings")["figures"]["dimensions"]) == (0, 48)
    assert step_of(found, "engine")["finding"] == "embeddings, because the model has no head for text."
    assert step_of(found, "template")["finding"] == "The model gives embeddings, not text."


def test_a_check_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    async def fails(subject: Any) -> Any:
        raise KeyError("here")

    monkeypatch.setitem(sys.modules["deployments.cli.doctor.checkup"].CHECKS, "tokens", fails)
    made = step_of(report(capsys, HOOKS + "sound", "--traceback", keep="tokens"), "tokens")
    assert (made["code"], made["finding"]) == ("check-failed", "The check failed: KeyError: 'here'")


def test_a_sign_of_life_while_a_loader_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Which step, how long, and the line of the loader; the loader waits until that was said."""
    import deployments.cli.doctor.display as display

    monkeypatch.setattr(display, "FIRST_SIGN_S", 0.05)
    monkeypatch.setattr(display, "NEXT_SIGN_S", 0.05)
    said = tmp_path / "said"

    class Signs(io.StringIO):
        def write(self, text: str) -> int:
            if "load_model" in text:
                said.touch()
            return super().write(text)

    signs = Signs()
    monkeypatch.setattr(sys, "stderr", signs)
    file = tmp_path / "slow.py"
    file.write_text(
        "import pathlib, time\nfrom tests.cli.faulty import sound\n\n\ndef load_model():\n"
        f"    while not pathlib.Path({str(said)!r}).exists():\n        time.sleep(0.01)\n    return sound()\n"
    )
    assert run(f"{file}:load_model", *(part for step in STEPS if step not in NEEDED for part in ("--skip", step))) == 0
    assert re.search(r"… loader: \d+ s, at slow\.py, line [67] in load_model", signs.getvalue())


def test_the_modules_that_can_be_captured_and_changed(tmp_path: Path, capsys: Capture) -> None:
    made = step_of(report(capsys, HOOKS + "sound", "--modules", keep="modules"), "modules")
    listed = {module["name"]: module for module in made["figures"]["modules"]}
    assert set(listed) == {name for name, _ in llama().named_modules() if name}
    counts = [sum(module[key] for module in listed.values()) for key in ("capturable", "steerable")]
    assert counts == [made["figures"]["capturable"], made["figures"]["steerable"]]
    assert made["finding"] == f"Of {len(listed)} modules, requests can capture {counts[0]} and change {counts[1]}."
    width = llama().config.hidden_size
    for line in (
        f"model.norm (LlamaRMSNorm): input [{width}] float32: capture, change; output [{width}] float32: capture, ",
        "model.embed_tokens (Embedding): input [] int64: capture alone (its numbers are not floating-point numbers); ",
        "model.layers (ModuleList): it is not called by the model's forward",
    ):
        assert any(detail.startswith(line) for detail in made["details"]), made["details"]
    closed = configuration(tmp_path, "sound", inside="off")
    made = step_of(report(capsys, closed, "--model", "it", "--modules", keep="modules"), "modules")
    assert (made["status"], made["details"]) == ("skipped", [])
    assert "models[].inside is off" in made["finding"]


def test_the_real_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deployments.cli.main", "check", HOOKS + "refuses_system", "--skip", "speed"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 3
    assert "warning  system" in done.stdout
    assert "fix: Give the loader a `chat_template`" in done.stdout
    assert done.stderr == ""


def table(heading: str) -> list[list[str]]:
    """The cells of the first table after a heading of docs/check.md."""
    text = PAGE.partition(f"\n## {heading}\n")[2].partition("|---|")[2].partition("\n\n")[0]
    return [re.split(r" (?<!\\)\| ", row.strip("| ")) for row in text.splitlines()[1:]]


def test_the_page_has_every_code() -> None:
    rows = [[f"`{code}`", kind.status, kind.meaning, kind.fix] for code, kind in CODES.items()]
    assert table("Findings") == rows


def test_the_page_has_every_step() -> None:
    assert re.findall(r"`([a-z-]+)`", " ".join(row[0] for row in table("Steps"))) == list(STEPS)


def test_the_page_has_every_key_and_figure_of_the_report(capsys: Capture) -> None:
    parts = PAGE.split("\n## JSON\n")[1].split("\n\n|")[1:]
    keys, step_keys, figures = (re.findall(r"^\| (`.*?`) \| (.*?) \|$", part, re.MULTILINE) for part in parts)
    assert [name.strip("`") for name, _ in keys] == ["loader", "model", "device", "status", "exit_status", "steps"]
    assert {name.strip("`") for name, _ in step_keys} == STEP_KEYS
    listed = {
        name: re.findall(r"`(\w+)`", values) for names, values in figures for name in re.findall(r"`([a-z-]+)`", names)
    }
    for step in report(capsys, HOOKS + "sees")["steps"]:
        if step["status"] == "ok":
            assert sorted(step["figures"]) == sorted(listed.get(step["step"], [])), step["step"]


def test_the_page_shows_what_the_demo_model_gets(capsys: Capture) -> None:
    assert run("model_loaders.demo:load_model") == 0
    (shown,) = re.findall(r"```\n(Model demo.*?)```", PAGE, re.DOTALL)
    assert plain(shown) == plain(capsys.readouterr().out)


def plain(report: str) -> list[str]:
    """The lines of a report without the numbers that differ from run to run."""
    changing = re.compile(r"[\d.,]+ (?:GiB|KiB|s|ms|sequences of|tokens/s|with 16)(?=\W|$)")
    return [" ".join(changing.sub("…", line).split()) for line in report.strip().splitlines()]


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained(tmp_path / "my-checkpoint")
    byte_tokenizer().save_pretrained(tmp_path / "my-checkpoint")
    (tmp_path / "my_loader.py").write_text(re.findall(r"```python\n(from transformers.*?)```", README, re.DOTALL)[0])
    Path(configuration(tmp_path, "sound")).rename("my_config.yaml")
    text = (tmp_path / "my_config.yaml").read_text().replace("id: it", "id: my-checkpoint")
    (tmp_path / "my_config.yaml").write_text(text)
    commands = re.findall(r"^troupe check (.*?) *#", PAGE.partition("```bash\n")[2].partition("```")[0], re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert report(capsys, *shlex.split(command), keep="tokens")["exit_status"] == 0


def test_a_loader_that_ends_the_process_is_named(tmp_path: Path) -> None:
    (tmp_path / "quits.py").write_text("import os\n\n\ndef load_model():\n    os._exit(9)\n")
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli.main", "check", "quits.py:load_model", "--device", "cpu"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "ended in step 'loader': os._exit(9) was called at quits.py, line 5 in load_model." in done.stderr
