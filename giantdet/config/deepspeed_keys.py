"""What DeepSpeed's half of a run's JSON may contain.

DeepSpeed accepts any top-level key, so that a typo trains with a default. These tables say what
DeepSpeed 0.19 really reads (`runtime/config.py` and the pydantic models of each block); they are
literals because importing DeepSpeed takes seconds, and `tests/config/test_deepspeed_keys.py` compares
them with the installed DeepSpeed.

A value is described by a type (`float` takes integers too, `int` takes 5e8), a tuple of the allowed
values, a dict of keys, or `object` for anything.
"""

from __future__ import annotations

from typing import Any

Spec = Any  # type | tuple[object, ...] | dict[str, "Spec"]

DTYPES = ("fp32", "fp16", "bf16")

ZERO: dict[str, Spec] = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": bool,
    "reduce_scatter": bool,
    "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool,
    "allgather_partitions": bool,
    "allgather_bucket_size": int,
    "overlap_comm": bool,
    "compute_grad_norm": bool,
    "load_from_fp32_weights": bool,
    "elastic_checkpoint": bool,
    "offload_param": {
        "device": ("none", "cpu", "nvme"),
        "nvme_path": str,
        "buffer_count": int,
        "buffer_size": int,
        "max_in_cpu": int,
        "pin_memory": bool,
    },
    "offload_optimizer": {
        "device": ("none", "cpu", "nvme"),
        "nvme_path": str,
        "buffer_count": int,
        "pin_memory": bool,
        "pipeline_read": bool,
        "pipeline_write": bool,
        "fast_init": bool,
        "ratio": float,
        "super_offload": bool,
        "cpuadam_cores_perc": float,
    },
    "sub_group_size": int,
    "stage3_prefetch_bucket_size": int,
    "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int,
    "stage3_max_live_parameters": int,
    "stage3_max_reuse_distance": int,
    "stage3_gather_16bit_weights_on_model_save": bool,
    "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool,
    "stage3_allgather_sequential": bool,
    "ignore_unused_parameters": bool,
    "round_robin_gradients": bool,
    "parameter_alignment": bool,
    "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool,
    "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool,
    "pipeline_loading_checkpoint": bool,
    "override_module_apply": bool,
    "log_trace_cache_warnings": bool,
    "enable_sanity_checks": bool,
    "leaf_module": {"classes": list, "names": list, "name_suffixes": list},
}

# "auto" values that config/resolve.py computes.
AUTO_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

# Blocks whose "auto" values DeepSpeed itself drops in favour of its defaults (`DeepSpeedConfigModel`).
AUTO_BLOCKS = (
    "zero_optimization",
    "bf16",
    "fp16",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "comet",
    "comms_logger",
    "compile",
)

KEYS: dict[str, Spec] = {
    "train_batch_size": int,
    "train_micro_batch_size_per_gpu": int,
    "gradient_accumulation_steps": int,
    "optimizer": {"type": str, "params": dict, "legacy_fusion": bool},
    "scheduler": {"type": str, "params": dict},
    "zero_optimization": ZERO,
    "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool,
    "gradient_clipping": float,
    "prescale_gradients": bool,
    "gradient_predivide_factor": float,
    "gradient_allreduce_op": ("mean", "sum"),
    "communication_data_type": DTYPES,
    "disable_allgather": bool,
    "bf16": {
        "enabled": bool,
        "immediate_grad_update": bool,
        "check_grad_overflow": bool,
        "bf16_master_weights_and_grads": bool,
        "bf16_optimizer_states": bool,
    },
    "fp16": {
        "enabled": bool,
        "auto_cast": bool,
        "loss_scale": float,
        "initial_scale_power": int,
        "loss_scale_window": int,
        "hysteresis": int,
        "consecutive_hysteresis": bool,
        "min_loss_scale": int,
        "fp16_master_weights_and_grads": bool,
    },
    "torch_autocast": {
        "enabled": bool,
        "dtype": ("float16", "bfloat16", "float32", "fp16", "bf16", "fp32"),
        "lower_precision_safe_modules": list,
    },
    "data_types": {
        "grad_accum_dtype": DTYPES,
        "param_dtype": DTYPES,
        "buffer_dtype": DTYPES,
        "keep_in_fp32_modules": object,
    },
    "steps_per_print": int,
    "log_level": str,
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "disable_python_gc": bool,
    "timers": {"throughput": {"enabled": bool, "synchronized": bool}},
    "flops_profiler": {
        "enabled": bool,
        "recompute_fwd_factor": float,
        "profile_step": int,
        "module_depth": int,
        "top_modules": int,
        "detailed": bool,
        "output_file": str,
    },
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "tensorboard": {"enabled": bool, "output_path": str, "job_name": str},
    "csv_monitor": {"enabled": bool, "output_path": str, "job_name": str},
    "wandb": {"enabled": bool, "group": str, "team": str, "project": str},
    "comet": {
        "enabled": bool,
        "samples_log_interval": int,
        "project": str,
        "workspace": str,
        "api_key": str,
        "experiment_name": str,
        "experiment_key": str,
        "online": bool,
        "mode": str,
    },
    "checkpoint": {
        "tag_validation": ("Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL"),
        "load_universal": bool,
        "use_node_local_storage": bool,
        "parallel_write": {"pipeline_stage": bool},
        "checkpoint_serialization": bool,
        "writer": dict,
    },
    "aio": {
        "block_size": int,
        "queue_depth": int,
        "intra_op_parallelism": int,
        "single_submit": bool,
        "overlap_events": bool,
        "use_gds": bool,
    },
    "compile": {
        "deepcompile": bool,
        "free_activation": bool,
        "free_activation_threshold": int,
        "offload_activation": bool,
        "offload_activation_pin_memory": bool,
        "offload_opt_states": bool,
        "double_buffer": bool,
        "symmetric_memory": bool,
        "debug_log": bool,
        "offload_parameters": bool,
        "sync_before_reduce": bool,
        "sync_after_reduce": bool,
        "sync_before_allgather": bool,
        "sync_after_allgather": bool,
        "keep_int_input_tensors": bool,
        "keep_all_input_tensors": bool,
        "passes": list,
    },
}

# Keys that DeepSpeed knows and giantdet refuses, because they would do nothing or do harm here.
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
    "expert_parallel": "needs mixture-of-experts layers, which giantdet has not",
    "use_data_before_expert_parallelism": "needs mixture-of-experts layers, which giantdet has not",
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
    "zero_optimization.save_muon_momentum_buffer_in_memory": "is for Muon, which giantdet does not support",
    "zero_optimization.mics_shard_size": _REMOVED,
    "zero_optimization.mics_hierarchical_params_gather": _REMOVED,
    "zero_optimization.zeropp_loco_param": _REMOVED,
    "compile.autoep_non_moe": "needs mixture-of-experts layers, which giantdet has not",
    "optimizer.params.max_grad_norm": "is not read by DeepSpeed; set gradient_clipping",
}
