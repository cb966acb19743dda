"""Builds the tokenizer and model config of the arithmetic task, byte for byte reproducibly.

    python scripts/build_arithmetic_tokenizer.py [output_folder]

The tokenizer is word-level with a byte fallback: a vocabulary of the 256 bytes and of every word
the task writes. The parts of the r1_zero template around the question are one token each, which
keeps a training example at about 55 tokens in all.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from cs336_alignment.data.arithmetic import generate_rows

PACKAGE = Path(__file__).resolve().parents[1] / "cs336_alignment"
TEMPLATE = PACKAGE / "data" / "templates" / "r1_zero.prompt"
OUTPUT = PACKAGE / "assets" / "arithmetic"

EOS, PAD = "<|endoftext|>", "<|pad|>"
# Plain added tokens, not special ones: decoding must keep the tags even when it skips specials.
TAGS = (" </think> <answer> ", " </answer>")
# A digit; or a word with the punctuation before it, and the space after it if a digit follows; or
# an operator with its spaces. Each is one token of the reasoning, so steps stay short.
PATTERN = r"[0-9]|[^\s0-9\p{L}]* ?\p{L}+(?: (?=[0-9]))?| ?[^\s0-9\p{L}]+ ?"
MAX_LENGTH = 512

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
}


def template_parts() -> tuple[str, str]:
    """Returns the r1_zero template's text before and after the question."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split("{question}")
    return before, after


def build_tokenizer() -> Tokenizer:
    """Builds the tokenizer from the words of a large sample of rows."""
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words: set[str] = set()
    for row in generate_rows("train", 20_000, seed=0):
        reasoning, _ = row["answer"].split("\n#### ")
        for text in (row["question"], f" {reasoning}"):
            words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = alphabet + sorted(words - set(alphabet))
    vocab = {entry: index for index, entry in enumerate(entries)}
    # Without merges a word is either looked up whole (ignore_merges) or spelled in bytes.
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False), AddedToken(PAD)])
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in template_parts() + TAGS])
    return tokenizer


def write_json(path: Path, values: dict[str, object]) -> None:
    """Writes sorted, indented JSON, so that a rebuild gives an empty diff."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def build(output: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and config.json to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(output / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
    }
    write_json(output / "tokenizer_config.json", tokenizer_config)
    ids = {"eos_token_id": tokenizer.token_to_id(EOS), "pad_token_id": tokenizer.token_to_id(PAD)}
    config = CONFIG | ids | {"bos_token_id": None, "vocab_size": tokenizer.get_vocab_size()}
    write_json(output / "config.json", config)


def main() -> None:
    """Parses the command line and builds the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=OUTPUT, help="output folder")
    build(parser.parse_args().output)


if __name__ == "__main__":
    main()
