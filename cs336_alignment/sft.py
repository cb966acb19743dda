"""The public primitives of supervised fine-tuning, and the map of the package.

```
errors, files, config, microbatch   what all speak: user errors, the keys of a run, one microbatch
config_check, config_clashes        what keys may be; what does not combine
config_names                        the key that was meant
compose, cli, data_commands         Hydra to a typed config; `cs336-sft VERB`; prepare and inspect
data/        sources (json_rows, table_rows) → layout → formats, templates
             → chat (messages, spans, chat_probe, chat_date) → tokenize → encode, encode_processes
             → prepare (store, ledger, lint)
             → splits, mixture → dataset → batching (step ▸ examples ▸ microbatches)
             token_view, token_page: what is trained, to look at
model/       source (where from) → loading · fits
             attention (flat rows, shared prefix) · lm_head (chunked) · policy · log_probs
             slots, padded_decoder: decoding with a cache
             trainable (what is trained) → lora (adapters, by peft) → adapters, adapter_files
             → base_model, narrow
training/    loss · step (one step's gradient) · trainer (the loop) · run (a run, whole)
             optimizer · schedule · parallel · status · stop
             checkpoint → snapshot (what it holds), checkpoint_folders (which there are)
             run_folder, earlier_config (may a command go on?) · held_out (when it is evaluated)
             preflight · rehearsal · memory, foresight · report · manifest · export
             doctor (invariances)
             best (which step) · finish (the end of a run) · reload_check (the export, loaded anew)
evaluation/  loss · generate (sampling) · log_generations · evaluator · run (`cs336-sft evaluate`:
             arms, kept_responses, statistics, summary, categories) · chat, chat_session
             rewards ← answers ← quantities, formulas ← spelling
tracking/    tracker · console · metrics · wandb_logger · plots
```
"""

from cs336_alignment.data.tokenize import tokenize_prompt_and_output
from cs336_alignment.evaluation.log_generations import log_generations
from cs336_alignment.model.log_probs import compute_entropy, get_response_log_probs
from cs336_alignment.training.loss import masked_normalize, sft_microbatch_train_step

__all__ = [
    "compute_entropy",
    "get_response_log_probs",
    "log_generations",
    "masked_normalize",
    "sft_microbatch_train_step",
    "tokenize_prompt_and_output",
]
