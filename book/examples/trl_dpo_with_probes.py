"""`trl dpo` with probes: the same settings from the command line or a file, the curves and alerts beside the model.

.venv/bin/python book/examples/trl_dpo_with_probes.py --config my_dpo.yml
"""

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from lddyn.engine.callback import ProbeCallback

script, settings, model = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config()
options = {"dtype": model.dtype, "revision": model.model_revision, "attn_implementation": model.attn_implementation}
settings.model_init_kwargs = options | (settings.model_init_kwargs or {})
data = load_dataset(script.dataset_name, name=script.dataset_config)
trainer = DPOTrainer(
    model.model_name_or_path,
    args=settings,
    train_dataset=data[script.dataset_train_split],
    eval_dataset=data.get(script.dataset_test_split),
    quantization_config=get_quantization_config(model),
    peft_config=get_peft_config(model),
)
trainer.add_callback(ProbeCallback(trainer, output_dir=f"{settings.output_dir}/probes"))
trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
trainer.save_model()
