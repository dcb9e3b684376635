"""DeepSpeed's half of a run's JSON, as types.

DeepSpeed accepts any top-level key, so a run with a mistyped key would train with the default. These sections
have all keys that DeepSpeed 0.19 reads (`runtime/config.py` and the pydantic models of each block), with its
defaults. They are copied because importing DeepSpeed takes seconds; `tests/config/test_deepspeed.py` compares
them with the installed version. DeepSpeed receives only the keys that were given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from giantdet.config.section import Auto, NonNegative, Section, Whole, wish

Dtype = Literal["fp32", "fp16", "bf16"]
BatchSize = Annotated[Whole, Field(ge=1)]


def _no_bool(value: Any) -> Any:
    """Reject true and false: `True == 1` in Python, but not in JSON."""
    if isinstance(value, bool):
        raise wish("one of 0, 1, 2, 3")
    return value


Stage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(_no_bool)]


class AutoSection(Section):
    """A block in which "auto" means "not given": DeepSpeed then takes its own default."""

    @model_validator(mode="before")
    @classmethod
    def _without_auto(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: inner for key, inner in value.items() if inner != "auto" or not cls._may_be_auto(key)}

    @classmethod
    def _may_be_auto(cls, key: str) -> bool:
        """Return whether the key may be "auto". Unknown keys and whole blocks are kept, and refused later."""
        field = cls.model_fields.get(key)
        return field is not None and not isinstance(field.default, Section)

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema.get("properties", {}).items():
            if "$ref" not in field:
                schema["properties"][name] = {"anyOf": [field, {"const": "auto"}]}
        return schema


class OffloadParamConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: Whole = 5
    buffer_size: Whole = 100_000_000
    max_in_cpu: Whole = 1_000_000_000
    pin_memory: bool = True


class OffloadOptimizerConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    device: Literal["none", "cpu", "nvme"] = "none"
    nvme_path: str | None = None
    buffer_count: Whole = 4
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False
    ratio: float = 1.0
    super_offload: bool = False
    cpuadam_cores_perc: float = 0.8


class LeafModuleConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    classes: list[Any] = Field(default=[])
    names: list[Any] = Field(default=[])
    name_suffixes: list[Any] = Field(default=[])


class ZeroConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    stage: Stage = 0
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Whole = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: Whole = 500_000_000
    overlap_comm: bool | None = None
    compute_grad_norm: bool = True
    load_from_fp32_weights: bool = True
    elastic_checkpoint: bool = False
    offload_param: OffloadParamConfig = OffloadParamConfig()
    offload_optimizer: OffloadOptimizerConfig = OffloadOptimizerConfig()
    sub_group_size: Whole = 1_000_000_000
    stage3_prefetch_bucket_size: Whole = 50_000_000
    stage3_param_persistence_threshold: Whole = 100_000
    stage3_model_persistence_threshold: Whole = 9_223_372_036_854_775_807
    stage3_max_live_parameters: Whole = 1_000_000_000
    stage3_max_reuse_distance: Whole = 1_000_000_000
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: Whole = 0
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: Whole = 1
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    pipeline_loading_checkpoint: bool = False
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False
    leaf_module: LeafModuleConfig = LeafModuleConfig()


class Bf16Config(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    immediate_grad_update: bool = False
    check_grad_overflow: bool = True
    bf16_master_weights_and_grads: bool = False
    bf16_optimizer_states: bool = False


class Fp16Config(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    auto_cast: bool = False
    loss_scale: float = 0.0
    initial_scale_power: Whole = 16
    loss_scale_window: Whole = 1000
    hysteresis: Whole = 2
    consecutive_hysteresis: bool = False
    min_loss_scale: Whole = 1
    fp16_master_weights_and_grads: bool = False


class TorchAutocastConfig(Section):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    dtype: Literal["float16", "bfloat16", "float32", "fp16", "bf16", "fp32"] | None = None
    lower_precision_safe_modules: list[Any] | None = None


class DataTypesConfig(Section):
    """See `DeepSpeedConfig`."""

    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32_modules: Any = None


class ThroughputConfig(Section):
    """See `DeepSpeedConfig`."""

    enabled: bool = True
    synchronized: bool = True


class TimersConfig(Section):
    """See `DeepSpeedConfig`."""

    throughput: ThroughputConfig = ThroughputConfig()


class FlopsProfilerConfig(Section):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    recompute_fwd_factor: float = 0.0
    profile_step: Whole = 1
    module_depth: Whole = -1
    top_modules: Whole = 1
    detailed: bool = True
    output_file: str | None = None


class CommsLoggerConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    prof_all: bool = True
    prof_ops: list[Any] = Field(default=[])
    verbose: bool = False
    debug: bool = False


class TensorBoardConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    output_path: str | None = ""
    job_name: str | None = "DeepSpeedJobName"


class CsvMonitorConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    output_path: str | None = ""
    job_name: str | None = "DeepSpeedJobName"


class WandbConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    group: str | None = None
    team: str | None = None
    project: str | None = "deepspeed"


class CometConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    enabled: bool = False
    samples_log_interval: Whole = 100
    project: str | None = None
    workspace: str | None = None
    api_key: str | None = None
    experiment_name: str | None = None
    experiment_key: str | None = None
    online: bool | None = None
    mode: str | None = None


class ParallelWriteConfig(Section):
    """See `DeepSpeedConfig`."""

    pipeline_stage: bool = False


class CheckpointConfig(Section):
    """See `DeepSpeedConfig`."""

    tag_validation: Literal["Warn", "Ignore", "Fail", "WARN", "IGNORE", "FAIL"] = "Warn"
    load_universal: bool = False
    use_node_local_storage: bool = False
    parallel_write: ParallelWriteConfig = ParallelWriteConfig()
    checkpoint_serialization: bool = True
    writer: dict[str, Any] | None = None


class AioConfig(Section):
    """See `DeepSpeedConfig`."""

    block_size: Whole = 1_048_576
    queue_depth: Whole = 8
    intra_op_parallelism: Whole = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class CompileConfig(AutoSection):
    """See `DeepSpeedConfig`."""

    deepcompile: bool = False
    free_activation: bool = False
    free_activation_threshold: Whole = 10_485_760
    offload_activation: bool = False
    offload_activation_pin_memory: bool = True
    offload_opt_states: bool = False
    double_buffer: bool = True
    symmetric_memory: bool = False
    debug_log: bool = False
    offload_parameters: bool = False
    sync_before_reduce: bool = False
    sync_after_reduce: bool = False
    sync_before_allgather: bool = False
    sync_after_allgather: bool = False
    keep_int_input_tensors: bool = True
    keep_all_input_tensors: bool = False
    passes: list[Any] | None = None


class OptimizerBlock(Section):
    """The optimizer: `type` is the name of a section in config/optimizers.py, and `params` its fields."""

    type: str
    params: dict[str, Any] = Field(default={})
    legacy_fusion: bool = False


class SchedulerBlock(Section):
    """The LR schedule: `type` is the name of a section in config/schedulers.py, and `params` its fields."""

    type: str
    params: dict[str, Any] = Field(default={})


class DeepSpeedConfig(Section):
    """All keys except `giantdet`; https://www.deepspeed.ai/docs/config-json/ describes them."""

    train_batch_size: BatchSize | Auto = "auto"
    train_micro_batch_size_per_gpu: BatchSize | Auto = "auto"
    gradient_accumulation_steps: BatchSize | Auto = "auto"
    optimizer: OptimizerBlock
    scheduler: SchedulerBlock | None = None
    zero_optimization: ZeroConfig = ZeroConfig()
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    gradient_clipping: NonNegative | Auto = "auto"
    prescale_gradients: bool = False
    gradient_predivide_factor: float = 1.0
    gradient_allreduce_op: Literal["mean", "sum"] = "mean"
    communication_data_type: Dtype | None = None
    disable_allgather: bool = False
    bf16: Bf16Config = Bf16Config()
    fp16: Fp16Config = Fp16Config()
    torch_autocast: TorchAutocastConfig = TorchAutocastConfig()
    data_types: DataTypesConfig = DataTypesConfig()
    steps_per_print: Whole | None = None
    log_level: str | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool | None = None
    timers: TimersConfig = TimersConfig()
    flops_profiler: FlopsProfilerConfig = FlopsProfilerConfig()
    comms_logger: CommsLoggerConfig = CommsLoggerConfig()
    tensorboard: TensorBoardConfig = TensorBoardConfig()
    csv_monitor: CsvMonitorConfig = CsvMonitorConfig()
    wandb: WandbConfig = WandbConfig()
    comet: CometConfig = CometConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    aio: AioConfig = AioConfig()
    compile: CompileConfig = CompileConfig()
