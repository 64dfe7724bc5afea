"""Makes an ONNX file of a BERT tokenizer, with which a program in C++ takes text: see examples/cpp/embed_text.cc.

    python examples/tokenizer_onnx.py all-MiniLM-L6-v2/tokenizer.json -o tokenizer.onnx
    modcompile package engine -o minilm --tokenizer tokenizer.onnx
    python examples/tokenizer_onnx.py --tiny     of a vocabulary of a few words

The file has one operator, BertTokenizer of onnxruntime-extensions, and the vocabulary: text [1] in, input_ids,
token_type_ids and attention_mask [N] out. Of 3,000 random texts of ASCII and Latin-1 all had the ids of the tokenizers
package, and so had some in Russian, Chinese and Japanese. Not the same, where it was tried: words with capital Greek
letters or with letters such as s-cedilla and l-stroke are unknown to it; special tokens that are written in a text are
read as text; and a zero character ends one.
"""

import argparse
import json
import tempfile
from pathlib import Path

import onnx
from onnx import TensorProto, helper

DOMAIN = "ai.onnx.contrib"
OUTPUTS = ("input_ids", "token_type_ids", "attention_mask")


def tokenizer_model(described: dict) -> onnx.ModelProto:
    """The ONNX model of what a ``tokenizer.json`` holds."""
    model, normalizer = described["model"], described.get("normalizer") or {}
    if model.get("type") != "WordPiece" or normalizer.get("type") != "BertNormalizer":
        raise SystemExit(f"BertTokenizer is for WordPiece behind BertNormalizer, not for {model.get('type')} behind "
                         f"{normalizer.get('type')}")
    words = sorted(model["vocab"], key=model["vocab"].get)
    if [model["vocab"][word] for word in words] != list(range(len(words))):
        raise SystemExit("the vocabulary's numbers are not 0, 1, 2, ...")
    lowercase = normalizer["lowercase"]
    node = helper.make_node(
        "BertTokenizer", ["text"], list(OUTPUTS), domain=DOMAIN, vocab_file="\n".join(words), do_lower_case=lowercase,
        # Where the file leaves it open, accents go with the capitals.
        strip_accents=lowercase if normalizer.get("strip_accents") is None else normalizer["strip_accents"],
        suffix_indicator=model["continuing_subword_prefix"], unk_token=model["unk_token"],
        max_len_word=model["max_input_chars_per_word"] + 1)
    graph = helper.make_graph(
        [node], "tokenizer", [helper.make_tensor_value_info("text", TensorProto.STRING, [1])],
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["N"]) for name in OUTPUTS])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)],
                             ir_version=10)


def tiny() -> dict:
    """A vocabulary of a few words."""
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] it was rain ##ing .".split()
    return {"model": {"type": "WordPiece", "vocab": {word: number for number, word in enumerate(words)},
                      "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100},
            "normalizer": {"type": "BertNormalizer", "lowercase": True, "strip_accents": None}}


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tokenizer", type=Path, nargs="?", help="a tokenizer.json")
    parser.add_argument("-o", "--output", type=Path, default=Path("tokenizer.onnx"))
    parser.add_argument("--tiny", action="store_true", help="of a few words, to a folder that goes away")
    options = parser.parse_args()
    if not options.tiny and options.tokenizer is None:
        parser.error("name a tokenizer.json, or --tiny")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "tokenizer.onnx") if options.tiny else options.output
        model = tokenizer_model(tiny() if options.tiny else json.loads(options.tokenizer.read_text(encoding="utf-8")))
        onnx.save_model(model, target)
        print(f"{target.name}: {target.stat().st_size} bytes, text in, {', '.join(OUTPUTS)} out")


if __name__ == "__main__":
    main()
