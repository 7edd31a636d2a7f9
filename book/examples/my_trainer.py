"""Path (b): your own TRL script with two more lines (marked), and the curves and scorecard of that run at the end.

.venv/bin/python book/examples/my_trainer.py MODEL PAIRS.jsonl OUT
"""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from lddyn.engine.callback import ProbeCallback
from lddyn.workshop import report

name, pairs, out = sys.argv[1:4]
model, reference = (AutoModelForCausalLM.from_pretrained(name, dtype="float32") for _ in range(2))
tokenizer = AutoTokenizer.from_pretrained(name)
data = load_dataset("json", data_files=pairs, split="train").select_columns(["prompt", "chosen", "rejected"])
settings = DPOConfig(
    output_dir=f"{out}/trainer", learning_rate=1e-4, per_device_train_batch_size=4, num_train_epochs=2,
    bf16=False, report_to="none", save_strategy="no",
)  # fmt: skip
trainer = DPOTrainer(model, ref_model=reference, args=settings, train_dataset=data, processing_class=tokenizer)

callback = ProbeCallback(trainer, every=2, output_dir=out, max_prompt=64, max_response=64)  # <- one
trainer.add_callback(callback)  # <- two
trainer.train()

print(report.write([out], method="dpo"))  # the same as: python -m lddyn report OUT --method dpo
