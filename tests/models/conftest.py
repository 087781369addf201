"""Tiny models of the kinds that matter, with weights large enough that every entry of the cache shows in the logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

KVC_MINI = Path(__file__).parents[2] / "models" / "kvc-mini"

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "attn_implementation": "sdpa",
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small are slower on more threads, far slower on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _wild(model):
    """Default initialisation makes attention nearly uniform and the answer nearly constant."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(
                    std=1.0
                    if "embed" in name
                    else (1.5 if "q_proj" in name or "k_proj" in name else 1.0) * p.shape[1] ** -0.5
                )
    return model.eval()


def _llama():
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=5, **SHAPE))


def _qwen():
    return Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=4, use_sliding_window=False, **SHAPE))


def _hybrid():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "full_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=5,
        layer_types=kinds,
        sliding_window=24,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
        **SHAPE,
    )
    return Gemma3ForCausalLM(config)


_BUILDERS = {"llama": _llama, "qwen": _qwen, "hybrid": _hybrid}


@pytest.fixture(scope="session")
def _built():
    return {}


def _get(built, name):
    if name not in built:
        state = torch.random.get_rng_state()
        torch.manual_seed(1)
        built[name] = _wild(_BUILDERS[name]())
        torch.random.set_rng_state(state)
    return built[name]


@pytest.fixture(params=["llama", "qwen", "hybrid"])
def model(request, _built, device):
    """Each tiny model, float32."""
    yield _get(_built, request.param).to(device)
    _built[request.param].to("cpu")


@pytest.fixture(params=["llama", "qwen"])
def dense(request, _built, device):
    """Each tiny model without sliding layers."""
    yield _get(_built, request.param).to(device)
    _built[request.param].to("cpu")


@pytest.fixture
def llama(_built, device):
    yield _get(_built, "llama").to(device)
    _built["llama"].to("cpu")


@pytest.fixture
def hybrid(_built, device):
    yield _get(_built, "hybrid").to(device)
    _built["hybrid"].to("cpu")


@pytest.fixture(scope="session")
def mini():
    """The small trained model and its tokenizer, float32."""
    model = AutoModelForCausalLM.from_pretrained(KVC_MINI, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(KVC_MINI)
