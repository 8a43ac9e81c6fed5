"""A tiny model as mlx-lm keeps it: a folder with weights, an index, and a tokenizer.

python tests/helpers/model_folder.py ARCHITECTURE FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
from gguf_files import TOKENS, add_bpe
from mlx_lm.utils import save_model
from tiny_models import tiny_config
from varied_models import varied_model

from mlx_turbokv.loading.gguf.reader import open_gguf
from mlx_turbokv.loading.gguf.tokenizer import build_tokenizer


def write_model_folder(folder: Path, architecture: str, **changes: int) -> Path:
    """Write a model whose greedy text varies; the vocabulary is that of the small GGUF files."""
    folder.mkdir(parents=True, exist_ok=True)
    changes = {"vocab_size": len(TOKENS), "tie_word_embeddings": False, **changes}
    model = varied_model(architecture, **{k: v for k, v in changes.items() if k[:4] != "tie_"})
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(tiny_config(architecture, **changes)))
    writer = gguf.GGUFWriter(folder / "vocabulary.gguf", "llama")
    add_bpe(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = open_gguf(folder / "vocabulary.gguf").metadata
    build_tokenizer(metadata)._tokenizer.save_pretrained(folder)
    (folder / "vocabulary.gguf").unlink()
    return folder


if __name__ == "__main__":
    write_model_folder(Path(sys.argv[2]), sys.argv[1])
