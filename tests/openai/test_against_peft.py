"""Log-likelihoods under an adapter that was trained, against those of the peft package for the same tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers

from model_loaders.demo.tasks import make_tasks
from tests.adapters.train import HERE
from tests.clients.conftest import WEIGHTS
from tests.openai.conftest import Serve
from tests.openai.test_sixteen_adapters import scores_of

peft = pytest.importorskip("peft", reason="PEFT is an optional package")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT


def prompts() -> list[list[int]]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(WEIGHTS)
    texts = ["\n".join(message["content"] for message in task.messages) + task.answer for task in make_tasks(12, 5)]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_log_likelihoods(dtype: torch.dtype, deterministic: bool, serve: Serve) -> None:
    """Of a request by itself; in the deterministic mode also beside others. A prompt of another length is rounded in
    another way in bfloat16, by PEFT too, so that programs that leave out the last token find other numbers."""
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=dtype)
    alone = peft.PeftModel.from_pretrained(base, HERE / "one_more").eval()
    kwargs = {"model_name": str(WEIGHTS), "dtype": str(dtype).removeprefix("torch.")}
    model = {"id": "base", "loader": "model_loaders.auto:load_model", "kwargs": kwargs}
    engine = {"threads": 1, "deterministic": deterministic}
    adapter = {"id": "mine", "base": "base", "adapter": str(HERE / "one_more")}
    server = serve([{**model, "engine": engine}, adapter])
    torch.set_num_threads(1)
    with ThreadPoolExecutor(8 if deterministic else 1) as pool, torch.inference_mode():
        found = list(pool.map(lambda ids: scores_of(server.url, "mine", ids), prompts()))
        for ids, scores in zip(prompts(), found, strict=True):
            logprobs = alone(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
            expected = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
            assert float((scores - expected).abs().max()) < 1e-4
