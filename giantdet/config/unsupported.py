"""Keys of DeepSpeed that giantdet refuses, because they would have no effect here or break a run."""

from __future__ import annotations

_REMOVED = "was removed from DeepSpeed"
_LANGUAGE = "is for language models and does nothing here"
UNSUPPORTED: dict[str, str] = {
    "activation_checkpointing": "configures deepspeed.checkpointing, which breaks ZeRO-2/3 with shared "
    "modules; set giantdet.model.backbone.checkpoint_blocks",
    "bfloat16": "is the old name of bf16",
    "elasticity": f"{_REMOVED}; set the batch sizes, and restart on another number of GPUs",
    "amp": f"{_REMOVED}; use bf16",
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "sparse_attention": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "autotuning": "would start trial runs of its own, which giantdet does not support",
    "dataloader_drop_last": "configures DeepSpeed's loader; giantdet has its own (giantdet.data)",
    "data_efficiency": _LANGUAGE,
    "hybrid_engine": _LANGUAGE,
    "pipeline": "needs a pipeline module; giantdet trains with data parallelism and ZeRO",
    "tensor_parallel": "needs a sharding plan; giantdet trains with data parallelism and ZeRO",
    "expert_parallel": "needs mixture-of-experts layers, which giantdet does not support",
    "use_data_before_expert_parallelism": "needs mixture-of-experts layers, which giantdet does not support",
    "weight_quantization": "is for inference engines and does nothing here",
    "seq_parallel_communication_data_type": _LANGUAGE,
    "vocabulary_size": _LANGUAGE,
    "managed_gradient_accumulation": "would need another training loop",
    "datastates_ckpt": "needs a checkpoint engine that giantdet does not use",
    "zero_optimization.cpu_offload": "is deprecated; use zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "is deprecated; use zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "is deprecated; use pin_memory of the offload blocks",
    "zero_optimization.legacy_stage1": "is deprecated by DeepSpeed",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "is deprecated; use "
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "zero_optimization.zenflow": "replaces the optimizer's step, which giantdet does not support",
    "zero_optimization.save_muon_momentum_buffer_in_memory": "is for Muon with offload, which is not "
    "supported",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "compile.autoep_non_moe": "needs mixture-of-experts layers, which giantdet does not support",
    "optimizer.params.max_grad_norm": "is not read by DeepSpeed; set gradient_clipping",
}
