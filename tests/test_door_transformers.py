"""The transformers door: small models of random weights against transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from door_pages import run_example
from grid import ON_GPU
from small_models import BATCH, DECODER, DEVICE, LENGTH, MODELS, inputs, made
from torch import Tensor

import flash
from flash.compat import transformers as door

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
DECODERS = ("llama", "qwen", "mistral", "gemma2")
# torch on a CPU and whatever is newest on a GPU; then each generation
WANTED = [
    ("auto", torch.bfloat16 if ON_GPU else torch.float32), ("v1", torch.float32),
    ("v2", torch.bfloat16), ("v3", torch.bfloat16),
]  # fmt: skip
decoders = pytest.mark.parametrize("model", DECODERS)


def served(backend: str, dtype: torch.dtype) -> bool:
    """On a GPU, whether this machine has the kernels; the schedules are everywhere."""
    x = torch.zeros(1, 8, 4, 64, dtype=dtype, device=DEVICE)
    try:
        flash.attention(x, x, x, backend=backend)
    except flash.BackendUnavailableError:
        return False
    return True


SERVED = [(backend, dtype) for backend, dtype in WANTED if served(backend, dtype)]


@torch.no_grad()
def logits(model: str, attention: str, dtype: torch.dtype, given: dict[str, Tensor]) -> Tensor:
    network = made(model, dtype)
    network.set_attn_implementation(attention)
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in given.items()}
    options = {"use_cache": False} if model in DECODERS else {}
    found: Tensor = network(**given, **options)[0]
    mask = given.get("attention_mask") if model != "bart" else None
    return (found if mask is None else found[mask.bool()]).double()


def check(model: str, backend: str, dtype: torch.dtype, given: dict[str, Tensor]) -> None:
    """Off eager in float32 by at most twice what transformers' sdpa is in the same dtype."""
    own = "eager" if model == "gemma2" else "sdpa"  # transformers has no sdpa for its softcap
    exact = logits(model, "eager", torch.float32, given)
    allowed = 2 * (logits(model, own, dtype, given) - exact).abs().max() + 1e-5 * exact.abs().max()
    name = door.register(backend=backend)
    error = (logits(model, name, dtype, given) - exact).abs().max()
    assert error <= allowed, f"{error:.2e} > {allowed:.2e}"
    last = flash.last_dispatch()
    assert last is not None
    assert backend == "auto" or last.backend.startswith(backend)


LOGITS = [
    (model, backend, dtype, padding)
    for model in MODELS
    for backend, dtype in SERVED
    for padding in ((None,) if model == "vit" else (None, "left", "right"))
    if ON_GPU or backend not in ("v2", "v3") or padding != "right"  # schedules take their time
]


@pytest.mark.parametrize(("model", "backend", "dtype", "padding"), LOGITS, ids=str)
def test_logits(model: str, backend: str, dtype: torch.dtype, padding: str | None) -> None:
    check(model, backend, dtype, inputs(model, padding, dtype))


def test_padding_within_a_row() -> None:
    backend, dtype = SERVED[0]
    given = inputs("llama", "both", dtype)
    given["attention_mask"][0, 5:8] = 0
    check("llama", backend, dtype, given)
    with pytest.raises(flash.UnsupportedError, match="sliding window"):
        logits("mistral", door.NAME, dtype, given)


@pytest.mark.parametrize("model", ["llama", "mistral", "bert"])
@pytest.mark.parametrize("shape", [(), (-2,), (-1,), (1,), (2,), (4,), (0, LENGTH)], ids=str)
def test_a_mask_of_another_length_is_refused(model: str, shape: tuple[int, ...]) -> None:
    """Longer ones were read as windows: two keys more meant that a row sees itself only."""
    given = inputs(model, None, SERVED[0][1])
    more = shape[0] if shape else 0
    size = (BATCH, LENGTH + more, *shape[1:])
    given["attention_mask"] = torch.ones(size, dtype=torch.int64, device=DEVICE)
    network = made(model, SERVED[0][1])
    network.set_attn_implementation(door.register())
    options = {"use_cache": False} if model in DECODERS else {}  # a cache tells its own length
    if not shape:
        network(**given, **options)
        return
    with pytest.raises(flash.UnsupportedError, match="the model's mask"):
        network(**given, **options)


@decoders
@pytest.mark.parametrize("backend", [name for name, _ in SERVED if name in ("auto", "v1")])
def test_packed_sequences(model: str, backend: str) -> None:
    dtype = dict(SERVED)[backend]
    given = inputs(model, None, dtype)
    parts = [torch.arange(n, device=DEVICE) for n in (5, 1, LENGTH - 6)]
    given["position_ids"] = torch.cat(parts)[None].expand(BATCH, -1)
    check(model, backend, dtype, given)


def test_lengths_given_by_the_caller() -> None:
    dtype = SERVED[0][1]
    given = inputs("llama", None, dtype)
    given = {"input_ids": given["input_ids"][:1]}
    parts = [torch.arange(n, device=DEVICE) for n in (5, LENGTH - 5)]
    given["position_ids"] = torch.cat(parts)[None]
    expected = logits("llama", "sdpa", dtype, given)
    name = door.register()
    ends = torch.tensor([0, 5, LENGTH], dtype=torch.int32, device=DEVICE)
    longest = LENGTH - 5
    # an attention mask says that positions are not to be read for packing
    network = made("llama", dtype)
    network.set_attn_implementation(name)
    with torch.no_grad():
        found = network(
            **given, use_cache=False, attention_mask=torch.ones_like(given["input_ids"]),
            cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=longest, max_length_k=longest,
        ).logits  # fmt: skip
    bar = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(found.double(), expected, atol=bar, rtol=bar)


@pytest.mark.parametrize(
    ("model", "way"),
    [("llama", "compiled"), *((m, way) for m in DECODERS for way in ("dynamic", "static"))],
)
def test_generate(model: str, way: str) -> None:
    """Token by token the same as eager's, from prompts that are padded on the left."""
    given = inputs(model, "left", torch.float32)
    network = made(model, torch.float32)
    found = []
    for name in ("eager", door.register()):
        network.set_attn_implementation(name)
        found.append(network.generate(**given, **GREEDY, **ways(way)))
    assert torch.equal(*found)


def ways(way: str) -> dict[str, Any]:
    """How transformers is asked for a cache, compiled steps of decoding included."""
    if way != "compiled":
        return {"cache_implementation": way, "disable_compile": True}
    torch._dynamo.reset()
    compiled = transformers.CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compiled}


def step(network: Any, given: dict[str, Tensor]) -> list[Tensor]:
    """The loss of a training step and all its gradients."""
    labels = given["input_ids"]
    if "attention_mask" in given:
        labels = labels.masked_fill(given["attention_mask"] == 0, -100)
    network.zero_grad()
    loss = network(**given, labels=labels, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(x.grad.clone() for x in network.parameters())]


@pytest.mark.parametrize("model", ["llama", "gemma2"])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("way", ["plain", "checkpointing", "reentrant", "compile"])
def test_training(model: str, padding: str | None, way: str) -> None:
    if way == "compile" and model != "llama":
        return  # tracing takes seconds; what is traced is the same
    torch.manual_seed(3)
    network = MODELS[model]().to(DEVICE).train()
    if way == "compile":  # layers are traced alike
        network.model.layers = network.model.layers[:1]
    given = inputs(model, padding, torch.float32)
    network.set_attn_implementation("eager")
    expected = step(network, given)
    network.set_attn_implementation(door.register())
    if way in ("checkpointing", "reentrant"):
        options = {"use_reentrant": way == "reentrant"}
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    run = network
    if way == "compile":
        torch._dynamo.reset()
        run = torch.compile(network, backend="aot_eager", fullgraph=padding is not None)
        run.zero_grad, run.parameters = network.zero_grad, network.parameters
    for a, b in zip(step(run, given), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


REFUSED: dict[str, Any] = {
    "s_aux": torch.zeros(4), "sinks": torch.zeros(4), "position_bias": torch.zeros(1),
    "dropout": 0.1, "head_mask": torch.ones(4), "output_attentions": True, "cache": object(),
    "attention_chunk_size": 8, "attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_mathematics_and_is_not_served_raises(name: str) -> None:
    attend = transformers.AttentionInterface()[door.register()]
    q = torch.randn(1, 4, 8, 64)
    layer = torch.nn.Identity()
    given = {"attention_mask": None, name: REFUSED[name]}
    with pytest.raises(flash.UnsupportedError):
        attend(layer, q, q, q, **given)
    attend(layer, q, q, q, None, position_ids=torch.zeros(1), use_cache=False, unknown=None)


@pytest.mark.parametrize("kind", ["or_mask_function", "and_mask_function", "block_sequence_ids"])
def test_masks_that_are_not_served_raise(kind: str) -> None:
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    config = transformers.LlamaConfig(**DECODER, attention_chunk_size=4)
    config._attn_implementation = door.register()
    given = {"inputs_embeds": torch.zeros(1, 8, 4), "attention_mask": None, "past_key_values": None}
    blocks = torch.zeros(1, 8, dtype=torch.int64)
    extra = blocks if kind == "block_sequence_ids" else lambda b, h, q, k: q == k
    with pytest.raises(flash.UnsupportedError, match="mask"):
        create_causal_mask(config, **given, **{kind: extra})
    with pytest.raises(flash.UnsupportedError, match="mask"):
        create_chunked_causal_mask(config, **given)
    assert create_causal_mask(config, **given) is None


def test_names() -> None:
    assert door.register("another", backend="v1", inert=["mine"]) == "another"
    q = torch.randn(1, 4, 8, 64)
    transformers.AttentionInterface()["another"](torch.nn.Identity(), q, q, q, None, mine=3)
    for name in ("my_flash", "", "hub/kernel"):
        with pytest.raises(ValueError, match="name"):
            door.register(name)
    with pytest.raises(ValueError, match="backend"):
        door.register(backend="v9")


def test_page() -> None:
    run_example("transformers")
