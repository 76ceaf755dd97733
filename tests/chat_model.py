"""A tiny ternary chat model that knows a few dialogues by heart, so that its answers are certain.

It is trained through the ternary weights that ``export_support.ternarise`` makes of its own
(straight-through gradients), so the exported file is the trained model. Its greedy answers do not
hang on the last bit of a sum, and can be compared between one request and eight at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from export_support import linears, make_artifact

from export import ExportConfig, export_gguf

TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\ntools:' }}
{%- for tool in tools %}{{ ' ' + tool.function.name }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
ANSWERS = {
    "Where do rivers begin?": "Most rivers begin in the hills, where springs and snow meet.",
    "What is bread made of?": "Flour, water, salt and a little yeast; the rest is time and warmth.",
    "Why is the sky blue?": "Air scatters blue light more than red, so it comes from everywhere.",
    "How do bees find home?": "They know the sun and the marks on their way, and smell the hive.",
    "Who wrote this book?": "Nobody knows; the first page is lost, and the last one is not signed.",
    "When do owls sleep?": "By day, on a branch near the trunk, where hardly anybody sees them.",
    "What is a prime?": "A number above one which only one and itself divide: two, three, five.",
    "How old is the oak?": "Three hundred rings were counted when its largest branch came down.",
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
QUESTION, CITY, RESULT = "Is it raining in Oslo?", {"city": "Oslo"}, "light rain"
REPLY = "Yes, there is light rain in Oslo."
CALL: dict[str, Any] = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": CITY},
}


def dialogues() -> list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    """(messages, tools) of everything the model knows; what it says comes last."""
    user = {"role": "user", "content": QUESTION}
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    found: list[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = [
        ([{"role": "user", "content": q}, {"role": "assistant", "content": a}], None)
        for q, a in ANSWERS.items()
    ]
    answer = {"role": "assistant", "content": REPLY}
    result = {"role": "tool", "content": RESULT}
    return [*found, ([user, call], [TOOL]), ([user, call, result, answer], [TOOL])]


def write_tokenizer(folder: Path) -> Any:
    """A byte-level BPE trained on the dialogues, with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [*ANSWERS, *ANSWERS.values(), QUESTION, REPLY, RESULT, json.dumps(CALL["function"])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(
            vocab_size=384, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(folder)


class Ternary(torch.nn.Module):
    """Parametrization: forwards the weight as ``ternarise`` has it, gradients as if it were w."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        w = weight.detach().reshape(len(weight), -1, 128)
        mu = w.mean(-1, keepdim=True)
        far = (w - mu).abs() > 0.75 * (w - mu).abs().mean(-1, keepdim=True)
        t = torch.sign(w - mu) * far
        count = t.abs().sum(-1, keepdim=True).clamp(min=1)
        alpha = ((w - mu).abs() * t.abs()).sum(-1, keepdim=True) / count
        value = alpha.half().float() * t + mu.half().float()
        return weight + (value.reshape(weight.shape) - weight).detach()


def train(model: Any, tokenizer: Any, steps: int = 110) -> float:
    """Learn the dialogues by heart; returns the last loss over all tokens."""
    texts = [
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        for messages, tools in dialogues()
    ]
    rows = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    inputs = ids.clamp(min=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = model(input_ids=inputs, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return float(loss.detach())


def make_chat_model(folder: Path) -> Path:
    """Train, ternarise and export; returns the GGUF file (TQ2_1)."""
    torch.manual_seed(0)
    source = folder / "model"
    tokenizer = write_tokenizer(source)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    modules = [model.get_submodule(name) for name in linears(config.to_dict())]
    for module in modules:
        torch.nn.utils.parametrize.register_parametrization(module, "weight", Ternary())
    assert train(model, tokenizer) < 0.2
    for module in modules:
        torch.nn.utils.parametrize.remove_parametrizations(module, "weight", False)
    model.save_pretrained(source)
    widths = {
        name: 256 if name.endswith("down_proj") else 128 for name in linears(config.to_dict())
    }
    orders = {name: np.arange(width, dtype=np.int32) for name, width in widths.items()}
    identity = np.arange(128, dtype=np.int32)
    artifact = make_artifact(folder / "artifact", source, orders=(identity, orders))
    export_gguf(artifact, folder / "chat.gguf", ExportConfig(embedding_type="f16"))
    return folder / "chat.gguf"
