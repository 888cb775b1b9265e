"""The inner process of test_hostile_models: opens mutants of small models and says on stdout what became of each.

Run as ``python hostile_worker.py FOLDER FIRST LAST``: FOLDER holds the models to mutate, one line comes back for each.
"""

from __future__ import annotations

import math
import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_rt.core.gguf.reader import GGML_TYPES, Header, TensorInfo, read_header
from edge_rt.testing import gguf_bytes

Entry = tuple[str, Any]
Metadata = dict[str, Entry]

_NUMBERS = (0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 127, 255, 369, 370, 512, 513, 4096, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_REALS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-5, 1e-45, 1e30, 3e38, -1e30, math.nan, math.inf, -math.inf)
_TEXTS: tuple[str, ...] = ("", "llama", "gpt2", "gemma4", "bert", "t5", "rwkv", "qwen2", "qwen3", "gemma", "clip")
_TEXTS += ("default", "llama-bpe", "whitespace", "yarn", "linear", "longrope", "none", "phi-3", "%s%n", "é\n", "a" * 300)
_TOKENS: tuple[bytes, ...] = (b"", b"\0", b" ", b"  ", b"\n", b"a", b"\xff\xfe", b"\xf7\xbf\xbf\xbf", b"</s>", b"<|end|>")
_TOKENS += (b"<|return|>", b"<0x0A>", b"[EMPTY_5]")
_KEYS = (  # keys libllama reads that the base models lack
    "attention.sliding_window attention.sliding_window_pattern attention.causal attention.clamp_kqv attention.max_alibi_bias"
    " attention.scale attention.layer_norm_epsilon attention.group_norm_groups logit_scale embedding_scale residual_scale"
    " expert_count expert_used_count expert_group_count expert_group_used_count expert_feed_forward_length expert_shared_count"
    " expert_weights_scale expert_weights_norm expert_gating_func nextn_predict_layers rope.scaling.type rope.scaling.factor"
    " rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_log_multiplier rope.scale_linear"
    " rope.dimension_sections tensor_data_layout use_parallel_residual pooling_type leading_dense_block_count"
)


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """A mutant: half of them by bytes, half by meaning (which gets deeper)."""
    header = read_header(raw, len(raw))
    if rng.random() < 0.5:
        return _mutate_bytes(raw, header, rng)
    values: Metadata = {}
    for key in header:
        kind = header.type_of(key) or ""
        values[key] = (kind, header.raw_strings(key) if kind == "[str]" else header.get(key))
    tensors = list(header.tensors.values())
    for _ in range(rng.choice((1, 1, 2, 3))):
        action: Callable[[], None] = rng.choice(
            (
                lambda: _change_value(values, rng),
                lambda: _change_value(values, rng),
                lambda: _change_array(values, rng),
                lambda: _add_value(values, header.architecture, rng),
                lambda: _change_tensor(tensors, rng),
            )
        )
        action()
    return _rebuild(header, values, tensors, raw)


def _mutate_bytes(raw: bytes, header: Header, rng: random.Random) -> bytes:
    mutant = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Most of a header is the vocabulary; its ends are where the fields are.
        size = min(header.data_offset, len(mutant))
        if not size:
            break
        at = rng.choice((rng.randrange(size), rng.randrange(min(size, 1200)), size - 1 - rng.randrange(min(size, 1200))))
        action = rng.randrange(5)
        if action == 0:
            mutant[at] = rng.randrange(256)
        elif action == 1:
            mutant[at] ^= 1 << rng.randrange(8)
        elif action == 2:
            mutant[at : at + 4] = struct.pack("<I", rng.choice(_NUMBERS))
        elif action == 3:
            mutant[at : at + 8] = struct.pack("<Q", rng.choice((*_NUMBERS, 2**63, 2**64 - 1)))
        else:
            del mutant[rng.choice((at, rng.randrange(at, len(mutant)))) :]
    return bytes(mutant)


def _scalar(kind: str, rng: random.Random) -> Any:
    if kind == "str":
        return rng.choice(_TEXTS)
    if kind == "bool":
        return rng.random() < 0.5
    if kind in ("f32", "f64"):
        return rng.choice(_REALS)
    bits, signed = int(kind[1:]), kind[0] == "i"
    number = rng.choice(_NUMBERS) % (1 << bits)
    return number - (1 << bits) if signed and number >> (bits - 1) else number


def _change_value(values: Metadata, rng: random.Random) -> None:
    key = rng.choice([key for key, (kind, _) in values.items() if not kind.startswith("[")])
    kind = values[key][0] if rng.random() < 0.7 else rng.choice(list(gguf_bytes.NUMBERS))
    action = rng.randrange(8)
    if action == 0:
        del values[key]
    elif action == 1:
        values[key] = (f"[{kind}]", [_scalar(kind, rng) for _ in range(rng.choice((0, 1, 2, 3)))])
    else:
        values[key] = (kind, _scalar(kind, rng))


def _change_array(values: Metadata, rng: random.Random) -> None:
    keys = [key for key, (kind, _) in values.items() if kind.startswith("[")]
    if not keys:
        return
    key = rng.choice(keys)
    kind, old = values[key]
    items, inner, at = list(old), kind[1:-1], rng.randrange(len(old) or 1)
    action = rng.randrange(6)
    if action == 0:
        del items[at:]
    elif action == 1:
        items += items[:at]
    elif action == 2 and items:
        items[at] = items[rng.randrange(len(items))]
    elif action == 3:
        rng.shuffle(items)
    elif action == 4:
        inner = rng.choice(list(gguf_bytes.NUMBERS))
        items = [_scalar(inner, rng) for _ in items]
    else:
        for _ in range(rng.choice((1, 5, 100))):
            items.insert(rng.randrange(len(items) + 1), rng.choice(_TOKENS) if inner == "str" else _scalar(inner, rng))
        items = items[: len(old)]
    values[key] = (f"[{inner}]", items)


def _add_value(values: Metadata, architecture: str, rng: random.Random) -> None:
    kind = rng.choice(("u32", "u32", "u32", "f32", "bool", "str", "i32", "[u32]", "[f32]"))
    inner = kind.strip("[]")
    value = [_scalar(inner, rng) for _ in range(rng.choice((1, 2)))] if kind.startswith("[") else _scalar(inner, rng)
    values[f"{architecture}.{rng.choice(_KEYS.split())}"] = (kind, value)


def _change_tensor(tensors: list[TensorInfo], rng: random.Random) -> None:
    at = rng.randrange(len(tensors))
    info = tensors[at]
    name, shape, kind = info.name, list(info.shape), info.type
    action = rng.randrange(7)
    if action == 0:
        del tensors[at]
        return
    if action == 1:
        kind = rng.choice([number for number, (_, block, _) in GGML_TYPES.items() if shape[0] % block == 0])
    elif action == 2:
        rng.shuffle(shape)
    elif action == 3:
        shape[rng.randrange(len(shape))] = rng.choice((1, 2, 31, 32, 64, 96, 128, 256))
    elif action == 4:
        shape = [*shape, *[rng.choice((1, 1, 2))] * (4 - len(shape))]
    elif action == 5:
        name = rng.choice([other.name for other in tensors])
    else:
        name = name.replace(rng.choice(("weight", "bias", "0", "attn", "ffn")), rng.choice(("weight", "bias", "1", "9", "99999999999", "")))
    type_name, block, block_bytes = GGML_TYPES[kind]
    if shape[0] % block == 0 and name and len(name) < 64:
        tensors[at] = TensorInfo(name, tuple(shape), kind, type_name, 0, math.prod(shape) // block * block_bytes)


def _rebuild(header: Header, values: Metadata, tensors: list[TensorInfo], raw: bytes) -> bytes:
    """A file whose tensors lie one behind the other, so that only their meaning is wrong."""
    infos, offset, alignment = [], 0, header.alignment
    for info in tensors:
        infos.append(gguf_bytes.tensor(info.name, info.shape, info.type, offset))
        offset += -(-info.nbytes // alignment) * alignment
    data = raw[header.data_offset :]
    data = (data * (offset // len(data) + 1))[:offset]
    return gguf_bytes.build([gguf_bytes.metadata(key, *entry) for key, entry in values.items()], infos, data, alignment=alignment)


def open_and_run(path: Path, engine: str | None, pack: bool) -> None:
    """Open a model, tokenise, compute logits, and write a few tokens. Raises what edge-rt raises."""
    import edge_rt

    with edge_rt.open(path, engine=engine, pack=pack, threads=1, context=64) as model:
        tokens = model.tokenize("Hello world, the answer is\n\n42 é 世界 <|im_end|>  \t🙂", special=True)[:32]
        if tokens:
            model.logits(tokens)
        model.detokenize(range(model.vocab.n_tokens))
        model.vocab.eog_tokens()


def main(folder: Path, first: int, last: int) -> None:
    """Mutants are numbered: the same number is the same mutant in every process."""
    from edge_rt.errors import EdgeError

    bases = [path.read_bytes() for path in sorted(folder.glob("base*.gguf"))]
    path = folder / f"mutant-{first}.gguf"
    for number in range(first, last):
        rng = random.Random(number)
        raw = mutate(bases[number % len(bases)], rng)
        path.unlink(missing_ok=True)
        path.write_bytes(raw)
        try:
            open_and_run(path, rng.choice((None, None, "llama_cpp")), rng.random() < 0.2)
            print("end ran", flush=True)
        except EdgeError as error:
            print(f"end {type(error).__name__} {str(error).replace(chr(10), ' ')[:200]}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
