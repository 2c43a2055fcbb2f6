"""Models and pipelines of diffusers: quantized while they load, saved, loaded again, fine-tuned, offloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.hooks import apply_group_offloading
from diffusers.quantizers import PipelineQuantizationConfig

from quantlib import quantize_
from quantlib.hf import QuantlibConfig
from quantlib.nn import QuantConv2d, QuantLinear

CPU = torch.device("cpu")


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
    ).eval()  # fmt: skip


def dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
        patch_size=2, norm_num_groups=4, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip


def run(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
    dtype = next(p.dtype for p in model.parameters() if p.requires_grad)
    step = torch.tensor([3])
    if isinstance(model, UNet2DConditionModel):
        y: Tensor = model(x.to(dtype), step, encoder_hidden_states=context.to(dtype)).sample
    else:
        y = model(x.to(dtype), timestep=step, class_labels=torch.tensor([1])).sample
    return y


@pytest.mark.parametrize("spec", ["W8A16", "int4:group:16", "W8A8", "float8_e5m2:row", "bfloat16"])
@pytest.mark.parametrize("make", [unet, dit])
def test_load_save_load(make: Any, spec: str, tmp_path: Path) -> None:
    """The layers of ``quantize_`` on load, the same bytes after saving, floats after ``dequantize``."""
    model = make()
    model.save_pretrained(tmp_path / "float")
    in_memory = copy.deepcopy(model)
    report = quantize_(in_memory, spec)
    with torch.inference_mode():
        want = run(in_memory)
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=QuantlibConfig(spec))
        assert {layer.name for layer in loaded.hf_quantizer.report.layers} == {layer.name for layer in report.layers}
        assert torch.equal(run(loaded), want)
        for number, quantized in enumerate((loaded, in_memory)):
            quantized.save_pretrained(tmp_path / f"codes-{number}")
            again = type(model).from_pretrained(tmp_path / f"codes-{number}")
            assert torch.equal(run(again), want)
        again.dequantize()
        again.save_pretrained(tmp_path / "decoded")
        decoded = type(model).from_pretrained(tmp_path / "decoded")
        assert "quantization_config" not in decoded.config
        assert not any(isinstance(module, QuantLinear) for module in decoded.modules())
        atol = 0.05 if "A8" in spec else 1e-5
        torch.testing.assert_close(run(decoded), want, rtol=0, atol=atol)


def test_scales_stay_float32_in_a_model_of_16_bits(tmp_path: Path) -> None:
    dit().save_pretrained(tmp_path / "float")
    config, dtype = QuantlibConfig("W8A16"), torch.bfloat16
    loaded = DiTTransformer2DModel.from_pretrained(tmp_path / "float", quantization_config=config, torch_dtype=dtype)
    loaded.save_pretrained(tmp_path / "codes")
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "codes", torch_dtype=dtype)
    for model in (loaded, again):
        layer = model.transformer_blocks[0].attn1.to_q
        assert layer.weight_scale.dtype == torch.float32
        assert layer.bias.dtype == model.dtype == dtype
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())


def test_convolutions_and_patterns(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "float")
    config = QuantlibConfig("W8A16", convolutions=True, skip=["conv_in", "up_blocks.*"])
    model = UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=config)
    assert isinstance(model.down_blocks[0].resnets[0].conv1, QuantConv2d)
    assert type(model.conv_in) is nn.Conv2d
    assert not any(isinstance(module, QuantLinear) for module in model.up_blocks.modules())
    assert model.hf_quantizer.report.skipped["conv_in"] == "matches conv_in"
    model.save_pretrained(tmp_path / "codes")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "codes")
    state, found = model.state_dict(), again.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(x, found[name]) for name, x in state.items())
    for floats in (again.conv_in, again.up_blocks):  # torch's FP32 products sum in another order at unaligned addresses
        for p in floats.parameters():
            p.data = p.data.clone()
    assert torch.equal(run(again), run(model))


def test_pipeline(tmp_path: Path) -> None:
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(16,), norm_num_groups=4, sample_size=8)
    DiTPipeline(transformer=dit(), vae=vae, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "float")
    config = PipelineQuantizationConfig(quant_mapping={"transformer": QuantlibConfig("W4A16")})
    pipeline = DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    pipeline.save_pretrained(tmp_path / "codes")
    images = []
    for made in (pipeline, DiTPipeline.from_pretrained(tmp_path / "codes")):
        assert isinstance(made.transformer.transformer_blocks[0].attn1.to_q, QuantLinear)
        made.set_progress_bar_config(disable=True)
        torch.manual_seed(0)  # of which the noise of every step comes
        images.append(torch.from_numpy(made([1], num_inference_steps=2, output_type="np").images))
    assert torch.equal(*images)


def test_adapters_train_fuse_and_unfuse() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = unet()
    quantize_(model, "W8A16")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    run(model).sum().backward()
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.grad is not None} >= {"lora_A", "lora_B"}
    with torch.no_grad():
        want = run(model)
        model.fuse_lora()
        torch.testing.assert_close(run(model), want, rtol=0, atol=0.05)
        model.unfuse_lora()
        assert torch.equal(run(model), want)


@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(kind: dict[str, Any]) -> None:
    model = dit()
    quantize_(model, "W4A16")
    with torch.no_grad():
        want = run(model)
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **kind)
        assert torch.equal(run(model), want)


def test_bad_input(tmp_path: Path) -> None:
    model = dit()
    model.save_pretrained(tmp_path / "float")
    config = QuantlibConfig("W8A16")
    with pytest.raises(ValueError, match="device_map must not send layers to disk"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path / "float", quantization_config=config, device_map={"": "disk"}, offload_folder=str(tmp_path)
        )
    with pytest.raises(ValueError, match="model must have a layer to quantize"):
        DiTTransformer2DModel.from_pretrained(
            tmp_path / "float", quantization_config=QuantlibConfig("W8A16", skip=["*"])
        )
    quantize_(model, "W8A16")
    model.save_pretrained(tmp_path / "codes")
    import safetensors.torch

    file = tmp_path / "codes" / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(file)
    lost = "transformer_blocks.0.attn1.to_q.weight_scale"
    del state[lost]
    safetensors.torch.save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"find all of its codes and scales in its files, got no {lost}"):
        DiTTransformer2DModel.from_pretrained(tmp_path / "codes")
