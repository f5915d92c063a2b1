"""OpenVLA: counts, token arithmetic, attention, batching, loading and saving."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from prismo.embodiment import LIBERO
from prismo.models.bin_tokenizer import BinTokenizer
from prismo.models.heads import L1Head, L1RegressionActionHead
from prismo.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticImageProcessor,
    PrismaticProcessor,
    TextBatch,
)
from prismo.models.openvla.prediction import ActionModules, predict_normalized
from prismo.models.projectors import ProprioProjector
from prismo.models.random_weights import fill_random
from prismo.models.self_test import SelfTestError

GOLDEN_PROMPT = "pick up the black bowl between the plate and the ramekin and place it on the plate"
GOLDEN_IDS = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 701, 278, 4628, 12580, 29880, 1546, 278]
GOLDEN_IDS += [15284, 322, 278, 364, 420, 9089, 322, 2058, 372, 373, 278, 15284, 29973, 13, 3744, 29901]
INSTRUCTIONS = ["open the drawer", GOLDEN_PROMPT, "Put the BOWL on the stove"]


@pytest.fixture(scope="module")
def vla(tiny_base: Path) -> OpenVLAForActionPrediction:
    return load(tiny_base)


@pytest.fixture(scope="module")
def vanilla(tiny_base: Path) -> OpenVLAForActionPrediction:
    return load(tiny_base, attention="causal")


@pytest.fixture(scope="module")
def processor(tiny_base: Path) -> PrismaticProcessor:
    return PrismaticProcessor.from_pretrained(tiny_base)


@pytest.fixture(scope="module")
def modules(vla: OpenVLAForActionPrediction) -> ActionModules:
    head, projector = L1RegressionActionHead(vla.llm_dim), ProprioProjector(vla.llm_dim)
    fill_random(head, 1)
    fill_random(projector, 2)
    return ActionModules(L1Head(head.eval()), projector.eval())


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    images = torch.randint(0, 256, (3, 2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return PrismaticImageProcessor().normalize(images)


def rows(text: TextBatch, index: int) -> TextBatch:
    """One sample without the padding that the batch gave it."""
    length = int(text.attention_mask[index].sum())
    return TextBatch(text.input_ids[index : index + 1, :length], None, text.labels[index : index + 1, :length])


def load(folder: Path, **kwargs: Any) -> OpenVLAForActionPrediction:
    """The checkpoint in fp32, so that comparisons can be strict."""
    return OpenVLAForActionPrediction.from_pretrained(folder, **{"dtype": torch.float32} | kwargs).eval()


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_full_size_counts() -> None:
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(OpenVLAConfig())
    assert len(model.state_dict()) == 982
    assert sum(p.numel() for p in model.parameters()) == 7_541_237_184
    assert model.config.text_config.rms_norm_eps == 1e-6
    assert model.config.patches_per_view == 256
    assert model.config.token_vocab_size == 32000


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_prompt_ids(processor: PrismaticProcessor) -> None:
    assert processor.prompt_ids(GOLDEN_PROMPT) == [*GOLDEN_IDS, 29871]
    assert processor.prompt_ids(GOLDEN_PROMPT.upper()) == [*GOLDEN_IDS, 29871]


def test_training_ids_equal_the_tokenised_string(processor: PrismaticProcessor) -> None:
    """The original writes actions as characters and tokenises the whole text; ids are built directly here."""
    tokens = BinTokenizer()
    actions = np.random.default_rng(0).uniform(-1.1, 1.1, (1, 8, 7))
    text = processor.training_text([GOLDEN_PROMPT], actions, tokens)
    characters = processor.tokenizer.decode(tokens.encode(actions.reshape(-1)))
    prompt = f"In: What action should the robot take to {GOLDEN_PROMPT}?\nOut: {characters}</s>"
    assert processor.tokenizer(prompt)["input_ids"] == text.input_ids[0].tolist()
    assert (text.labels[0] != -100).sum() == 57
    assert text.labels[0, -57:].tolist() == text.input_ids[0, -57:].tolist()
    assert text.attention_mask is None


def test_action_ids() -> None:
    tokens = BinTokenizer()
    assert tokens.encode(np.array([-1.0, 1.0, -3.0, 3.0])).tolist() == [31999, 31744, 31999, 31744]
    assert tokens.first_id == 31743
    values = np.linspace(-1, 1, 501)
    assert np.abs(tokens.decode(tokens.encode(values)) - values).max() <= 1 / 255 + 1e-12
    assert tokens.decode(np.array([31999, 31744, 2, 40000])) == pytest.approx(
        [-0.99607843, 0.99607843, 0.99607843, -0.99607843]
    )


def test_action_masks_equal_the_counting_rule() -> None:
    """The original counts labelled tokens; union of its two masks = ours."""
    labels = torch.full((2, 70), -100)
    labels[0, 10:66], labels[0, 66] = torch.randint(31744, 32000, (56,)), 2
    labels[1, 5:61], labels[1, 61] = torch.randint(31744, 32000, (56,)), 2
    count = torch.cumsum(labels != -100, dim=1)
    current = (count >= 1) & (count <= 7) & (labels > 31743)
    following = (count > 7) & (labels > 31743)
    tokens = BinTokenizer()
    assert torch.equal(tokens.mask(labels), current | following)
    assert torch.equal(tokens.first_action_mask(labels, 7), current)
    assert tokens.mask(labels).sum(1).tolist() == [56, 56]


def test_query_and_training_select_the_same_states(
    vla: OpenVLAForActionPrediction, processor: PrismaticProcessor, pixels: Tensor
) -> None:
    tokens = vla.action_tokenizer
    training = processor.training_text([GOLDEN_PROMPT], np.zeros((1, 8, 7)), tokens)
    asked = processor.query_text([GOLDEN_PROMPT], LIBERO.action_tokens, tokens)
    with torch.no_grad():
        states = [
            vla(t.input_ids, None, pixels[:1], action_mask=(m := tokens.mask(t.labels))).action_states(m)
            for t in (training, asked)
        ]
        out = vla(asked.input_ids, None, pixels[:1], action_mask=tokens.mask(asked.labels))
    assert torch.equal(*states)
    first = out.inserted_tokens + len(processor.prompt_ids(GOLDEN_PROMPT)) - 1  # P + n - 1, the space token
    assert torch.equal(states[0], out.last_hidden_state[:, first : first + 56])


def test_processor_reads_the_rounded_statistics(processor: PrismaticProcessor, tmp_path: Path) -> None:
    """`tvf_normalize_params` win over `means`, and survive saving."""
    processor.save_pretrained(tmp_path)
    for read in (processor, PrismaticProcessor.from_pretrained(tmp_path)):
        assert read.image_processor.statistics[0] == (
            [0.484375, 0.455078125, 0.40625],
            [0.228515625, 0.2236328125, 0.224609375],
        )
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["processor_class"] == "PrismaticProcessor"
    assert stored["image_processor_type"] == "PrismaticImageProcessor"
    images, (mean, std) = torch.rand(2, 2, 3, 16, 16), processor.image_processor.statistics[0]
    first = processor.image_processor.normalize(images).unflatten(1, (2, -1, 3))[:, :, 0]
    torch.testing.assert_close(first * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1), images)


# --- attention -------------------------------------------------------------------------------------------------------


def last_states(vla: OpenVLAForActionPrediction, text: TextBatch, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return vla(text.input_ids, text.attention_mask, pixels).last_hidden_state


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_changes_nothing(
    tiny_base: Path, processor: PrismaticProcessor, pixels: Tensor, kind: str, implementation: str
) -> None:
    vla = load(tiny_base, attention=kind, attn_implementation=implementation)
    text = processor.prompt_batch(INSTRUCTIONS)
    assert text.attention_mask is not None
    batch = last_states(vla.eval(), text, pixels)
    for i in range(len(INSTRUCTIONS)):
        alone = last_states(vla, rows(text, i), pixels[i : i + 1])
        torch.testing.assert_close(batch[i, : alone.shape[1]], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
@pytest.mark.parametrize("padded", [False, True])
def test_sdpa_equals_eager(
    tiny_base: Path, processor: PrismaticProcessor, pixels: Tensor, kind: str, padded: bool
) -> None:
    text = processor.prompt_batch(INSTRUCTIONS if padded else INSTRUCTIONS[:1] * 3)
    states = []
    for implementation in ("sdpa", "eager"):
        vla = load(tiny_base, attention=kind, attn_implementation=implementation)
        assert vla.language_model.config._attn_implementation == implementation
        states.append(last_states(vla.eval(), text, pixels))
    longest = 1  # the sample without padding, the others have padded positions that mean nothing
    torch.testing.assert_close(states[0][longest], states[1][longest], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bidirectional", "causal"])
def test_who_sees_whom(
    vla: OpenVLAForActionPrediction,
    vanilla: OpenVLAForActionPrediction,
    processor: PrismaticProcessor,
    pixels: Tensor,
    kind: str,
) -> None:
    model = vla if kind == "bidirectional" else vanilla
    text = processor.prompt_batch(INSTRUCTIONS[:1])
    changed = text.input_ids.clone()
    changed[0, -1] = 500
    before = last_states(model, text, pixels[:1])
    after = last_states(model, TextBatch(changed, None, text.labels), pixels[:1])
    moved = (before - after).abs().amax(dim=-1)[0] > 0
    assert moved[-1]
    assert bool(moved[0]) == (kind == "bidirectional")


def test_self_test_catches_wrong_attention(tiny_base: Path) -> None:
    vla = load(tiny_base, self_test=False)
    vla.self_test()
    for layer in vla.language_model.model.layers:
        layer.self_attn.is_causal = True  # what a stock transformers does to an OFT checkpoint
    with pytest.raises(SelfTestError, match="needs bidirectional attention"):
        vla.self_test()
    vla.config.attention = "causal"
    vla.self_test()
    for layer in vla.language_model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(SelfTestError, match="'causal' was asked"):
        vla.self_test()


def test_self_test_catches_a_lost_image(tiny_base: Path) -> None:
    vla = load(tiny_base)
    torch.nn.init.zeros_(vla.projector.fc3.weight)
    with pytest.raises(SelfTestError, match="image does not influence"):
        vla.self_test()


# --- prediction ------------------------------------------------------------------------------------------------------


def test_batched_prediction_equals_one_by_one(
    vla: OpenVLAForActionPrediction, modules: ActionModules, processor: PrismaticProcessor, pixels: Tensor
) -> None:
    proprio = torch.randn(3, 8)
    text = processor.query_text(INSTRUCTIONS, LIBERO.action_tokens, vla.action_tokenizer)
    batch = predict_normalized(vla, modules, text, pixels, LIBERO, proprio=proprio)
    assert batch.shape == (3, 8, 7)
    for i in range(3):
        single = predict_normalized(vla, modules, rows(text, i), pixels[i : i + 1], LIBERO, proprio=proprio[i : i + 1])
        torch.testing.assert_close(batch[i : i + 1], single, rtol=1e-5, atol=1e-5)


def test_cached_decoding_equals_recomputation(
    vanilla: OpenVLAForActionPrediction, processor: PrismaticProcessor, pixels: Tensor
) -> None:
    """Batched greedy decoding over a cache = appending each token and running everything again, sample by sample."""
    text = processor.prompt_batch(INSTRUCTIONS)
    ids = vanilla.generate_action_tokens(text.input_ids, text.attention_mask, pixels, tokens=7)
    for i in range(3):
        sequence = rows(text, i).input_ids
        for _ in range(7):
            with torch.no_grad():
                out = vanilla(sequence, None, pixels[i : i + 1])
            sequence = torch.cat([sequence, vanilla.logits(out.last_hidden_state[:, -1]).argmax(-1)[:, None]], dim=1)
        assert ids[i].tolist() == sequence[0, -7:].tolist()
    actions = predict_normalized(vanilla, ActionModules(), text, pixels, LIBERO)
    assert actions.shape == (3, 1, 7)


def test_oft_model_refuses_token_by_token(
    vla: OpenVLAForActionPrediction, processor: PrismaticProcessor, pixels: Tensor
) -> None:
    text = processor.prompt_batch(INSTRUCTIONS)
    with pytest.raises(ValueError, match="needs attention='causal'"):
        vla.generate_action_tokens(text.input_ids, text.attention_mask, pixels, tokens=7)


def test_proprio_must_fit_the_checkpoint(
    vla: OpenVLAForActionPrediction, modules: ActionModules, processor: PrismaticProcessor, pixels: Tensor
) -> None:
    text = processor.query_text(INSTRUCTIONS, LIBERO.action_tokens, vla.action_tokenizer)
    with pytest.raises(ValueError, match="needs a proprio state"):
        predict_normalized(vla, modules, text, pixels, LIBERO)
    with pytest.raises(ValueError, match="takes no proprio state"):
        predict_normalized(vla, ActionModules(modules.head), text, pixels, LIBERO, proprio=torch.zeros(3, 8))


def test_forward_computes_nothing_unasked(
    vla: OpenVLAForActionPrediction, processor: PrismaticProcessor, pixels: Tensor
) -> None:
    """No LM head, no cache, no hidden states, no last tower block, no final tower norm, no attention pool."""
    unused = [vla.language_model.lm_head]
    for tower in vla.vision_backbone.towers:
        unused += [tower.blocks[-1], tower.norm, *(m for n, m in tower.named_modules() if "attn_pool" in n)]
    calls: list[object] = []
    hooks = [m.register_forward_hook(lambda module, *_: calls.append(module)) for m in unused]
    text = processor.query_text(INSTRUCTIONS, LIBERO.action_tokens, vla.action_tokenizer)
    try:
        out = vla(text.input_ids, text.attention_mask, pixels)
    finally:
        for hook in hooks:
            hook.remove()
    assert not calls
    assert out.past_key_values is None
    assert out.hidden_states == {}


def test_hidden_layer_indices(vla: OpenVLAForActionPrediction, processor: PrismaticProcessor, pixels: Tensor) -> None:
    """0 = embeddings, -1 = last = after the norm, in between the outputs of the decoder layers."""
    text = processor.prompt_batch(INSTRUCTIONS[:1])
    seen: list[Tensor] = []
    hook = vla.language_model.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        out = vla(text.input_ids, None, pixels[:1], hidden_layers=(0, 2, -3, -1))
    hook.remove()
    assert torch.equal(out.hidden_states[2], seen[0])
    assert torch.equal(out.hidden_states[-3], seen[0])
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(out.hidden_states[0][:, 0], vla.get_input_embeddings()(text.input_ids[:, 0]))
    with pytest.raises(IndexError, match=r"hidden layer 5 asked, the language model has -5..4"):
        vla.layer_index(5)


def test_gradient_checkpointing_keeps_gradients(tiny_base: Path, processor: PrismaticProcessor, pixels: Tensor) -> None:
    text = processor.prompt_batch(INSTRUCTIONS)
    gradients = []
    for checkpointing in (False, True):
        vla = load(tiny_base).train()
        if checkpointing:
            vla.gradient_checkpointing_enable({"use_reentrant": False})
        vla(text.input_ids, text.attention_mask, pixels).last_hidden_state.square().mean().backward()
        gradients.append(vla.vision_backbone.featurizer.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(*gradients)


# --- files -----------------------------------------------------------------------------------------------------------


def fingerprint(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_save_load_equal_and_folder_untouched(vla: OpenVLAForActionPrediction, tiny_base: Path, tmp_path: Path) -> None:
    before = fingerprint(tiny_base)
    vla.save_pretrained(tmp_path, max_shard_size="2MB")
    again = load(tmp_path)
    for (name, a), (other, b) in zip(vla.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    assert again.config.to_dict() == vla.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert fingerprint(tiny_base) == before
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(vla.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "openvla"
    assert config["architectures"] == ["OpenVLAForActionPrediction"]
    assert config["text_config"]["model_type"] == "llama"
    assert {"vision_backbone_id", "timm_model_ids", "image_sizes", "norm_stats", "torch_dtype"} <= set(config)


def test_half_precision_load(tiny_base: Path) -> None:
    vla = load(tiny_base, dtype=torch.bfloat16)
    assert {p.dtype for p in vla.parameters()} == {torch.bfloat16}
    assert vla.language_model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.fixture
def broken(tiny_base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


def shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def test_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is not a checkpoint: no config\.json"):
        load(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a checkpoint folder nor a hub id"):
        load(tmp_path / "absent")


def test_truncated_shard(broken: Path) -> None:
    file = shard(broken)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{file.name} is truncated"):
        load(broken)


def test_missing_shard(broken: Path) -> None:
    shard(broken).unlink()
    with pytest.raises(FileNotFoundError, match="which is not there"):
        load(broken)


def test_adapter_folder_names_the_merge_script(broken: Path) -> None:
    for file in broken.glob("*.safetensors*"):
        file.unlink()
    (broken / "lora_adapter").mkdir()
    with pytest.raises(FileNotFoundError, match="prismo merge"):
        load(broken)


def test_missing_tensor(broken: Path) -> None:
    from safetensors.torch import save_file  # noqa: PLC0415

    file = shard(broken)
    with safe_open(file, framework="pt") as tensors:
        kept = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 (not a dict)
    dropped = sorted(kept)[0]
    del kept[dropped]
    save_file(kept, file, metadata={"format": "pt"})
    index = broken / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][dropped]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"do not fit OpenVLA \(missing: {dropped}"):
        load(broken)


def test_other_model_type(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type 'llama', expected 'openvla'"):
        load(broken)


def test_unknown_backbone() -> None:
    with pytest.raises(ValueError, match="Did you mean 'dinosiglip-vit-so-224px'"):
        OpenVLAConfig(vision_backbone_id="dinosiglip-vit-so-224")


@pytest.mark.parametrize("shape", [(1, 5, 224, 224), (1, 6, 256, 256)])
def test_wrong_pixel_shape(vla: OpenVLAForActionPrediction, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 6 \* views, 224, 224\]"):
        vla.project_vision(torch.zeros(shape))
