"""Run lm-evaluation-harness; arguments as JSON on standard input, results as JSON on standard output."""

import json
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

given = json.load(sys.stdin)
results = simple_evaluate(
    model=given["model"],
    model_args=given["model_args"],
    tasks=given["tasks"],
    batch_size=given.get("batch_size", 1),
    task_manager=TaskManager(include_path=given["include_path"], include_defaults=False),
    log_samples=True,
    bootstrap_iters=0,
    device="cpu",
    random_seed=0,
)
samples = {
    task: [
        {"doc": sample["doc_id"], "responses": sample["filtered_resps"], "raw": sample["resps"]}
        for sample in sorted(rows, key=lambda sample: sample["doc_id"])
    ]
    for task, rows in results["samples"].items()
}
print(json.dumps(samples))
