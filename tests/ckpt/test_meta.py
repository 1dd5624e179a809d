"""Meta's and Mistral's own files, against transformers' model of the same weights and Meta's rotary positions."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ckpt.conftest import hugging_face_model
from ckpt.test_ckpt_command import mt_ckpt
from mt_ckpt.conversion.convert import convert
from mt_ckpt.conversion.verify import our_logits
from mt_ckpt.meta.llama_mistral import llama_mistral
from mt_ckpt.meta.loader import Meta, half_split
from mt_core.checkpoint.detection import detect_loader, open_checkpoint
from mt_core.errors import MtError

NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
}
SIZES = {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64}
PARAMS = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "multiple_of": 16, "norm_eps": 1e-6}
TOKENS_BT = torch.randint(64, (2, 40), generator=torch.Generator().manual_seed(1))


def interleaved(weight, heads):
    """Rows of each head as Meta has them: row i of a half goes to 2i, row i of the other to 2i + 1."""
    first, second = weight.unflatten(0, (heads, 2, -1)).unbind(1)
    return torch.stack([first, second], 2).flatten(0, 2)


def metas_names(state, heads=8, groups=4, embedding_dim=1):
    """Transformers' tensors under Meta's names, in Meta's order of rows, with the dim that files share."""
    whole = {
        "tok_embeddings.weight": (state["model.embed_tokens.weight"], embedding_dim),
        "norm.weight": (state["model.norm.weight"], None),
        "output.weight": (state["lm_head.weight"], 0),
        "rope.freqs": (torch.ones(4), None),
    }
    for name, tensor in state.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
            theirs, dim = NAMES[match[2]]
            counts = {"attention.wq": heads, "attention.wk": groups}
            value = interleaved(tensor, counts[theirs]) if theirs in counts else tensor
            whole[f"layers.{match[1]}.{theirs}.weight"] = (value, dim)
    return whole


def write(path, whole, files=1, **params):
    path.mkdir()
    for rank in range(files):
        shares = {n: (t if dim is None else t.chunk(files, dim)[rank]).clone() for n, (t, dim) in whole.items()}
        torch.save(shares, path / f"consolidated.{rank:02d}.pth")
    (path / "params.json").write_text(json.dumps({**PARAMS, "vocab_size": -1, **params}))
    return path


@pytest.fixture
def llama():
    return hugging_face_model("llama", **SIZES, intermediate_size=176, rms_norm_eps=1e-6)


@pytest.mark.parametrize(("files", "embedding_dim"), [(1, 1), (2, 1), (4, 0)])
def test_any_number_of_files_gives_transformers_logits(files, embedding_dim, llama, tmp_path):
    whole = metas_names(llama.state_dict(), embedding_dim=embedding_dim)
    loader = llama_mistral(write(tmp_path / "meta", whole, files))
    assert detect_loader(tmp_path / "meta") == "llama_mistral"
    logits_BTV = our_logits(loader, TOKENS_BT)
    assert (logits_BTV - llama(TOKENS_BT).logits).abs().max() <= 1e-5


SCALED = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LATER = {
    "llama 3.1": (
        {"rope_parameters": {**SCALED, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
        {"rope_theta": 500_000.0, "use_scaled_rope": True, "rope_scaling_factor": 8.0},
        131_072,
    ),
    "llama 3": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
        {"rope_theta": 500_000.0, "ffn_dim_multiplier": 1.0},
        8192,
    ),
}


@pytest.mark.parametrize("release", LATER)
def test_later_llamas_turn_their_positions_as_transformers_does(release, tmp_path):
    theirs, params, positions = LATER[release]
    model = hugging_face_model("llama", **SIZES, intermediate_size=176, rms_norm_eps=1e-6, **theirs)
    loader = Meta(write(tmp_path / "meta", metas_names(model.state_dict()), 2, **params))
    assert loader.config().max_seq_len == positions
    assert (our_logits(loader, TOKENS_BT) - model(TOKENS_BT).logits).abs().max() <= 1e-5


@pytest.mark.parametrize("window", [None, 16])
def test_mistrals_files_give_transformers_logits(window, tmp_path):
    changes = {"head_dim": 12, "intermediate_size": 48, "rms_norm_eps": 1e-5, "sliding_window": window}
    model = hugging_face_model("mistral", **{**SIZES, **changes}, attn_implementation="eager")
    (tmp_path / "meta").mkdir()
    whole = metas_names(model.state_dict())
    tensors = {name: tensor.clone() for name, (tensor, _) in whole.items() if name != "rope.freqs"}
    save_file(tensors, tmp_path / "meta" / "consolidated.safetensors")
    params = {"dim": 64, "n_layers": 3, "n_heads": 8, "n_kv_heads": 4, "head_dim": 12, "hidden_dim": 48}
    params |= {"norm_eps": 1e-5, "vocab_size": 64} | ({"sliding_window": window} if window else {})
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    loader = llama_mistral(tmp_path / "meta")
    assert loader.config().attention.window == window
    assert (our_logits(loader, TOKENS_BT) - model(TOKENS_BT).logits).abs().max() <= 1e-5


def turned_neighbours(x_TK, theta=10_000.0):
    """Meta's rotation: features 2i and 2i + 1 are the two parts of a complex number."""
    half = x_TK.shape[-1] // 2
    angles_TF = torch.arange(x_TK.shape[0])[:, None] / theta ** (torch.arange(half) / half)
    pairs_TF = torch.view_as_complex(x_TK.unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(pairs_TF * torch.polar(torch.ones_like(angles_TF), angles_TF)).flatten(-2)


def turned_halves(x_TK, theta=10_000.0):
    """Ours: features i and i + d/2."""
    half = x_TK.shape[-1] // 2
    angles_TF = torch.arange(x_TK.shape[0])[:, None] / theta ** (torch.arange(half) / half)
    a_TF, b_TF = x_TK.split(half, -1)
    cos, sin = angles_TF.cos(), angles_TF.sin()
    return torch.cat([a_TF * cos - b_TF * sin, a_TF * sin + b_TF * cos], -1)


def test_scores_are_those_of_metas_own_rotation():
    torch.manual_seed(0)
    q_KD, k_KD, x_TD = torch.randn(16, 24), torch.randn(16, 24), torch.randn(9, 24)
    theirs_TS = turned_neighbours(x_TD @ q_KD.T) @ turned_neighbours(x_TD @ k_KD.T).T
    ours_TS = turned_halves(x_TD @ half_split(q_KD, 1).T) @ turned_halves(x_TD @ half_split(k_KD, 1).T).T
    torch.testing.assert_close(ours_TS, theirs_TS, rtol=1e-5, atol=1e-5 * theirs_TS.abs().max().item())
    unpermuted_TS = turned_halves(x_TD @ q_KD.T) @ turned_halves(x_TD @ k_KD.T).T
    assert (unpermuted_TS - theirs_TS).abs().max() > 0.1  # the permutation matters


def test_half_split_undoes_interleaving_in_every_head():
    weight = torch.arange(24.0).view(24, 1)
    assert torch.equal(half_split(interleaved(weight, 3), 3), weight)
    assert half_split(torch.arange(8.0)[:, None], 1).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_an_output_layer_that_is_absent_or_equal_is_tied(llama, tmp_path):
    whole = metas_names(llama.state_dict())
    whole["output.weight"] = (whole["tok_embeddings.weight"][0], 0)
    equal = Meta(write(tmp_path / "equal", {**whole, "tok_embeddings.weight": whole["output.weight"]}, 2))
    absent = Meta(write(tmp_path / "absent", {n: pair for n, pair in whole.items() if n != "output.weight"}, 2))
    assert equal.config().tied
    assert absent.config().tied
    ours = dict(equal.tensors())
    assert all(torch.equal(tensor, ours.pop(name)) for name, tensor in absent.tensors())
    assert not ours


def test_what_was_guessed_is_noted(llama, tmp_path, capsys):
    path = write(tmp_path / "meta", metas_names(llama.state_dict()), use_scaled_rope=True)
    assert Meta(path).config().position.scaling.factor == 32
    note = "not in params.json, taken from the releases: sequences of 131072 tokens and positions stretched 32 times"
    assert f"note: {path}: {note}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("params", "size"),
    [
        ({"dim": 4096, "multiple_of": 256}, 11008),  # Llama 2 7B
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),  # Llama 2 70B
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),  # Llama 3 8B
        ({"dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5}, 8192),  # Llama 3.2 1B
    ],
)
def test_feed_forward_sizes_are_those_of_the_releases(params, size):
    from mt_ckpt.meta.config import hidden

    assert hidden(params) == size


def test_the_command_converts_and_proves(llama, tmp_path):
    path = write(tmp_path / "meta", metas_names(llama.state_dict()), 2)
    result = mt_ckpt("convert", "--load-dir", path, "--saver", "hf", "--save-dir", tmp_path / "hf", "--verify")
    assert result.exit_code == 0
    assert "verified: result in mt = result in transformers" in result.stdout
    assert open_checkpoint(tmp_path / "hf").config().attention.num_kv_heads == 4


def test_both_formats_at_once_are_refused(llama, tmp_path):
    path = write(tmp_path / "meta", metas_names(llama.state_dict()))
    (path / "config.json").write_text("{}")
    with pytest.raises(
        MtError, match="both config.json \\(Hugging Face's format\\) and params.json \\(Meta's\\); take"
    ):
        llama_mistral(path)


def damaged(path: Path, how):
    shards = sorted(path.glob("consolidated.*"))
    match how:
        case "none":
            [shard.unlink() for shard in shards]
        case "gap":
            shards[0].unlink()
            shards[2].unlink()
        case "too few":
            shards[3].unlink()
        case "truncated":
            shards[1].write_bytes(shards[1].read_bytes()[:-3000])
        case "a list":
            torch.save([torch.ones(1)], shards[1])
        case "two kinds":
            save_file({"a": torch.ones(1)}, path / "consolidated.safetensors")
        case "safetensors":
            [shard.unlink() for shard in shards]
            (path / "consolidated.00.safetensors").write_bytes(b"1234")
        case _:
            tensors = torch.load(shards[1])
            tensors["layers.0.attention.wq.bias"] = tensors.pop("norm.weight")
            tensors["layers.1.attention.wo.weight"] = torch.ones(3, 3)
            torch.save(tensors, shards[1])


DAMAGE = {
    "none": ["holds no consolidated.*.pth or consolidated*.safetensors"],
    "gap": ["consolidated.00.pth: missing; copy it", "consolidated.02.pth: missing; copy it"],
    "too few": ["holds 3 files, its parts are those of 4; copy all of them, and no others"],
    "truncated": ["consolidated.01.pth: truncated or not a file of torch.save"],
    "a list": ["consolidated.01.pth: does not hold tensors by name; give Meta's own files"],
    "two kinds": ["holds its weights twice (consolidated.00.pth, "],
    "safetensors": ["consolidated.00.safetensors: truncated or not safetensors"],
    "other tensors": [
        "file 1 alone has layers.0.attention.wq.bias; copy the files of one model",
        "file 1 lacks norm.weight",
        "layers.1.attention.wo.weight has shape (64, 16) in file 0, (3, 3) in 1",
    ],
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_files_are_one_report(how, llama, tmp_path):
    path = write(tmp_path / "meta", metas_names(llama.state_dict()), 4)
    damaged(path, how)
    with pytest.raises(MtError) as error:
        convert("llama_mistral", path, "native", tmp_path / "result")
    assert len(error.value.problems) == len(DAMAGE[how])
    assert all(part in str(error.value) for part in DAMAGE[how])
    assert not list(tmp_path.glob("result*"))


def test_all_that_mt_does_not_compute_is_told_at_once(llama, tmp_path):
    whole = metas_names(llama.state_dict())
    path = write(tmp_path / "meta", whole, moe={"num_experts": 8}, lora_args={"rank": 16}, n_heads=None, dim="x")
    with pytest.raises(MtError) as error:
        Meta(path).config()
    assert [p.actual for p in error.value.problems] == [
        "dim is 'x'",
        "n_heads is None",
        "asks for moe",
        "asks for lora_args",
    ]
    whole |= {"layers.0.attention.wq.bias": (torch.ones(64), 0)}
    del whole["norm.weight"]
    with pytest.raises(MtError) as error:
        dict(Meta(write(tmp_path / "other", whole, 2)).tensors())
    assert [p.actual for p in error.value.problems] == ["unexpected tensor", "tensor is missing"]
    with pytest.raises(MtError, match="num_kv_heads 3 does not divide heads 8; copy it again"):
        Meta(write(tmp_path / "odd", whole, n_kv_heads=3)).config()
