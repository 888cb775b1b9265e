"""What the compiler's cost model predicts for its targets, beside what others published of such devices.

``python -m bench.published`` prints the table of docs/compiler.md. Nothing is measured: a published model is given by its measures, and its
types as llama-quantize chooses them. Published rates are of other programs on boards that are like the target, at best the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from edge_rt.compiler import cost, target
from edge_rt.compiler.shape import ModelShape, read_shape, tensor_bytes
from edge_rt.core.gguf.reader import GGML_TYPES, Header, TensorInfo

FACTOR = 1.34
"""How far a prediction may be off: by a third."""
GENERATED = 128
"""Tokens that llama-bench generates in an empty context (tg128); a token sees half of them on average."""
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_F32, _U32 = 6, 4


class Measures(NamedTuple):
    """Those of a model, from its config.json. ``tied``: the embedding is the head too."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    tied: bool = False


MODELS = {
    "TinyLlama 1.1B": Measures("llama", 22, 2048, 32, 4, 64, 5632, 32000),
    "Llama 3.2 1B": Measures("llama", 16, 2048, 32, 8, 64, 8192, 128256, tied=True),
    "Llama 3.2 3B": Measures("llama", 28, 3072, 24, 8, 128, 8192, 128256, tied=True),
    "Llama 3.1 8B": Measures("llama", 32, 4096, 32, 8, 128, 14336, 128256),
    "Llama 2 7B": Measures("llama", 32, 4096, 32, 32, 128, 11008, 32000),
    "Amber 7B": Measures("llama", 32, 4096, 32, 32, 128, 11008, 32000),
    "CodeLlama 34B": Measures("llama", 48, 8192, 64, 8, 128, 22016, 32000),
    "SmolLM2 1.7B": Measures("llama", 24, 2048, 32, 32, 64, 8192, 49152, tied=True),
    "Yi 1.5 6B": Measures("llama", 32, 4096, 32, 4, 128, 11008, 64000),
    "Qwen2.5 0.5B": Measures("qwen2", 24, 896, 14, 2, 64, 4864, 151936, tied=True),
    "Qwen1.5 1.8B": Measures("qwen2", 24, 2048, 16, 16, 128, 5504, 151936),
}


class Row(NamedTuple):
    """A published result: tokens a second.

    ``prompt``: tokens of the prompt whose rate it is, 0: the rate of generating. ``threads``: 0 for all. ``plain``: it ran without packed
    kernels, so that types count as ``other`` on a target that has them. ``speed``: of its cores together, as a part of the target's, by
    number and clock. ``program``: where it is not llama.cpp's CPU kernels, which is all that a target for a CPU foretells. ``fitted``: a
    figure of the target was taken from it, so that it confirms no other.
    """

    target: str
    device: str
    model: str
    type: str
    published: float
    source: str
    prompt: int = 0
    threads: int = 0
    plain: bool = False
    speed: float = 1.0
    program: str = ""
    fitted: bool = False


def shape(model: str, kind: str) -> ModelShape:
    """A model's shape, with the types that llama-quantize gives its tensors for a file of this kind (F16, Q8_0, Q4_0, Q4_K_M)."""
    m = MODELS[model]
    sizes: dict[str, tuple[int, int]] = {"token_embd": (m.n_embd, m.n_vocab)}
    for i in range(m.n_layer):
        sizes |= {f"blk.{i}.{name}": size for name, size in _block(m)}
    if not m.tied:
        sizes["output"] = (m.n_embd, m.n_vocab)
    tensors = {}
    for name, size in sizes.items():
        chosen = _type(name, kind, m)
        tensors[f"{name}.weight"] = TensorInfo(f"{name}.weight", size, _NUMBERS[chosen], chosen, 0, tensor_bytes(size, chosen))
    values: dict[str, tuple[int, Any]] = {
        "general.architecture": (8, m.architecture),
        f"{m.architecture}.attention.layer_norm_rms_epsilon": (_F32, 1e-5),
        f"{m.architecture}.rope.freq_base": (_F32, 10000.0),
    }
    whole: Mapping[str, int] = {
        "embedding_length": m.n_embd, "block_count": m.n_layer, "attention.head_count": m.n_head, "attention.head_count_kv": m.n_head_kv,
        "attention.key_length": m.head_dim, "attention.value_length": m.head_dim, "feed_forward_length": m.n_ff, "context_length": 4096,
        "rope.dimension_count": m.head_dim,
    }  # fmt: skip
    values |= {f"{m.architecture}.{key}": (_U32, value) for key, value in whole.items()}
    total = sum(info.nbytes for info in tensors.values())
    header = Header(version=3, alignment=32, data_offset=0, file_size=total, values=values, tensors=tensors, header_bytes=b"")
    return read_shape(header, packed=())


def _block(m: Measures) -> Iterator[tuple[str, tuple[int, int]]]:
    query, cells = m.n_head * m.head_dim, m.n_head_kv * m.head_dim
    yield from {"attn_q": (m.n_embd, query), "attn_k": (m.n_embd, cells), "attn_v": (m.n_embd, cells)}.items()
    yield "attn_output", (query, m.n_embd)
    yield from {"ffn_gate": (m.n_embd, m.n_ff), "ffn_up": (m.n_embd, m.n_ff), "ffn_down": (m.n_ff, m.n_embd)}.items()


def _type(name: str, kind: str, m: Measures) -> str:
    """As ``llama_tensor_get_type`` of llama.cpp (src/llama-quant.cpp) chooses: finer for the head, and in some layers of Q4_K_M."""
    if kind in ("F16", "Q8_0"):
        return kind
    if name == "output" or (m.tied and name == "token_embd"):
        return "Q8_0" if m.n_embd % 256 else "Q6_K"
    if kind != "Q4_K_M":
        return kind
    if name.endswith((".attn_v", ".ffn_down")):
        i, n = int(name.split(".")[1]), m.n_layer
        if i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2:
            return "Q6_K"
    return "Q4_K"


def predicted(row: Row) -> float:
    """Tokens a second."""
    device = target.load(row.target)
    if row.plain:
        device = device._replace(efficiency={key: device.efficiency[key] for key in ("other", "attention")})
    if row.speed != 1.0:
        operations = {key: value * row.speed for key, value in device.profile.operations.items()}
        device = device._replace(profile=device.profile._replace(operations=operations), elements=device.elements * row.speed)
    found, threads = shape(row.model, row.type), row.threads or device.threads
    if row.prompt:
        return row.prompt / cost.prefill(found, device, row.prompt, threads).seconds
    return 1.0 / cost.decode(found, device, GENERATED // 2, threads).seconds


_LLAMA, _BENCHMARKS = "github.com/ggml-org/llama.cpp", "github.com/geerlingguy/ai-benchmarks"
_EDGE = "huggingface.co/spaces/nyunai/edge-llm-leaderboard (commit abb9e2b)"
_TUNNEY = "justine.lol/matmul (J. Tunney, 2024)"
_ZEN, _CARDS = "AMD Ryzen 5 7600X, 6 cores", "github.com/mlc-ai/llm-perf-bench"
_Q6A, _REVIEW = "Radxa Dragon Q6A, the cores of a Snapdragon 778G", "github.com/geerlingguy/sbc-reviews/issues/85"
_KABY, _COFFEE = "Intel Core i7-7820HQ, 4 cores", "Intel Core i5-9500, 6 cores"
_NORMIE = "github.com/brand-o/normiebench/issues"
ROWS = (
    Row("rpi-5", "Raspberry Pi 5, 2 GB", "Qwen2.5 0.5B", "Q4_0", 289.92, f"{_LLAMA}/discussions/30069", prompt=512, fitted=True),
    Row("rpi-5", "Raspberry Pi 5, 2 GB", "Qwen2.5 0.5B", "Q4_0", 33.84, f"{_LLAMA}/discussions/30069", threads=2, fitted=True),
    Row("rpi-5", "Raspberry Pi 5", "Amber 7B", "Q4_0", 14.44, _EDGE, prompt=512),
    Row("rpi-5", "Raspberry Pi 5", "Amber 7B", "Q4_0", 2.57, _EDGE),
    Row("rpi-5", "Raspberry Pi 5", "Yi 1.5 6B", "Q4_K_M", 5.58, _EDGE, prompt=512, plain=True, fitted=True),
    Row("rpi-5", "Raspberry Pi 5", "Yi 1.5 6B", "Q4_K_M", 2.72, _EDGE, plain=True),
    Row("rpi-5", "Raspberry Pi 5", "SmolLM2 1.7B", "Q8_0", 17.52, _EDGE, prompt=512, plain=True, fitted=True),
    Row("rpi-5", "Raspberry Pi 5", "SmolLM2 1.7B", "Q8_0", 5.18, _EDGE, plain=True),
    Row("rpi-5", "Raspberry Pi 500+", "Llama 3.2 3B", "Q4_K_M", 5.55, f"{_BENCHMARKS}/issues/24", plain=True),
    Row("rpi-5", "Raspberry Pi 5", "Llama 3.2 3B", "Q4_K_M", 4.61, f"{_BENCHMARKS}/issues/1", plain=True),
    Row("rpi-cm4", "Raspberry Pi 4", "TinyLlama 1.1B", "Q8_0", 10.0, _TUNNEY, prompt=512, fitted=True),
    Row("rpi-cm4", "Raspberry Pi 4", "TinyLlama 1.1B", "Q8_0", 3.0, _TUNNEY, fitted=True),
    Row("rpi-cm4", "Raspberry Pi 4", "TinyLlama 1.1B", "F16", 3.0, _TUNNEY, prompt=512, fitted=True),
    Row("rpi-cm4", "Raspberry Pi 4", "TinyLlama 1.1B", "F16", 2.0, _TUNNEY, fitted=True),
    Row("rpi-cm4", "Raspberry Pi 400, 1.8 GHz", "Llama 3.2 3B", "Q4_K_M", 1.60, _BENCHMARKS, speed=1.2, fitted=True),
    Row("rpi-cm4", "Raspberry Pi 4", "Qwen1.5 1.8B", "Q4_0", 3.05, "github.com/aidatatools/ollama-benchmark/pull/9", fitted=True),
    Row("x86-avx2", _KABY, "Llama 3.1 8B", "Q4_K_M", 22.53, f"{_NORMIE}/42", prompt=512, fitted=True),
    Row("x86-avx2", _KABY, "Llama 3.1 8B", "Q4_K_M", 5.62, f"{_NORMIE}/42"),
    Row("x86-avx2", _COFFEE, "Llama 3.1 8B", "Q4_K_M", 35.43, f"{_NORMIE}/34", prompt=512, speed=1.8),
    Row("x86-avx2", _COFFEE, "Llama 3.1 8B", "Q4_K_M", 6.51, f"{_NORMIE}/34", speed=1.8),
    Row("x86-avx512", _ZEN, "Llama 2 7B", "Q4_K_M", 84.0, f"{_LLAMA}/pull/12829", prompt=512, threads=6, fitted=True),
    Row("x86-avx512", _ZEN, "Llama 2 7B", "Q4_K_M", 14.01, f"{_LLAMA}/pull/12829", threads=6, fitted=True),
    Row("x86-avx512", _ZEN, "Llama 2 7B", "Q4_0", 14.88, f"{_LLAMA}/pull/9921", threads=6, fitted=True),
    Row("android-arm64", _Q6A, "TinyLlama 1.1B", "Q4_K_M", 25.25, _REVIEW, prompt=512, plain=True, fitted=True),
    Row("android-arm64", _Q6A, "TinyLlama 1.1B", "Q4_K_M", 15.23, _REVIEW, plain=True, fitted=True),
    Row("android-arm64", _Q6A, "Llama 3.2 3B", "Q4_K_M", 8.76, _REVIEW, prompt=512, plain=True),
    Row("a10g", "two NVIDIA A10G, one after the other", "CodeLlama 34B", "Q4_0", 21.93, _CARDS, program="llama.cpp, CUDA"),
    Row("a10g", "NVIDIA A10", "Llama 2 7B", "F16", 37.0, "github.com/InternLM/lmdeploy/issues/210", program="LMDeploy"),
    Row("ascend-910b", "Ascend 910B", "Llama 2 7B", "Q4_0", 19.7, f"{_LLAMA}/pull/8822", program="llama.cpp, CANN", fitted=True),
    Row("ascend-910b", "Ascend 910B", "Qwen2.5 0.5B", "Q4_0", 45.38, f"{_LLAMA}/pull/12671", program="llama.cpp, CANN", fitted=True),
    Row("ascend-910b", "Ascend 910B", "Qwen2.5 0.5B", "Q4_0", 13594.0, f"{_LLAMA}/pull/12671", prompt=512, program="llama.cpp, CANN"),
)


def table() -> str:
    """The table of docs/compiler.md."""
    lines = ["| device | model | | published | predicted | ratio | source |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        got = predicted(row)
        what = f"prompt of {row.prompt}" if row.prompt else "generating"
        notes = [f"{row.threads} threads" if row.threads else "", "plain kernels" if row.plain else "", row.program]
        device = f"`{row.target}`: {row.device}"
        kind = f"{row.model} {row.type}" + "".join(f", {note}" for note in notes if note)
        found = f"{row.published:.5g}{'*' if row.fitted else ''} | {got:.3g} | {got / row.published:.2f}"
        lines.append(f"| {device} | {kind} | {what} | {found} | {row.source} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
