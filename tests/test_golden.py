"""Whole-model equality with the original implementations (fp32, real-size towers), see tests/golden/.

The model is built once per session. Single parts have their own golden tests beside their unit tests.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from prismo.align import AlignRecipe, SpatialForcing, VGGTAggregator, vision_tokens
from prismo.align.vggt import infer_config
from prismo.data.normalize import parse_statistics, resolve_unnorm_key, unnormalize
from prismo.embodiment import LIBERO
from prismo.merging.merge import merge
from prismo.models.heads import DiffusionActionHead, DiffusionHead, L1Head, L1RegressionActionHead
from prismo.models.lora import load_adapter
from prismo.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, PrismaticImageProcessor, TextBatch
from prismo.models.openvla.prediction import ActionModules, predict_normalized
from prismo.models.openvla.processing import query
from prismo.models.openvla.vision import FiLMVisionBackbone, PrismaticVisionBackbone
from prismo.models.projectors import NoisyActionProjector, ProprioProjector
from prismo.training.openvla_objective import OpenVLAInputs, OpenVLAObjective
from tests import golden
from tests.golden import close

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """These matrices are large enough for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def build(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    """The golden OpenVLA: meta device first, so that no time goes into an initialisation that is overwritten."""
    shapes = golden.sizes("state_shapes.json")
    with torch.device("meta"):
        model = OpenVLAForActionPrediction(config)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == shapes
    weights = {name: golden.weight(golden.salt(), name, shape) for name, shape in shapes.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.language_model.model.rotary_emb = LlamaRotaryEmbedding(config=config.text_config)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def config() -> OpenVLAConfig:
    return OpenVLAConfig(**golden.sizes("config.json"))


@pytest.fixture(scope="session")
def vla(config: OpenVLAConfig) -> OpenVLAForActionPrediction:
    return build(config)


@dataclass(frozen=True)
class Inputs:
    """Stored ids, drawn images and states of the two samples."""

    text: TextBatch
    pixels: Tensor
    proprio: Tensor
    target: Tensor


@pytest.fixture(scope="session")
def inputs() -> Inputs:
    stored = golden.figures("train_l1_align.npz")
    text = TextBatch(stored["input_ids"].long(), stored["attention_mask"].bool(), stored["labels"].long())
    return Inputs(
        text=text,
        pixels=PrismaticImageProcessor().normalize(golden.images()),
        proprio=golden.normal_input("proprio", 2, 8),
        target=golden.uniform_input("gt", 2, 8, 7) * 2 - 1,
    )


@pytest.fixture(scope="session")
def modules(vla: OpenVLAForActionPrediction) -> ActionModules:
    head = golden.fill(L1RegressionActionHead(vla.llm_dim), golden.salt("action_head"))
    projector = golden.fill(ProprioProjector(vla.llm_dim), golden.salt("proprio_projector"))
    return ActionModules(L1Head(head), projector)


def to_environment(config: OpenVLAConfig, normalized: Tensor) -> Tensor:
    """Un-normalised actions, as the original's `predict_action` returns them."""
    statistics = parse_statistics(config.norm_stats)
    key = resolve_unnorm_key(statistics, None)
    return torch.from_numpy(unnormalize(normalized[0].numpy(), statistics[key].action, LIBERO.normalization))


def sample_query(vla: OpenVLAForActionPrediction, file: str) -> TextBatch:
    """The inference prompt of a file (sample 1) with its action slots."""
    prompt = golden.figures(file)["input_ids"].long()[0].tolist()
    return query([prompt], LIBERO.action_tokens, vla.action_tokenizer)


def test_l1_inference(
    vla: OpenVLAForActionPrediction, modules: ActionModules, inputs: Inputs, config: OpenVLAConfig
) -> None:
    expected = golden.figures("infer_l1.npz")
    text = sample_query(vla, "infer_l1.npz")
    mask = vla.action_tokenizer.mask(text.labels)
    out = vla(
        text.input_ids,
        None,
        inputs.pixels[1:],
        action_mask=mask,
        extra_tokens=modules.proprio_projector(inputs.proprio[1:]),
    )
    close(out.action_states(mask), expected["states"])
    actions = predict_normalized(vla, modules, text, inputs.pixels[1:], LIBERO, proprio=inputs.proprio[1:])
    close(to_environment(config, actions), expected["actions"])


def test_image_processor() -> None:
    expected = golden.figures("image_processor.npz")
    pixels = PrismaticImageProcessor()(Image.fromarray(expected["image"].numpy()))["pixel_values"]
    close(pixels[:, :, ::13, ::13], expected["pixel_values"])


def test_discrete(vla: OpenVLAForActionPrediction, inputs: Inputs, config: OpenVLAConfig) -> None:
    expected = golden.figures("discrete.npz")
    text, pixels = inputs.text, inputs.pixels[:, :6]
    mask = vla.action_tokenizer.mask(text.labels)
    out = vla(text.input_ids, text.attention_mask, pixels, action_mask=mask)
    logits = vla.logits(out.last_hidden_state)
    close(logits[:, 256::7, ::997], expected["logits"])
    assert torch.equal(logits[:, out.inserted_tokens : -1].argmax(-1), expected["argmax"].long())
    targets = text.labels[:, 1:]
    loss = torch.nn.functional.cross_entropy(
        logits[:, out.inserted_tokens : -1].flatten(0, 1), targets.flatten(), ignore_index=-100
    )
    close(loss, expected["lm_loss"])
    prompt = sample_query(vla, "infer_l1.npz")
    actions = predict_normalized(vla, ActionModules(), prompt, pixels[1:], LIBERO)
    close(to_environment(config, actions), expected["actions"])


@pytest.fixture
def diffusion_modules(vla: OpenVLAForActionPrediction, modules: ActionModules) -> Iterator[ActionModules]:
    head = golden.fill(DiffusionActionHead(vla.llm_dim), golden.salt("diffusion_head"))
    noisy = golden.fill(NoisyActionProjector(vla.llm_dim), golden.salt("noisy_action_projector"))
    return ActionModules(DiffusionHead(head, noisy), modules.proprio_projector)


def test_diffusion(
    vla: OpenVLAForActionPrediction, diffusion_modules: ActionModules, inputs: Inputs, config: OpenVLAConfig
) -> None:
    expected = golden.figures("diffusion.npz")
    text, parts = inputs.text, diffusion_modules.by_stem()
    head = parts["action_head"]
    noise = golden.normal_input("noise", 2, 8, 7)
    example = head.noisy_actions(inputs.target, noise, torch.tensor([3, 41]))
    close(example.actions, expected["noisy"])
    close(example.time_embedding, expected["time_emb"])
    mask = vla.action_tokenizer.mask(text.labels)
    out = vla(
        text.input_ids,
        text.attention_mask,
        inputs.pixels,
        action_mask=mask,
        action_embeddings=parts["noisy_action_projector"](example.actions),
        extra_tokens=torch.cat([diffusion_modules.proprio_projector(inputs.proprio), example.time_embedding], 1),
    )
    close(head(out.action_states(mask)), expected["eps"])
    steps = len(expected["timesteps"])
    assert head.ddim.timesteps(steps) == expected["timesteps"].int().tolist()
    actions = predict_normalized(
        vla,
        diffusion_modules,
        sample_query(vla, "infer_l1.npz"),
        inputs.pixels[1:],
        LIBERO,
        proprio=inputs.proprio[1:],
        diffusion_steps=steps,
        start=golden.normal_input("x0", 1, 8, 7),
    )
    close(to_environment(config, actions), expected["actions"])


def test_film(vla: OpenVLAForActionPrediction, modules: ActionModules, inputs: Inputs, config: OpenVLAConfig) -> None:
    expected = golden.figures("film.npz")
    shapes = golden.sizes("film_shapes.json")
    with torch.device("meta"):
        backbone = FiLMVisionBackbone(PrismaticVisionBackbone(config.towers), vla.llm_dim)
    state = {name: golden.weight(golden.salt("film"), name, shape) for name, shape in shapes.items()}
    backbone.load_state_dict(state, strict=True, assign=True)
    mask = vla.action_tokenizer.mask(inputs.text.labels)
    plain, vla.vision_backbone = vla.vision_backbone, backbone
    try:
        with torch.no_grad():
            out = vla(
                inputs.text.input_ids[:1],
                inputs.text.attention_mask[:1],
                inputs.pixels[:1],
                action_mask=mask[:1],
                extra_tokens=modules.proprio_projector(inputs.proprio[:1]),
                hidden_layers=(0,),
            )
    finally:
        vla.vision_backbone = plain
    inserted = out.hidden_states[0][:, 1 : 1 + out.inserted_tokens]
    close(inserted[:, ::37], expected["projector_features"])
    close(out.last_hidden_state[:, ::29], expected["last"])


@pytest.fixture(scope="session")
def teacher() -> VGGTAggregator:
    shapes = golden.sizes("aggregator_shapes.json")
    state = {name: golden.weight(golden.salt("aggregator"), name, shape) for name, shape in shapes.items()}
    model = VGGTAggregator(infer_config(state))
    model.load_state_dict(state, strict=True)
    return model.eval()


def alignment(vla: OpenVLAForActionPrediction, teacher: VGGTAggregator, vggt_layer: int) -> SpatialForcing:
    """The published recipe on hidden state 2 of the small Llama."""
    recipe = AlignRecipe(
        vla_layers_align=2, vggt_layers_align=vggt_layer, use_vggt_pe=True, use_vlm_norm=True, align_loss_coeff=0.5
    )
    module = SpatialForcing(teacher, vla.llm_dim, recipe)
    golden.fill(module.projector, golden.salt("align_projector"))
    return module


# Gradient norms that the original stored, and where the parameter sits in our objective.
GRADIENTS = {
    "g_head_fc2": "action_head.model.fc2.weight",
    "g_align_fc1": "alignment.projector.fc1.weight",
    "g_align_norm": "alignment.projector.vlm_norm.weight",
    "g_prop_fc1": "proprio_projector.fc1.weight",
    "g_q0": "vla.language_model.model.layers.0.self_attn.q_proj.weight",
    "g_fc3": "vla.projector.fc3.weight",
    "g_qkv0": "vla.vision_backbone.featurizer.blocks.0.attn.qkv.weight",
    "g_fqkv5": "vla.vision_backbone.fused_featurizer.blocks.5.attn.qkv.weight",
    "g_embed": "vla.language_model.model.embed_tokens.weight",
}


def test_training_step(
    vla: OpenVLAForActionPrediction, modules: ActionModules, teacher: VGGTAggregator, inputs: Inputs
) -> None:
    """Losses and gradients of one step come out of the objective that the trainer uses."""
    expected = golden.figures("train_l1_align.npz")
    objective = OpenVLAObjective(vla, modules, {"alignment": alignment(vla, teacher, -1)})
    batch = OpenVLAInputs(
        images=golden.images(),
        pixel_values=inputs.pixels,
        text=inputs.text,
        actions=inputs.target,
        proprio=inputs.proprio,
    )
    parameters = {name: objective.get_parameter(path).requires_grad_() for name, path in GRADIENTS.items()}
    try:
        losses = objective(batch)
        close(losses.actions, expected["pred"])
        close(losses.metrics["loss"], expected["l1"])
        close(losses.metrics["align_loss"], expected["align"])
        close(losses.total, expected["loss"])
        gradients = torch.autograd.grad(losses.total, list(parameters.values()))
    finally:
        vla.requires_grad_(False)
    for name, gradient in zip(parameters, gradients, strict=True):
        close(gradient.norm(), expected[name], rel=1e-3)


def test_aligned_states_and_other_teacher_layer(
    vla: OpenVLAForActionPrediction, modules: ActionModules, teacher: VGGTAggregator, inputs: Inputs
) -> None:
    expected = golden.figures("train_l1_align.npz")
    mask = vla.action_tokenizer.mask(inputs.text.labels)
    with torch.no_grad():
        out = vla(
            inputs.text.input_ids,
            inputs.text.attention_mask,
            inputs.pixels,
            action_mask=mask,
            extra_tokens=modules.proprio_projector(inputs.proprio),
            hidden_layers=(2,),
        )
        close(out.action_states(mask), expected["action_states"])
        hidden = vision_tokens(out.hidden_states[2], out.vision_tokens, shift=True)
        close(hidden[:, ::37], expected["vision_hidden"])
        _, metrics = alignment(vla, teacher, 1)(golden.images(), hidden)
    close(metrics["align_loss"], expected["align_1"])


def test_adapter_and_merge(
    vla: OpenVLAForActionPrediction,
    modules: ActionModules,
    inputs: Inputs,
    config: OpenVLAConfig,
    tmp_path: Path,
) -> None:
    """An adapter as peft 0.11 wrote it (with its lm_head copy): loaded, and merged from file to file."""
    expected = golden.figures("lora.npz")
    base, checkpoint, merged = tmp_path / "base", tmp_path / "checkpoint", tmp_path / "merged"
    vla.save_pretrained(base)
    write_adapter(vla, config, checkpoint)

    def predict(model: OpenVLAForActionPrediction) -> Tensor:
        text = sample_query(model, "infer_l1.npz")
        actions = predict_normalized(model, modules, text, inputs.pixels[1:], LIBERO, proprio=inputs.proprio[1:])
        return to_environment(config, actions)

    adapted = OpenVLAForActionPrediction.from_pretrained(base, dtype=torch.float32).eval()
    load_adapter(adapted, checkpoint)
    close(predict(adapted), expected["actions"])
    del adapted  # 3 GB

    merge(base, checkpoint, merged, progress=False)
    shutil.rmtree(base)
    result = OpenVLAForActionPrediction.from_pretrained(merged, dtype=torch.float32).eval()
    towers, llama = result.vision_backbone, result.language_model.model
    close(towers.featurizer.patch_embed.proj.weight[::97, 0, ::5, ::5], expected["conv"])
    close(llama.layers[0].self_attn.q_proj.weight[::9, ::9], expected["q0"])
    close(towers.fused_featurizer.blocks[3].attn.qkv.weight[::301, ::97], expected["qkv"])
    close(predict(result), expected["actions_merged"])
    shutil.rmtree(merged)


def write_adapter(vla: OpenVLAForActionPrediction, config: OpenVLAConfig, checkpoint: Path) -> None:
    """`lora_adapter/` and `dataset_statistics.json` as the original writes them."""
    folder = checkpoint / "lora_adapter"
    folder.mkdir(parents=True)
    tensors = {}
    for name, shape in golden.sizes("lora_shapes.json").items():
        if ".lora_" in name:
            tensors[name] = golden.weight(golden.salt("lora"), name, shape)
        else:
            own = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            tensors[name] = vla.get_parameter(own).detach().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(golden.golden_folder() / "adapter_config.json", folder / "adapter_config.json")
    (checkpoint / "dataset_statistics.json").write_text(json.dumps(config.norm_stats))
