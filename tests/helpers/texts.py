"""Small tokenizers and whole model folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SAMPLE = ["Hello world, how are you?", "The answer is 12. It is good, isn't it?", "a b c the there then where when"] * 3


def byte_level(vocabulary: int = 320, bos: str | None = None) -> tokenizers.Tokenizer:
    """As GPT-2, Qwen and Llama 3 have it; `</think>` is an added token that is no special token."""
    t = tokenizers.Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    control = CONTROL + ([bos] if bos else [])
    size = vocabulary - 1
    t.train_from_iterator(
        SAMPLE, trainers.BpeTrainer(vocab_size=size, special_tokens=control, initial_alphabet=alphabet)
    )
    t.add_tokens([tokenizers.AddedToken("</think>", special=False)])
    if bos:
        t.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    return t


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 and Gemma have it: spaces as ▁, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghilnorstuvwy.,?"]
    words = ["he", "th", "▁th", "▁the", "in"]
    merges = [("h", "e"), ("t", "h"), ("▁", "th"), ("▁th", "e"), ("i", "n")]
    vocabulary = {p: n for n, p in enumerate([*pieces, *words])}
    t = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return t


def rendered_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a rendered chat template, by `tokenizers`."""
    return tokenizer.inner.encode(text, add_special_tokens=False).ids


def write_text_files(folder: Path, tokenizer: tokenizers.Tokenizer | None = None, **settings: Any) -> None:
    """tokenizer.json and tokenizer_config.json."""
    (tokenizer or byte_level()).save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHATML, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")


def write_model(checkpoint: Path, folder: Path, **settings: Any) -> Path:
    """A whole model folder: a checkpoint and text files."""
    shutil.copytree(checkpoint, folder)
    write_text_files(folder, **settings)
    return folder


def change(path: Path, **fields: Any) -> None:
    """Sets fields of a JSON file; None removes one."""
    data = {**json.loads(path.read_text("utf-8")), **fields}
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}), "utf-8")
