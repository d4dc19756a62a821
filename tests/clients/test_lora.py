"""The recipe for LoRA adapters in docs/cookbook.md, in an environment that has PEFT."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.clients.conftest import ROOT, client_python, run_shell
from tests.docs.conftest import checkpoint  # noqa: F401
from tests.docs.pages import DOCS, blocks

ADAPTER = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained("my-checkpoint")
options = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
get_peft_model(base, options).save_pretrained("my-adapter")
"""
COMPARED = """
import torch
from lora_loader import load_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

ids = torch.arange(40)[None]
merged = load_model("cpu", "my-checkpoint", "my-adapter")["model"](ids).logits
base = AutoModelForCausalLM.from_pretrained("my-checkpoint")
alone = base(ids).logits
adapted = PeftModel.from_pretrained(base, "my-adapter")(ids).logits
print((merged - adapted).abs().max().item() < 1e-3 < (merged - alone).abs().max().item())
"""


def test_an_adapter_is_merged(tmp_path: Path, checkpoint: Path) -> None:  # noqa: F811
    shutil.copytree(checkpoint, tmp_path / "my-checkpoint")
    (loader,) = [block for block in blocks(DOCS / "cookbook.md") if block.title == "lora_loader.py"]
    for name, text in (("lora_loader.py", loader.text), ("adapter.py", ADAPTER), ("compared.py", COMPARED)):
        (tmp_path / name).write_text(text)
    python = client_python("peft", ["peft==0.21.2"])
    assert run_shell(python, "python adapter.py && python compared.py", tmp_path).strip() == "True"
    check = "check lora_loader.py:load_model --kwargs '{base: my-checkpoint, adapter: my-adapter}'"
    printed = run_shell(python, f"PYTHONPATH={ROOT} python -m deployments.cli.main {check}", tmp_path)
    assert "continuous_batching" in printed
